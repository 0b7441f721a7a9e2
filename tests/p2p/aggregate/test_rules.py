"""Robust rules against plain float64 references, and what each tolerates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from fault.errors import InputError
from p2p.aggregate.rules import RULES, Robust
from p2p.aggregate.scripts import source

Rows = Any


def run(text: str, rows: Rows) -> Any:
    robust = Robust.parse(text)
    function = torch.jit.CompilationUnit(source(robust.rule.script)).find_function(
        robust.rule.script
    )
    vectors = [torch.from_numpy(row.copy()) for row in rows]
    return function(vectors, [], robust.arguments(len(rows))).numpy()


def median(rows: Rows, f: int) -> Any:
    return np.median(rows, axis=0)


def trimmed(rows: Rows, f: int) -> Any:
    return np.sort(rows, axis=0)[f : len(rows) - f].mean(axis=0)


def around_median(rows: Rows, f: int) -> Any:
    found = np.empty(rows.shape[1])
    for column in range(rows.shape[1]):
        values = list(rows[:, column])
        middle = float(np.median(values))
        values.sort(key=lambda value: abs(value - middle))
        found[column] = np.mean(values[: len(values) - f])
    return found


def krum(rows: Rows, f: int, m: int = 1) -> Any:
    scores = []
    for i, row in enumerate(rows):
        apart = sorted(float(((row - o) ** 2).sum()) for j, o in enumerate(rows) if j != i)
        scores.append(sum(apart[: len(rows) - f - 2]))
    order = sorted(range(len(rows)), key=lambda i: (scores[i], i))
    return rows[sorted(order[:m])].mean(axis=0)


REFERENCES: dict[str, Callable[..., Any]] = {
    "coordinate_median": median,
    "trimmed_mean": trimmed,
    "meamed": around_median,
    "krum": krum,
    "multi_krum": lambda rows, f: krum(rows, f, len(rows) - f - 2),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("n", "length"), [(5, 1), (6, 37), (7, 20_000), (9, 3)])
def test_it_agrees_with_a_plain_reference(name: str, n: int, length: int) -> None:
    """Random vectors, some far off, for each f that the rule tolerates."""
    draw = np.random.default_rng(n * length)
    for f in range(1, RULES[name].upper_bound(n) + 1):
        rows = draw.standard_normal((n, length)).astype(np.float32)
        rows[draw.permutation(n)[:f]] *= -10
        wanted = REFERENCES[name](rows.astype(np.float64), f)
        np.testing.assert_allclose(run(f"{name}:{f}", rows), wanted, rtol=2e-5, atol=1e-6)


ROBUST = [name for name in RULES if name != "mean"]


@pytest.mark.parametrize("name", ROBUST)
def test_ties_are_no_matter_of_chance(name: str) -> None:
    """Equal vectors give that vector; equal scores take the first."""
    rows = np.repeat(np.float32([[1.5, -2.0, 0.25]]), 7, axis=0)
    np.testing.assert_array_equal(run(f"{name}:1", rows), rows[0])
    rows[4:] = -rows[4:]
    assert run(f"{name}:1", rows).tobytes() == run(f"{name}:1", rows).tobytes()


@pytest.mark.parametrize("name", ROBUST)
def test_wrong_vectors_do_not_get_far(name: str) -> None:
    """Wherever f huge vectors stand, the result stays among the right ones."""
    n = 5
    f = RULES[name].upper_bound(n)
    right = np.linspace(-1, 1, n * 4, dtype=np.float32).reshape(n, 4)
    for places in combinations(range(n), f):
        rows = right.copy()
        rows[list(places)] = 1e6
        assert np.abs(run(f"{name}:{f}", rows)).max() <= 1.0


@pytest.mark.parametrize(
    ("text", "n", "words"),
    [
        ("average", 5, "there is mean, coordinate_median"),
        ("krum:x", 5, "krum:F"),
        ("krum:1:2", 5, "krum:F"),
        ("krum", 4, "of no use"),
        ("krum:2", 5, "tolerates 1 wrong ones, and not 2"),
        ("trimmed_mean:2", 4, "tolerates 1"),
        ("coordinate_median", 2, "of no use"),
        ("multi_krum:1:3", 5, "1 to 2"),
    ],
)
def test_what_a_rule_cannot_do_is_said(text: str, n: int, words: str) -> None:
    """Before anything is started."""
    with pytest.raises(InputError, match=words):
        Robust.parse(text).check(n, "peers")


def test_what_a_rule_can_do() -> None:
    """As many wrong ones as it tolerates by default."""
    for text, n, arguments in (
        ("krum", 5, ["1", "1"]),
        ("multi_krum", 7, ["2", "3"]),
        ("multi_krum:1:2", 7, ["1", "2"]),
        ("meamed", 5, ["2"]),
        ("trimmed_mean:1", 5, ["1"]),
    ):
        robust = Robust.parse(text)
        robust.check(n, "peers")
        assert robust.arguments(n) == arguments
