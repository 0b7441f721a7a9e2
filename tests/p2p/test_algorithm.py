"""A contribution is a pure function of state, step and shard; what a mean does to the state."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fault.errors import ImpureTask, InvalidTask
from p2p import Task
from p2p.algorithm import GradientAveraging, Vector, probe
from p2p.collectives.memory import PlainMemory
from p2p.handout import GradientInPieces
from p2p.plan import Plan
from p2p.seeding import configure_determinism, seeded
from p2p.state import TrainingState

SHARDS = 3


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    configure_determinism(1)


def nothing() -> None:
    pass


def data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (samples,), generator=generator))


class Setting:
    """A task with its state, plan and algorithm."""

    def __init__(self, model: nn.Module, shards: int = SHARDS, **changes: Any) -> None:
        defaults: dict[str, Any] = {
            "dataset": data(50),
            "loss": nn.CrossEntropyLoss(),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
            "batch_size": 12,
            "steps": 20,
        }
        self.task = Task(model=model, **{**defaults, **changes})
        self.plan = Plan(
            len(self.task.dataset),
            shards,
            self.task.batch_size,
            steps=20,
            accumulate=self.task.accumulate,
        )
        self.state = TrainingState(self.task)
        self.algorithm = GradientAveraging(self.task, self.state, self.plan)

    def contributions(self) -> list[Vector]:
        return [self.algorithm.contribution(v, nothing) for v in range(self.plan.shards)]

    def mean(self) -> Vector:
        total, *others = self.contributions()
        for other in others:
            total += other
        return total

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.algorithm.apply(self.mean())

    def tensor(self, name: str) -> Tensor:
        return next(e.tensor for e in self.state.flat.entries if e.name == name)


class Partly(nn.Module):
    """Some parameters never get a gradient, some not from every batch, one gets a sparse one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.unused = nn.Linear(6, 5), nn.Linear(5, 7)
        self.table = nn.Embedding(3, 5, sparse=True)
        self.last, self.seldom = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs)) + self.table((inputs[:, 0] > 0).long())
        output: Tensor = self.last(hidden)
        return output + self.seldom(hidden) if inputs[0, 0] > 0 else output


class Filled(PlainMemory):
    """Memory that others have used."""

    def __init__(self, value: float) -> None:
        self.value = value

    def take(self, length: int) -> Vector:
        return np.full(length, self.value, np.float32)


class Stateful(nn.Module):
    """Changes buffers in place and by replacing them, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.BatchNorm1d(6)
        self.first = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.4)
        self.last = nn.Linear(8, 3)
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.tensor([False, True, False]))
        self.register_buffer("constant", torch.tensor([0.1, float("inf"), float("nan"), -0.0]))
        self.also: nn.Module = nn.Module()
        self.also.register_buffer("calls", self.calls)

    def forward(self, inputs: Tensor) -> Tensor:
        self.replaced = 0.9 * self.replaced + 0.1 * torch.rand(3)
        self.calls += 3
        self.flags.logical_not_()
        scale = np.random.uniform(0.9, 1.1) * random.uniform(0.9, 1.1)
        output: Tensor = self.last(self.drop(torch.relu(self.first(self.norm(inputs))))) * scale
        return output


def generators() -> tuple[bytes, bytes, object]:
    state = np.random.get_state(legacy=False)
    numpys = state["state"].pop("key").tobytes() + repr(state).encode()
    return torch.get_rng_state().numpy().tobytes(), numpys, random.getstate()


# --- purity ---------------------------------------------------------------------------------


def test_a_contribution_leaves_state_and_generators_untouched() -> None:
    """Buffers changed in place or replaced, gradients, modes and generators are as before."""
    setting = Setting(Stateful())
    setting.steps(2)
    registered = {name: id(b) for name, b in setting.state.model.named_buffers()}
    before = setting.state.image(), generators()
    for shard in range(SHARDS):
        setting.algorithm.contribution(shard, nothing)
    assert (setting.state.image(), generators()) == before
    assert {name: id(b) for name, b in setting.state.model.named_buffers()} == registered
    assert all(parameter.grad is None for parameter in setting.state.model.parameters())


def test_a_contribution_depends_on_state_step_and_shard_alone() -> None:
    """Order, repetition, what was computed between, modes, stray gradients and generators: none
    of them changes a bit, and each call's array is its own."""
    setting = Setting(Stateful())
    setting.steps(3)
    first = setting.contributions()
    copies = [vector.copy() for vector in first]
    model = setting.state.model.eval()
    torch.manual_seed(99)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.set_flush_denormal(True)
    with torch.no_grad():
        backwards = [setting.algorithm.contribution(v, nothing) for v in (2, 1, 1, 0)]
    for vector, shard in zip(backwards, (2, 1, 1, 0), strict=True):
        assert vector.tobytes() == copies[shard].tobytes()
    assert [vector.tobytes() for vector in first] == [vector.tobytes() for vector in copies]
    assert len({vector.tobytes() for vector in first}) == SHARDS


def test_a_contribution_that_raises_leaves_the_state_untouched() -> None:
    """A sample or a forward pass that raises changes nothing, and the next call is as ever."""

    class Fragile(Stateful):
        broken = False

        def forward(self, inputs: Tensor) -> Tensor:
            output = super().forward(inputs)
            if self.broken:
                raise ZeroDivisionError("the user's own")
            return output

    model = Fragile()
    setting = Setting(model, accumulate=2)
    setting.steps(1)
    expected = setting.algorithm.contribution(1, nothing)
    before = setting.state.image(), generators()
    model.broken = True
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        setting.algorithm.contribution(1, nothing)
    assert (setting.state.image(), generators()) == before
    model.broken = False
    assert setting.algorithm.contribution(1, nothing).tobytes() == expected.tobytes()


def test_apply_is_a_pure_function_of_state_and_mean() -> None:
    """The mean is not changed even by an optimizer that clips gradients in place, and noise that
    an optimizer draws is the same in each process."""

    class NoisyClipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            parameters = [p for p in self.param_groups[0]["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(parameters, 0.01)
            for parameter in parameters:
                parameter.grad.add_(torch.randn_like(parameter), alpha=0.01)
            return super().step(closure)

    digests = set()
    for history in (1, 2):
        setting = Setting(Stateful(), optimizer=lambda p: NoisyClipping(p, lr=0.1))
        mean = setting.mean()
        torch.manual_seed(history)
        before = mean.tobytes(), generators()
        setting.algorithm.apply(mean)
        assert (mean.tobytes(), generators()) == before
        assert setting.state.step == 1
        digests.add(setting.state.digest())
    assert len(digests) == 1


FRESH_AND_OLD = """
import sys
from p2p.algorithm import GradientAveraging, probe
from p2p.job import load_task
from p2p.plan import Plan
from p2p.seeding import configure_determinism
from p2p.state import TrainingState
from pathlib import Path

configure_determinism(1)
task = load_task(Path(sys.argv[1]), {})
state = TrainingState(task)
plan = Plan(len(task.dataset), 4, task.batch_size, steps=task.steps, seed=task.seed)
algorithm = GradientAveraging(task, state, plan)
image = Path(sys.argv[2])
if sys.argv[3] == "old":
    print(probe(state, algorithm))
    start = state.image()
    for step in range(6):
        if step == 4:
            image.write_bytes(state.image())
        mean = algorithm.contribution(0, lambda: None)
        for shard in (1, 2, 3):
            mean += algorithm.contribution(shard, lambda: None)
        algorithm.apply(mean)
        state.evaluate(task)
    state.load(image.read_bytes())
    for shard in (3, 1, 0, 2):
        algorithm.contribution(shard, lambda: None)
else:
    print(probe(state, algorithm))
    state.load(image.read_bytes())
print(state.digest(), algorithm.contribution(2, lambda: None).tobytes().hex())
"""

JOB = """
import random
import numpy as np
import torch
from torch import nn
from p2p import Task

class Noisy:
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(75, 2, 9, 9, generator=generator)
    def __len__(self):
        return 75
    def __getitem__(self, i):
        return self.images[i].roll(random.randrange(3), 1) * np.random.rand(), i % 5

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 7, 3)
        self.norm = nn.BatchNorm2d(7)
        self.drop = nn.Dropout(0.3)
        self.lstm = nn.LSTM(49, 11, batch_first=True)
        self.attention = nn.MultiheadAttention(11, 1, dropout=0.1, batch_first=True)
        self.table = nn.Embedding(7, 11)
        self.head = nn.Linear(11, 5)
    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.conv(x.float())))).flatten(2)
        x = self.lstm(x)[0] + self.table(torch.arange(7))
        x = self.attention(x, x, x)[0]
        return self.head(x[:, torch.tensor([0, 0, 3])].sum(1))

def task():
    return Task(Model(), Noisy(), nn.CrossEntropyLoss(), lambda p: torch.optim.Adam(p),
        batch_size=40, steps=30, evaluate=lambda m: {"x": float(m(torch.randn(3, 2, 9, 9)).sum())})
"""


def test_a_contribution_does_not_depend_on_the_process_history(tmp_path: Path) -> None:
    """A fresh process that loads a state computes the same bits as one that trained, evaluated
    and computed other shards before; and their probes agree."""
    job = tmp_path / "job.py"
    job.write_text(JOB)
    outputs = []
    for kind in ("old", "fresh"):
        command = [sys.executable, "-c", FRESH_AND_OLD, str(job), str(tmp_path / "image")]
        done = subprocess.run(
            [*command, kind],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    old, fresh = outputs
    assert old == fresh
    assert len(old) == 3


def test_seeding_is_the_formula_and_puts_generators_back() -> None:
    """The numbers drawn follow from (seed, step, shard) alone; nested and failing blocks too."""

    def drawn(seed: int, step: int, shard: int) -> tuple[float, ...]:
        with seeded(seed, step, shard):
            return torch.rand(()).item(), float(np.random.rand()), random.random()

    before = generators()
    numbers = {where: drawn(*where) for where in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len({value for values in numbers.values() for value in values}) == 12
    torch.randn(1)  # leaves half a pair of normal numbers in the generator
    middle = generators()
    with pytest.raises(KeyError), seeded(3, 4, 5):
        assert drawn(0, 0, 1) == numbers[0, 0, 1]
        raise KeyError
    assert generators() == middle != before
    for _ in range(4):  # NumPy's pair: one half is left, and then taken
        np.random.standard_normal()
        middle = generators()
        for _ in range(2):
            with seeded(3, 4, 5):
                once = np.random.standard_normal()
                with seeded(0, 0, 0):
                    np.random.standard_normal(3)
                twice = np.random.standard_normal()
            assert generators() == middle
        with seeded(3, 4, 5):
            assert [once, twice] == [*np.random.standard_normal(2)]
    shared = np.random.Generator(vars(np.random)["get_bit_generator"]())
    drawn_from_shared = set()
    for drawn_before in (1, 2, 1):  # which leave NumPy's memory alike
        np.random.seed(0)
        normals = [np.random.standard_normal() for _ in range(drawn_before)]
        with seeded(3, 4, 5):
            drawn_from_shared.add(shared.integers(1 << 62))
        normals += [np.random.standard_normal() for _ in range(3 - drawn_before)]
        np.random.seed(0)
        assert normals == [*np.random.standard_normal(3)]
    assert len(drawn_from_shared) == 1


def test_another_generator_of_numpys_is_refused() -> None:
    """Its state is not known; it stays as it is. So does one that comes in the middle."""
    exchange, given = vars(np.random)["set_bit_generator"], vars(np.random)["get_bit_generator"]()
    other = np.random.PCG64(1)
    exchange(other)
    try:
        before = other.state
        with pytest.raises(InvalidTask, match="is a PCG64"), seeded(3, 4, 5):
            pass
        assert other.state == before
        exchange(np.random.MT19937(1))
        with seeded(3, 4, 5):
            exchange(np.random.PCG64(1))
        with pytest.raises(InvalidTask, match="is a PCG64"), seeded(3, 4, 5):
            pass
    finally:
        exchange(given)


# --- what a model may not do ----------------------------------------------------------------


class Renormalizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, max_norm=0.5)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = self.table(inputs[:, 0].abs().long())
        output: Tensor = self.last(inputs + chosen)
        return output


class Clamping(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(inputs)


class Replacing(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        output = super().forward(inputs)
        self.weight = nn.Parameter(self.weight.detach() * 2)
        return output


class Growing(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        self.register_buffer("seen", inputs.detach())
        return super().forward(inputs)


class Reshaping(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs.detach()
        return super().forward(inputs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Renormalizing, "changes the parameter 'table.weight' in place"),
        (lambda: Clamping(6, 3), "changes the parameter 'weight' in place"),
        (lambda: Replacing(6, 3), "replaces the parameter 'weight' of Replacing"),
        (lambda: Growing(6, 3), "the buffer 'seen' of Growing"),
        (Reshaping, "the buffer 'seen' by something of another dtype or shape"),
    ],
)
def test_models_that_change_what_only_a_step_may_are_refused(
    model: Callable[[], nn.Module], message: str
) -> None:
    """In-place changes of parameters, also behind autograd's back, and changes of the layout."""
    setting = Setting(model())
    with pytest.raises(InvalidTask, match=message):
        setting.algorithm.contribution(0, nothing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"a tensor of shape \(4,\)"),
        ({"loss": lambda output, target: 1.0}, "returned of type float"),
        ({"dataset": torch.randn(50, 6)}, r"dataset\[\d+\] is a tensor of shape \(6,\)"),
        ({"dataset": [(1, 2, 3)] * 50}, "not a pair"),
    ],
)
def test_losses_and_samples_are_checked(changes: dict[str, Any], message: str) -> None:
    """A loss that is no mean and a sample that is no pair are InvalidTask and say what they are."""
    setting = Setting(nn.Linear(6, 3), **changes)
    with pytest.raises(InvalidTask, match=message):
        setting.algorithm.contribution(0, nothing)


def test_a_model_without_parameters_to_train_is_refused() -> None:
    """There must be something to train."""
    with pytest.raises(InvalidTask, match="no parameter that requires a gradient"):
        Setting(nn.Linear(6, 3).requires_grad_(False))


# --- gradients ------------------------------------------------------------------------------


class Branching(nn.Module):
    """Uses `rare` only for batches with a sample of class 2, and `never` not at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.usual = nn.Linear(6, 3)
        self.rare = nn.Linear(6, 3)
        self.never = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.usual(inputs)
        if inputs[:, 0].max() > 1.5:
            output = output + self.rare(inputs)
        return output


def test_a_missing_gradient_is_not_zero() -> None:
    """AdamW leaves parameters without a gradient alone, and treats one that some shards lack as
    a mean with zeros."""
    setting = Setting(Branching())
    never = setting.tensor("never.weight").clone()
    rare = [e.name for e in setting.state.flat.trainable].index("rare.weight")
    lacking = set()
    for _ in range(20):
        vectors = setting.contributions()
        marks = [setting.algorithm._split_marks(vector)[0][rare] for vector in vectors]
        lacking.add(sum(bool(mark) for mark in marks))
        before = setting.tensor("rare.weight").clone()
        mean = vectors[0] + vectors[1] + vectors[2]
        setting.algorithm.apply(mean)
        assert torch.equal(setting.tensor("rare.weight"), before) == (not any(marks))
    assert {0, 1} <= lacking
    assert torch.equal(setting.tensor("never.weight"), never)
    states = setting.state.optimizer.state
    assert setting.tensor("never.weight") not in states
    assert setting.tensor("rare.weight") in states


def test_a_zero_gradient_is_not_missing() -> None:
    """A parameter whose gradient is zero is decayed by AdamW, as in an ordinary loop."""

    class Zeroed(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, :3] * 1.0 + 0.0 * super().forward(inputs)

    setting = Setting(Zeroed(6, 3))
    before = setting.tensor("weight").clone()
    setting.steps(1)
    torch.testing.assert_close(setting.tensor("weight"), before * (1 - 0.01 * 0.1))


def test_sparse_gradients_become_dense() -> None:
    """An embedding with sparse gradients trains like one with dense ones."""

    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.table = nn.Embedding(9, 3, sparse=sparse)

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.table(inputs.abs().long()).sum(1)
            return output

    settings = [Setting(Words(sparse), accumulate=2) for sparse in (True, False)]
    for setting in settings:
        setting.steps(3)
    first, second = (setting.tensor("table.weight") for setting in settings)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_the_sum_is_the_gradient_of_the_global_batch() -> None:
    """Weights n_v / n: over uneven shards, and with micro-batches, the sum is the mean gradient
    over the global batch, last incomplete batch included."""
    for shards, accumulate in ((3, 1), (3, 2), (4, 5), (1, 3)):
        torch.manual_seed(1)
        setting = Setting(
            nn.Linear(6, 3), shards, accumulate=accumulate, batch_size=14, dataset=data(50)
        )
        for step in range(4):
            assert setting.plan.batch_size_at(step) == (8 if step == 3 else 14)
            indices = [
                index
                for shard in range(shards)
                for part in setting.plan.micro_batches(shard, step)
                for index in part
            ]
            inputs, targets = setting.task.dataset[indices]
            model = nn.Linear(6, 3)
            model.load_state_dict(setting.state.named_tensors())
            loss = nn.CrossEntropyLoss()(model(inputs), targets)
            loss.backward()
            mean = setting.mean()
            for part in setting.algorithm._gradients:
                plain = dict(model.named_parameters())[part.entry.name].grad
                torch.testing.assert_close(
                    part.view(torch.from_numpy(mean)), plain, atol=1e-6, rtol=1e-5
                )
            assert setting.algorithm.loss(mean) == pytest.approx(loss.item(), abs=1e-6)
            setting.algorithm.apply(mean)


def test_an_empty_shard_adds_zeros() -> None:
    """A shard without samples contributes zeros, computes nothing, and the others' weights sum to
    one; a step whose first shard is empty still advances the integer buffers."""
    model = Stateful()
    model.norm.eval()  # one sample is too few for it
    # the second step has one sample, which belongs to shard 1
    setting = Setting(model, shards=4, batch_size=9, dataset=data(10))
    setting.steps(1)
    assert setting.tensor("calls").item() == 3
    calls: list[int] = []
    vectors = [setting.algorithm.contribution(shard, lambda: calls.append(0)) for shard in range(4)]
    assert len(calls) == 2  # one sample, one micro-batch
    assert [bool(vector.any()) for vector in vectors] == [False, True, False, False]
    assert not vectors[0].view(np.uint32).any()
    setting.algorithm.apply(vectors[0] + vectors[1] + vectors[2] + vectors[3])
    assert setting.tensor("calls").item() == 6


# --- buffers --------------------------------------------------------------------------------


def test_integer_buffers_advance_once_per_step() -> None:
    """They take what the lowest shard's forward passes leave, to the last bit, at any size; tied
    ones stay one."""
    model = Stateful()
    model.calls += (1 << 62) + 12345
    setting = Setting(model, accumulate=2)
    setting.steps(3)
    # two micro-batches per step, as a loop that accumulates has two forward passes
    assert model.calls.item() == (1 << 62) + 12345 + 3 * 2 * 3
    assert model.also.calls is model.calls
    assert model.norm.num_batches_tracked.item() == 6
    assert model.flags.tolist() == [False, True, False]
    single = Setting(Stateful())
    single.steps(1)
    assert single.tensor("flags").tolist() == [True, False, True]
    assert single.tensor("norm.num_batches_tracked").item() == 1


def test_float_buffers_are_averaged_and_constants_keep_their_bits() -> None:
    """Statistics are the weighted mean over the shards; a buffer that no forward pass changed
    keeps every bit, though the weights of three shards do not sum to one exactly."""
    setting = Setting(Stateful(), batch_size=13, dataset=data(50))
    before = setting.tensor("constant").clone()
    expected = torch.zeros(6)
    for shard in range(SHARDS):
        inputs = setting.task.dataset[setting.plan.micro_batches(shard, 0)[0]][0]
        expected += setting.plan.weight(shard, 0) * 0.1 * inputs.mean(0)
    for _ in range(5):
        setting.steps(1)
        if setting.state.step == 1:
            torch.testing.assert_close(setting.tensor("norm.running_mean"), expected)
        kept = setting.tensor("constant")
        assert kept.view(torch.int32).tolist() == before.view(torch.int32).tolist()


# --- the rest -------------------------------------------------------------------------------


def test_progress_is_told_after_each_sample_and_each_micro_batch() -> None:
    """A watchdog sees every sample that was fetched and every micro-batch."""
    setting = Setting(nn.Linear(6, 3), accumulate=3)
    calls: list[int] = []
    setting.algorithm.contribution(0, lambda: calls.append(0))
    assert len(calls) == setting.plan.shard_size(0, 0) + 3


def test_a_loss_that_is_no_number_is_reported() -> None:
    """The mean's loss is not finite when any shard's is not; whether to go on is not decided."""
    setting = Setting(nn.Linear(6, 3), loss=lambda output, target: output.sum() * float("nan"))
    assert np.isnan(setting.algorithm.loss(setting.mean()))


def test_a_mean_of_another_length_is_refused() -> None:
    """A vector that is no mean of this task never reaches the state."""
    setting = Setting(nn.Linear(6, 3))
    before = setting.state.digest()
    with pytest.raises(ValueError, match="expected"):
        setting.algorithm.apply(np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="expected"):
        setting.algorithm.apply(np.zeros(setting.algorithm.length))
    assert setting.state.digest() == before


def test_modes_stay_as_the_task_set_them() -> None:
    """A module in evaluation mode stays in it; a whole model in that mode is to be trained."""
    frozen = Stateful()
    frozen.norm.eval()
    setting = Setting(frozen)
    setting.steps(2)
    assert setting.tensor("norm.num_batches_tracked").item() == 0
    assert not setting.tensor("norm.running_mean").any()
    pretrained = Stateful().eval()
    setting = Setting(pretrained)
    setting.steps(2)
    assert setting.tensor("norm.num_batches_tracked").item() == 2


def test_a_probe_puts_the_state_back_and_knows_the_task() -> None:
    """Equal tasks have equal probes, another seed has another; only before the first step."""
    probes = []
    for seed in (0, 0, 1):
        setting = Setting(Stateful(), seed=seed)
        before = setting.state.image(), generators()
        probes.append(probe(setting.state, setting.algorithm))
        assert (setting.state.image(), generators()) == before
        assert not setting.state.optimizer.state
    assert probes[0] == probes[1] != probes[2]
    setting.steps(1)
    with pytest.raises(ValueError, match="before step 0"):
        probe(setting.state, setting.algorithm)


def test_a_rehearsal_finds_a_batch_too_small_for_batch_normalization() -> None:
    """The one sample that some shard gets in an epoch's last step is found before the run."""
    setting = Setting(Stateful(), shards=2, batch_size=10, dataset=data(33))
    with pytest.raises(InvalidTask, match="at step 3, shard 1 computes a batch of 1, too few"):
        setting.algorithm.rehearse(nothing)
    fine = Setting(Stateful(), shards=2, batch_size=10, dataset=data(34))
    before = fine.state.image()
    fine.algorithm.rehearse(nothing)
    assert fine.state.image() == before


def test_a_rehearsal_finds_a_job_with_a_memory_of_its_own() -> None:
    """A generator that the dataset keeps makes the same contribution differ; it is named."""

    class Remembering:
        def __init__(self) -> None:
            self.drawn = np.random.default_rng(0)

        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((6,), self.drawn.random(), dtype=torch.float32), index % 3

    setting = Setting(nn.Linear(6, 3), dataset=Remembering())
    with pytest.raises(ImpureTask, match="first in the gradient of 'weight'"):
        setting.algorithm.rehearse(nothing)


class ReadsWhatItNeverWrote(nn.Module):
    """In the forward pass, in the backward pass, or nowhere."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            x = x + torch.empty(6)
        out: Tensor = self.layer(x)
        if self.where == "backward":
            out.register_hook(lambda gradient: gradient + torch.empty(3))
        return out


@pytest.mark.parametrize("where", ["forward", "backward", ""])
def test_a_rehearsal_finds_what_reads_memory_that_was_never_written(where: str) -> None:
    """Its bits would be those of whatever lay there."""
    setting = Setting(ReadsWhatItNeverWrote(where))
    if not where:
        assert setting.algorithm.rehearse(nothing)
        return
    with pytest.raises(ImpureTask, match=r"first in the gradient of 'layer.weight': .*never writt"):
        setting.algorithm.rehearse(nothing)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_memory_is_filled_but_for_contributions() -> None:
    """A model that is not initialised, and what an optimizer keeps, are alike in each process."""
    fills: list[bool] = []

    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            fills.append(torch.utils.deterministic.fill_uninitialized_memory)
            return super().forward(x)

    class Keeping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["history"] = torch.empty(5, *parameter.shape)
            return super().step(closure)

    setting = Setting(Looking(6, 3), optimizer=lambda parameters: Keeping(parameters, 0.1))
    setting.algorithm.apply(setting.algorithm.contribution(0, nothing))
    assert fills == [False] and torch.empty(4).isnan().all()
    kept = setting.state.optimizer.state.values()
    assert all(each["history"].isnan().all() for each in kept) and len(kept) == 2


def test_every_part_of_a_contribution_has_a_name() -> None:
    """Whatever differs between two contributions can be told in words."""
    algorithm = Setting(Stateful()).algorithm
    vector = np.arange(algorithm.length, dtype=np.float32)
    tensors = algorithm.tensors(vector)
    assert {"gradient of 'first.weight'", "buffer 'replaced'"} <= set(tensors)
    assert "buffer 'norm.num_batches_tracked'" in tensors and list(tensors)[-1] == "loss"
    assert np.all(np.diff(np.concatenate(list(tensors.values()))) > 0)


# --- parts that are handed out ----------------------------------------------------------------


class Wide(nn.Module):
    """Layers wide enough for several parts, one of which is used twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(6, 700), nn.Linear(700, 700)
        self.twice, self.last = nn.Linear(700, 700), nn.Linear(700, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.first(inputs))))
        output: Tensor = self.last(torch.tanh(self.twice(hidden)))
        return output


@pytest.mark.parametrize("accumulate", [1, 3])
def test_parts_that_are_handed_out_do_not_change_any_more(accumulate: int) -> None:
    """They come while the gradients do, reach to the last one, and the whole has the same bits."""
    torch.manual_seed(3)
    setting = Setting(Wide(), accumulate=accumulate)
    expected = setting.algorithm.contribution(1, nothing)
    parts: list[tuple[int, int, bytes]] = []

    def on_part(vector: Vector, start: int, stop: int) -> None:
        parts.append((start, stop, vector[start:stop].tobytes()))

    found = setting.algorithm.contribution(1, nothing, on_part)
    assert found.tobytes() == expected.tobytes()
    assert len(parts) == 1  # nothing before the unused layer is told of: its gradient never comes
    assert all(stop == setting.algorithm.gradient_length for _, stop, _ in parts)
    for start, stop, seen in parts:
        assert found[start:stop].tobytes() == seen


def test_parts_come_from_the_last_layer_to_the_first() -> None:
    torch.manual_seed(3)
    layers = [nn.Linear(6, 600), *[nn.Linear(600, 600) for _ in range(4)], nn.Linear(600, 3)]
    setting = Setting(nn.Sequential(*layers))
    starts: list[int] = []
    setting.algorithm.contribution(0, nothing, lambda vector, start, stop: starts.append(start))
    assert len(starts) == 4 and starts == sorted(starts, reverse=True) and starts[-1] < 100_000
    assert all(parameter.grad is None for parameter in setting.task.model.parameters())
    assert setting.algorithm.rehearse(nothing) is True


def test_a_parameter_that_only_an_earlier_micro_batch_uses() -> None:
    """The pass that completes the gradients does not come to it, and it has one all the same."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always = nn.Sequential(nn.Linear(6, 600), nn.Linear(600, 600), nn.Linear(600, 3))
            self.sometimes = nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.always(inputs)
            if len(inputs) > 1:
                output = output + self.sometimes(inputs)
            return output

    torch.manual_seed(3)
    setting = Setting(Fickle(), accumulate=3, batch_size=12, shards=3)
    sizes = [len(each) for each in setting.plan.micro_batches(0, 0)]
    assert max(sizes) > 1 and sizes[-1] == 1
    expected = setting.algorithm.contribution(0, nothing)
    found = setting.algorithm.contribution(0, nothing, lambda *_: None)
    assert found.tobytes() == expected.tobytes()


def test_a_backward_pass_in_pieces_is_noticed() -> None:
    """Reentrant checkpoints come to a shared layer twice: nothing of it may be handed out."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(6, 600), nn.Linear(600, 600)
            self.last = nn.Linear(600, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            for _ in range(2):
                hidden = checkpoint(self.shared, hidden, use_reentrant=True)
            output: Tensor = self.last(hidden)
            return output

    setting = Setting(Checkpointed())
    assert setting.algorithm.rehearse(nothing) is False
    with pytest.raises(GradientInPieces, match="--no-overlap"):
        setting.algorithm.contribution(0, nothing, lambda *_: None)
    assert setting.algorithm.rehearse(nothing) is False


@pytest.mark.parametrize(
    ("model", "shards", "step"), [(Partly, SHARDS, 0), (Stateful, SHARDS, 0), (Partly, 12, 4)]
)
def test_what_was_in_the_memory_before_leaves_no_trace(
    model: Callable[[], nn.Module], shards: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handed out in parts or not, and from shards without samples as well."""
    for module in ("p2p.algorithm", "p2p.handout"):
        monkeypatch.setattr(f"{module}.PART_ELEMENTS", 1)
    setting = Setting(model(), shards, optimizer=lambda each: torch.optim.SGD(each, 0.1))
    sizes = [setting.plan.shard_size(shard, step) for shard in range(shards)]
    assert (0 in sizes) is (shards > SHARDS)
    for shard in range(shards):
        for on_part in (None, lambda *_: None):
            found = set()
            for value in (0.0, 7.0, float("nan")):
                setting.algorithm.memory = Filled(value)
                vector = setting.algorithm.contribution_at(step, shard, nothing, on_part)
                found.add(vector.tobytes())
            assert len(found) == 1
