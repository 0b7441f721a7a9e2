"""Which slot a log is about is found by what the functions wrote themselves."""

from __future__ import annotations

from pathlib import Path

from launcher.home import Home
from launcher.logs import beginning, entries, invocations, of_slot

LINES = [
    "loading torch",
    "START RequestId: a Version: $LATEST",
    f"{beginning(1, 1)}, cold start",
    "0. is not a slot",
    "END RequestId: a",
    "REPORT RequestId: a",
    "START RequestId: b Version: $LATEST",
    f"{beginning(0, 2)}, warm start",
    "END RequestId: b",
]


def test_each_invocation_is_a_section() -> None:
    """What was written before the first START, while the environment came up, belongs to it."""
    assert list(invocations(LINES)) == [LINES[:6], LINES[6:]]
    assert list(invocations(LINES[:1])) == [LINES[:1]]
    assert list(invocations([])) == []


def test_a_warm_sandbox_may_have_served_several_slots() -> None:
    """Only the sections of the slot that was asked for are told."""
    assert list(of_slot(LINES, 1)) == LINES[:6]
    assert list(of_slot(LINES, 0)) == LINES[6:]
    assert list(of_slot(LINES, 2)) == []


def test_processes_are_told_of_unless_a_slot_is_asked_for(tmp_path: Path) -> None:
    """With the name of the file before each line, and tracebacks put back into lines."""
    folder = Home(tmp_path).create("run")
    written = "\n".join([*LINES, "Traceback\r\xa0File"])
    (folder.function_logs / "s-1.log").write_text(written, "utf-8")
    (folder.logs / "relay.log").write_text("bound\n")
    assert list(entries(folder))[-3:] == ["s-1: Traceback", "s-1:  File", "relay: bound"]
    assert list(entries(folder, 1)) == [f"s-1: {line}" for line in LINES[:6]]
