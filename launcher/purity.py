"""What `p2p-launch check` lets two fresh processes compute: the beginning of a task, written down.

The answer to `inquiry.ask("launcher.purity", …)` is how many shards and steps were computed; the
arrays go to another file, which `evidence.py` compares. The second process does not do what the
first one does: it takes a step and puts it back, as each joiner of a run does, then computes the
shards in another order, and one of them twice; and it has torch fill what it takes of memory. None
of that may matter, since a contribution depends on nothing but the state, the shard and the step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2p.importing import import_torch

import_torch()

import numpy as np
import torch
from torch import Tensor

from launcher.evidence import WHOLE_STATE, Evidence, Label
from launcher.home import writing_to
from launcher.inquiry import JobRequest, answer, blamed_on
from launcher.preflight import load
from p2p.algorithm import GradientAveraging, Vector, probe
from p2p.plan import Plan
from p2p.state import TrainingState

STEPS = 2
"""So that what the first step leaves behind can show in the second."""
SHARDS_LIMIT = 4
"""More of them, and a check of many shards would take as many times as long."""
Named = tuple[str, Any]


def compute(request: JobRequest, file: Path, disturbed: bool) -> dict[str, Any]:
    """Raises what is wrong with the job, as `preflight.inspect` does, but for impurity."""
    job = Path(request.job)
    task, plan = load(request)
    steps = min(STEPS, plan.steps)
    with writing_to(file.parent), Evidence(file) as evidence:
        for name in ("samples", "steps", "batch_size", "accumulate", "seed"):
            evidence.add(Label(name, None), np.array(getattr(plan, name)))
        with blamed_on(job, "its state was built"):
            state = TrainingState(task)
            algorithm = GradientAveraging(task, state, plan)
        algorithm.fills_memory = disturbed
        _add_state(evidence, state, None)
        with blamed_on(job, "its first batch was computed"):
            algorithm.try_smallest_batch(_nothing)
        if disturbed:
            with blamed_on(job, "its first step was taken and put back"):
                probe(state, algorithm)
        for step in range(steps):
            with blamed_on(job, f"step {step} was computed"):
                contributions = _contributions(algorithm, chosen(plan, step), disturbed)
            for shard, vector in contributions.items():
                for name, values in algorithm.tensors(vector).items():
                    evidence.add(Label(name, step, shard), values)
            with blamed_on(job, f"step {step} was applied"):
                algorithm.apply(np.sum(list(contributions.values()), axis=0, dtype=np.float32))
            _add_state(evidence, state, step)
    return {"steps": steps, "shards": len(chosen(plan, 0))}


def chosen(plan: Plan, step: int) -> list[int]:
    """The shards that are computed: all, or a few that lie far apart.

    The lowest with samples is among them, since it alone contributes the integer buffers. The sum
    of their contributions stands for the mean; any mean does, as long as both processes have it.
    """
    few = min(plan.shards, SHARDS_LIMIT)
    return sorted({plan.first_shard(step), *(plan.shards * each // few for each in range(few))})


def _contributions(
    algorithm: GradientAveraging, shards: list[int], disturbed: bool
) -> dict[int, Vector]:
    order = [*reversed(shards), shards[0]] if disturbed else shards
    computed = {shard: algorithm.contribution(shard, _nothing) for shard in order}
    return {shard: computed[shard] for shard in shards}


def _add_state(evidence: Evidence, state: TrainingState, step: int | None) -> None:
    digest = state.digest()  # first, since it refuses what could not be named below
    for name, value in dict(_named_state(state)).items():
        evidence.add(Label(name, step), _array(value))
    evidence.add(Label(WHOLE_STATE, step), np.array(digest))


def _named_state(state: TrainingState) -> Iterator[Named]:
    flat = state.flat
    for kind, entries in (
        ("parameter", (*flat.trainable, *flat.frozen)),
        ("buffer", (*flat.float_buffers, *flat.integer_buffers)),
    ):
        for entry in entries:
            yield f"{kind} {entry.name!r}", entry.tensor
    names = {id(entry.tensor): entry.name for entry in (*flat.trainable, *flat.frozen)}
    groups = state.optimizer.param_groups
    order = [names[id(parameter)] for group in groups for parameter in group["params"]]
    for key, kept in state.optimizer.state_dict().items():
        if key != "state":
            yield from _leaves(f"optimizer's {key}", kept)
            continue
        # torch keeps it by the parameter's number in the order of the groups
        for number, of_one in kept.items():
            known = isinstance(number, int) and number < len(order)
            name = repr(order[number]) if known else str(number)
            yield from _leaves(f"optimizer's state of {name}", of_one)
    if state.scheduler is not None:
        yield from _leaves("scheduler's state", state.scheduler.state_dict())


def _leaves(path: str, value: Any) -> Iterator[Named]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{path}, {key}", each)
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _leaves(f"{path}, {place}", each)
    elif isinstance(value, Tensor | bool | int | float | str | bytes | np.generic):
        yield path, value
    # the rest (None, functions, sets) is in the digest, which says nothing of where


def _array(value: Any) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    # an integer that is too long for NumPy would be an object
    long = type(value) is int and not -(1 << 63) <= value < 1 << 63
    return np.array(str(value) if long else value)


def _nothing() -> None:
    pass


if __name__ == "__main__":
    EVIDENCE, ROLE = sys.argv[2:]
    sys.exit(answer(lambda request: compute(request, Path(EVIDENCE), ROLE == "disturbed")))
