"""Whole states on their way from peer to peer, part by part, at the receiver's pace. Sans-I/O.

A transfer is keyed by (step, digest) and not by view or sender, so any peer with that state can
carry it on. The receiver asks for the parts it lacks, a window at a time, which bounds what is on
the way; a receiver counts as having nothing until the whole image fits its digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fault.records import Peer
from p2p.actions import LoadState, Send, TakeImage
from p2p.messages import StatePart, Want

PART_BYTES = 1 << 20
WINDOW_PARTS = 16
PARTS_LIMIT = 1 << 16
IMAGE_LIFE_S = 2.0
"""How long an image that nobody asks for is kept."""


@dataclass(slots=True)
class _Incoming:
    step: int
    digest: str
    count: int
    parts: dict[int, bytes | memoryview] = field(default_factory=dict)
    window: int = 0
    """Parts still to come before the next ones are asked for."""

    def missing(self) -> tuple[int, ...]:
        lacking = (index for index in range(self.count) if index not in self.parts)
        return tuple([index for index, _ in zip(lacking, range(WINDOW_PARTS), strict=False)])


class Transfer:
    """Both directions of one peer's transfers."""

    def __init__(self, out: list[object]) -> None:
        self.out = out
        self.loading = False
        self._incoming: _Incoming | None = None
        self._image: tuple[int, str, memoryview] | None = None
        self._image_used_at = 0.0
        self._taking = False
        self._waiting: dict[Peer, Want] = {}

    # --- receiving --------------------------------------------------------------------------

    def want(self, source: Peer, step: int) -> None:
        """Asks `source` for its state, or for what is missing of one; this peer is at `step`."""
        incoming = self._incoming
        if self.loading:
            return
        if incoming is None or incoming.step <= step:
            self._incoming = None
            self.out.append(Send(source, Want(step, -1, "", ())))
            return
        missing = incoming.missing()
        incoming.window = len(missing)
        self.out.append(Send(source, Want(step, incoming.step, incoming.digest, missing)))

    def on_part(self, source: Peer, part: StatePart, step: int) -> None:
        if self.loading or part.step <= step or not 0 <= part.index < part.count <= PARTS_LIMIT:
            return
        incoming = self._incoming
        if incoming is None or incoming.step < part.step:
            incoming = self._incoming = _Incoming(part.step, part.digest, part.count)
            incoming.window = min(part.count, WINDOW_PARTS)
        if (part.step, part.digest, part.count) != (
            incoming.step,
            incoming.digest,
            incoming.count,
        ):
            return
        if part.index in incoming.parts:
            return
        incoming.parts[part.index] = part.payload
        incoming.window -= 1
        if len(incoming.parts) == incoming.count:
            image = bytearray().join([incoming.parts[index] for index in range(incoming.count)])
            self._incoming = None
            self.loading = True
            self.out.append(LoadState(incoming.step, incoming.digest, image))
        elif incoming.window <= 0:
            self.want(source, step)

    # --- sending ----------------------------------------------------------------------------

    def on_want(self, source: Peer, want: Want, step: int, digest: str, now: float) -> None:
        """Sends what is wanted of the transfer that has begun, else begins one of this state."""
        image = self._image
        if image is not None and image[:2] == (want.transfer_step, want.transfer_digest):
            self._image_used_at = now
            self._send(source, [i for i in want.missing[:WINDOW_PARTS] if i >= 0])
        elif image is not None and image[:2] == (step, digest):
            self._image_used_at = now
            self._send(source, list(range(WINDOW_PARTS)))
        else:
            self._waiting[source] = want
            if not self._taking:
                self._taking = True
                self.out.append(TakeImage(step))

    def on_image(self, step: int, digest: str, image: memoryview, now: float) -> None:
        self._taking = False
        self._image = (step, digest, image)
        self._image_used_at = now
        waiting, self._waiting = self._waiting, {}
        for peer in waiting:
            self._send(peer, list(range(WINDOW_PARTS)))

    def nudge(self, to: Peer, step: int, digest: str, now: float) -> None:
        """Offers the state unasked: the first parts of it."""
        self.on_want(to, Want(-1, -1, "", ()), step, digest, now)

    def tick(self, now: float) -> None:
        if self._image is not None and now - self._image_used_at > IMAGE_LIFE_S:
            self._image = None

    def _send(self, to: Peer, indices: list[int]) -> None:
        assert self._image is not None
        step, digest, image = self._image
        count = max(1, -(-len(image) // PART_BYTES))
        for index in indices:
            if index < count:
                payload = image[index * PART_BYTES : (index + 1) * PART_BYTES]
                self.out.append(Send(to, StatePart(step, digest, index, count, payload)))
