"""The jobs that runs are tested with."""

from __future__ import annotations

from pathlib import Path

from chaos.live import Workload

ROOT = Path(__file__).parents[1]
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits": ("examples/digits.py", ()),
    "charlm": ("examples/charlm.py", ()),
    # 4.4 MB: a shorter vector goes the way of direct, also where the ring was asked for
    "wide": ("benchmarks/wide_job.py", ("width=600", "batch_size=32")),
}


def workload_of(job: str, steps: int, collective: str) -> Workload:
    file, settings = JOBS[job]
    return Workload(ROOT / file, steps, collective, settings=settings)
