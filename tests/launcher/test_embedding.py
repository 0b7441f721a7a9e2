"""A program can run a job as the command does."""

from __future__ import annotations

from pathlib import Path

import pytest

import launcher
from fault.errors import InputError
from fault.registry import Event
from launcher.summary import Story

JOB = """
import os
from pathlib import Path

import torch
from p2p import Task

with Path(__file__).with_name("runners").open("a") as file:
    print(os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "a process"), file=file)


def evaluate(model: torch.nn.Module) -> dict[str, float]:
    model.weight.data.zero_()
    raise RuntimeError("no evaluation today")


def task(steps: int = 8, evaluates: bool = False) -> Task:
    inputs = torch.linspace(-1, 1, 32).reshape(16, 2)
    return Task(
        model=torch.nn.Linear(2, 1),
        dataset=torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)),
        loss=torch.nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        steps=steps,
        evaluate=evaluate if evaluates else None,
    )
"""


def test_a_run_from_a_program(tmp_path: Path) -> None:
    """`launcher.run` returns the summary, shows events, and leaves weights that load.

    The job is run by a function that looks at it, and by the one peer, and by nobody else.
    """
    from safetensors.torch import load_file

    job = tmp_path / "job.py"
    job.write_text(JOB)
    kinds: list[str] = []

    def show(story: Story, events: list[Event]) -> None:
        kinds.extend(event.kind for event in events)

    summary = launcher.run(
        job, home=tmp_path / "home", show=show, peers=1, shards=2, settings={"steps": "12"}
    )
    assert (summary["state"], summary["steps"], summary["shards"]) == ("finished", 12, 2)
    assert "view" in kinds and "outcome" in kinds
    runners = (tmp_path / "runners").read_text("utf-8")
    assert runners.splitlines() == ["mayfly-look", "mayfly"]
    weights = load_file(Path(summary["folder"]) / "final.safetensors")
    assert sorted(weights) == ["bias", "weight"]
    evaluated = launcher.run(
        job,
        home=tmp_path / "home",
        peers=1,
        shards=2,
        settings={"steps": "12", "evaluates": "yes"},
    )
    # it broke the model it was given, and raised: neither is of any consequence
    assert (evaluated["state"], evaluated["metrics"]) == ("finished", {})
    assert evaluated["digest"] == summary["digest"]


def test_wrong_options_raise(tmp_path: Path) -> None:
    """What does not go together is refused before anything is started."""
    with pytest.raises(InputError, match="shards"):
        launcher.run(tmp_path / "job.py", peers=4, shards=2)
