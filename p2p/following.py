"""How a candidate comes to stand where the members stand, and stays there, while they train on.

It takes a whole state from one member (`transfer.py`), however long that takes, and from then on
each step's mean as it arises, and applies it. So whoever is let in has the newest state, or the one
before, and the stall of a hand-over does not grow with the model. Sans-I/O.

The follower sets the pace: it says which state it holds, and gets that step's mean as soon as it
is whole. Means are kept for as long as somebody follows, within bounds; who falls behind further
than that gets a whole state once more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fault.records import Peer
from p2p.actions import Apply, Send
from p2p.collectives.executor import Executor
from p2p.collectives.memory import Vector
from p2p.messages import Follow, Total
from p2p.steps import Shape

WINDOW_UNITS = 32
"""Units of a mean on their way to a follower at once."""
FOLLOWER_LIFE_S = 2.0
"""Who says nothing for so long no longer follows."""
KEPT_BYTES = 256 << 20
KEPT_MEANS = 8
"""So many are kept even where they take more than `KEPT_BYTES`."""


@dataclass(frozen=True, slots=True)
class _Standing:
    step: int
    digest: str
    heard_at: float


class Leader:
    """The member's side: the means of the last steps, and who follows them."""

    def __init__(self, shape: Shape, out: list[object]) -> None:
        self._shape = shape
        self._out = out
        self._kept: dict[int, tuple[str, Vector]] = {}
        """By step, without gaps: the digest of that step's state, and the mean."""
        self._limit = max(KEPT_MEANS, KEPT_BYTES // max(1, 4 * shape.length))
        self._followers: dict[Peer, _Standing] = {}

    def expect(self, peer: Peer, now: float) -> None:
        """This candidate takes a state from here, and is going to follow."""
        known = self._followers.get(peer, _Standing(-1, "", now))
        self._followers[peer] = replace(known, heard_at=now)

    def standing(self, peer: Peer) -> tuple[int, str]:
        """The step and the digest that a follower said last; (-1, "") for who does not follow."""
        follower = self._followers.get(peer)
        return (follower.step, follower.digest) if follower is not None else (-1, "")

    def covers(self, step: int) -> bool:
        """Whether who stands at this step can be brought here by means alone."""
        return step in self._kept

    def on_mean(self, step: int, digest: str, mean: Vector) -> None:
        """The mean of `step` is whole; whoever waits for it gets it."""
        if step - 1 not in self._kept:
            self._kept.clear()
        self._kept[step] = digest, mean
        limit = self._limit if self._followers else 1
        while len(self._kept) > limit:
            del self._kept[next(iter(self._kept))]
        for peer, follower in self._followers.items():
            if (follower.step, follower.digest) == (step, digest):
                self._send(peer, step, ())

    def on_follow(self, source: Peer, follow: Follow, step: int, is_busy: bool, now: float) -> bool:
        """False when the follower needs a whole state; `step` is the member's own.

        While the way there `is_busy`, nothing is sent: it may be what is lacking.
        """
        self._followers[source] = _Standing(follow.step, follow.digest, now)
        kept = self._kept.get(follow.step)
        if kept is None:
            return follow.step >= step
        if kept[0] != follow.digest:
            return False
        if not is_busy:
            self._send(source, follow.step, follow.missing)
        return True

    def tick(self, now: float) -> None:
        for peer, follower in list(self._followers.items()):
            if now - follower.heard_at > FOLLOWER_LIFE_S:
                del self._followers[peer]

    def _send(self, to: Peer, step: int, missing: tuple[int, ...]) -> None:
        digest, mean = self._kept[step]
        units = self._shape.units
        for unit in (missing or range(len(units)))[:WINDOW_UNITS]:
            if 0 <= unit < len(units):
                payload = mean[units[unit].start : units[unit].stop].data.cast("B")
                self._out.append(Send(to, Total(step, unit, digest, payload)))


class Follower:
    """The candidate's side: one step's mean after the other, unit by unit."""

    def __init__(self, shape: Shape, out: list[object]) -> None:
        self._shape = shape
        self._out = out
        self._step, self._digest = -1, ""
        self._executor: Executor | None = None
        self._window = 0
        self._applying: tuple[int, Vector] | None = None

    def stand_at(self, step: int, digest: str) -> Vector | None:
        """The state is now of this step; returns the mean that led there, if one did."""
        applied, self._applying = self._applying, None
        self._step, self._digest, self._executor = step, digest, None
        return applied[1] if applied is not None and applied[0] == step - 1 else None

    def word(self) -> Follow:
        """What to say to the member: where this candidate stands, and what it still lacks."""
        missing: list[int] = []
        if self._executor is not None:
            units = range(len(self._shape.units))
            missing = [unit for unit in units if self._executor.total(unit) is None][:WINDOW_UNITS]
        self._window = len(missing) or min(len(self._shape.units), WINDOW_UNITS)
        return Follow(self._step, self._digest, tuple(missing))

    def on_total(self, source: Peer, total: Total) -> None:
        if (total.step, total.digest) != (self._step, self._digest) or self._applying is not None:
            return
        if self._executor is None:
            self._executor = self._shape.executor()
        if not self._executor.receive_total(total.unit, total.payload):
            return
        self._window -= 1
        if self._executor.complete:
            self._applying = self._step, self._executor.mean
            self._out.append(Apply(self._step, self._executor.mean))
        elif self._window <= 0:
            self._out.append(Send(source, self.word()))
