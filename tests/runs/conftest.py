"""Runs of the examples on real processes, and the weights that each of them has to end with."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from chaos.live import Fault, Result, Workload, play

Play = Callable[..., Result]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run(home: Path) -> Play:
    """Plays one run with these faults to its end."""

    def start(work: Workload, name: str, *faults: Fault, options: tuple[str, ...] = ()) -> Result:
        return play(work.job, home, f"{name}-{work}", [*work.options, *options], faults)

    return start


@pytest.fixture
def relay_address() -> str:
    """Where two relays may listen, for which they need four ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
        with suppress(OSError, OverflowError), ExitStack() as stack:
            for next_port in range(port + 1, port + 4):
                stack.enter_context(socket.create_server(("127.0.0.1", next_port)))
            return f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def reference(run: Play) -> Callable[[Workload], Result]:
    """The run of a workload in which nothing fails."""
    known: dict[Workload, Result] = {}

    def look_up(work: Workload) -> Result:
        if work not in known:
            result = run(work, "reference")
            assert result.summary["deaths"] == 0 and result.summary["steps"] == work.steps
            known[work] = result
        return known[work]

    return look_up
