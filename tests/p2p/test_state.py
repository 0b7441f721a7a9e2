"""What a training state can hold, and that an image is all of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import TensorDataset
from xxhash import xxh3_128_hexdigest

from fault.errors import InvalidTask
from p2p import Task
from p2p.algorithm import GradientAveraging
from p2p.image import TreeWriter
from p2p.plan import Plan
from p2p.seeding import configure_determinism
from p2p.state import TrainingState, digest_of

SHARDS = 2


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    configure_determinism(1)


class Everything(nn.Module):
    """Tied weights, parameters without a gradient, frozen ones, buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.columns = nn.Parameter(torch.randn(5, 3).t())
        self.head = nn.Linear(5, 3)
        self.register_buffer("table", torch.arange(15, dtype=torch.int32).reshape(3, 5))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))
        self.register_buffer("small", torch.tensor([1, 2, 255], dtype=torch.uint8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = self.calls + 1  # replaced, not changed in place
        self.scratch.mul_(0.9).add_(inputs.mean())
        hidden = self.norm(self.tied(torch.tanh(self.inner(inputs))) * self.scalar)
        output: Tensor = self.head(hidden * self.frozen) + hidden @ self.columns.t()
        return output


def a_task(model: nn.Module | None = None, **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(28, 5, generator=generator)
    defaults: dict[str, Any] = {
        "model": Everything() if model is None else model,
        "dataset": TensorDataset(inputs, torch.randint(0, 3, (28,), generator=generator)),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "batch_size": 8,
        "steps": 40,
    }
    return Task(**{**defaults, **changes})


class Training:
    """A state that can be trained further."""

    def __init__(self, task: Task) -> None:
        plan = Plan(len(task.dataset), SHARDS, task.batch_size, steps=40)
        self.state = TrainingState(task)
        self.algorithm = GradientAveraging(task, self.state, plan)

    def steps(self, count: int) -> None:
        for _ in range(count):
            mean = self.algorithm.contribution(0, lambda: None)
            mean += self.algorithm.contribution(1, lambda: None)
            self.algorithm.apply(mean)

    def rates(self) -> list[Any]:
        return [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.state.optimizer.param_groups
        ]


def assert_continues(make: Callable[[], Task]) -> None:
    """A fresh object that loads an image is the same, and goes on the same, bit for bit."""
    original, fresh = Training(make()), Training(make())
    original.steps(5)
    image = original.state.image()
    assert original.state.digest() == digest_of(image) == xxh3_128_hexdigest(image)
    fresh.state.load(image)
    assert fresh.state.step == 5
    assert fresh.state.image() == image
    assert fresh.rates() == original.rates()
    original.steps(6)
    fresh.steps(6)
    assert fresh.rates() == original.rates()
    assert fresh.state.image() == original.state.image()
    # and back again, over a state that has become another
    fresh.state.load(image)
    assert fresh.state.image() == image


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adam capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_through_an_image(name: str) -> None:
    """Each optimizer's state, made lazily at its first step, survives to the last bit."""
    assert_continues(lambda: a_task(optimizer=OPTIMIZERS[name]))


class Halving:
    """A learning rate function that counts its own calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.5**self.calls + 1 / (step + 1)


class BoundCosine(lr_scheduler.LRScheduler):
    """A scheduler of a user's own, with a function in its attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.shape = lambda step: float(np.cos(step / 10))
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [float(rate) * self.shape(self.last_epoch) for rate in self.base_lrs]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Halving()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 7, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=7),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=4),
            lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
            lr_scheduler.CosineAnnealingLR(o, 10),
        ],
        milestones=[4, 8],
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, power=1.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=7), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=1, cooldown=1, threshold=0.1, factor=0.5
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, mode="triangular2"),
    "CyclicLR exp_range": lambda o: lr_scheduler.CyclicLR(
        o, 0.001, 0.1, 3, mode="exp_range", gamma=0.99
    ),
    "CyclicLR of a function": lambda o: lr_scheduler.CyclicLR(
        o, 0.001, 0.1, 3, scale_fn=lambda x: 1 / (1 + x)
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40, three_phase=True),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.001, anneal_epochs=7),
    "a user's own": BoundCosine,
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    """The list above leaves out no scheduler that this torch offers."""
    known = {name.split()[0] for name in SCHEDULERS}
    assert set(lr_scheduler.__all__) - known == {"LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_through_an_image(name: str) -> None:
    """Each scheduler's state survives, and its learning rates go on as they would have."""
    assert_continues(
        lambda: a_task(
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            scheduler=SCHEDULERS[name],
        )
    )


@pytest.mark.parametrize("name", ["LambdaLR", "SequentialLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_learning_rates_that_are_tensors_go_through_an_image(name: str) -> None:
    """A learning rate that is a tensor, shared between groups, is still shared afterwards."""

    def make() -> Task:
        rate = torch.tensor(0.05)

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            groups = [{"params": parameters[:3]}, {"params": parameters[3:], "betas": (0.8, 0.9)}]
            return torch.optim.Adam(groups, lr=rate, foreach=False)

        return a_task(optimizer=optimizer, scheduler=SCHEDULERS[name])

    assert_continues(make)


def test_channels_last_goes_through_an_image() -> None:
    """Strides of parameters, and of optimizer state that follows them, are kept."""

    def make() -> Task:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 3)
        )
        model[1].to(memory_format=torch.channels_last)
        return a_task(model)

    assert_continues(make)
    state = TrainingState(make())
    weight = dict(state.model.named_parameters())["1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_parametrized_modules_go_through_an_image() -> None:
    """Weight and spectral normalization, whose forward pass changes float buffers, are states."""

    def make() -> Task:
        torch.manual_seed(1)
        first = parametrizations.spectral_norm(nn.Linear(5, 6))
        return a_task(nn.Sequential(first, parametrizations.weight_norm(nn.Linear(6, 3))))

    assert_continues(make)


def test_digest_depends_on_values_alone() -> None:
    """Neither the order in which optimizer state was made nor that of its keys is in the digest."""
    training = Training(a_task())
    training.steps(2)
    before = training.state.digest()
    optimizer = training.state.optimizer
    reversed_state = [
        (parameter, dict(reversed(values.items())))
        for parameter, values in reversed(optimizer.state.items())
    ]
    optimizer.state.clear()
    optimizer.state.update(reversed_state)
    optimizer.param_groups[0] = dict(reversed(optimizer.param_groups[0].items()))
    assert training.state.digest() == before
    with torch.no_grad():
        reversed_state[0][1]["exp_avg"].view(-1)[0] += 1e-6
    assert training.state.digest() != before


def test_everything_of_the_state_is_in_the_digest() -> None:
    """One changed bit in any parameter or buffer, the step or a group's value shows."""
    training = Training(a_task(scheduler=SCHEDULERS["StepLR"]))
    training.steps(1)
    state = training.state
    seen = {state.digest()}
    for entry in state.flat.entries:
        if entry.size:
            memory = state.flat.bytes_of(entry)
            memory[-1] ^= 1
            seen.add(state.digest())
            memory[-1] ^= 1
    assert state.digest() in seen
    assert len(seen) == 1 + sum(entry.size > 0 for entry in state.flat.entries)
    state.step += 1
    seen.add(state.digest())
    state.step -= 1
    state.optimizer.param_groups[0]["weight_decay"] = 0.5
    seen.add(state.digest())
    assert len(seen) == 3 + sum(entry.size > 0 for entry in state.flat.entries)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "values": lambda tensor: tensor.add_(1.0),
    "strides": lambda tensor: tensor.t_(),
    "shape": lambda tensor: tensor.unsqueeze_(0),
    "size": lambda tensor: tensor.resize_(1, 2),
    "memory": lambda tensor: tensor.set_(torch.arange(9.0)),  # type: ignore[call-overload]
    "all": lambda tensor: setattr(tensor, "data", torch.ones(2, dtype=torch.bfloat16)),
}


def assert_written_alike(values: dict[str, Any], before: TreeWriter) -> TreeWriter:
    """A writer that remembers what `before` wrote writes what one does that does not."""
    told, fresh = TreeWriter(remembered=before.branches), TreeWriter()
    assert told.packed("optimizer", values) == fresh.packed("optimizer", values)
    assert told.table == fresh.table
    assert [bytes(part) for part in told.parts] == [bytes(part) for part in fresh.parts]
    return told


@pytest.mark.parametrize("change", CHANGES)
def test_no_more_is_remembered_of_a_tensor_than_it_is(change: str) -> None:
    tensor, before = torch.arange(6.0).reshape(2, 3), TreeWriter()
    if change == "all":
        tensor = torch.arange(2.0).bfloat16()
    values = {"state": {0: {"mean": tensor}}}
    before.packed("optimizer", values)
    CHANGES[change](tensor)
    told = assert_written_alike(values, before)
    assert (told.branches == before.branches) == (change == "values")


SHARED = torch.ones(2)
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "number": {"b": {0: {"step": 5001, "mean": SHARED}, 1: [1.0, "a"]}},
    "kind of number": {"b": {0: {"step": 5000, "mean": SHARED}, 1: [1, "a"]}},
    "sign of zero": {"b": {0: {"step": 5000, "mean": SHARED}, 1: [-0.0, "a"]}},
    "key": {"b": {2: {"step": 5000, "mean": SHARED}, 1: [1.0, "a"]}},
    "kind of list": {"b": {0: {"step": 5000, "mean": SHARED}, 1: (1.0, "a")}},
    "nesting": {"b": {0: {"step": 5000, "mean": SHARED}, 1: [[1.0, "a"]]}},
    "another tensor": {"b": {0: {"step": 5000, "mean": SHARED.clone()}, 1: [1.0, "a"]}},
    "tensors before it": {
        "a": [torch.zeros(1)],
        "b": {0: {"step": 5000, "mean": SHARED}, 1: [1.0, "a"]},
    },
    "seen before it": {"a": [SHARED], "b": {0: {"step": 5000, "mean": SHARED}, 1: [1.0, "a"]}},
    "seen after it": {"b": {0: {"step": 5000, "mean": SHARED}, 1: [1.0, "a"]}, "c": [SHARED]},
    "a set": {"b": {0: {"step": 5000, "mean": SHARED}, 1: {1.0, 2.0}}},
    "nothing": {"b": {0: {"step": 5000, "mean": SHARED}, 1: [1.0, "a"]}},
}


@pytest.mark.parametrize("other", OTHER_VALUES)
def test_what_is_remembered_is_used_for_the_same_alone(other: str) -> None:
    """Whatever differs, also what was written before what is remembered."""
    first, before, branch = OTHER_VALUES["nothing"], TreeWriter(), ("optimizer", "b")
    before.packed("optimizer", first)
    told = assert_written_alike(OTHER_VALUES[other], before)
    is_used = told.branches.get(branch) is before.branches[branch]
    assert is_used == (other in ("nothing", "seen after it"))
    again = assert_written_alike(OTHER_VALUES[other], told)
    assert_written_alike(first, again)


def test_many_parameters_are_remembered() -> None:
    """Numbers above 256 are other objects each time that they are made."""

    def state() -> dict[str, Any]:
        return {"state": {number: {"mean": SHARED} for number in range(int("300"))}}

    before = TreeWriter()
    before.packed("optimizer", state())
    told = assert_written_alike(state(), before)
    assert told.branches["optimizer", "state"] is before.branches["optimizer", "state"]


def test_a_copy_is_not_remembered() -> None:
    """Its values would be those of the time when it was made."""
    tensor, before = torch.arange(9.0).reshape(3, 3)[:, ::2], TreeWriter()
    before.packed("optimizer", {"state": [tensor]})
    tensor.add_(1.0)
    assert_written_alike({"state": [tensor]}, before)


def test_a_set_that_changes_is_written_as_it_is() -> None:
    values: dict[str, Any] = {"state": [{1, 2}, torch.ones(1)]}
    before = TreeWriter()
    before.packed("optimizer", values)
    values["state"][0].add(3)
    assert_written_alike(values, before)


def test_named_tensors_load_into_the_plain_model() -> None:
    """The tensors are copies that share no memory, one for each name, as `state_dict` has them."""
    training = Training(a_task())
    training.steps(3)
    tensors = training.state.named_tensors()
    plain = Everything()
    assert tensors.keys() == plain.state_dict().keys()
    plain.load_state_dict(tensors)
    inputs = torch.randn(4, 5)
    assert torch.equal(plain.eval()(inputs), training.state.model.eval()(inputs))
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert len(set(places)) == len(places)
    assert torch.equal(tensors["inner.weight"], tensors["tied.weight"])
    tensors["inner.weight"].zero_()
    assert training.state.named_tensors()["inner.weight"].any()


def test_the_models_tensors_lie_in_the_buffer() -> None:
    """Parameters and buffers are views, aligned as torch aligns, and tied ones are one."""
    state = TrainingState(a_task())
    start = state.flat.memory.ctypes.data
    assert start % 64 == 0
    for entry in state.flat.entries:
        assert entry.start % 64 == 0
        if entry.size:
            assert entry.tensor.data_ptr() == start + entry.start
    names = [entry.name for entry in state.flat.entries]
    assert "inner.weight" in names and "tied.weight" not in names
    assert state.model.tied.weight is state.model.inner.weight


# --- damaged and foreign images -------------------------------------------------------------


def test_damaged_images_are_refused() -> None:
    """Cut or altered images raise ValueError, or load as the other state that they then are."""
    training, victim = Training(a_task()), Training(a_task())
    training.steps(2)
    image = training.state.image()
    start = victim.state.image()
    generator = random.Random(7)
    for length in (0, 1, 15, 16, 17, 200, len(image) // 2, len(image) - 1):
        with pytest.raises(ValueError, match="no state of this task"):
            victim.state.load(image[:length])
    with pytest.raises(ValueError, match="no state of this task"):
        victim.state.load(bytes(image) + b"\x00")
    tree_length = int.from_bytes(image[8:16], "little")
    refused = 0
    for _ in range(400):
        damaged = bytearray(image)
        damaged[generator.randrange(16 + tree_length)] ^= 1 << generator.randrange(8)
        try:
            victim.state.load(damaged)
        except ValueError:
            refused += 1
        else:
            assert victim.state.digest() == digest_of(damaged) != digest_of(image)
        victim.state.load(start)
    assert refused > 200


@pytest.mark.parametrize(
    "other",
    [
        lambda: a_task(nn.Linear(5, 3)),
        lambda: a_task(optimizer=lambda p: torch.optim.SGD(p[:3], lr=0.1)),
        lambda: a_task(scheduler=SCHEDULERS["StepLR"]),
    ],
    ids=["model", "optimizer", "scheduler"],
)
def test_images_of_other_tasks_are_refused(other: Callable[[], Task]) -> None:
    """Another model, other parameter groups or another scheduler; the state stays as it was."""
    training = Training(other())
    training.steps(1)
    state = TrainingState(a_task())
    before = state.digest()
    with pytest.raises(ValueError, match="no state of this task"):
        state.load(training.state.image())
    assert state.digest() == before


def test_an_optimizer_that_forgets_is_found_out() -> None:
    """When load_state_dict() loses something, loading says so instead of drifting later."""

    class Forgetful(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict({**state_dict, "state": {}})

    training = Training(a_task(optimizer=lambda p: Forgetful(p, lr=0.1, momentum=0.9)))
    training.steps(1)
    with pytest.raises(ValueError, match="loses something"):
        training.state.load(training.state.image())


# --- what is refused ------------------------------------------------------------------------


def with_buffer(value: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 3))
    model.register_buffer("odd", value)
    return model


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}


class SharedMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight.data = self.first.weight.data


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "float64": (lambda: nn.Linear(5, 3).double(), "parameter 'weight' is float64"),
    "bfloat16": (lambda: nn.Linear(5, 3).bfloat16(), "parameter 'weight' is bfloat16"),
    "complex": (lambda: nn.Linear(5, 3, dtype=torch.complex64), "'weight' is complex64"),
    "float64 buffer": (lambda: with_buffer(torch.zeros(2).double()), "buffer 'odd' is float64"),
    "sparse buffer": (lambda: with_buffer(torch.eye(2).to_sparse()), "buffer 'odd' is on cpu"),
    "meta": (lambda: nn.Linear(5, 3, device="meta"), "is on meta"),
    "lazy": (lambda: nn.LazyLinear(3), "'weight' has no shape yet"),
    "overlap": (SharedMemory, "different tensors over the same memory"),
    "scripted": (lambda: torch.jit.script(nn.Linear(5, 3)), "is compiled"),
    "compiled": (lambda: torch.compile(nn.Linear(5, 3)), "is compiled"),
    "extra state": (lambda: nn.Sequential(WithExtraState(5, 3)), "'0' keeps state outside"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_exact_are_refused(name: str) -> None:
    """A model whose training could not be bit-exact is an InvalidTask that names the tensor."""
    make, message = MODELS[name]
    with pytest.raises(InvalidTask, match=message):
        TrainingState(a_task(make()))


class Odd(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["drawn"] = {"from": [torch.Generator()]}


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


REFUSED_OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lbfgs": (lambda p: torch.optim.LBFGS(p), "LBFGS evaluates the loss several times"),
    "closure": (lambda p: NeedsClosure(p, lr=0.1), "NeedsClosure evaluates the loss several"),
    "sparse": (lambda p: torch.optim.SparseAdam(p), "sparse gradients only"),
    "foreign": (
        lambda p: torch.optim.SGD([*p, nn.Parameter(torch.zeros(1))], lr=0.1),
        "group 0 of the optimizer has a parameter that is not one of the model's",
    ),
    "none": (lambda p: None, "returned NoneType, not a torch.optim.Optimizer"),
    "unsupported": (Odd, r"optimizer\.param_groups\.0\.drawn\.from\.0 is of type Generator"),
}


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_optimizers_that_cannot_be_exact_are_refused(name: str) -> None:
    """An optimizer that a step with one gradient cannot drive, or that an image cannot hold."""
    make, message = REFUSED_OPTIMIZERS[name]
    with pytest.raises(InvalidTask, match=message):
        TrainingState(a_task(nn.Linear(5, 3), optimizer=make))


def test_optimizer_state_that_is_the_model_itself_is_refused() -> None:
    """State that aliases a parameter would be torn from it when read, so it is refused."""

    class Averaging(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            parameter = self.param_groups[0]["params"][0]
            self.state[parameter]["slow"] = parameter.data
            return super().step(closure)

    training = Training(a_task(optimizer=lambda p: Averaging(p, lr=0.1)))
    training.steps(1)
    with pytest.raises(InvalidTask, match=r"slow is a tensor in the model's own memory"):
        training.state.digest()


def test_a_scheduler_needs_its_methods() -> None:
    """What scheduler(optimizer) returns is checked by its methods."""
    with pytest.raises(InvalidTask, match=r"returned float, which has no step\(\)"):
        TrainingState(a_task(scheduler=lambda optimizer: 0.5))


# --- evaluation -----------------------------------------------------------------------------


def test_evaluation_leaves_the_state_untouched() -> None:
    """evaluate(model) runs in evaluation mode; modes, buffers and generators are put back."""
    modes = []

    def evaluate(model: nn.Module) -> dict[str, Any]:
        modes.append(model.training)
        model.train()(torch.randn(4, 5))  # changes buffers and draws from the generator
        return {"accuracy": torch.tensor(0.5), "other": 1}

    task = a_task(evaluate=evaluate)
    training = Training(task)
    training.steps(1)
    before = training.state.digest(), torch.get_rng_state().numpy().tobytes()
    assert training.state.evaluate(task) == {"accuracy": 0.5, "other": 1.0}
    assert modes == [False] and training.state.model.training
    assert (training.state.digest(), torch.get_rng_state().numpy().tobytes()) == before
    assert TrainingState(a_task()).evaluate(a_task()) == {}
    wrong = a_task(evaluate=lambda model: 0.5)
    with pytest.raises(InvalidTask, match="names to numbers"):
        TrainingState(wrong).evaluate(wrong)
