"""Where the payload of a message goes that comes over a connection of our own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from p2p.messages import Message, Segment, StatePart, Total
from p2p.transport.framing import LARGEST_BYTES, Target
from p2p.transport.wire import Frame, WireFormat

Place = Callable[[Segment], Target | None]
"""Where the payload of a segment is to lie, or who takes it, so that the segment comes without;
None: in memory of its own."""

_SO_LONG = np.empty(LARGEST_BYTES, np.uint8).data
"""Stands in for payloads, and is never touched; what is not written to must not be allocated for
each, or what is would not come into memory that is in the cache."""


def nowhere(segment: Segment) -> None:
    """All in memory of their own."""


def begun(
    wire: WireFormat[Message], header: Frame, size: int | None, is_guarded: bool, place: Place
) -> tuple[Message, Target]:
    """The message of a header, and where its payload of `size` bytes, which is yet to come, goes.

    Raises Malformed. A payload with a checksum cannot be taken this way.
    """
    if size is None:
        return wire.decode([header], is_guarded), memoryview(b"")
    message = wire.decode([header, _SO_LONG[:size]], is_guarded, is_to_come=True)
    assert isinstance(message, Segment | Total | StatePart)  # no other has a payload
    target = place(message) if isinstance(message, Segment) else None
    if target is None:
        target = np.empty(size, np.uint8).data
    payload = target if isinstance(target, memoryview) else b""
    object.__setattr__(message, "payload", payload)  # nobody else has it yet; `replace` is slower
    return message, target
