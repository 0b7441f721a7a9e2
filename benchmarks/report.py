"""What every benchmark says beside its figures, and how figures are summed up."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def surroundings() -> dict[str, Any]:
    """Where and of what the figures are."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
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
