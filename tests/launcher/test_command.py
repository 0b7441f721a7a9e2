"""`p2p-launch` beyond `run`: what it says of runs, and how it ends and removes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fault.errors import InputError, RunEnded, RunStopped, RunUnknown
from launcher.home import RunFolder

JOB = """
import torch
from p2p import Task


def task(steps: int = 40):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return Task(
        model=torch.nn.Linear(4, 1),
        dataset=torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
        loss=torch.nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        batch_size=16,
        steps=steps,
    )
"""


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "p2p-launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longer than a Unix socket's path may be, with a space in it."""
    return tmp_path_factory.mktemp("home") / f"a {'long' * 30} home"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("a job") / "the job.py"
    file.write_text(JOB)
    return file


@pytest.fixture(scope="module")
def finished(home: Path, job: Path) -> subprocess.CompletedProcess[str]:
    options = ("--peers", "2", "--kill", "1@5", "--run-id", "finished", "--json")
    return launch("run", job, "--home", home, *options)


def test_a_run_ends_with_one_json_line(finished: subprocess.CompletedProcess[str]) -> None:
    """Alone on stdout; the progress is on stderr, without a single control character."""
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert (summary["state"], summary["steps"], summary["deaths"]) == ("finished", 40, 1)
    assert (Path(summary["folder"]) / "final.safetensors").is_file()
    assert "slot 1: killed at step 5, as asked for" in finished.stderr
    assert "step 40/40" in finished.stderr and "\x1b" not in finished.stderr


def test_nothing_of_a_finished_run_is_left_but_files(
    home: Path, finished: subprocess.CompletedProcess[str]
) -> None:
    """No socket, no ready file."""
    folder = home / "runs" / "finished"
    names = {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob("*") if path.is_socket()]
    assert {"summary.json", "events.jsonl", "final.safetensors"} <= names
    assert not {"supervisor.json", "emulator.ready", "relay-0.ready", "failure.json"} & names


def test_what_is_said_of_a_finished_run(
    home: Path, finished: subprocess.CompletedProcess[str]
) -> None:
    """Its state, its logs; and it cannot be stopped."""
    found = json.loads(launch("status", "finished", "--home", home, "--json").stdout)
    assert found["state"] == "finished" and found["steps"] == 40
    assert found["traffic"]["relayed_bytes"] > 0 and found["traffic"]["malformed"] == 0
    (relay,) = found["relays"]
    assert relay["messages"] > 0 and relay["refused"] == 0
    assert launch("list", "--home", home).stdout.split()[:2] == ["finished", "finished"]
    assert "START RequestId" in launch("logs", "finished", "--home", home).stdout
    logs = launch("logs", "finished", "--home", home, "--slot", "1").stdout
    told = [line.split(": ", 1)[1] for line in logs.splitlines() if ": slot " in line]
    assert "slot 1, generation 1, restored start" in told
    assert all(line.startswith("slot 1, ") for line in told)
    stopped = launch("stop", "finished", "--home", home)
    assert stopped.returncode == RunEnded.exit_code and "is over" in stopped.stderr
    for command in (("attach",), ("scale", "1"), ("resume",)):
        result = launch(command[0], "finished", *command[1:], "--home", home)
        assert result.returncode == RunEnded.exit_code, result.stderr


def test_a_run_that_nobody_knows(home: Path) -> None:
    """Every command says so."""
    commands = [("scale", "2"), *[(name,) for name in ("status", "logs", "stop", "rm")]]
    for command in (*commands, ("attach",), ("resume",)):
        result = launch(command[0], "nobody", *command[1:], "--home", home)
        assert result.returncode == RunUnknown.exit_code
        assert result.stderr.startswith("p2p-launch: there is no run nobody")


@pytest.mark.parametrize("when", ["run ", "step "])
def test_a_run_is_stopped_from_elsewhere_and_removed(home: Path, job: Path, when: str) -> None:
    """While it boots and in the middle; the launcher that follows it ends as well."""
    command = [Path(sys.executable).parent / "p2p-launch", "run", job, "--home", home]
    command += ["--peers", "2", "--set", "steps=1000000", "--run-id", "stopped"]
    run = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    assert any(line.startswith(when) for line in run.stderr)
    found = json.loads(launch("status", "stopped", "--home", home, "--json").stdout)
    assert found["state"] == "running"
    assert "stopped" in launch("list", "--home", home).stdout
    assert launch("stop", "stopped", "--home", home).returncode == 0
    _, rest = run.communicate(timeout=20)
    assert run.returncode == RunStopped.exit_code, rest
    assert launch("rm", "stopped", "--home", home).returncode == 0
    assert not (home / "runs" / "stopped").exists()


def test_a_run_is_stopped_while_its_job_is_looked_at(home: Path, job: Path) -> None:
    """Nothing is left of it, not even what looks at the job."""
    slow = job.with_name("slow.py")
    slow.write_text("import time\ntime.sleep(100)\n")
    command = [Path(sys.executable).parent / "p2p-launch", "run", slow, "--home", home]
    command += ["--run-id", "early"]
    run = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    folder, until = RunFolder(home / "runs" / "early"), time.monotonic() + 30
    while not folder.alive():
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.02)
    assert launch("stop", "early", "--home", home).returncode == 0
    _, rest = run.communicate(timeout=30)
    assert run.returncode == RunStopped.exit_code, rest
    assert rest == "p2p-launch: run early was stopped before it began\n"
    assert not folder.exists()


@pytest.mark.acceptance
def test_a_run_is_stopped_though_its_registry_hangs(home: Path, job: Path) -> None:
    """The supervisor needs no registry to end what it owns."""
    command = [Path(sys.executable).parent / "p2p-launch", "run", job, "--home", home]
    command += ["--peers", "2", "--set", "steps=1000000", "--run-id", "hung"]
    run = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    assert any(line.startswith("step ") for line in run.stderr)
    ready = json.loads((home / "runs" / "hung" / "supervisor.json").read_text())
    os.kill(ready["pids"]["registry"], signal.SIGSTOP)
    found = json.loads(launch("status", "hung", "--home", home, "--json").stdout)
    assert found["registry"] == "does not answer"
    assert launch("stop", "hung", "--home", home).returncode == 0
    _, rest = run.communicate(timeout=20)
    assert run.returncode == RunStopped.exit_code, rest
    found = json.loads(launch("status", "hung", "--home", home, "--json").stdout)
    assert found["state"] == "stopped"


def test_a_stopped_run_is_resumed_and_scaled(home: Path, job: Path) -> None:
    """It goes on from its newest checkpoint, with as many peers as it is told, to the same bits."""
    options = ("--home", home, "--peers", "2", "--shards", "3", "--set", "steps=1500")
    whole = launch("run", job, *options, "--run-id", "whole", "--json")
    command = [Path(sys.executable).parent / "p2p-launch", "run", job, *options]
    run = subprocess.Popen(
        [*map(str, command), "--run-id", "taken-up"], stderr=subprocess.PIPE, text=True
    )
    assert run.stderr is not None
    assert any(line.startswith("step ") and " 0:" in line for line in run.stderr)
    assert launch("scale", "taken-up", "4", "--home", home).returncode == InputError.exit_code
    assert launch("scale", "taken-up", "3", "--home", home).returncode == 0
    assert any("slot 2: rejoined" in line for line in run.stderr)
    assert launch("stop", "taken-up", "--home", home).returncode == 0
    run.communicate(timeout=30)
    resumed = launch("resume", "taken-up", "--home", home, "--json")
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert (summary["state"], summary["steps"]) == ("finished", 1500)
    assert summary["digest"] == json.loads(whole.stdout)["digest"]
