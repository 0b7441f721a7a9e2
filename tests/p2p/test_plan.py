"""The order of the data: every sample once per epoch, shards that keep their part."""

from __future__ import annotations

from hashlib import sha256

import pytest

from fault.errors import InvalidTask
from p2p.plan import Plan

SHAPES = [
    (samples, shards, batch)
    for samples in (7, 64, 101)
    for shards in (1, 2, 3, 4, 7)
    for batch in (7, 8, 32, 200)
]


def taken(plan: Plan, shard: int, step: int) -> list[int]:
    return [index for part in plan.micro_batches(shard, step) for index in part]


@pytest.mark.parametrize(("samples", "shards", "batch"), SHAPES)
def test_an_epoch_takes_every_sample_once(samples: int, shards: int, batch: int) -> None:
    """Over the steps of an epoch the shards see each sample once, and only samples they own."""
    plan = Plan(samples, shards, batch, epochs=3, accumulate=2, seed=5)
    per_epoch = plan.steps // 3
    assert per_epoch == -(-samples // batch)
    orders = []
    for epoch in range(3):
        seen = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            sizes = [plan.shard_size(shard, step) for shard in range(shards)]
            batches = [taken(plan, shard, step) for shard in range(shards)]
            assert [len(indices) for indices in batches] == sizes
            assert all(
                index % shards == shard for shard in range(shards) for index in batches[shard]
            )
            assert sum(sizes) == plan.batch_size_at(step) and max(sizes) - min(sizes) <= 1
            weights = [plan.weight(shard, step) for shard in range(shards)]
            assert weights == [size / sum(sizes) for size in sizes]
            assert plan.first_shard(step) == next(v for v in range(shards) if sizes[v])
            seen += [index for indices in batches for index in indices]
        assert sorted(seen) == list(range(samples))
        orders.append(seen)
    assert samples < 64 or orders[0] != orders[1] != orders[2]


def test_the_formula_stays() -> None:
    """The order is the one written down, so a run can be resumed by another build of Mayfly."""
    plan = Plan(10, 2, 4, epochs=2, seed=3)
    word = (1 << 64) - 1

    def order(size: int, epoch: int, shard: int) -> list[int]:
        text = f"order,3,{epoch},{shard}".encode()
        start = int.from_bytes(sha256(text).digest()[:8], "little")

        def key(index: int) -> int:
            z = (start + (index + 1) * 0x9E3779B97F4A7C15) & word
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
            return z ^ (z >> 31)

        return sorted(range(size), key=key)

    for step in range(6):
        epoch, within = divmod(step, 3)
        places = range(within * 4, min(within * 4 + 4, 10))
        for shard in range(2):
            expected = [
                shard + 2 * order(5, epoch, shard)[place // 2]
                for place in places
                if place % 2 == shard
            ]
            assert taken(plan, shard, step) == expected
    assert [taken(plan, 0, step) for step in range(3)] == [[0, 6], [8, 4], [2]]


def test_micro_batches_divide_a_shard_evenly() -> None:
    """Accumulation only cuts the shard's samples, in order; parts may be empty."""
    whole = Plan(23, 2, 10, epochs=1)
    for accumulate in (2, 3, 5, 8):
        cut = Plan(23, 2, 10, epochs=1, accumulate=accumulate)
        for step in range(whole.steps):
            for shard in range(2):
                parts = cut.micro_batches(shard, step)
                assert len(parts) == accumulate
                assert [i for part in parts for i in part] == taken(whole, shard, step)
                sizes = [len(part) for part in parts]
                assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_a_shard_may_be_empty_in_the_last_batch() -> None:
    """With fewer samples left than shards, some shards get none and weigh nothing."""
    plan = Plan(9, 4, 8, epochs=1)
    assert [plan.shard_size(shard, 1) for shard in range(4)] == [1, 0, 0, 0]
    assert plan.micro_batches(3, 1) == [[]] and plan.weight(3, 1) == 0.0
    assert Plan(10, 4, 7, epochs=1).first_shard(1) == 0
    assert [Plan(10, 4, 9, epochs=1).shard_size(shard, 1) for shard in range(4)] == [0, 1, 0, 0]
    assert Plan(10, 4, 9, epochs=1).first_shard(1) == 1


@pytest.mark.parametrize(("samples", "shards", "batch"), SHAPES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_smallest_micro_batch_is_the_smallest_of_all_steps(
    samples: int, shards: int, batch: int, accumulate: int
) -> None:
    """Looking at a few steps finds what looking at every step finds."""
    plan = Plan(samples, shards, batch, epochs=2, accumulate=accumulate)
    sizes = [
        len(part)
        for step in range(plan.steps)
        for shard in range(shards)
        for part in plan.micro_batches(shard, step)
        if part
    ]
    size, step, shard = plan.smallest_micro_batch()
    assert size == min(sizes)
    assert size in [len(part) for part in plan.micro_batches(shard, step)]


def test_steps_may_be_more_or_fewer_than_an_epoch() -> None:
    """`steps` counts steps, and epochs follow one another for as long as there are steps."""
    assert Plan(100, 4, 30, steps=2).steps == 2
    long = Plan(100, 4, 30, steps=9)
    assert long.steps == 9 and long.batch_size_at(3) == long.batch_size_at(7) == 10
    with pytest.raises(ValueError, match="step 9"):
        long.micro_batches(0, 9)
    with pytest.raises(ValueError, match="shard 4"):
        long.micro_batches(4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 3}, "3 samples, fewer than the 4 shards"),
        ({"batch_size": 3}, "smaller than the 4 shards"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"epochs": 0}, "steps is 0"),
        ({"steps": 3}, "either epochs or steps"),
        ({"epochs": None}, "either epochs or steps"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, int], message: str) -> None:
    """Numbers without a run are an InvalidTask that says which."""
    usual = {"samples": 100, "shards": 4, "batch_size": 20, "epochs": 1}
    with pytest.raises(InvalidTask, match=message):
        Plan(**{**usual, **arguments})
