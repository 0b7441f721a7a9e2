"""Runs of the examples on real processes, and the weights that each of them has to end with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos.live import Fault, Result, play

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARDS = 4


@dataclass(frozen=True)
class Kind:
    """One computation: whatever happens to it, it has one result."""

    example: str
    steps: int
    collective: str

    def __str__(self) -> str:
        return f"{self.example}-{self.steps}-{self.collective}"

    @property
    def options(self) -> tuple[str, ...]:
        collective = ("--collective", self.collective)
        return ("--shards", str(SHARDS), *collective, "--set", f"steps={self.steps}")


Play = Callable[..., Result]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run(home: Path) -> Play:
    """Plays one run of a kind with these faults to its end."""

    def start(kind: Kind, name: str, *faults: Fault, options: tuple[str, ...] = ()) -> Result:
        job = EXAMPLES / f"{kind.example}.py"
        return play(job, home, f"{name}-{kind}", [*kind.options, *options], faults)

    return start


@pytest.fixture(scope="session")
def reference(run: Play) -> Callable[[Kind], Result]:
    """A kind's run in which nothing fails."""
    known: dict[Kind, Result] = {}

    def look_up(kind: Kind) -> Result:
        if kind not in known:
            result = run(kind, "reference")
            assert result.summary["deaths"] == 0 and result.summary["steps"] == kind.steps
            known[kind] = result
        return known[kind]

    return look_up
