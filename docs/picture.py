"""Draws a run out of the events it left behind: a lane for each slot, the loss underneath.

    pip install -c constraints.txt -e '.[docs]'
    p2p-launch run examples/digits.py --set steps=900 --kill 2@60 --kill 0@350 --kill 1@350 \
        --kill 3@600 --run-id picture
    python docs/picture.py ~/.mayfly/runs/picture docs/run.png

The same without `--kill`, as `--run-id calm`, leaves the same bytes:

    cmp ~/.mayfly/runs/picture/final.safetensors ~/.mayfly/runs/calm/final.safetensors

It reads `events.jsonl` in the run's folder and nothing else. Needed to draw the picture again, and
for nothing that Mayfly does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

HOME_COLOUR = "#2a6f97"
ADOPTED_COLOUR = "#e09f3e"
BOOT_COLOUR = "#ced4da"
DEATH_COLOUR = "#9e2a2b"
LABEL_SHARE = 0.02
"""A stretch that is shorter than this part of the run gets no label."""


def slot_of(peer: str) -> int:
    return int(peer.split(".", 1)[0])


@dataclass
class Picture:
    """What is drawn. Times are seconds since the run was created."""

    slots: int = 0
    end: float = 0.0
    claimed: dict[str, float] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)
    killed: dict[str, float] = field(default_factory=dict)
    deaths: list[tuple[str, float]] = field(default_factory=list)
    views: list[tuple[float, dict[str, list[int]]]] = field(default_factory=list)
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)


def read(events: Path) -> Picture:
    picture, began, causes = Picture(), 0.0, dict[str, str]()
    for line in events.read_text("utf-8").splitlines():
        event: dict[str, Any] = json.loads(line)
        fields, now = event["fields"], event["time"] - began
        match event["kind"]:
            case "created":
                began, picture.slots = event["time"], fields["slots"]
            case "claimed":
                picture.claimed[fields["peer"]] = now
            case "killed":
                picture.killed[fields["peer"]] = now
            case "left":
                picture.gone[fields["peer"]] = now
                causes[fields["peer"]] = fields["cause"]
            case "view":
                plays: dict[str, list[int]] = {peer: [] for peer in fields["members"]}
                for shard, peer in enumerate(fields["players"]):
                    plays[peer].append(shard)
                picture.views.append((now, plays))
                for peer, kind in fields["removals"]:
                    died = kind not in ("left", "swap", "scaled") or causes.get(peer)
                    at = picture.killed.get(peer, now)
                    picture.gone.setdefault(peer, at)
                    if died:
                        picture.deaths.append((peer, at))
            case "steps":
                for step, time, loss in fields["rows"]:
                    picture.losses.setdefault(step, (time - began, loss))
            case "outcome":
                picture.end = now
    return picture


def draw_lanes(picture: Picture, lanes: Axes) -> None:
    for peer, at in picture.claimed.items():
        joined = [time for time, plays in picture.views if peer in plays]
        until = min([*joined[:1], picture.gone.get(peer, picture.end), picture.end])
        lanes.barh(slot_of(peer), until - at, left=at, height=0.3, color=BOOT_COLOUR)
    ends = [time for time, _ in picture.views[1:]] + [picture.end]
    for (start, plays), end in zip(picture.views, ends, strict=True):
        for peer, shards in plays.items():
            until = min(end, picture.gone.get(peer, end))
            slot, adopted = slot_of(peer), shards != [slot_of(peer)]
            colour = ADOPTED_COLOUR if adopted else HOME_COLOUR
            lanes.barh(slot, until - start, left=start, height=0.62, color=colour)
            if until - start > LABEL_SHARE * picture.end:
                label = ",".join(map(str, shards))
                place = (start + until) / 2
                lanes.text(place, slot, label, color="white", ha="center", va="center", size=8)
    for peer, at in picture.deaths:
        lanes.plot(at, slot_of(peer), "X", color=DEATH_COLOUR, markersize=11, mec="white")
    lanes.set_yticks(range(picture.slots), [f"slot {slot}" for slot in range(picture.slots)])
    lanes.invert_yaxis()
    lanes.legend(
        handles=[
            Patch(color=BOOT_COLOUR, label="function starts, imports torch, gets the state"),
            Patch(color=HOME_COLOUR, label="plays its own shard"),
            Patch(color=ADOPTED_COLOUR, label="plays adopted shards (numbers: which)"),
            Line2D([], [], marker="X", color=DEATH_COLOUR, linestyle="", label="SIGKILL"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        fontsize=8,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
    )


def draw_loss(picture: Picture, losses: Axes) -> None:
    rows = [picture.losses[step] for step in sorted(picture.losses)]
    losses.plot([at for at, _ in rows], [loss for _, loss in rows], ".", color="#444", markersize=2)
    losses.set_yscale("log")
    losses.set_ylabel("loss of each step")
    losses.set_xlabel("seconds since the run was created")
    losses.set_xlim(0, picture.end)


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python docs/picture.py RUN_FOLDER PICTURE.png", file=sys.stderr)
        return 2
    picture = read(Path(sys.argv[1]) / "events.jsonl")
    figure, (lanes, losses) = plt.subplots(
        2, 1, sharex=True, figsize=(10, 4.6), height_ratios=(picture.slots, 3), layout="constrained"
    )
    draw_lanes(picture, lanes)
    draw_loss(picture, losses)
    for _, at in picture.deaths:
        for axes in (lanes, losses):
            axes.axvline(at, color=DEATH_COLOUR, linewidth=0.8, alpha=0.5, zorder=0)
    for axes in (lanes, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], dpi=100, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
