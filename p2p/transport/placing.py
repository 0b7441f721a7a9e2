"""Where the payload of a message goes that comes over a connection of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from p2p.messages import Message, Segment
from p2p.transport.stream import Target
from p2p.transport.wire import Frame, WireFormat

Place = Callable[[Segment], Target | None]
"""Where the payload of a segment is to lie, or who takes it, so that the segment comes without;
None: in memory of its own."""


def nowhere(segment: Segment) -> None:
    """All in memory of their own."""


def begun(
    wire: WireFormat[Message], frames: list[Frame], is_guarded: bool, place: Place
) -> tuple[Message, Target]:
    """The message of a header, and where its payload, which is yet to come, goes.

    Raises Malformed. A payload with a checksum cannot be taken this way.
    """
    message = wire.decode(frames, is_guarded)
    if isinstance(message, Segment) and (found := place(message)) is not None:
        return replace(message, payload=found if isinstance(found, memoryview) else b""), found
    return message, memoryview(frames[1] if len(frames) > 1 else b"")
