"""TorchScript that runs in the store: one readable function in each file beside this one."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def source(name: str) -> str:
    """The text of the script, whose entry point has its name."""
    return (FOLDER / f"{name}.py").read_text("utf-8")
