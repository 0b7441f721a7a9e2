"""Draws a history: a lane for each slot, the loss underneath.

Sizes are in inches, as matplotlib's are; the layout is worked out by hand, so that a picture of
sixteen slots over two hours is as calm as one of four over a minute. What has no room gets no
label; the page beneath the picture has it all in tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.report.curve import finite, thinned, trend
from launcher.report.history import History
from launcher.report.lanes import (
    ADOPTED,
    BOOT,
    DEATH,
    FAINT,
    HOME,
    INK,
    POINTS,
    Lanes,
    lane_height,
)
from launcher.report.wording import headline, subtitle

if TYPE_CHECKING:  # importing it takes a while, which the other commands need not wait for
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0
PIXELS_PER_INCH = 160
STALL = "#f3dcd9"
LEFT, RIGHT = 0.72, 0.22
HEADER, LEGEND_ROW, GAP, CURVE, FOOTER = 0.74, 0.25, 0.14, 1.5, 0.5
DEATH_LINES_LIMIT = 24
"""With more deaths than this, only their marks are drawn."""
ONE_ROW = 5
"""Entries of the legend that fit beside each other."""
MINUTES_FROM_S, HOURS_FROM_S = 180.0, 3 * 3600.0


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
        _draw_stalls(history, each)
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
        columnspacing=1.8,
        labelspacing=0.55,
    )
    Lanes(history, lanes, span / (width * POINTS)).draw()
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
        handles.append(marker("X", "death, and how it was noticed", color=DEATH, mec="white", ms=9))
    if history.handovers:
        handles.append(marker("D", "hand-over", color="white", mec=INK, ms=5, mew=0.9))
    if _visible_stalls(history):
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


def _visible_stalls(history: History) -> list[tuple[float, float]]:
    """Those of hand-overs and deaths that are wide enough to be seen, and no ordinary step."""
    least = max(0.002 * history.end_s, 3 * history.step_s)
    gaps = {each.gap_s for each in history.incidents if each.gap_s is not None}
    return sorted((start, end) for start, end in gaps if end - start > least)


def _draw_stalls(history: History, axes: Axes) -> None:
    for start, end in _visible_stalls(history):
        axes.axvspan(start, end, color=STALL, linewidth=0, zorder=0)
    deaths = [each.at_s for each in history.incidents if each.death]
    if len(deaths) <= DEATH_LINES_LIMIT:
        for at in deaths:
            axes.axvline(at, color=DEATH, linewidth=0.6, alpha=0.45, zorder=0.5)


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
            color="#8792a0",
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
