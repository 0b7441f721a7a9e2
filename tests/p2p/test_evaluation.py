"""Evaluation in a function of its own: once for each state, however often it is called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint import open_storage
from fault.records import Timing
from fault.registry import Registry
from launcher.registry_server import RegistryServer
from p2p.evaluation import Evaluator, StateSender, state_name
from p2p.job import load_task
from p2p.spec import RunSpec, job_digest
from p2p.state import TrainingState

JOB = """
import torch
from p2p import Task


def task(raises: bool = False):
    def evaluate(model):
        if raises:
            raise ValueError("no data to evaluate on")
        return {"weight": model.weight.sum().item(), "training": float(model.training)}

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return Task(
        model=torch.nn.Linear(4, 1),
        dataset=torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
        loss=torch.nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        batch_size=16,
        steps=40,
        evaluate=evaluate,
    )
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    server = RegistryServer(tmp_path_factory.mktemp("run"))
    server.start()
    yield server
    server.stop()


class Peer:
    """What a sender needs of its peer, with a real registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.asked: list[int] = []
        self.warnings: list[str] = []

    def record_once(self, kind: str, key: str, fields: dict[str, object]) -> bool:
        return self.registry.event(kind, key, fields)

    def evaluate(self, step: int) -> None:
        self.asked.append(step)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def begin(
    server: RegistryServer, folder: Path, run: str, **settings: str
) -> tuple[Registry, RunSpec]:
    job = folder / "job.py"
    job.write_text(JOB)
    spec = RunSpec(
        run=run,
        job=str(job),
        settings=tuple(settings.items()),
        job_digest=job_digest(job),
        seed=0,
        shards=2,
        slots=2,
        steps=40,
        samples=64,
        folder=str(folder),
        relays=("ipc:///nowhere",),
        sockets="",
        checkpoints=(folder / "checkpoints").as_uri(),
        evaluate_every=4,
    )
    registry = Registry(server.socket, run, Timing())
    assert registry.create(spec.to_json(), 2)
    return registry, spec


def metrics(registry: Registry) -> list[dict[str, object]]:
    return [event.fields for event in registry.read_events() if event.kind == "metrics"]


def test_two_members_send_one_state_and_it_is_evaluated_once(
    server: RegistryServer, tmp_path: Path
) -> None:
    """Of two that store it one has it evaluated; of two deliveries one evaluates."""
    registry, spec = begin(server, tmp_path, "twice")
    task = load_task(Path(spec.job), {})
    state = TrainingState(task)
    storage = open_storage(spec.checkpoints)
    peers = [Peer(registry), Peer(registry)]
    for peer in peers:
        sender = StateSender(storage, peer)
        assert sender.submit(8, state.image)
        sender.close(10.0)
    assert [peer.asked for peer in peers] == [[8], []] and not peers[0].warnings
    evaluator = Evaluator()
    url = f"unix://{server.socket}"
    first, second = (evaluator.evaluate("twice", url, 8) for _ in range(2))
    assert "metrics" in first and "reason" in second
    weight = float(task.model.weight.detach().sum())
    expected = {"step": 8, "epoch": 2.0, "values": {"weight": weight, "training": 0.0}}
    assert metrics(registry) == [expected]
    assert storage.get(state_name(8)) is None
    json.dumps(first)  # it is what the function returns


def test_what_evaluate_raises_is_a_warning(server: RegistryServer, tmp_path: Path) -> None:
    """It would raise again, so it is not tried again; the run goes on without that result."""
    registry, spec = begin(server, tmp_path, "raises", raises="yes")
    state = TrainingState(load_task(Path(spec.job), {}))
    open_storage(spec.checkpoints).put(state_name(4), [state.image()])
    Evaluator().evaluate("raises", f"unix://{server.socket}", 4)
    assert [found["values"] for found in metrics(registry)] == [{}]
    (warning,) = [event for event in registry.read_events() if event.kind == "warning"]
    assert "no data to evaluate on" in warning.fields["text"]
