"""A state goes on from the store: its outline has no tensor, and makes the image whole again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fault.records import Timing
from launcher.store_server import StoreServer
from p2p.aggregate.averaging import DatabaseAveraging
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.outline import Memory, Outline, cut
from p2p.aggregate.parts import Built
from p2p.aggregate.places import Place
from p2p.algorithm import GradientAveraging
from p2p.plan import Plan
from p2p.spec import RunSpec
from p2p.state import TrainingState, digest_of
from p2p.task import Task

pytestmark = pytest.mark.timeout(300)
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreServer]]:
    servers = [StoreServer(tmp_path_factory.mktemp("store")) for _ in range(2)]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def urls(stores: list[StoreServer]) -> list[str]:
    for server in stores:
        with BulkConnection(server.url) as store:
            store.execute("FLUSHALL")
    return [server.url for server in stores]


def built(optimizer: str) -> Built:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(100, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 3))
    model[0].bias.requires_grad_(False)
    data = torch.utils.data.TensorDataset(torch.randn(8, 100), torch.zeros(8, 3))
    task = Task(model, data, nn.MSELoss(), OPTIMIZERS[optimizer], batch_size=8, steps=9)
    state = TrainingState(task)
    return Built(task, state, GradientAveraging(task, state, Plan(8, 2, 8, steps=9)))


def averaging(one: Built, slot: int, urls: list[str]) -> tuple[DatabaseAveraging, list[str]]:
    warnings: list[str] = []
    spec = RunSpec(
        *("r", "job.py", (), "", 0, 2, 2, 9, 8, "/", (), "file:///"),
        workers=1, stores=tuple(urls), prefix="r", aggregate="database", timing=Timing(),
    )  # fmt: skip
    return DatabaseAveraging(spec, slot, one, lambda worker: None, warnings.append), warnings


def step(one: Built, averaging: DatabaseAveraging) -> None:
    mean = sum(one.algorithm.contribution(shard, lambda: None) for shard in range(2))
    averaging.apply(np.asarray(mean, np.float32))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_outline_is_small_and_becomes_the_image(optimizer: str, urls: list[str]) -> None:
    """At the start and after steps, in the store where the state is and in another one."""
    one = built(optimizer)
    sender, warnings = averaging(one, 0, urls)
    for _ in range(3):
        image = one.state.image()
        sent = sender.outline()
        assert sent is not None and len(sent) < 8000 < len(image) / 10
        for slot in (0, 1):
            other = built(optimizer)
            receiver, _ = averaging(other, slot, urls)
            whole = receiver.whole(bytearray(sent))
            assert whole == image
            other.state.load(whole)
            step(other, receiver)
        step(one, sender)
        assert one.state.digest() == other.state.digest()
    assert not warnings


def test_who_goes_on_publishes_nothing_again(urls: list[str]) -> None:
    """The state that was taken over is in the place where it was found, and nowhere else."""
    one, other = built("adam"), built("adam")
    sender, _ = averaging(one, 0, urls[:1])
    step(one, sender)
    sent = sender.outline()
    assert sent is not None
    with BulkConnection(urls[0]) as store:
        before = store.execute("KEYS", "r:1:*")
        receiver, _ = averaging(other, 0, urls[:1])
        other.state.load(receiver.whole(bytearray(sent)))
        step(other, receiver)
        assert sorted(store.execute("KEYS", "r:1:*")) == sorted(before)  # type: ignore[arg-type, type-var]


def test_a_held_place_outlasts_steps_and_then_goes(urls: list[str]) -> None:
    """Whoever was told of a place finds it, though others train on; nothing is left for ever."""
    one = built("momentum")
    sender, _ = averaging(one, 0, urls[:1])
    step(one, sender)
    image, sent = one.state.image(), sender.outline()
    assert sent is not None
    for _ in range(4):
        step(one, sender)
    receiver, _ = averaging(built("momentum"), 1, urls[:1])
    assert receiver.whole(bytearray(sent)) == image
    outline = Outline.from_bytes(sent)
    assert outline is not None
    with BulkConnection(urls[0]) as store:
        store.execute("DEL", Place(outline.place).held)
        step(one, sender)
        assert store.execute("KEYS", f"{outline.place}*") == []
        assert len(store.execute("KEYS", "*:ready")) == 2  # type: ignore[arg-type]
    assert receiver.whole(bytearray(sent)) == b""


def test_without_a_store_the_whole_image_is_sent(urls: list[str], tmp_path: Path) -> None:
    """A store that is away is no reason to let a candidate wait."""
    one = built("adam")
    sender, warnings = averaging(one, 0, [f"unix://{tmp_path}/none"])
    assert sender.outline() is None
    assert len(warnings) == 1 and warnings[0].startswith("a state is sent without the store")
    assert sender.whole(bytearray(one.state.image())) == one.state.image()


def test_a_damaged_outline_is_no_error(urls: list[str]) -> None:
    """Whichever of its bytes is another one: what comes of it is for its digest to refuse."""
    one = built("momentum")
    sender, _ = averaging(one, 0, urls[:1])
    step(one, sender)
    sent = sender.outline()
    assert sent is not None
    receiver, _ = averaging(built("momentum"), 1, urls[:1])
    refused = 0
    for place in range(0, len(sent), 3):
        damaged = bytearray(sent)
        damaged[place] ^= 0x55
        refused += digest_of(receiver.whole(damaged)) != one.state.digest()
    assert refused > len(sent) / 6


def test_pieces_are_cut_where_stored_memory_begins_and_ends() -> None:
    """Whatever overlaps: bytes before, between and after stored memories are carried."""
    memory = np.arange(100, dtype=np.uint8)
    stored = [Memory.of(memory[60:90], "b", 7), Memory.of(memory[10:40], "a")]
    stored += [Memory.of(memory[50:50], "empty")]
    pieces = cut([b"head", memory.data, memory[20:30].data, memory[95:].data], stored)
    shown = [piece if isinstance(piece, bytes) else tuple(piece) for piece in pieces]
    assert shown == [
        b"head",
        *(
            bytes(range(10)),
            ("a", 0, 30),
            bytes(range(40, 60)),
            ("b", 7, 37),
            bytes(range(90, 100)),
        ),
        ("a", 10, 20),
        bytes(range(95, 100)),
    ]
    tensors = {"a": memory[10:40], "b": memory[53:90]}
    outline = replace(Outline(3, 0, "p", ()), pieces=pieces)
    again = Outline.from_bytes(outline.to_bytes())
    assert again is not None
    expected = b"head" + memory.tobytes() + memory[20:30].tobytes() + memory[95:].tobytes()
    assert again.image(tensors.__getitem__) == expected


@pytest.mark.parametrize("data", [b"", b"MAYFLY\0\1", b"\xc0", b"\x95\1\2\3\4\5", bytes(100)])
def test_what_is_no_outline_is_not_taken_for_one(data: bytes) -> None:
    assert Outline.from_bytes(data) is None
    assert digest_of(data)
