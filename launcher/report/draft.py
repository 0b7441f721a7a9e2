"""An invocation of which more may be heard, until it becomes one of a history. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fault.records import Peer
from launcher.report.history import Invocation, Stretch


@dataclass(slots=True)
class Draft:
    """Times are seconds since the run was created."""

    slot: int
    generation: int
    peer: Peer
    granted_s: float
    start: str = ""
    joined_s: float | None = None
    gone_s: float | None = None
    """When it was killed, or said that it leaves."""
    ended_s: float | None = None
    ending: str = ""
    stretches: list[Stretch] = field(default_factory=list)
    plays: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    since_s: float = 0.0

    def play(self, home: tuple[int, ...], adopted: tuple[int, ...], now: float) -> None:
        """From now on it plays these, which may be the ones it plays already."""
        if (home, adopted) == self.plays:
            return
        until = now if self.gone_s is None else min(now, self.gone_s)
        if self.plays != ((), ()) and until > self.since_s:
            self.stretches.append(Stretch(self.since_s, until, *self.plays))
        self.plays, self.since_s = (home, adopted), now

    def end(self, ending: str, now: float) -> None:
        """What is heard first stands."""
        if self.ended_s is None:
            self.play((), (), now)
            self.ended_s = now if self.gone_s is None else min(now, self.gone_s)
            self.ending = ending

    def last_seen(self, at: float) -> None:
        """It was dead for a while before it was removed."""
        assert self.ended_s is not None
        self.ended_s = max(self.joined_s or 0.0, min(at, self.ended_s))
        self.stretches = [
            replace(each, end_s=min(each.end_s, self.ended_s))
            for each in self.stretches
            if each.start_s < self.ended_s
        ]

    def done(self) -> Invocation:
        assert self.ended_s is not None
        return Invocation(
            self.slot,
            self.generation,
            self.peer,
            self.start,
            self.granted_s,
            self.joined_s,
            self.ended_s,
            self.ending,
            tuple(self.stretches),
        )
