"""The upper part of the picture: who played which shards, slot by slot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fault.records import slot_of
from launcher.report.history import History, Incident, Invocation
from launcher.report.wording import numbers, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOME, ADOPTED, BOOT = "#1f6fae", "#eda724", "#c3cad3"
DEATH, INK, FAINT = "#9b1b1e", "#22272e", "#6b7480"

LANES_HEIGHT, LANE_MOST, LANE_LEAST = 5.2, 0.54, 0.15
BAR = (-0.38, 0.58)
"""Top and height of a bar in its lane, where 1 is the distance to the next lane."""
TRACK = (0.27, 0.12)
"""The same of the track beneath it, in which functions start."""
POINTS = 72.0
GLYPH = 0.6
"""A character's width, in parts of the size of the font."""
MARKER_POINTS = 6.5
"""Markers that would be closer than this are left out."""
SCALINGS_LIMIT = 24
"""With more changes of scale, only their lines are drawn."""
STRETCHES_LIMIT = 60
"""With more, a lane says its home shards once, and again when they change."""
LEAST_POINTS = 1.4
"""A shorter adoption or start is drawn that wide, so that it can be seen."""


def lane_height(history: History) -> float:
    return max(LANE_LEAST, min(LANE_MOST, LANES_HEIGHT / max(1, history.lanes)))


class Lanes:
    """The upper part. `point` is how many seconds of the run one point of paper shows."""

    def __init__(self, history: History, axes: Axes, point: float) -> None:
        self._history = history
        self._axes = axes
        self._point = point
        self._lane_points = lane_height(history) * POINTS
        self._size = 7.5 if self._lane_points > 24 else 6.5
        self._said: dict[int, list[tuple[float, float]]] = {}
        """Where there is text in the middle of a lane already."""
        stretches = sum(len(each.stretches) for each in history.invocations)
        self._crowded = stretches > STRETCHES_LIMIT
        self._numbered: dict[int, tuple[int, ...]] = {}
        """The home shards that a slot's lane was labelled with last."""

    def draw(self) -> None:
        history, axes = self._history, self._axes
        self._bars()
        self._boots()
        self._seams([each for each in history.incidents if not each.death])
        self._deaths([each for each in history.incidents if each.death])
        self._labels_of_boots()
        top = -0.7 if history.scalings or history.notices else -0.5
        for scaling in history.scalings:
            axes.axvline(scaling.at_s, color=INK, linewidth=1, linestyle=":", zorder=4)
        if len(history.scalings) <= SCALINGS_LIMIT:
            for scaling in history.scalings:
                place = scaling.at_s + 3 * self._point
                axes.text(place, top + 0.02, f"{scaling.slots} slots", size=7, color=INK, va="top")
        for notice in self._apart(history.notices):
            axes.plot(
                notice.at_s, top, "v", color=FAINT, mec="white", ms=7, clip_on=False, zorder=6
            )
        every = -(-9 // int(self._lane_points)) if self._lane_points < 9 else 1
        slots = range(0, history.lanes, every)
        middles = [slot + BAR[0] + BAR[1] / 2 for slot in slots]
        axes.set_yticks(middles, [f"slot {slot}" for slot in slots], color=INK, size=8.5)
        axes.set_ylim(history.lanes - 0.45, top)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=False)

    def _bars(self) -> None:
        pieces: dict[str, list[tuple[float, float, float, float]]] = {HOME: [], ADOPTED: []}
        for invocation in self._history.invocations:
            for stretch in invocation.stretches:
                count = len(stretch.home) + len(stretch.adopted)
                top, length = invocation.slot + BAR[0], stretch.end_s - stretch.start_s
                for colour, shards in ((HOME, stretch.home), (ADOPTED, stretch.adopted)):
                    least = LEAST_POINTS * self._point if colour == ADOPTED else 0.0
                    box = (stretch.start_s, top, max(length, least), BAR[1] * len(shards) / count)
                    if shards:
                        pieces[colour].append(box)
                        self._number(invocation.slot, shards, colour, box)
                    top += box[3]
        self._rectangles(pieces[HOME], HOME, zorder=2)
        self._rectangles(pieces[ADOPTED], ADOPTED, zorder=2.5)

    def _number(
        self,
        slot: int,
        shards: tuple[int, ...],
        colour: str,
        box: tuple[float, float, float, float],
    ) -> None:
        """Which shards a bar stands for, if that fits into it."""
        left, top, length, tall = box
        size = min(self._size, 0.86 * tall * self._lane_points)
        text = numbers(shards)
        if size < 4.5 or length < (len(text) * GLYPH * size + 5) * self._point:
            return
        if colour == HOME and self._crowded:
            if self._numbered.get(slot) == shards:
                return
            self._numbered[slot] = shards
        ink = "white" if colour == HOME else INK
        place = (left + length / 2, top + tall / 2)
        self._axes.text(
            *place, text, size=size, color=ink, ha="center", va="center_baseline", zorder=3
        )

    def _boots(self) -> None:
        least = LEAST_POINTS * self._point
        rectangles = [
            (
                each.granted_s,
                each.slot + TRACK[0],
                max(least, _until(each) - each.granted_s - 0.8 * self._point),
                TRACK[1],
            )
            for each in self._history.invocations
        ]
        self._rectangles(rectangles, BOOT, zorder=2)

    def _rectangles(
        self,
        rectangles: list[tuple[float, float, float, float]],
        colour: str,
        zorder: float,
    ) -> None:
        from matplotlib.collections import PolyCollection

        corners = [
            [(left, top), (left + long, top), (left + long, top + tall), (left, top + tall)]
            for left, top, long, tall in rectangles
        ]
        collection = PolyCollection(corners, facecolor=colour, edgecolor="none", zorder=zorder)
        self._axes.add_collection(collection, autolim=False)

    def _seams(self, handovers: list[Incident]) -> None:
        """A white cut through the lane; a diamond on it, unless the one before is too close."""
        middle = BAR[0] + BAR[1] / 2
        for slot in range(self._history.lanes):
            mine = [each for each in handovers if slot_of(each.peer) == slot]
            ends = (slot + BAR[0], slot + BAR[0] + BAR[1])
            self._axes.vlines([each.at_s for each in mine], *ends, color="white", lw=1, zorder=3)
            at = [each.at_s for each in self._apart(mine)]
            size = min(5.0, 0.24 * self._lane_points)
            self._axes.plot(
                at,
                [slot + middle] * len(at),
                "D",
                color="white",
                mec=INK,
                mew=0.8,
                ms=size,
                zorder=5,
            )

    def _deaths(self, deaths: list[Incident]) -> None:
        middle = BAR[0] + BAR[1] / 2
        size = min(10.0, 0.42 * self._lane_points)
        for slot in range(self._history.lanes):
            mine = [each for each in deaths if slot_of(each.peer) == slot]
            for each in self._apart(mine):
                self._axes.plot(
                    each.at_s,
                    slot + middle,
                    "X",
                    color=DEATH,
                    mec="white",
                    mew=0.8,
                    ms=size,
                    clip_on=False,
                    zorder=6,
                )
                left = each.at_s + (size / 2 + 2) * self._point
                self._say(slot, left, each.kind, DEATH)

    def _labels_of_boots(self) -> None:
        """How a function started and how long that took, where the lane is free meanwhile."""
        for each in self._history.invocations:
            if each.boot_s is not None and each.start:
                text = f"{each.start}, {seconds(each.boot_s)}"
                middle = (each.granted_s + _until(each)) / 2
                half = (len(text) * GLYPH * self._size / 2) * self._point
                if 2 * half < each.boot_s:
                    self._say(each.slot, middle - half, text, FAINT)

    def _say(self, slot: int, left: float, text: str, colour: str) -> None:
        """Text in the middle of a lane, if nothing else is there."""
        size = min(self._size, 0.5 * self._lane_points)
        right = left + (len(text) * GLYPH * size + 2) * self._point
        taken = self._said.setdefault(slot, [])
        if not taken:
            taken += [
                (stretch.start_s, stretch.end_s)
                for each in self._history.invocations
                if each.slot == slot
                for stretch in each.stretches
            ]
        free = all(right <= start or end <= left for start, end in taken)
        if size < 5 or not free or right > self._history.end_s:
            return
        taken.append((left, right))
        place = (left, slot + BAR[0] + BAR[1] / 2)
        self._axes.text(*place, text, size=size, color=colour, va="center_baseline", zorder=3)

    def _apart(self, marked: Iterable[Any]) -> list[Any]:
        """Those that are not too close to the one before to be told from it."""
        kept: list[Any] = []
        for each in marked:
            if not kept or each.at_s - kept[-1].at_s > MARKER_POINTS * self._point:
                kept.append(each)
        return kept


def _until(invocation: Invocation) -> float:
    """When it had started, or had failed to."""
    return invocation.ended_s if invocation.joined_s is None else invocation.joined_s
