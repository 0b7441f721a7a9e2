"""`p2p-launch check` tells a pure job from one that is not, and names what differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fault.errors import ImpureTask, InputError, InvalidTask, JobNotFound, NoTask
from launcher.evidence import Difference, Evidence, Label, compare, differences

JOB = """
import os, random, time
from pathlib import Path

import torch
from torch import nn
from p2p import Task

own = random.Random()


class Rows(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        self.kind, self.reads, self.cache = kind, 0, {}

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        self.reads += 1
        if self.kind == "counter":
            x = x + self.reads
        if self.kind == "own":
            x = x + own.random()
        if self.kind == "unwritten":
            x = x + torch.empty(x.shape)
        if self.kind == "global":
            x = x + random.random() + torch.rand(())
        if self.kind == "cache":
            x = self.cache.setdefault(index, x * 3) if index in self.cache else x
            self.cache[index] = x * 3
        if self.kind == "slow":
            Path(__file__).with_name("reached").touch()
            time.sleep(100)
        return x, int(index) % 2


class Counting(torch.optim.SGD):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["params"][0].grad.mul_(self.calls)
        return super().step(closure)


def task(kind: str = ""):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2)
    )
    if kind == "urandom":
        nn.init.constant_(model[4].bias, int.from_bytes(os.urandom(3), "little") / 1e6)
    if kind == "clock":
        nn.init.constant_(model[4].bias, int(time.time()) % 1000)
    optimizer = Counting if kind == "optimizer" else torch.optim.SGD
    return Task(
        model=model,
        dataset=Rows(kind),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: optimizer(parameters, lr=0.1, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        batch_size=4 if kind == "small" else 16,
        steps=5,
    )
"""


def long(kind: str) -> Any:
    """A check takes as long as two boots, so most kinds are left to the long run."""
    return pytest.param(kind, marks=pytest.mark.acceptance)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("job") / "job.py"
    file.write_text(JOB)
    return file


def command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).parent / "p2p-launch"), "check", *map(str, arguments)]


def check(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command, and sees to it that nothing is left behind."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=100, env=environment
    )
    assert left_in(tmp_path) == []
    return result


def left_in(folder: Path) -> list[Path]:
    """torch makes a folder for its compiler there, which is not ours."""
    return [each for each in folder.iterdir() if not each.name.startswith("torchinductor")]


def found(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert result.returncode == ImpureTask.exit_code, result.stderr
    answer = json.loads(result.stdout)
    assert answer["pure"] is False and len(result.stderr.splitlines()) == 1
    listed: list[dict[str, Any]] = answer["differences"]
    return listed


def test_a_pure_job(job: Path, tmp_path: Path) -> None:
    """One line; dropout, batch normalization and draws from the global generators are pure."""
    result = check(tmp_path, job, "--set", "kind=global")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("pure: job.py ") and result.stdout.count("\n") == 1


@pytest.mark.acceptance
def test_a_pure_job_as_json(job: Path, tmp_path: Path) -> None:
    """One object; of many shards a few are computed."""
    result = check(tmp_path, job, "--peers", "8", "--json")
    answer = json.loads(result.stdout)
    assert (result.returncode, answer["pure"], answer["differences"]) == (0, True, [])
    assert (answer["steps"], answer["shards"]) == (2, 4)


@pytest.mark.parametrize("kind", ["clock", long("urandom")])
def test_a_model_that_begins_otherwise_each_time(job: Path, tmp_path: Path, kind: str) -> None:
    """The parameter is named, and nothing that follows from it."""
    listed = found(check(tmp_path, job, "--set", f"kind={kind}", "--json"))
    assert [(e["tensor"], e["step"], e["shard"]) for e in listed] == [
        ("parameter '4.bias'", None, None)
    ]
    assert (listed[0]["differing"], listed[0]["values"]) == (2, 2)


@pytest.mark.parametrize("kind", ["own", *map(long, ("counter", "cache", "unwritten"))])
def test_a_dataset_with_a_memory_of_its_own(job: Path, tmp_path: Path, kind: str) -> None:
    """Tensor, shard and step of the contribution are named."""
    listed = found(check(tmp_path, job, "--set", f"kind={kind}", "--json"))
    assert (listed[0]["tensor"], listed[0]["step"]) == ("gradient of '0.weight'", 0)
    assert listed[0]["shard"] == 0 and 0 < listed[0]["differing"] <= 18
    assert {each["step"] for each in listed} == {0}
    assert all(each["tensor"].startswith(("gradient", "buffer", "loss")) for each in listed)


def test_an_optimizer_with_a_memory_of_its_own(job: Path, tmp_path: Path) -> None:
    """What it does not give out in its state shows after the step; the text is for people."""
    result = check(tmp_path, job, "--set", "kind=optimizer")
    assert result.returncode == ImpureTask.exit_code
    assert "  parameter '0.weight' after step 0: differs in 18 of 18 values, largest" in (
        result.stdout
    )
    assert "  optimizer's state of '0.weight', momentum_buffer after step 0" in result.stdout
    assert "usual causes: " in result.stdout and "state_dict()" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("p2p-launch: job.py is impure: parameter '0.weight' after step 0")


def test_a_bad_job_is_told_as_before_a_run(job: Path, tmp_path: Path) -> None:
    """With the same exit codes, and nothing on stdout."""
    empty = job.with_name("empty.py")
    empty.write_text("")
    for file, options, error, said in (
        (job.with_name("no.py"), (), JobNotFound, "no.py"),
        (empty, (), NoTask, "task()"),
        (job, ("--set", "colour=red"), InputError, "colour"),
        (job, ("--shards", "0"), InputError, "at least one"),
        (job, ("--set", "kind=small"), InvalidTask, "batch normalization"),
    ):
        result = check(tmp_path, file, *options)
        assert (result.returncode, result.stdout) == (error.exit_code, ""), result.stderr
        assert said in result.stderr.splitlines()[-1]


def test_ctrl_c_leaves_nothing(job: Path, tmp_path: Path) -> None:
    """Neither the process that computes nor a file."""
    reached = job.with_name("reached")
    process = subprocess.Popen(
        command(job, "--set", "kind=slow"),
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not reached.exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    assert len(children_of(tmp_path)) == 1
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said
    assert children_of(tmp_path) == [] and left_in(tmp_path) == []


def children_of(folder: Path) -> list[str]:
    """The living processes that were asked a question in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher.purity" in words and os.fsencode(folder) in b" ".join(words):
            found.append(process.name)
    return found


# --- the comparison ------------------------------------------------------------------------------


def test_bits_are_compared_and_not_values() -> None:
    """Zeros of other signs differ, equal NaNs do not; shapes and types are told."""
    label = Label("gradient of 'w'", 0, 2)

    def told(one: Any, other: Any) -> str:
        return str(compare(label, np.asarray(one, np.float32), np.asarray(other, np.float32)))

    prefix = "gradient of 'w', shard 2, step 0: "
    assert compare(label, np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) is None
    assert compare(label, np.zeros((0, 3)), np.zeros((0, 3))) is None
    assert told([0.0, 1.0], [-0.0, 1.0]) == prefix + (
        "differs in 1 of 2 values, largest difference 0"
    )
    assert told([1.0, 2.0, 3.0], [1.0, np.inf, 4.0]) == prefix + "differs in 2 of 3 values"
    assert told(0.5, 0.25) == prefix + "is 0.5 in one process and 0.25 in the other"
    assert "of shape (2,) in one process and float32 of shape (3,)" in told([1, 2], [1, 2, 3])


def test_only_the_earliest_stage_is_told(tmp_path: Path) -> None:
    """All of it, also what only one process has; what follows differs for no reason of its own."""
    files = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for file, value in zip(files, (1, 2), strict=True):
        with Evidence(file) as evidence:
            evidence.add(Label("same", None), np.arange(3))
            evidence.add(Label("a", 0, 1), np.array([value, 0]))
            evidence.add(Label(f"only {value}", 0, 3), np.array(0))
            evidence.add(Label("later", 0), np.array(value))
    told: list[Difference] = differences(*files)
    assert [str(each.label) for each in told] == [
        "a, shard 1, step 0",
        "only 1, shard 3, step 0",
        "only 2, shard 3, step 0",
    ]
    assert differences(files[0], files[0]) == []
