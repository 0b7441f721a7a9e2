"""What every benchmark says beside its figures, and how figures are summed up."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Figures, for people; None is shown as a dash."""
    lines = [[*head], *[["-" if each is None else str(each) for each in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def unwind_when_terminated() -> None:
    """Makes SIGTERM an exception, as Ctrl-C is one, so that what was started is ended by both."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def surroundings() -> dict[str, Any]:
    """Where and of what the figures are."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def middle(values: Sequence[float]) -> float | None:
    return round(median(values), 4) if values else None


def finish(found: dict[str, Any], as_json: bool) -> None:
    """Prints the figures as one JSON object, on one line if that was asked for."""
    print(json.dumps(found, indent=None if as_json else 1), flush=True)
