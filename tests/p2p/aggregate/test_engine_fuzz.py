"""Whatever is said to the engine: it answers each command once, in order, and lives.

In every test run a few examples, always the same; `pytest -m acceptance` on this file fuzzes each
server for ten minutes, or for `MAYFLY_FUZZ_SECONDS`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.p2p.aggregate.conftest import KINDS, MEMORY_LIMIT, server_or_skip
from tests.p2p.aggregate.stores import Simple, Store, Wire, function, packed

SECONDS = float(os.environ.get("MAYFLY_FUZZ_SECONDS", "600"))
SHORT_EXAMPLES = 60
COMMANDS = 100_000
RSS_SLACK_BYTES = 24 << 20

Words = list[Any]

# --- the grammar ------------------------------------------------------------------------------


def entry(*names: str) -> Words:
    return ["ENTRY_POINTS", str(len(names)), *names]


KEYS = ["a", "b", "c", "s", "t", "text", "{x}y", "\0\r\n", ""]
NUMBERS = ["0", "1", "2", "3", "7", "-1", "1.5", "nan", "inf", "-inf", "1e400", "x", "", "0x1"]
LARGE = ["65536", "2147483648", "4294967296", "9223372036854775807", "18446744073709551616"]
DTYPES = ["FLOAT", "double", "INT8", "INT16", "int32", "INT64", "UINT8", "UINT16", "BOOL", "STRING"]
OTHER_DTYPES = ["FLOAT16", "BFLOAT16", "", "INT128"]
LINES = [
    "return tensors",
    "return tensors[0]",
    "return [tensors[0], tensors[0]]",
    "return tensors[0] + tensors[-1]",
    "return torch.cat(tensors)",
    "return torch.sum(torch.stack(tensors), dim=0)",
    "return tensors[0].reshape([-1])[::2]",
    "return tensors[0].half()",
    "return tensors[0].to(torch.cfloat)",
    "return torch.zeros([int(args[0]), int(args[1])])",
    "return torch.empty([int(args[0])], dtype=int(args[1]))",
    "return torch.ones([3]).expand([1 << 20, 3])",
    "return tensors[0] @ tensors[1]",
    "return tensors[0][int(args[0])]",
    "return torch.take(tensors[0], torch.tensor([int(args[0])]))",
    "return torch.as_strided(tensors[0], [int(args[0])], [1])",
    "return tensors[0].view(int(args[0]))",
    "return 1",
    "return None",
    "assert len(args) > 1, 'few'",
    "tensors[0].add_(1)",
    "tensors[0].resize_([int(args[0])])",
    "tensors[0].set_(tensors[1])",
    "x = args[5]",
    "x = int(args[0]) // int(args[1])",
    "x = [1] * int(args[0])",
    "x = 'y' * int(args[0])",
    "print(args)",
    "for i in range(min(1000, len(args) * 100)):",
    "while len(args) > 100:",
    "    pass",
    "redis.execute(args[0], args[1:])",
    "redis.execute('SET', keys[0], 'x')",
    "x = redis.asList(redis.execute('KEYS', '*'))",
    "import os",
    "raise ValueError('x')",
    "def g(x: int):",
    "return f(tensors, keys, args)",
    "if len(tensors) > 1:",
    "x = torch.jit.fork(f, tensors, keys, args)",
    "y = torch._C._cuda_init()",
    "\treturn tensors\r\n",
]
GOOD = [function(line) for line in LINES[:20]]


def text_of(length: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="latin-1"), max_size=length)


key = st.sampled_from(KEYS)
number = st.sampled_from(NUMBERS + NUMBERS[:5] * 3) | st.sampled_from(LARGE)
small = st.sampled_from(["0", "1", "2", "3", "4"])
blob = st.binary(max_size=64) | st.integers(0, 64).map(bytes)
junk = text_of(12) | blob


@st.composite
def counted(draw: st.DrawFn, name: str, items: st.SearchStrategy[Any], most: int = 4) -> Words:
    """`NAME n item …`, mostly with the right n."""
    found = draw(st.lists(items, max_size=most))
    count = str(len(found)) if draw(st.integers(0, 9)) else draw(number)
    return [name, count, *found]


@st.composite
def tensor_set(draw: st.DrawFn) -> Words:
    dtype = draw(st.sampled_from(DTYPES * 4 + OTHER_DTYPES))
    shape = draw(st.lists(small | number, max_size=4))
    words: Words = ["AI.TENSORSET", draw(key), dtype, *shape]
    kind = draw(st.integers(0, 3))
    if kind == 1:
        words += ["VALUES", *draw(st.lists(number, max_size=8))]
    elif kind == 2:
        words += ["BLOB", draw(blob)]
    elif kind == 3 and all(each in ("1", "2", "3", "4") for each in shape):
        size = {"INT8": 1, "UINT8": 1, "BOOL": 1, "STRING": 1, "FLOAT": 4, "int32": 4}
        length = size.get(dtype, 8 if dtype in ("double", "INT64") else 2)
        for each in shape:
            length *= int(each)
        words += ["BLOB", draw(st.binary(min_size=length, max_size=length))]
    return words


@st.composite
def tensor_get(draw: st.DrawFn) -> Words:
    formats = st.sampled_from(["META", "BLOB", "VALUES", "x"])
    return ["AI.TENSORGET", draw(key), *draw(st.lists(formats, max_size=3))]


@st.composite
def source(draw: st.DrawFn) -> str:
    if draw(st.booleans()):
        return draw(st.sampled_from(GOOD))
    text = function(*draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=5)))
    if draw(st.integers(0, 3)) == 0:  # and a piece of it replaced
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 9)))
        text = (
            text[:start] + draw(st.text(st.characters(codec="latin-1"), max_size=5)) + text[stop:]
        )
    return text


@st.composite
def script_store(draw: st.DrawFn) -> Words:
    device = draw(st.sampled_from(["CPU"] * 6 + ["GPU", "cpu:1", "", "x"]))
    words: Words = ["AI.SCRIPTSTORE", draw(st.sampled_from(["s", "t"]) | key), device]
    words += draw(st.sampled_from([[], ["TAG", "tag"], ["TAG", ""]]))
    words += draw(counted("ENTRY_POINTS", st.sampled_from(["f", "f", "f", "g", ""]), 2))
    return [*words, "SOURCE", draw(source())]


scopes = st.one_of(
    counted("INPUTS", key),
    counted("OUTPUTS", key),
    counted("KEYS", key),
    counted("ARGS", number | st.sampled_from(["SET", "GET", "DEL", "AI.TENSORSET"])),
)


@st.composite
def script_execute(draw: st.DrawFn) -> Words:
    words: Words = ["AI.SCRIPTEXECUTE", draw(st.sampled_from(["s", "t"]) | key)]
    words.append(draw(st.sampled_from(["f", "f", "f", "g", ""])))
    if draw(st.integers(0, 2)):
        words += ["INPUTS", "1", "a", *draw(st.sampled_from([[], ["OUTPUTS", "1", "b"]]))]
        words += draw(st.sampled_from([[], ["ARGS", "2", "2", "3"], ["ARGS", "1", "70000"]]))
    else:
        words += [word for scope in draw(st.lists(scopes, max_size=4)) for word in scope]
    return words + draw(st.sampled_from([["TIMEOUT", "2000"]] * 4 + [["TIMEOUT", "1"], []]))


@st.composite
def dag(draw: st.DrawFn) -> Words:
    words: Words = [draw(st.sampled_from(["AI.DAGEXECUTE", "AI.DAGEXECUTE", "AI.DAGEXECUTE_RO"]))]
    heads = st.one_of(
        counted("LOAD", key, 2), counted("PERSIST", key, 2), key.map(lambda each: ["ROUTING", each])
    )
    words += [word for head in draw(st.lists(heads, max_size=2)) for word in head]
    words += draw(st.sampled_from([[], ["TIMEOUT", "2000"], ["TIMEOUT", "x"]]))
    for step in draw(st.lists(st.one_of(tensor_set(), tensor_get(), script_execute()), max_size=4)):
        words += ["|>", *step]
    return words


others = st.one_of(
    st.tuples(st.sampled_from(["AI.SCRIPTGET", "AI.SCRIPTDEL", "AI.INFO"]), key),
    st.tuples(st.sampled_from(["AI.INFO"]), key, st.just("RESETSTAT")),
    st.tuples(st.sampled_from(["AI._SCRIPTSCAN", "AI._MODELSCAN", "AI.CONFIG", "AI.MODELSTORE"])),
    st.tuples(st.just("AI.CONFIG"), st.sampled_from(["GET", "LOADBACKEND"]), junk),
    st.tuples(st.sampled_from(["DEL", "DUMP", "TYPE", "PERSIST", "OBJECT"]), key),
    st.tuples(st.sampled_from(["RENAME", "COPY"]), key, key),
    st.tuples(st.sampled_from(["EXPIRE", "PEXPIRE"]), key, small),
    st.tuples(st.just("MEMORY"), st.just("USAGE"), key),
    st.sampled_from([("MULTI",), ("EXEC",), ("DISCARD",), ("FLUSHALL",), ("INFO", "MODULES")]),
    st.tuples(st.just("SET"), st.just("text"), junk),
).map(list)


@st.composite
def in_lua(draw: st.DrawFn) -> Words:
    words = draw(st.one_of(tensor_set(), tensor_get(), script_store(), script_execute(), dag()))
    return ["EVAL", "return redis.pcall(unpack(ARGV))", "0", *words]


@st.composite
def mutated(draw: st.DrawFn) -> Words:
    """A command with a word replaced, dropped or doubled."""
    words = list(draw(st.one_of(tensor_set(), script_store(), script_execute(), dag(), others)))
    place = draw(st.integers(0, len(words) - 1))
    old = words[place]
    words[place : place + 1] = draw(st.sampled_from([[], [old, old], [draw(junk)]]))
    return words


commands = st.one_of(
    tensor_set(), tensor_get(), script_store(), script_execute(), dag(), others, in_lua(), mutated()
).filter(bool)
pipelines = st.lists(commands, min_size=1, max_size=12)


# --- what has to hold -------------------------------------------------------------------------


class Fuzzed:
    """A server whose scripts are ended soon; started again when it has ended, to shrink a case."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def connect(self) -> Wire:
        if not self.store.alive():
            limits = ("MEMORY_LIMIT", str(MEMORY_LIMIT), "SCRIPT_LIMIT_MS", "4000")
            self.store.start(engine=limits)
        return self.store.connect()

    def try_all(
        self, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], seconds: float
    ) -> None:
        """Checks examples for so long; the same few in every run if it is zero."""
        until = time.monotonic() + seconds

        @settings(
            max_examples=500 if seconds else SHORT_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=not seconds,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def some(example: Any) -> None:
            check(example)
            assert self.store.alive(), f"it ended: {self.store.log()[-3000:]}"

        some()
        while time.monotonic() < until:
            some()

    def answers_each(self, pipeline: list[Words]) -> None:
        """All at once down one connection: as many replies, then the echo of a word of ours."""
        token = os.urandom(8).hex()
        wire = self.connect()
        with contextlib.closing(wire):
            # a transaction that was begun ends, so that the echo is one
            wire.send_bytes(b"".join(map(packed, [*pipeline, ["DISCARD"], ["ECHO", token]])))
            for _ in range(len(pipeline) + 1):
                wire.receive()
            assert wire.receive() == token.encode()

    def survives(self, data: bytes) -> None:
        """Any bytes: replies come back until the server hangs up, and others notice nothing."""
        wire, other = self.connect(), self.connect()
        with contextlib.closing(wire), contextlib.closing(other):
            with contextlib.suppress(ConnectionError):
                wire.send_bytes(data)
                wire.end()
                while wire.has_more():
                    wire.receive()
            assert other("PING") == Simple("PONG")

    def restores(self, example: tuple[int, list[tuple[int, int]]]) -> None:
        """What DUMP gave, with bytes changed and a checksum that fits: loaded or refused."""
        which, changes = example
        wire = self.connect()
        with contextlib.closing(wire):
            wire(DUMPED[which % len(DUMPED)])
            dumped = wire("DUMP dumped")
            assert isinstance(dumped, bytes)
            body = bytearray(dumped[:-8])
            room = len(body) - BEFORE_VALUE - 2
            for place, value in changes:
                body[BEFORE_VALUE + place % room] = value
            restored = bytes(body) + crc64(bytes(body)).to_bytes(8, "little")
            wire(["RESTORE", "restored", 0, restored, "REPLACE"])
            for command in ("AI.TENSORGET", "AI.SCRIPTGET", "DUMP", "DEL"):
                wire([command, "restored"])
            assert wire("PING") == Simple("PONG")


DUMPED: list[Words] = [
    ["AI.TENSORSET", "dumped", "FLOAT", "2", "3"],
    ["AI.TENSORSET", "dumped", "STRING", "2", "VALUES", "one", "two"],
    ["AI.TENSORSET", "dumped", "BOOL", "VALUES", "1"],
    ["AI.SCRIPTSTORE", "dumped", "CPU", "TAG", "t", *entry("f"), "SOURCE", GOOD[3]],
]
BEFORE_VALUE = 10
"""Bytes of a dump that say what type its value is of; the rest is the type's own."""


def crc64(data: bytes) -> int:
    """The checksum of dumps: CRC-64 of Jones, reflected."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x95AC9329AC4BC9B5 if crc & 1 else 0)
    return crc


@st.composite
def raw_bytes(draw: st.DrawFn) -> bytes:
    """Commands with some of their bytes changed, taken away, or put in between; or any bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(b"".join(map(packed, draw(pipelines))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 8)))
        data[start:stop] = draw(
            st.binary(max_size=8) | st.sampled_from([b"\r\n", b"$-1\r\n", b"*"])
        )
    return bytes(data)


damages = st.tuples(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=4),
)

LENGTHS = [
    pytest.param(0.0, id="short"),
    pytest.param(SECONDS, id="long", marks=[pytest.mark.acceptance, pytest.mark.timeout(3600)]),
]


@pytest.fixture(params=KINDS)
def fuzzed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fuzzed]:
    store = server_or_skip(request.param, tmp_path)
    yield Fuzzed(store)
    store.stop()


@pytest.mark.parametrize("seconds", LENGTHS)
def test_each_command_is_answered_once(fuzzed: Fuzzed, seconds: float) -> None:
    """Commands of the grammar, right and wrong, many at once."""
    fuzzed.try_all(pipelines, fuzzed.answers_each, seconds * 0.6)


@pytest.mark.parametrize("seconds", LENGTHS)
def test_any_bytes_are_survived(fuzzed: Fuzzed, seconds: float) -> None:
    """Damaged commands harm nobody else, and replies stay whole."""
    fuzzed.try_all(raw_bytes(), fuzzed.survives, seconds * 0.3)


@pytest.mark.parametrize("seconds", LENGTHS)
def test_damaged_dumps_are_survived(fuzzed: Fuzzed, seconds: float) -> None:
    """A value that no server wrote is refused or harmless."""
    assert crc64(b"123456789") == 0xE9C6D914C4B8D9CA  # the check value of this CRC
    fuzzed.try_all(damages, fuzzed.restores, seconds * 0.1)


# --- memory -----------------------------------------------------------------------------------


def usual(number: int) -> list[Words]:
    """What clients do all day, and what they do wrong; the scripts' names differ each time."""
    source = function(f"return tensors[0] + {number}")
    name = f"script-{number}"
    run = ["AI.SCRIPTEXECUTE", name, "f", "INPUTS", "1", "x", "OUTPUTS", "1", "y"]
    return [
        ["AI.SCRIPTSTORE", name, "CPU", *entry("f"), "SOURCE", source],
        ["AI.TENSORSET", "x", "FLOAT", "1024", "BLOB", bytes(4096)],
        *[run] * 10,
        ["AI.SCRIPTEXECUTE", name, "f", "INPUTS", "1", "none", "OUTPUTS", "1", "y"],
        ["AI.SCRIPTEXECUTE", name, "g", "INPUTS", "1", "x"],
        ["AI.SCRIPTEXECUTE", name, "f", "INPUTS", "0", "OUTPUTS", "1", "y"],
        ["AI.SCRIPTSTORE", "bad", "CPU", *entry("f"), "SOURCE", source[:-9]],
        ["AI.DAGEXECUTE", "LOAD", "1", "x", "|>", *run, "|>", "AI.TENSORGET", "y", "VALUES"],
        ["AI.TENSORGET", "y", "VALUES"],
        ["AI.TENSORGET", "y", "META", "BLOB"],
        *[["AI.TENSORSET", f"t{each}", "INT8", "3", "VALUES", "1", "2", "3"] for each in range(60)],
        *[["AI.TENSORGET", f"t{each}"] for each in range(20)],
        ["AI.INFO", name],
        ["DEL", name],
    ]


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_many_commands(fuzzed: Fuzzed) -> None:
    """100,000 commands, a thousand scripts among them, leave nothing behind."""
    each = len(usual(0))
    grown: list[int] = []
    with contextlib.closing(fuzzed.connect()) as wire:
        for number in range(COMMANDS // each):
            wire.send_bytes(b"".join(map(packed, usual(number))))
            for _ in range(each):
                wire.receive()
            if number % 100 == 99:
                grown.append(fuzzed.store.resident_bytes())
    assert grown[-1] - grown[1] <= RSS_SLACK_BYTES, [round(each / 2**20) for each in grown]
