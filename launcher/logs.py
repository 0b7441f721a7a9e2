"""What a run's functions and processes wrote, put together for reading.

A sandbox's log holds one invocation after another, each from a START to a REPORT line, as on AWS.
Which slot an invocation served, only the function itself knows: it says so in its first line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from launcher.home import RunFolder

START = "START RequestId:"


def beginning(slot: int, generation: int) -> str:
    """How the first line that a function writes begins."""
    return f"slot {slot}, generation {generation}"


def invocations(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines of each invocation; those before the first START belong to it."""
    section: list[str] = []
    started = False
    for line in lines:
        if line.startswith(START):
            if started:
                yield section
                section = []
            started = True
        section.append(line)
    if section:
        yield section


def of_slot(lines: Iterable[str], slot: int) -> Iterator[str]:
    """Only what the functions in this slot wrote."""
    first = f"slot {slot}, generation "
    for section in invocations(lines):
        if any(line.startswith(first) for line in section):
            yield from section


def entries(folder: RunFolder, slot: int | None = None) -> Iterator[str]:
    """Lines with the name of their file in front; with a slot, only what its functions wrote."""
    files = sorted(folder.function_logs.glob("*.log"))
    if slot is None:
        files += sorted(folder.logs.glob("*.log"))
    for file in files:
        # the runtime client separates a traceback's lines with \r and indents with U+00A0
        text = file.read_text("utf-8", "replace").replace("\r", "\n").replace("\xa0", " ")
        lines = text.splitlines()
        for line in lines if slot is None else of_slot(lines, slot):
            yield f"{file.stem}: {line}"
