"""How a run went, out of the events it left behind. Pure."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any

from fault.records import slot_of
from fault.registry import Event

DEATH_KINDS = frozenset({"silent", "lease", "hung", "unreachable", "corrupt"})


class Pace:
    """How steps followed each other; built once, asked often. `times` are those of a `Story`."""

    def __init__(self, times: Mapping[int, float]) -> None:
        reached = [times[step] for step in sorted(times)]
        gaps = [after - before for before, after in itertools.pairwise(reached)]
        self.step_s = median(gaps) if gaps else float("nan")
        """The median time from one step to the next; NaN before there are two."""
        self._reached = sorted(reached)

    def last(self, at: float) -> float | None:
        """When the last step before `at` was reached."""
        after = bisect_right(self._reached, at)
        return self._reached[after - 1] if after else None

    def gap(self, at: float) -> tuple[float, float] | None:
        """When the last step before `at` and the first after it were reached."""
        after = bisect_right(self._reached, at)
        if after in (0, len(self._reached)):
            return None
        return self._reached[after - 1], self._reached[after]

    def stall_ms(self, at: float) -> float | None:
        """From the last step before `at` to the first after it, less the median step time."""
        gap = self.gap(at)
        if gap is None:
            return None
        return round(max(0.0, gap[1] - gap[0] - self.step_s) * 1000, 1)


@dataclass(slots=True)
class Story:
    """What the events say so far; feed them in order."""

    created_at: float = 0.0
    last_at: float = 0.0
    step: int = 0
    loss: float = float("nan")
    times: dict[int, float] = field(default_factory=dict)
    """When each step was reached, in the registry's seconds."""
    starts: dict[str, str] = field(default_factory=dict)
    deaths: list[tuple[str, str, float]] = field(default_factory=list)
    """(peer, kind, when its removal was agreed on)"""
    handovers: list[tuple[str, float]] = field(default_factory=list)
    views: int = 0
    view: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    kills: dict[str, float] = field(default_factory=dict)
    """When peers were killed on request."""
    traffic: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each peer's links carried, by its newest word: see `p2p.traffic.Traffic`."""
    evaluating: set[int] = field(default_factory=set)
    """Steps whose state is to be evaluated, and whose result has not come yet."""
    repeated: int = 0
    """Steps that were finished, and had to be computed again from a checkpoint."""
    revived: bool = False
    """By the newest view, and no step has been finished since."""
    _metrics_step: int = -1
    _causes: dict[str, str] = field(default_factory=dict)

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            self.last_at = event.time
            handler = getattr(self, f"_on_{event.kind}", None)
            if handler is not None:
                handler(event)

    def _on_created(self, event: Event) -> None:
        # a registry that came back empty has the run created again
        self.created_at = self.created_at or event.time

    def _on_started(self, event: Event) -> None:
        self.starts[event.fields["peer"]] = event.fields["start"]

    def _on_steps(self, event: Event) -> None:
        rows = event.fields["rows"]
        if self.revived and rows:
            self.repeated += max(0, self.step - rows[0][0] + 1)
            self.revived = False
        for step, time, loss in rows:
            if step not in self.times:
                self.times[step] = time
            if step >= self.step:
                self.step, self.loss = step, loss

    def _on_view(self, event: Event) -> None:
        self.views += 1
        before = self.view.get("members", [])
        self.view = event.fields
        removed = dict(event.fields["removals"])
        # a first view that is not the first: the registry came back empty
        if event.fields["kind"] == "revive" or (event.fields["kind"] == "first" and before):
            self.revived = True
            removed.update({peer: "lease" for peer in before if peer not in removed})
        for peer, kind in removed.items():
            if kind == "swap":
                self.handovers.append((peer, event.time))
            elif kind in DEATH_KINDS or (kind == "left" and self._causes.get(peer)):
                self.deaths.append((peer, kind, self.kills.get(peer, event.time)))

    def _on_left(self, event: Event) -> None:
        self._causes[event.fields["peer"]] = event.fields["cause"]

    def _on_killed(self, event: Event) -> None:
        self.kills[event.fields["peer"]] = event.time

    def _on_metrics(self, event: Event) -> None:
        # evaluations of epochs may come after that of the last step
        if event.fields["step"] >= self._metrics_step:
            self._metrics_step = event.fields["step"]
            self.metrics = event.fields["values"] or self.metrics
        self.evaluating.discard(event.fields["step"])

    def _on_traffic(self, event: Event) -> None:
        counts = dict(event.fields)
        self.traffic[counts.pop("peer")] = counts

    def _on_evaluation(self, event: Event) -> None:
        self.evaluating.add(event.fields["step"])

    def _on_outcome(self, event: Event) -> None:
        self.outcome = event.fields

    def _on_resumed(self, event: Event) -> None:
        self.outcome = {}

    # --- figures ----------------------------------------------------------------------------

    def stall_ms(self, at: float) -> float | None:
        """See `Pace.stall_ms`."""
        return Pace(self.times).stall_ms(at)

    def players(self) -> dict[int, list[int]]:
        """The shards that each slot plays now."""
        shards: dict[int, list[int]] = {}
        for shard, peer in enumerate(self.view.get("players", [])):
            shards.setdefault(slot_of(peer), []).append(shard)
        return shards


def total_traffic(story: Story) -> dict[str, float]:
    """Over all peers there ever were."""
    total: Counter[str] = Counter()
    for counts in story.traffic.values():
        total.update(counts)
    return {name: round(count, 3) for name, count in total.items()}


def summarize(
    story: Story,
    plan: dict[str, Any],
    folder: str,
    relays: Sequence[dict[str, int]] = (),
) -> dict[str, Any]:
    """The one JSON object that `run --json` ends with. `relays` is what each has counted."""
    outcome = story.outcome
    kinds = list(story.starts.values())
    pace = Pace(story.times)
    stalls = {
        "handover": [pace.stall_ms(at) for _, at in story.handovers],
        "death": [pace.stall_ms(at) for _, _, at in story.deaths],
    }
    finished = outcome.get("state") == "finished"
    return {
        "run": plan["run"],
        "state": outcome.get("state", "unknown"),
        "digest": outcome.get("digest", ""),
        "steps": outcome["step"] if finished else story.step,
        "shards": plan["shards"],
        "samples": plan["samples"],
        "loss": story.loss if isfinite(story.loss) else None,
        "metrics": story.metrics,
        "wall_s": round(story.last_at - story.created_at, 3),
        "invocations": {
            "total": len(kinds),
            **{kind: kinds.count(kind) for kind in ("cold", "warm", "restored")},
        },
        "handovers": len(story.handovers),
        "deaths": len(story.deaths),
        "steps_lost": story.repeated,
        "views": story.views,
        "stall_ms": {
            kind: [stall for stall in found if stall is not None] for kind, found in stalls.items()
        },
        "traffic": total_traffic(story),
        "relays": list(relays),
        "folder": folder,
        "error": outcome.get("error", ""),
        "reason": outcome.get("reason", ""),
        "trace": outcome.get("trace", ""),
    }
