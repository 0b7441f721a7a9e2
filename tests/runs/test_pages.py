"""Peers ask for huge pages, where the kernel gives them to those who ask."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from chaos.live import LiveRun
from tests.workloads import workload_of

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def glibc_can_ask() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


def asks(pid: int) -> bool:
    """Whether any of the process's heap may lie on huge pages."""
    is_heap = False
    for line in Path(f"/proc/{pid}/smaps").read_text("utf-8").splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a new range of addresses
            is_heap = rest[-1:] == ["[heap]"]
        elif is_heap and first == "VmFlags:" and "hg" in rest:
            return True
    return False


@pytest.mark.skipif(
    not MODES.exists() or "[madvise]" not in MODES.read_text("utf-8") or not glibc_can_ask(),
    reason="the kernel gives huge pages to everyone or nobody, or glibc is older than 2.35",
)
@pytest.mark.parametrize("start", [pytest.param("cold", marks=pytest.mark.acceptance), "snapshot"])
def test_peers_ask_for_huge_pages(home: Path, start: str) -> None:
    work = workload_of("digits", 1_000_000, "direct")
    options = (*work.options, f"--start={start}")
    with LiveRun(work.job, home, f"pages-{start}", options) as run:
        run.wait_for_step(5)
        pid = run.process_of(0)
        assert pid is not None and asks(pid)
