"""A run as it is shown to the person who started it: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from fault.records import slot_of
from fault.registry import Event
from launcher.summary import Story

LINE_EVERY_S = 2.0
WINDOW_S = 3.0
WHAT_HAPPENED = {
    "silent": "was lost: it fell silent",
    "lease": "was lost: its lease ran out",
    "hung": "was lost: it hung",
    "unreachable": "was cut off",
    "corrupt": "was removed: its state differed",
    "left": "left",
    "swap": "handed over",
    "scaled": "left: the run was scaled",
}


def lines_of(event: Event, before: dict[str, Any]) -> Iterable[str]:
    """What there is to tell of an event; `before` is the view it met."""
    fields = event.fields
    match event.kind:
        case "claimed":
            slot, generation, _ = fields["peer"].split(".")
            again = "" if generation == "1" else f" again (generation {generation})"
            yield f"slot {slot}: invoked{again}"
        case "killed":
            yield f"slot {fields['slot']}: killed at step {fields['step']}, as asked for"
        case "view":
            yield from _changes(fields, before)
        case "boot_failed":
            yield f"slot {slot_of(fields['peer'])}: could not start: {fields['reason']}"
        case "warning":
            yield f"warning: {fields['text']}"
        case "metrics":
            told = ", ".join(f"{name} {value:.4g}" for name, value in fields["values"].items())
            if told:
                yield f"evaluation after step {fields['step']}: {told}"


def _changes(fields: dict[str, Any], before: dict[str, Any]) -> Iterable[str]:
    members, players = fields["members"], fields["players"]
    gone = {peer: kind for peer, kind in fields["removals"] if peer not in members}
    for peer, kind in gone.items():
        yield f"slot {slot_of(peer)}: {WHAT_HAPPENED.get(kind, kind)}"
    if fields["kind"] == "revive":
        yield f"slot {slot_of(members[0])}: revived the run from its checkpoint"
        return
    old = before.get("members", [])
    if not old:
        yield f"{len(members)} peers are ready, {len(players)} shards"
        return
    for peer in members:
        if peer not in old:
            yield f"slot {slot_of(peer)}: rejoined"
    for shard, peer in enumerate(players):
        former = before["players"][shard]
        if former in gone and former != peer and peer in old:
            yield f"slot {slot_of(peer)}: adopted shard {shard}"


def who_plays_what(story: Story) -> str:
    """Like "0:[0] 1:[1,2]": slots and their shards."""
    return " ".join(
        f"{slot}:[{','.join(map(str, shards))}]" for slot, shards in sorted(story.players().items())
    )


def steps_per_second(story: Story) -> float:
    newest = story.times.get(story.step, 0.0)
    first = story.step
    while story.times.get(first - 1, float("-inf")) > newest - WINDOW_S:
        first -= 1
    return (story.step - first) / max(1e-9, newest - story.times.get(first, newest))


class Plain:
    """Lines for a file or a pipe."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._view: dict[str, Any] = {}
        self._shown_at = 0.0
        self._shown_step = -1

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, story: Story, events: list[Event]) -> None:
        for event in events:
            for line in lines_of(event, self._view):
                self._print(line)
            if event.kind == "view":
                self._view = event.fields
        last = story.step >= self.steps
        due = time.monotonic() - self._shown_at >= LINE_EVERY_S or last
        if story.times and due and story.step != self._shown_step:
            self._shown_at, self._shown_step = time.monotonic(), story.step
            self._status(story)

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _status(self, story: Story) -> None:
        self._print(
            f"step {story.step}/{self.steps}  loss {story.loss:.4f}  "
            f"{steps_per_second(story):.1f} steps/s  {who_plays_what(story)}"
        )


class Bar(Plain):
    """A bar under the lines, for a terminal."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__(steps)
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[told]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("run", total=steps, told="starting")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, story: Story, events: list[Event]) -> None:
        super().show(story, events)
        if story.times:
            self._status(story)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _status(self, story: Story) -> None:
        told = (
            f"loss {story.loss:.4f}  {steps_per_second(story):.1f} steps/s  {who_plays_what(story)}"
        )
        self._progress.update(self._task, completed=story.step, told=told)


class Quiet(Plain):
    """Nothing at all."""

    def show(self, story: Story, events: list[Event]) -> None:
        return None
