"""Phi accrual failure detection over the arrival times of heartbeats.

Hayashibara et al., "The phi accrual failure detector" (SRDS 2004): instead of a fixed timeout, the
suspicion that a peer is gone grows with the time since its last beat, measured against how its
beats have been arriving. Pure: the caller brings the clock.
"""

from __future__ import annotations

import math

SMOOTHING = 0.1
"""Weight of a new interval in the running mean and variance: about the last twenty beats."""


class PhiAccrual:
    """Suspicion of one peer. Times are seconds; `deviation_floor_s` forgives ordinary jitter."""

    __slots__ = ("_deviation_floor_s", "_is_off_beat", "_last", "_mean_s", "_variance", "threshold")

    def __init__(
        self, beat_s: float, now: float, threshold: float = 8.0, deviation_floor_s: float = 0.05
    ) -> None:
        self.threshold = threshold
        self._mean_s = beat_s
        self._variance = (beat_s / 2) ** 2
        self._deviation_floor_s = deviation_floor_s
        self._last = now
        self._is_off_beat = False
        """What was heard last was no beat."""

    def heard_else(self, now: float) -> None:
        """Something that is no beat: a sign of life, after which the next beat may be left out."""
        self._last = now
        self._is_off_beat = True

    def heard(self, now: float) -> None:
        interval, is_off_beat = now - self._last, self._is_off_beat
        self._last, self._is_off_beat = now, False
        if is_off_beat:
            return
        # A gap that was forgiven or ended a silence says nothing about the ordinary rhythm.
        delta = min(interval, 4 * self._mean_s) - self._mean_s
        self._mean_s += SMOOTHING * delta
        self._variance = (1 - SMOOTHING) * (self._variance + SMOOTHING * delta * delta)

    def forgive(self, seconds: float, now: float) -> None:
        """The observer itself stood still for so long: that silence is not the peer's."""
        self._last = min(now, self._last + seconds)

    def phi(self, now: float) -> float:
        """-log10 of the chance that a beat comes later than now, were the peer alive."""
        deviation = max(math.sqrt(self._variance), self._deviation_floor_s)
        later = 0.5 * math.erfc((now - self._last - self._mean_s) / (deviation * math.sqrt(2)))
        return -math.log10(later) if later > 1e-300 else 300.0

    def suspicious(self, now: float) -> bool:
        # cheap way out: nobody is suspected before the beat is even due
        return now - self._last > self._mean_s and self.phi(now) >= self.threshold
