"""A machine that is merely busy evicts nobody."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.live import LiveRun, Workload

JOB = Path(__file__).parents[2] / "examples" / "digits.py"
SECONDS = 120.0


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(400)
def test_twice_as_many_spinning_processes_as_cores(home: Path) -> None:
    """For two minutes; the first view is the only one, and steps go on."""
    work = Workload(JOB, 1_000_000, "ring")
    with LiveRun(work.job, home, "busy", work.options) as run:
        run.wait_for_step(10)
        with spinning(2 * (os.cpu_count() or 1)):
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                run.wait_for_step(0)
                time.sleep(1.0)
        views = [event for event in run.folder.read_events() if event.kind == "view"]
        assert len(views) == 1
        assert run.wait_for_step(200) >= 200
