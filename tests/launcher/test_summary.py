"""A run's summary is a function of the events it left behind."""

from __future__ import annotations

import itertools
from typing import Any

from fault.registry import Event
from launcher.summary import Story, summarize, total_traffic

PLAN = {"run": "r", "shards": 2, "samples": 8}
NUMBERS = itertools.count()
A, B, C = "0.1.aa", "1.1.bb", "1.2.cc"


def event(time: float, kind: str, /, **fields: Any) -> Event:
    return Event(f"{next(NUMBERS)}-0", time, kind, "", fields)


def view(time: float, members: list[str], removals: list[list[str]], kind: str = "change") -> Event:
    players = [members[shard % len(members)] for shard in range(2)]
    return event(
        time, "view", kind=kind, members=members, players=players, removals=removals, slots=2
    )


def steps(first: int, start: float, count: int) -> Event:
    rows = [[first + index, start + 0.01 * index, 1.0 / (first + index)] for index in range(count)]
    return event(start + 0.01 * count, "steps", rows=rows)


def told(*events: Event) -> dict[str, Any]:
    story = Story()
    story.take(events)
    return summarize(story, PLAN, "/folder")


BEGINNING = (
    event(0.0, "created", slots=2),
    event(1.0, "started", peer=A, start="cold"),
    event(1.0, "started", peer=B, start="cold"),
    view(2.0, [A, B], [], "first"),
    steps(1, 3.0, 10),
)


def test_a_death_is_counted_with_its_stall() -> None:
    """From the last step before it to the first after it, less the median step."""
    summary = told(
        *BEGINNING,
        view(3.3, [A], [[B, "silent"]]),
        event(3.4, "started", peer=C, start="warm"),
        steps(11, 3.59, 10),
        view(4.0, [A, C], []),
        event(5.0, "metrics", step=20, values={"accuracy": 0.5}),
        event(5.0, "outcome", state="finished", step=20, digest="d", error="", reason=""),
    )
    assert summary["deaths"] == 1 and summary["views"] == 3 and summary["handovers"] == 0
    assert summary["stall_ms"] == {"handover": [], "death": [490.0]}
    assert summary["invocations"] == {"total": 3, "cold": 2, "warm": 1, "restored": 0}
    assert (summary["state"], summary["steps"], summary["digest"]) == ("finished", 20, "d")
    assert summary["metrics"] == {"accuracy": 0.5} and summary["wall_s"] == 5.0


def test_a_revived_run_counts_everyone_it_lost() -> None:
    """The view that revives a run names no grounds for those who are gone."""
    summary = told(*BEGINNING, view(9.0, [C], [], "revive"), steps(11, 9.1, 5))
    assert summary["deaths"] == 2


def test_who_left_in_peace_did_not_die() -> None:
    """Only a departure with a cause counts."""
    peaceful = told(*BEGINNING, event(3.2, "left", peer=B, cause=""), view(3.3, [A], [[B, "left"]]))
    raised = told(*BEGINNING, event(3.2, "left", peer=B, cause="it"), view(3.3, [A], [[B, "left"]]))
    assert (peaceful["deaths"], raised["deaths"]) == (0, 1)


def test_a_hand_over_is_no_death() -> None:
    """It is counted apart, with a stall of its own."""
    summary = told(*BEGINNING, view(3.1, [A, C], [[B, "swap"]]), steps(11, 3.12, 5))
    assert summary["deaths"] == 0 and summary["handovers"] == 1
    assert len(summary["stall_ms"]["handover"]) == 1


def test_steps_told_twice_count_once() -> None:
    """After a revival steps are computed again; the first time they were reached stands."""
    summary = told(*BEGINNING, steps(6, 9.0, 5))
    assert summary["steps"] == 10
    assert summary["loss"] == 0.1


def test_a_run_without_an_outcome() -> None:
    """It has no steps, no loss and no state yet; that is no error."""
    summary = told(event(0.0, "created", slots=2))
    assert (summary["state"], summary["steps"], summary["loss"]) == ("unknown", 0, None)


def test_the_newest_counts_of_every_peer_are_added_up() -> None:
    """A peer tells what it has sent since it came, again and again."""
    story = Story()
    told = [("a", 1, 10, 0.5), ("b", 2, 20, 0.25), ("a", 3, 30, 1.0)]
    story.take(
        event(1.0, "traffic", peer=peer, asks=asks, named_bytes=size, waited_s=waited)
        for peer, asks, size, waited in told
    )
    assert total_traffic(story) == {"asks": 5, "named_bytes": 50, "waited_s": 1.25}
    assert story.traffic["a"]["asks"] == 3
