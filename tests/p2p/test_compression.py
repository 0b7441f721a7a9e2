"""What is rounded is close, right on average, and stays what it is when it is rounded again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from p2p.collectives.compression import Compression, compression
from p2p.collectives.memory import Vector
from p2p.collectives.rounding import BLOCK, IS_COMPILED, NOISE_PERIOD, CompiledInt8, Int8

COMPILED = pytest.mark.skipif(
    not IS_COMPILED and not shutil.which("cc"), reason="installed without a C compiler"
)
LENGTHS = (1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17)


@pytest.fixture(params=["bf16", "int8", "int8 without a C compiler"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def kind(way: str) -> str:
    return way.split()[0]


@pytest.fixture
def made(way: str, kind: str) -> Compression:
    return compression(kind) if way == kind else Int8()


def through(made: Compression, values: Vector, noise: int) -> Vector:
    payload = np.full(made.size(len(values)), 0xAA, np.uint8)
    made.pack(values, noise, payload)
    payload.flags.writeable = False  # as what is received
    out = np.full(len(values), 77, np.float32)
    made.unpack(payload, out)
    added = np.full(len(values), 2.5, np.float32)
    made.add(payload, added)
    assert added.tobytes() == (np.float32(2.5) + out).tobytes()
    sums = np.full((2, len(payload)), 0x55, np.uint8)
    made.pack(added, noise, sums[0])
    made.pack_sum(payload, np.full(len(values), 2.5, np.float32), noise, sums[1])
    assert sums[0].tobytes() == sums[1].tobytes()
    return out


def vectors() -> list[Vector]:
    draw = np.random.default_rng(1)
    some = [draw.standard_normal(length).astype(np.float32) for length in LENGTHS]
    some += [(each * 10.0 ** draw.uniform(-30, 30, len(each))).astype(np.float32) for each in some]
    tiny = np.array([1e-45, -3e-42, 1e-38, 0.0, -0.0], np.float32)
    huge = np.array([3e38, -2e38, 1.0], np.float32)
    return [*some, np.zeros(300, np.float32), tiny, huge]


def step_of(kind: str, values: Vector) -> Vector:
    """How far apart two neighbours are among the values that can be written, at each."""
    if kind == "bf16":
        return np.maximum(np.spacing(np.abs(values)) * 2.0**16, 2.0**-133)
    steps = np.empty(len(values))
    for start in range(0, len(values), BLOCK):
        peak = float(np.abs(values[start : start + BLOCK]).max())
        exponent = -126
        while 127 * 2.0**exponent < peak:
            exponent += 1
        steps[start : start + BLOCK] = 2.0**exponent
    return steps


def test_it_is_rounded_to_a_neighbour(kind: str, made: Compression) -> None:
    """Up or down, by less than a step, whatever the size of the values."""
    with np.errstate(over="ignore", invalid="ignore"):
        for values in vectors():
            for noise in (0, 1, 12345, 1 << 63):
                out = through(made, values, noise).astype(np.float64)
                finite = np.isfinite(out)  # bf16 may round the largest up to infinity
                assert finite.all() or np.abs(values).max() > 3e38
                error = np.abs(out - values.astype(np.float64))[finite]
                assert (error < step_of(kind, values)[finite]).all()


def test_rounding_again_changes_nothing(made: Compression) -> None:
    """With any noise: a total is passed on by whoever has it, packed or not."""
    for values in vectors():
        once = through(made, values, 7)
        for noise in (7, 8, 999_999):
            assert through(made, once, noise).tobytes() == once.tobytes()


def test_it_is_right_on_average(made: Compression) -> None:
    """Over all noises the mean of the rounded values is the value, to the last digits."""
    values = np.array([1.0, 0.3337, -0.7771, 1e-4, -3e-6, 0.0], np.float32)
    total = np.zeros(len(values))
    for noise in range(NOISE_PERIOD):
        payload = np.empty(made.size(len(values)), np.uint8)
        made.pack(values, noise, payload)
        out = np.empty(len(values), np.float32)
        made.unpack(payload, out)
        total += out
    assert np.abs(total / NOISE_PERIOD - values).max() < 2e-7


def test_the_noise_decides_and_nothing_else(kind: str) -> None:
    """Another instance, or one that has packed longer vectors before, gives the same bytes."""
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    used = compression(kind)
    through(used, np.ones(3 * NOISE_PERIOD, np.float32), 5)
    assert through(used, values, 9).tobytes() == through(compression(kind), values, 9).tobytes()
    assert through(used, values, 9).tobytes() != through(used, values, 10).tobytes()


def test_what_is_not_finite_is_not_hidden(kind: str, made: Compression) -> None:
    """int8 gives up the block, bf16 the value; the blocks beside it are as ever."""
    for odd in (np.float32("nan"), np.float32("inf"), -np.float32("inf")):
        values = np.ones(3 * BLOCK, np.float32)
        values[BLOCK + 5] = odd
        if np.isnan(odd):
            values.view(np.uint32)[BLOCK + 5] = 0xFFFFFFFF  # the most that a carry could spoil
        out = through(made, values, NOISE_PERIOD - 1)
        bad = ~np.isfinite(out)
        assert bad[BLOCK + 5] and not bad[:BLOCK].any() and not bad[2 * BLOCK :].any()
        assert bad.sum() == (1 if kind == "bf16" else BLOCK)


@COMPILED
@pytest.mark.parametrize("length", [*LENGTHS, NOISE_PERIOD + BLOCK + 1, 3 * NOISE_PERIOD])
def test_compiled_or_not_the_bits_are_the_same(length: int) -> None:
    """Of values of all sizes, of any bits at all, and with what is not finite in both summands."""
    compiled, plain = CompiledInt8(), Int8()
    draw = np.random.default_rng(length)
    some = draw.standard_normal(length).astype(np.float32)
    odd = some.copy()
    odd[draw.integers(length)] = draw.choice([np.nan, np.inf, -np.inf])
    scattered = (some * 10.0 ** draw.uniform(-44, 37, length)).astype(np.float32)
    bits = draw.integers(1 << 32, size=length, dtype=np.uint64).astype(np.uint32)
    largest = np.full(length, np.finfo(np.float32).max)
    for values in (some, odd, scattered, bits.view(np.float32), largest):
        for noise in (0, NOISE_PERIOD - 1, int(draw.integers(1 << 62))):
            payloads = [np.full(plain.size(length), each, np.uint8) for each in (1, 2)]
            compiled.pack(values, noise, payloads[0])
            plain.pack(values, noise, payloads[1])
            assert payloads[0].tobytes() == payloads[1].tobytes()
            outs = [np.full(length, each, np.float32) for each in (1, 2)]
            compiled.unpack(payloads[0], outs[0])
            plain.unpack(payloads[0], outs[1])
            assert outs[0].tobytes() == outs[1].tobytes()
            both = [np.full(plain.size(length), each, np.uint8) for each in (1, 2)]
            compiled.pack_sum(payloads[0], some.copy(), noise, both[0])
            plain.pack_sum(payloads[0], some.copy(), noise, both[1])
            assert both[0].tobytes() == both[1].tobytes()
            for summand in (values, -1e38 * np.ones(length, np.float32)):
                sums = [summand.copy(), summand.copy()]
                compiled.add(payloads[0], sums[0])
                plain.add(payloads[0], sums[1])
                assert sums[0].tobytes() == sums[1].tobytes()


@COMPILED
def test_lengths_that_do_not_fit_are_refused() -> None:
    made = CompiledInt8()
    values, payload = np.zeros(BLOCK + 1, np.float32), np.zeros(BLOCK + 3, np.uint8)
    made.pack(values, 0, payload)
    for wrong in (payload[:-1], np.zeros(BLOCK + 4, np.uint8), payload[:0]):
        for refused in (
            lambda wrong=wrong: made.pack(values, 0, wrong),
            lambda wrong=wrong: made.unpack(wrong, values),
            lambda wrong=wrong: made.add(wrong, values),
            lambda wrong=wrong: made.pack_sum(wrong, values, 0, payload),
        ):
            with pytest.raises(ValueError):
                refused()
    shifted = np.zeros(len(values) * 4 + 1, np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError):
        made.unpack(payload, shifted)
    read_only = payload[:]
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        made.pack(values, 0, read_only)
