"""Whole states on their way from peer to peer, part by part, at the receiver's pace. Sans-I/O.

A transfer is keyed by (step, digest) and not by view or sender, so any peer with that state can
carry it on. The receiver asks for the parts it lacks, a window at a time, which bounds what is on
the way; a receiver counts as having nothing until the whole image fits its digest.

While it is sent the others train on, and each of them has a newer state to offer. So a transfer of
several windows is left to its end, at both sides: else every new ask would begin another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fault.records import Peer
from p2p.actions import LoadState, Send, TakeImage
from p2p.messages import StatePart, Want

PART_BYTES = 1 << 20
WINDOW_PARTS = 16
PARTS_LIMIT = 1 << 16
IMAGE_LIFE_S = 2.0
"""How long an image that nobody asks for is kept, and how old one may be when it is first sent to
somebody: what an outline tells of may go."""
BUSY_S = 0.5
"""For so long after its last parts were sent, an image of several windows gives way to no other;
more than two of a candidate's beats, so that a lost part can be asked for in between."""


@dataclass(slots=True)
class _Incoming:
    source: Peer
    """Who sent the newest part."""
    step: int
    digest: str
    count: int
    parts: dict[int, bytes | memoryview] = field(default_factory=dict)
    window: int = 0
    """Parts still to come before the next ones are asked for."""
    quiet: int = 0
    """How often more was wanted since a part came."""

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
        self._image_made_at = 0.0
        self._image_used_at = 0.0
        self._served: dict[Peer, float] = {}
        """When each peer was last sent parts of this image."""
        self._taking = False
        self._waiting: dict[Peer, Want] = {}

    # --- receiving --------------------------------------------------------------------------

    def want(self, source: Peer, step: int, is_coming: bool = False) -> None:
        """A newer state than `step`, which this peer is at, is wanted; to be said at every beat.

        Asks `source`, unless parts are coming in. When they stop, whoever sent them is asked once
        more; `source` after that, which may no longer have this very state. While one `is_coming`,
        whoever sends it is only told to keep the others.
        """
        incoming = self._incoming
        if self.loading:
            return
        if is_coming:
            if incoming is not None:
                keep = Want(step, incoming.step, incoming.digest, ())
                self.out.append(Send(incoming.source, keep))
            return
        if incoming is None or incoming.step <= step:
            self._incoming = None
            self.out.append(Send(source, Want(step, -1, "", ())))
            return
        incoming.quiet += 1
        if incoming.quiet > 1:
            self._ask(incoming.source if incoming.quiet == 2 else source, incoming, step)

    @property
    def source(self) -> Peer:
        """Who sends parts of a state; nobody: ""."""
        return self._incoming.source if self._incoming is not None else ""

    @property
    def receiving(self) -> bool:
        """Parts of a state have come, and others are still to come."""
        return self._incoming is not None

    def _ask(self, source: Peer, incoming: _Incoming, step: int) -> None:
        missing = incoming.missing()
        incoming.window = len(missing)
        self.out.append(Send(source, Want(step, incoming.step, incoming.digest, missing)))

    def on_part(self, source: Peer, part: StatePart, step: int) -> None:
        if self.loading or part.step <= step or not 0 <= part.index < part.count <= PARTS_LIMIT:
            return
        incoming = self._incoming
        if incoming is None or incoming.step < part.step:
            incoming = self._incoming = _Incoming(source, part.step, part.digest, part.count)
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
        incoming.source, incoming.quiet = source, 0
        if len(incoming.parts) == incoming.count:
            image = bytearray().join([incoming.parts[index] for index in range(incoming.count)])
            self._incoming = None
            self.loading = True
            self.out.append(LoadState(incoming.step, incoming.digest, image))
        elif incoming.window <= 0:
            self._ask(source, incoming, step)

    # --- sending ----------------------------------------------------------------------------

    def on_want(self, source: Peer, want: Want, step: int, digest: str, now: float) -> None:
        """Sends what is wanted of the transfer that has begun, else begins one of this state."""
        image = self._image
        busy = self._busy(self._served, now)
        is_new = busy or now - self._image_made_at < IMAGE_LIFE_S
        if image is not None and image[:2] == (want.transfer_step, want.transfer_digest):
            self._send(source, [i for i in want.missing[:WINDOW_PARTS] if i >= 0], now)
        elif want.transfer_step >= 0 and not want.missing:
            return  # it was to be kept, and could not be
        elif image is not None and image[:2] == (step, digest) and is_new:
            if not self._busy([source], now):  # else it asked before the parts were there
                self._send(source, list(range(WINDOW_PARTS)), now)
        elif not busy:  # else it asks again, here or elsewhere
            self._waiting[source] = want
            if not self._taking:
                self._taking = True
                self.out.append(TakeImage(step))

    def _busy(self, peers: Iterable[Peer], now: float) -> bool:
        """Whether a transfer of several windows to one of the peers is going on."""
        if self._image is None or len(self._image[2]) <= WINDOW_PARTS * PART_BYTES:
            return False
        return any(now - self._served.get(peer, -BUSY_S) < BUSY_S for peer in peers)

    def on_image(self, step: int, digest: str, image: memoryview, now: float) -> None:
        self._taking = False
        self._image = (step, digest, image)
        self._image_made_at = self._image_used_at = now
        self._served = {}
        waiting, self._waiting = self._waiting, {}
        for peer in waiting:
            self._send(peer, list(range(WINDOW_PARTS)), now)

    def tick(self, now: float) -> None:
        if self._image is not None and now - self._image_used_at > IMAGE_LIFE_S:
            self._image = None

    def _send(self, to: Peer, indices: list[int], now: float) -> None:
        assert self._image is not None
        self._image_used_at = self._served[to] = now
        step, digest, image = self._image
        count = max(1, -(-len(image) // PART_BYTES))
        for index in indices:
            if index < count:
                payload = image[index * PART_BYTES : (index + 1) * PART_BYTES]
                self.out.append(Send(to, StatePart(step, digest, index, count, payload)))
