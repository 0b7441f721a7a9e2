"""Whom one member suspects, of what, and when it rather suspects its own link. Pure.

Suspicion is one member's word; who must go is judged from everyone's (`judgement.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fault.assignment import watched_by
from fault.detector import PhiAccrual
from fault.records import AccusationKind, Peer, Timing

CUT_OFF_BEATS = 2.5
"""Of several watched peers one is heard in every beat or two; none for so long, and the link is
down."""


class Suspicion:
    """Of the members that `me` watches, and of those that it asks something of."""

    def __init__(self, me: Peer, timing: Timing) -> None:
        self._me = me
        self._timing = timing
        self._detectors: dict[Peer, PhiAccrual] = {}
        self._accusing: dict[Peer, tuple[AccusationKind, float]] = {}
        self._cut_off = False
        """Nobody at all was heard for a while, so it is this peer's own link that is in doubt."""
        self._heard_at = 0.0

    def watch(self, members: Sequence[Peer], now: float) -> None:
        """There is a new view. Timers about a peer that stays survive; a newcomer's are clean."""
        self._cut_off, self._heard_at = False, now
        self._detectors = {
            peer: self._detectors.get(peer) or PhiAccrual(self._timing.beat_s, now)
            for peer in watched_by(self._me, members)
        }
        for peer in [p for p in self._accusing if p not in members]:
            del self._accusing[peer]

    def on_sign(self, peer: Peer, is_beat: bool, now: float) -> None:
        """It lives: here is a beat of it, or something that it may have left a beat out for."""
        detector = self._detectors.get(peer)
        if detector is None:
            return
        self._heard_at = now
        if self._cut_off:
            self._cut_off = False
            for each in self._detectors.values():
                each.forgive(now, now)  # the others will be heard, one after another
        if is_beat:
            detector.heard(now)
        else:
            detector.heard_else(now)
        accusation = self._accusing.get(peer)
        if accusation is not None and accusation[0] == "silent":
            del self._accusing[peer]

    def tick(self, late: float, is_missed: Callable[[Peer], bool], now: float) -> None:
        """Every beat. `late` is by how much this one is; `is_missed` says whether the registry,
        having been there for long enough to miss anyone, misses a peer as well.
        """
        if late > self._timing.beat_s:
            for detector in self._detectors.values():
                detector.forgive(late, now)
        if len(self._detectors) > 1 and now - self._heard_at > CUT_OFF_BEATS * self._timing.beat_s:
            self._cut_off = True
        for peer, detector in self._detectors.items():
            # who hears nobody at all is cut off itself, unless the registry misses them too
            if is_missed(peer) if self._cut_off else detector.suspicious(now):
                self._accusing[peer] = ("silent", now)

    def accuse(self, peer: Peer, kind: AccusationKind, now: float) -> None:
        current = self._accusing.get(peer)
        if current is None or current[0] != "silent":
            self._accusing[peer] = (kind, now)

    def accusations(self, now: float) -> tuple[tuple[Peer, AccusationKind], ...]:
        """What the next contact says; an accusation that is not repeated lapses."""
        ttl = self._timing.accusation_ttl_s
        for peer in [p for p, (_, at) in self._accusing.items() if now - at > ttl]:
            del self._accusing[peer]
        return tuple([(peer, kind) for peer, (kind, _) in self._accusing.items()])
