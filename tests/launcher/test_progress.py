"""What a person reads while a run goes on."""

from __future__ import annotations

from typing import Any

import pytest

from fault.registry import Event
from launcher.progress import Bar, Plain
from launcher.summary import Story

A, B, C = "0.1.aa", "1.1.bb", "1.2.cc"


def view(kind: str, members: list[str], players: list[str], removals: list[list[str]]) -> Event:
    fields: dict[str, Any] = {
        "kind": kind,
        "members": members,
        "players": players,
        "removals": removals,
    }
    return Event("1-0", 1.0, "view", "", fields)


STORY = [
    Event("1-0", 1.0, "claimed", "", {"slot": 0, "peer": A}),
    view("first", [A, B], [A, B], []),
    Event("1-0", 1.0, "steps", "", {"rows": [[1, 1.0, 0.5], [2, 1.5, 0.25]]}),
    Event("1-0", 1.0, "killed", "", {"slot": 1, "step": 2, "peer": B}),
    view("change", [A], [A, A], [[B, "silent"]]),
    Event("1-0", 1.0, "claimed", "", {"slot": 1, "peer": C}),
    view("change", [A, C], [A, C], []),
    Event("1-0", 1.0, "metrics", "", {"step": 2, "values": {"accuracy": 0.95}}),
]
LINES = [
    "slot 0: invoked",
    "2 peers are ready, 2 shards",
    "slot 1: killed at step 2, as asked for",
    "slot 1: was lost: it fell silent",
    "slot 0: adopted shard 1",
    "slot 1: invoked again (generation 2)",
    "slot 1: rejoined",
    "evaluation after step 2: accuracy 0.95",
]


@pytest.mark.parametrize("display", [Plain, Bar])
def test_each_event_is_a_line(display: type[Plain], capsys: pytest.CaptureFixture[str]) -> None:
    """In the order in which things happened, on stderr, with the step's line or bar below."""
    story = Story()
    story.take(STORY)
    with display(2) as shown:
        shown.show(story, STORY)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.rstrip() for line in err.splitlines()]
    assert [line for line in lines if line in LINES] == LINES
    assert "loss 0.2500" in err and "2/2" in err and "0:[0] 1:[1]" in err
