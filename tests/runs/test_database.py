"""Gradients summed and applied in a store: the weights do not depend on who dies, or where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chaos.live import Result

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
OPTIONS = ("--peers", "2", "--workers", "2", "--aggregate", "database")
STEPS = 120
Play = Callable[..., Result]
