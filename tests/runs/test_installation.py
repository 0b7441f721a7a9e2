"""Mayfly as it is where something could not be had when it was installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.live import Result, fingerprint
from launcher.home import RunFolder
from tests.workloads import workload_of

ROOT = Path(__file__).parents[2]
OPTIONS = ("--compress", "int8")


def done(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [str(each) for each in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def installed(sources: Path, place: Path, **environment: str) -> Path:
    """An environment with these sources, and all else from this one; its folder of programs."""
    done(sys.executable, "-m", "venv", "--without-pip", place)
    python = place / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(place)})
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    done(*pip, "--no-deps", "--no-build-isolation", sources, **environment)
    return python.parent


@pytest.mark.acceptance
@pytest.mark.timeout(400)
def test_without_a_c_compiler_the_bits_are_the_same(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    """int8 is computed another way, and the run says so."""
    work = workload_of("digits", 40, "direct")
    expected = run(work, "compiled", options=OPTIONS)
    sources = tmp_path / "sources"
    done("git", "clone", "--quiet", ROOT, sources)
    programs = installed(sources, tmp_path / "without", CC="false")
    assert not [*tmp_path.glob("without/lib/*/site-packages/p2p/collectives/*.so")]
    ended = done(
        *(programs / "p2p-launch", "run", work.job, "--home", tmp_path, "--run-id", "without"),
        *(*work.options, *OPTIONS),
    )
    assert "was not compiled" in ended.stderr
    assert fingerprint(RunFolder(tmp_path / "runs" / "without").final) == expected.weights
