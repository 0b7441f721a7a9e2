"""Draws a history: a lane for each slot, the loss underneath.

Sizes are in inches, as matplotlib's are; the layout is worked out by hand, so that a picture of
sixteen slots over two hours is as calm as one of four over a minute. What has no room gets no
label; the page beneath the picture has it all in tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from launcher.report.curve import finite, thinned, trend
from launcher.report.history import History, Incident, Invocation
from launcher.report.wording import headline, numbers, seconds, subtitle

if TYPE_CHECKING:  # importing it takes a while, which the other commands need not wait for
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0
PIXELS_PER_INCH = 160
HOME, ADOPTED, BOOT = "#1f6fae", "#eda724", "#c3cad3"
DEATH, STALL, INK, FAINT = "#9b1b1e", "#f3dcd9", "#22272e", "#6b7480"

LEFT, RIGHT = 0.72, 0.22
HEADER, LEGEND_ROW, GAP, CURVE, FOOTER = 0.74, 0.25, 0.14, 1.5, 0.5
LANES_HEIGHT, LANE_MOST, LANE_LEAST = 5.2, 0.54, 0.15
BAR = (-0.38, 0.58)
"""Top and height of a bar in its lane, where 1 is the distance to the next lane."""
TRACK = (0.27, 0.12)
"""The same of the track beneath it, in which functions start."""
POINTS = 72.0
GLYPH = 0.6
"""A character's width, in parts of the size of the font."""
MARKER_POINTS = 6.5
DEATH_LINES_LIMIT = 24
ONE_ROW = 5
"""Entries of the legend that fit beside each other."""
MINUTES_FROM_S, HOURS_FROM_S = 180.0, 3 * 3600.0


def lane_height(history: History) -> float:
    return max(LANE_LEAST, min(LANE_MOST, LANES_HEIGHT / max(1, history.lanes)))


def draw(history: History, title: str) -> Figure:
    """The whole picture, `WIDTH` inches wide. `title` names the run."""
    from matplotlib.figure import Figure

    legend = _legend(history)
    columns = len(legend) if len(legend) <= ONE_ROW else -(-len(legend) // 2)
    rows = -(-len(legend) // columns)
    lanes_height = lane_height(history) * max(1, history.lanes)
    top = HEADER + LEGEND_ROW * rows
    height = top + lanes_height + GAP + CURVE + FOOTER
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    width = WIDTH - LEFT - RIGHT

    def axes(bottom: float, tall: float) -> Axes:
        return figure.add_axes(
            (LEFT / WIDTH, bottom / height, width / WIDTH, tall / height), facecolor="none"
        )

    lanes = axes(FOOTER + CURVE + GAP, lanes_height)
    losses = axes(FOOTER, CURVE)
    span = max(history.end_s, 1e-3)
    for each in (lanes, losses):
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color("#aab2bd")
        each.tick_params(colors=FAINT, labelsize=8, length=3, width=0.6)
        each.set_xlim(0, span)
        _draw_stalls(history, each, span)
    figure.text(
        0.14 / WIDTH, 1 - 0.3 / height, headline(history, title), size=13, weight="bold", color=INK
    )
    figure.text(0.14 / WIDTH, 1 - 0.54 / height, subtitle(history), size=9.5, color=FAINT)
    figure.legend(
        handles=legend,
        loc="upper left",
        bbox_to_anchor=(0.14 / WIDTH, 1 - (HEADER - 0.04) / height),
        ncols=columns,
        borderpad=0,
        borderaxespad=0,
        fontsize=8,
        labelcolor=INK,
        frameon=False,
        handlelength=1.5,
        handletextpad=0.6,
        columnspacing=2.0,
        labelspacing=0.55,
    )
    _Lanes(history, lanes, span / (width * POINTS)).draw()
    _draw_loss(history, losses, span)
    _scale_time(losses, lanes, span)
    return figure


def _legend(history: History) -> list[Any]:
    """Of what there is in this picture."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def marker(sign: str, label: str, **how: Any) -> Line2D:
        return Line2D([], [], linestyle="", marker=sign, label=label, **how)

    handles: list[Any] = [
        Patch(color=HOME, label="plays its home shards"),
        Patch(color=ADOPTED, label="plays adopted shards"),
        Line2D([], [], color=BOOT, linewidth=3.5, label="a function starts"),
    ]
    if history.deaths:
        handles.append(marker("X", "death, and how it showed", color=DEATH, mec="white", ms=9))
    if history.handovers:
        handles.append(marker("D", "hand-over", color="white", mec=INK, ms=5, mew=0.9))
    if any(each.gap_s is not None for each in history.incidents):
        handles.append(Patch(color=STALL, label="no step finishes"))
    if history.scalings:
        line = Line2D(
            [], [], color=INK, linewidth=1, linestyle=":", label="number of slots changes"
        )
        handles.append(line)
    if history.notices:
        count = f" ({len(history.notices)})" if len(history.notices) > 1 else ""
        handles.append(marker("v", f"warning{count}", color=FAINT, mec="white", ms=7))
    return handles


def _draw_stalls(history: History, axes: Axes, span: float) -> None:
    """A band wherever one is wide enough to be seen."""
    gaps = {each.gap_s for each in history.incidents if each.gap_s is not None}
    for start, end in sorted(gaps):
        if end - start > max(0.002 * span, 3 * history.step_s):
            axes.axvspan(start, end, color=STALL, linewidth=0, zorder=0)
    deaths = [each.at_s for each in history.incidents if each.death]
    if len(deaths) <= DEATH_LINES_LIMIT:
        for at in deaths:
            axes.axvline(at, color=DEATH, linewidth=0.6, alpha=0.45, zorder=0.5)


class _Lanes:
    """The upper part. `point` is how many seconds of the run one point of paper shows."""

    def __init__(self, history: History, axes: Axes, point: float) -> None:
        self._history = history
        self._axes = axes
        self._point = point
        self._lane_points = lane_height(history) * POINTS
        self._size = 7.5 if self._lane_points > 24 else 6.5
        self._said: dict[int, list[tuple[float, float]]] = {}
        """Where there is text in the middle of a lane already."""

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
        if len(history.scalings) <= DEATH_LINES_LIMIT:
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
                    tall = BAR[1] * len(shards) / count
                    if shards:
                        pieces[colour].append((stretch.start_s, top, length, tall))
                        self._number(
                            shards, colour, stretch.start_s + length / 2, top, length, tall
                        )
                    top += tall
        for colour, rectangles in pieces.items():
            self._rectangles(rectangles, colour, zorder=2)

    def _number(
        self,
        shards: tuple[int, ...],
        colour: str,
        middle: float,
        top: float,
        long: float,
        tall: float,
    ) -> None:
        """Which shards a bar stands for, if that fits into it."""
        size = min(self._size, 0.86 * tall * self._lane_points)
        text = numbers(shards)
        if size < 4.5 or long < (len(text) * GLYPH * size + 5) * self._point:
            return
        ink = "white" if colour == HOME else INK
        place = (middle, top + tall / 2)
        self._axes.text(
            *place, text, size=size, color=ink, ha="center", va="center_baseline", zorder=3
        )

    def _boots(self) -> None:
        rectangles = [
            (each.granted_s, each.slot + TRACK[0], _until(each) - each.granted_s, TRACK[1])
            for each in self._history.invocations
        ]
        self._rectangles(rectangles, BOOT, zorder=2)

    def _rectangles(
        self, rectangles: list[tuple[float, float, float, float]], colour: str, zorder: float
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
        from fault.records import slot_of

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
        from fault.records import slot_of

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


def _draw_loss(history: History, axes: Axes, span: float) -> None:
    losses = finite(history.losses)
    axes.set_ylabel("loss", color=INK, size=8.5)
    axes.yaxis.set_label_coords(-0.055, 0.5)
    if losses:
        values = [each.loss for each in losses]
        if min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")
        points = thinned(losses)
        size = 1.8 if len(points) > 600 else 2.4
        axes.plot(
            [each.at_s for each in points],
            [each.loss for each in points],
            ".",
            color="#9aa4b0",
            ms=size,
            mew=0,
            zorder=2,
        )
        axes.plot(*trend(losses, span), color=INK, linewidth=1.2, zorder=3)
    else:
        axes.set_yticks([])
    axes.tick_params(axis="y", which="minor", length=0)
    if history.evaluations:
        last = history.evaluations[-1]
        told = "   ".join(f"{name} {value:.4g}" for name, value in last.values)
        text = f"evaluation after step {last.step}:  {told}"
        axes.text(
            0.995, 0.97, text, transform=axes.transAxes, size=8.5, color=INK, ha="right", va="top"
        )


def _scale_time(losses: Axes, lanes: Axes, span: float) -> None:
    """Seconds, minutes or hours, whichever gives small numbers."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    unit, name = 1.0, "seconds"
    if span >= HOURS_FROM_S:
        unit, name = 3600.0, "hours"
    elif span >= MINUTES_FROM_S:
        unit, name = 60.0, "minutes"
    least = span / unit / 10
    steps = (0.001, 0.01, 0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120, 240)
    step = next((each for each in steps if each >= least), least)
    for axes in (losses, lanes):
        axes.xaxis.set_major_locator(MultipleLocator(step * unit))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at / unit:g}"))
    losses.set_xlabel(f"{name} since the run was created", color=INK, size=8.5)
