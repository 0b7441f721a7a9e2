"""A loss curve that is small enough to draw, whatever the length of the run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, nan
from statistics import median

from launcher.report.history import Loss

POINTS_LIMIT = 2400
TREND_PIECES = 120
BREAK_SHARE = 0.02
"""The trend is broken where no step is finished for so large a part of the run."""


def finite(losses: Sequence[Loss]) -> list[Loss]:
    return [each for each in losses if isfinite(each.loss)]


def thinned(losses: Sequence[Loss], limit: int = POINTS_LIMIT) -> list[Loss]:
    """At most `limit`: evenly taken ones for the crowd, and the extremes, lest outliers vanish."""
    if len(losses) <= limit:
        return list(losses)
    kept = {piece[0] for piece in _pieces(losses, limit * 2 // 3)}
    for piece in _pieces(losses, limit // 6):
        kept.add(min(piece, key=lambda each: each.loss))
        kept.add(max(piece, key=lambda each: each.loss))
    return sorted(kept, key=lambda each: each.step)


def trend(losses: Sequence[Loss], span_s: float) -> tuple[list[float], list[float]]:
    """Times and running medians; a NaN wherever the line is to be broken."""
    times: list[float] = []
    medians: list[float] = []
    for unbroken in _unbroken(losses, BREAK_SHARE * span_s):
        share = max(1, round(TREND_PIECES * len(unbroken) / len(losses)))
        for piece in _pieces(unbroken, share):
            times.append(median(each.at_s for each in piece))
            medians.append(median(each.loss for each in piece))
        times.append(nan)
        medians.append(nan)
    return times, medians


def _pieces(losses: Sequence[Loss], count: int) -> list[Sequence[Loss]]:
    count = min(count, len(losses))
    cuts = [index * len(losses) // count for index in range(count + 1)]
    return [losses[start:end] for start, end in pairwise(cuts)]


def _unbroken(losses: Sequence[Loss], gap_s: float) -> list[Sequence[Loss]]:
    runs: list[Sequence[Loss]] = []
    start = 0
    for index in range(1, len(losses) + 1):
        if index == len(losses) or losses[index].at_s - losses[index - 1].at_s > gap_s:
            runs.append(losses[start:index])
            start = index
    return runs
