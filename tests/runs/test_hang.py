"""A function whose computation stands still is as good as dead, and costs as little."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.live import play

JOB = '''
import os
import time

import torch
from p2p import Task


class Hangs(torch.utils.data.Dataset):
    """Stands still at one sample, once in the life of `marker`, or never without one."""

    def __init__(self, marker: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(64, 8, generator=generator)
        self.marker = marker

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int):
        if index == 40 and self.marker and os.path.exists(self.marker):
            try:
                os.unlink(self.marker)
            except FileNotFoundError:
                pass
            else:
                while True:
                    time.sleep(1)
        return self.inputs[index], self.inputs[index].sum()


def task(marker: str = "") -> Task:
    return Task(
        model=torch.nn.Linear(8, 1),
        dataset=Hangs(marker),
        loss=lambda output, target: torch.nn.functional.mse_loss(output[:, 0], target),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        batch_size=16,
        steps=40,
    )
'''


@pytest.mark.acceptance
@pytest.mark.timeout(300)
@pytest.mark.parametrize("peers", [1, 2])
def test_a_hang_changes_nothing(peers: int, tmp_path: Path) -> None:
    """A hung peer is evicted by the others, or ended by its own watchdog, and its work adopted."""
    job, marker = tmp_path / "job.py", tmp_path / "marker"
    job.write_text(JOB)
    options = ["--peers", str(peers), "--shards", "2", "--patience", "2"]
    reference = play(job, tmp_path / "home", "reference", options, [])
    assert reference.summary["deaths"] == 0
    marker.touch()
    # the look at the job before the start must not be what hangs
    hung = play(job, tmp_path / "home", "hung", [*options, "--set", f"marker={marker}"], [])
    assert not marker.exists()
    assert hung.summary["deaths"] >= 1
    assert hung.weights == reference.weights
