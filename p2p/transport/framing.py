"""How messages travel over a connection of our own (`stream.py`).

    kind: 1 byte | channel: 2 bytes | length of the header, of the payload: 4 bytes each
    header | payload

all little-endian. A message is whole, with a payload or without, or it comes in parts: first its
header and how long the payload is, then, each by itself, parts of the payload. So whoever passes a
message on need not wait for its end; where that does not come, it says so. Parts of messages in
several channels can be mixed, and one whose next part does not come holds up no other.

Where there is a key, each of these parts, of the payload every `RECORD_BYTES`, is sealed
(`sealing.py`), and whoever changes anything breaks the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

from p2p.transport.pipe import Pipe

PREFIX = struct.Struct("<BHII")
BARE, WHOLE, BEGINS, GOES_ON, ENDS = 1, 2, 3, 4, 5
"""The kinds. What begins has no payload yet, what goes on no header, and what ends, though its
payload is not whole, neither."""
RECORD_BYTES = 256 << 10
"""What is sealed or opened at once; both copies of it fit into a core's cache."""
PIECE_BYTES = 512 << 10
"""What is taken at once of a payload that is taken while it comes: half of a core's cache."""
ALIGNED_BYTES = 64
"""A piece begins at a multiple of it."""
HEADER_LIMIT_BYTES = 64 << 10
LARGEST_BYTES = 32 << 20
"""Of a payload; what is larger is for ZeroMQ."""

M = TypeVar("M")
Take = Callable[[int, memoryview], None]
"""Is given a payload piece by piece: the first byte's place, a multiple of `ALIGNED_BYTES`, and
bytes that are soon others."""
Target = memoryview | Take | Pipe
Begin = Callable[[bytes, int | None], tuple[M, Target]]
"""Makes a message of its header and of the length of its payload, if it has one, which is yet to
come; says where that is to be written, or who takes it. Raises Malformed."""


class Broken(Exception):
    """The connection came to its end."""


def nowhere(start: int, piece: memoryview) -> None:
    """Where a payload goes that nobody wants."""
