"""RedisAI's protocol, rule by rule, as its clients see it on the wire."""
# ruff: noqa: E501 - a case is a line of its table

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.p2p.aggregate.stores import (
    Command,
    Double,
    Error,
    Reply,
    Simple,
    Store,
    Wire,
    Word,
    function,
    storing,
    words_of,
)

OK = Simple("OK")
NA = Simple("NA")
WRONG_TYPE = Error("WRONGTYPE Operation against a key holding the wrong kind of value")
NO_TENSOR = Error("ERR tensor key is empty or in a different shard")
NO_SCRIPT = Error("ERR script key is empty")
NESTED = Error("ERR Cannot run RedisAI command within a transaction or a LUA script")

Expected = Reply | re.Pattern[str]
"""A pattern stands for an error whose whole text it matches."""


@dataclass(frozen=True)
class Case:
    command: Command
    expected: Expected
    setup: tuple[Command, ...] = ()
    after: tuple[tuple[Command, Expected], ...] = ()

    def __str__(self) -> str:
        words = [self.command] if isinstance(self.command, str) else map(str, self.command)
        return " ".join(words).encode("unicode_escape").decode()[:90]


def case(
    command: Command,
    expected: Expected,
    *setup: Command,
    after: Sequence[tuple[Command, Expected]] = (),
) -> Case:
    return Case(command, expected, setup, tuple(after))


def agrees(reply: Reply, expected: Expected) -> bool:
    if isinstance(expected, re.Pattern):
        return isinstance(reply, Error) and expected.fullmatch(reply.text) is not None
    if isinstance(expected, list):
        return (
            isinstance(reply, list)
            and len(reply) == len(expected)
            and all(map(agrees, reply, expected))
        )
    return type(reply) is type(expected) and reply == expected


def check(wire: Wire, command: Command, expected: Expected) -> None:
    if wire.is_old and isinstance(expected, Error) and " arguments for 'ai." in expected.text:
        # before version 7 a server repeats the command's name as it was typed
        name = words_of(command)[0].decode()
        expected = Error(re.sub("'ai.*'", f"'{name}'", expected.text))
    reply = wire(command)
    assert agrees(reply, expected), f"{command!r} is answered {reply!r}, not {expected!r}"


def play(wire: Wire, case: Case) -> None:
    for command in case.setup:
        reply = wire(command)
        assert not isinstance(reply, Error), f"{command!r} is answered {reply!r}"
    check(wire, case.command, case.expected)
    for command, expected in case.after:
        check(wire, command, expected)
    check(wire, "PING", Simple("PONG"))


def arity(command: str) -> Error:
    return Error(f"ERR wrong number of arguments for '{command}' command")


def tensor(dtype: str, shape: Sequence[int], blob: bytes) -> Reply:
    """What AI.TENSORGET says of it by default."""
    return [b"dtype", dtype.encode(), b"shape", list(shape), b"blob", blob]


# ---------------------------------------------------------------- AI.TENSORSET

VALUES: dict[str, tuple[str, list[Reply], bytes]] = {
    "FLOAT": ("1.5 -2", [b"1.5", b"-2"], struct.pack("<2f", 1.5, -2)),
    "DOUBLE": ("1.5 -1e300", [b"1.5", None], struct.pack("<2d", 1.5, -1e300)),
    "INT8": ("-128 127", [-128, 127], struct.pack("<2b", -128, 127)),
    "INT16": ("-32768 32767", [-32768, 32767], struct.pack("<2h", -32768, 32767)),
    "INT32": (
        "-2147483648 2147483647",
        [-(2**31), 2**31 - 1],
        struct.pack("<2i", -(2**31), 2**31 - 1),
    ),
    "INT64": (
        f"{-(2**63)} {2**63 - 1}",
        [-(2**63), 2**63 - 1],
        struct.pack("<2q", -(2**63), 2**63 - 1),
    ),
    "UINT8": ("0 255", [0, 255], b"\x00\xff"),
    "UINT16": ("0 65535", [0, 65535], b"\x00\x00\xff\xff"),
    "BOOL": ("0 1", [0, 1], b"\x00\x01"),
    "STRING": ("one ", [b"one", b""], b"one\0\0"),
}


@pytest.mark.parametrize("dtype", VALUES)
def test_every_dtype_is_set_and_got_in_both_forms(wire: Wire, dtype: str) -> None:
    """What was set by VALUES is got as BLOB, and the other way round, with the same bytes."""
    values, shown, blob = VALUES[dtype]
    check(wire, f"AI.TENSORSET v {dtype.lower()} 2 values {values}", OK)
    check(wire, "AI.TENSORGET v", tensor(dtype, [2], blob))
    check(wire, ["ai.tensorset", "b", dtype, 1, 2, "blob", blob], OK)
    check(wire, "AI.TENSORGET b BLOB", blob)
    got = wire("AI.TENSORGET b VALUES")
    if dtype == "DOUBLE":  # printed as the server prints a double
        assert isinstance(got, list) and all(isinstance(each, bytes) for each in got)
        assert [float(str(each, "ascii")) for each in got if isinstance(each, bytes)] == [
            1.5,
            -1e300,
        ]
    else:
        assert got == shown
    zero: bytes = b"\0" * (2 if dtype == "STRING" else len(blob))
    check(wire, f"AI.TENSORSET z {dtype} 2", OK)
    check(wire, "AI.TENSORGET z BLOB", zero)


NO_TYPE = Error("ERR invalid data type")
BAD_SHAPE = Error("ERR invalid or negative value found in tensor shape")
BAD_LENGTH = Error("ERR data length does not match tensor shape and type")
ONE_BLOB = Error(
    "ERR a single binary string should come after the BLOB argument in 'AI.TENSORSET' command"
)
BAD_COUNT = Error("ERR wrong number of values was given in 'AI.TENSORSET' command")
BAD_VALUE = Error("ERR invalid value")
BAD_BOOL = Error("ERR BOOL tensor elements must be 0 or 1")
BAD_STRINGS = Error("ERR Number of string elements in data blob does not match tensor length")
NUL_IN_STRING = Error("ERR C-string value contains null character")
SHORT = b"\0\0\0"

TENSORSET = [
    *(case(f"AI.TENSORSET{words}", arity("ai.tensorset")) for words in ("", " x", " x FLOAT")),
    *(
        case(f"AI.TENSORSET x {dtype} 1", NO_TYPE)
        for dtype in ["FLOAT16", "HALF", "BFLOAT16", "UINT32", "UINT64", "COMPLEX", "FLOATS", "F"]
    ),
    case(["AI.TENSORSET", "x", "", "1"], NO_TYPE),
    case(["AI.TENSORSET", "x", "FLOAT\0", "1"], NO_TYPE),
    *(
        case(["AI.TENSORSET", "x", "FLOAT", *dims], BAD_SHAPE)
        for dims in (
            ["0"], ["-1"], ["abc"], ["1.5"], [""], ["1\0"], [" 1"], ["2", "0"], ["2", "DATA", "x"],
            [10**18, 10**18], [2**32, 2**32], [2**63], [-(2**63)], [10**30], [2**62, 4],
        )
    ),
    case(["AI.TENSORSET", "x", "FLOAT", 10**18], re.compile("(?i).*(memory|shape).*")),
    case(["AI.TENSORSET", "x", "STRING", 10**15], re.compile("(?i).*(memory|shape).*")),
    case(["AI.TENSORSET", "x", "FLOAT", 10**12], re.compile("(?i).*memory.*")),
    case(["AI.TENSORSET", "x", "FLOAT", 10**12, "BLOB", b"abcd"], BAD_LENGTH),
    case(["AI.TENSORSET", "x", "FLOAT", 10**12, "VALUES", 1], BAD_COUNT),
    *(
        case(["AI.TENSORSET", "x", "FLOAT", 1, "BLOB", blob], BAD_LENGTH)
        for blob in (b"", SHORT, b"\0" * 5)
    ),
    case(["AI.TENSORSET", "x", "STRING", 1, "BLOB", b""], BAD_LENGTH),
    case("AI.TENSORSET x FLOAT 1 BLOB", ONE_BLOB),
    case("AI.TENSORSET x FLOAT 1 BLOB abcd efgh", ONE_BLOB),
    case("AI.TENSORSET x FLOAT 1 BLOB abcd VALUES 1", ONE_BLOB),
    case("AI.TENSORSET x FLOAT 2 VALUES 1", BAD_COUNT),
    case("AI.TENSORSET x FLOAT 2 VALUES 1 2 3", BAD_COUNT),
    case("AI.TENSORSET x FLOAT 2 VALUES", BAD_COUNT),
    *(
        case(["AI.TENSORSET", "x", dtype, 1, "VALUES", value], BAD_VALUE)
        for dtype, value in (
            ("FLOAT", "abc"), ("FLOAT", ""), ("FLOAT", "nan"), ("FLOAT", "1 "), ("FLOAT", "1\0"),
            ("FLOAT", "1e39"), ("DOUBLE", "1e999"), ("DOUBLE", "nan"), ("DOUBLE", "0x"),
            ("INT8", "128"), ("INT8", "-129"), ("INT16", "32768"), ("INT32", 2**31),
            ("INT64", 2**63), ("INT64", -(2**63) - 1), ("INT64", "1.5"), ("INT64", "nan"),
            ("UINT8", "256"), ("UINT8", "-1"), ("UINT16", "65536"), ("UINT16", "-1"),
            ("BOOL", "2"), ("BOOL", "-1"), ("BOOL", "true"), ("INT32", ""),
        )
    ),
    case("AI.TENSORSET x FLOAT 3 VALUES inf -inf 1e-3", OK, after=[
        ("AI.TENSORGET x BLOB", struct.pack("<3f", float("inf"), float("-inf"), 1e-3))]),
    case("AI.TENSORSET x DOUBLE 1 VALUES inf", OK, after=[("AI.TENSORGET x VALUES", [b"inf"])]),
    *(
        case(["AI.TENSORSET", "x", "BOOL", 2, "BLOB", blob], BAD_BOOL)
        for blob in (b"\2\0", b"\0\2", b"\xff\1")
    ),
    *(
        case(["AI.TENSORSET", "x", "STRING", 2, "BLOB", blob], BAD_STRINGS)
        for blob in (b"a\0", b"a\0b\0c\0", b"a\0b", b"\0\0x", b"ab")
    ),
    case(["AI.TENSORSET", "x", "STRING", 1, "VALUES", "a\0b"], NUL_IN_STRING),
    case("AI.TENSORSET x FLOAT VALUES 5", OK, after=[
        ("AI.TENSORGET x META VALUES",
         [b"dtype", b"FLOAT", b"shape", [], b"values", [b"5"]])]),
    case(["AI.TENSORSET", "x", "INT8", "BLOB", b"\7"], OK, after=[
        ("AI.TENSORGET x", tensor("INT8", [], b"\7"))]),
    case("AI.TENSORSET x INT64 1 2 1 VALUES 1 2", OK, after=[
        ("AI.TENSORGET x META", [b"dtype", b"INT64", b"shape", [1, 2, 1]])]),
    case(["AI.TENSORSET", "\0\xff key\r\n", "INT8", 1, "VALUES", 3], OK, after=[
        (["AI.TENSORGET", "\0\xff key\r\n", "VALUES"], [3]), (["EXISTS", "\0\xff key\r\n"], 1)]),
    case(["AI.TENSORSET", "", "INT8", 1, "VALUES", 3], OK, after=[
        (["AI.TENSORGET", "", "VALUES"], [3])]),
    # the order of checks: key, dtype, dims, data
    case("AI.TENSORSET s WHAT -1 VALUES", WRONG_TYPE, "SET s 1"),
    case("AI.TENSORSET x WHAT -1 VALUES", NO_TYPE),
    case("AI.TENSORSET x FLOAT -1 VALUES a b", BAD_SHAPE),
    case("AI.TENSORSET s FLOAT 1 VALUES 1", WRONG_TYPE, storing("s", function("return tensors"))),
    # what was there
    case("AI.TENSORSET x INT8 1 VALUES 2", OK, "AI.TENSORSET x INT8 1 VALUES 1", "EXPIRE x 100",
         after=[("TTL x", -1), ("AI.TENSORGET x VALUES", [2])]),
    case("AI.TENSORSET x INT8 1 VALUES 1000", BAD_VALUE, "AI.TENSORSET x INT8 1 VALUES 1",
         "EXPIRE x 100000", after=[("AI.TENSORGET x VALUES", [1]), ("EXISTS x", 1)]),
    case("AI.TENSORSET s FLOAT 1 VALUES 1", WRONG_TYPE, "SET s 1", after=[("GET s", b"1")]),
]  # fmt: skip

# ---------------------------------------------------------------- AI.TENSORGET

X = "AI.TENSORSET x INT16 2 VALUES 1 -1"
X_META: list[Reply] = [b"dtype", b"INT16", b"shape", [2]]
X_BLOB = b"\1\0\xff\xff"

TENSORGET = [
    *(
        case(f"AI.TENSORGET x{words}", [*X_META, b"blob", X_BLOB], X)
        for words in ("", " META BLOB", " BLOB META", " meta Blob")
    ),
    case("AI.TENSORGET x META", X_META, X),
    case("AI.TENSORGET x META VALUES", [*X_META, b"values", [1, -1]], X),
    case("AI.TENSORGET x VALUES META", [*X_META, b"values", [1, -1]], X),
    case("AI.TENSORGET x BLOB", X_BLOB, X),
    case("AI.TENSORGET x VALUES", [1, -1], X),
    case("AI.TENSORGET x VALUES", [b"0.10000000149011612"], "AI.TENSORSET x FLOAT 1 VALUES 0.1"),
    case("AI.TENSORGET x VALUES", [b"a", b"", b"b"], ["AI.TENSORSET", "x", "STRING", 3, "BLOB", "a\0\0b\0"]),
    case("AI.TENSORGET none", NO_TENSOR),
    case("AI.TENSORGET none WHAT", NO_TENSOR),
    case("AI.TENSORGET s", WRONG_TYPE, "SET s 1"),
    case("AI.TENSORGET s WHAT", WRONG_TYPE, "SET s 1"),
    case("AI.TENSORGET s", WRONG_TYPE, storing("s", function("return tensors"))),
    case("AI.TENSORGET x WHAT", Error("ERR unsupported data format"), X),
    case(["AI.TENSORGET", "x", ""], Error("ERR unsupported data format"), X),
    case("AI.TENSORGET x BLOB VALUES", Error("ERR both BLOB and VALUES specified"), X),
    case("AI.TENSORGET", arity("ai.tensorget")),
    case("AI.TENSORGET x META BLOB VALUES", arity("ai.tensorget"), X),
]  # fmt: skip


def test_doubles_are_doubles_in_resp3(wire: Wire) -> None:
    """In RESP3 a value is a double, and what holds it stays an array."""
    check(wire, "AI.TENSORSET x FLOAT 2 VALUES 0.5 inf", OK)
    assert isinstance(wire("HELLO 3"), list)
    check(wire, "AI.TENSORGET x VALUES", [Double("0.5"), Double("inf")])
    check(wire, "AI.TENSORGET x META", [b"dtype", b"FLOAT", b"shape", [2]])
    wire.send("AI.TENSORGET x META")
    assert wire.receive_line() == b"*4", "an array, not a map"
    check(wire, "PING", Simple("PONG"))


# ---------------------------------------------------------------- AI.SCRIPTSTORE, GET, DEL

RETURN = function("return tensors")
NO_ENTRIES = Error("ERR Insufficient arguments, missing script entry points")
NO_SOURCE = Error("ERR Insufficient arguments, missing script SOURCE")
BAD_INPUTS = (
    "Wrong inputs type in function f. Expected signature similar to: "
    "def f(tensors: List[Tensor], keys: List[str], args: List[str])"
)


def stores(*words: Word) -> list[Word]:
    return ["AI.SCRIPTSTORE", "s", *words]


def signature(head: str) -> list[Word]:
    return storing("s", f"def f({head}:\n    return tensors\n")


SCRIPTSTORE = [
    case("AI.SCRIPTSTORE", arity("ai.scriptstore")),
    case(stores("CPU", "ENTRY_POINTS", 0, "SOURCE", RETURN), arity("ai.scriptstore")),
    case(stores("CPU", "TAG", "t", "ENTRY_POINTS", 0, "SOURCE", RETURN), OK),
    case(stores("CPU", "ENTRY_POINTS", 1, "f", "SOURCE", RETURN), OK),
    case(stores("cpu", "entry_points", 1, "f", "source", RETURN, "more", "words"), OK),
    case(stores("CPU", "ENTRY_POINTS", 1, "f", "TAG", "t", "SOURCE", RETURN), NO_SOURCE),
    case(stores("CPU", "SOURCE", RETURN, "ENTRY_POINTS", 1, "f"), NO_ENTRIES),
    case(stores("CPU", "ENTRY_POINTS", 10, "f", "SOURCE", RETURN), NO_ENTRIES),
    case(stores("CPU", "ENTRY_POINTS", 10**18, "f", "SOURCE", RETURN), NO_ENTRIES),
    case(stores("CPU", "ENTRY_POINTS", -1, "f", "SOURCE", RETURN), NO_ENTRIES),
    case(stores("CPU", "TAG", "a", "b", "c", "ENTRY_POINTS"), NO_ENTRIES),
    *(
        case(
            stores("CPU", "ENTRY_POINTS", count, "f", "SOURCE", RETURN),
            Error("ERR Non numeric entry points number provided to AI.SCRIPTSTORE command"),
        )
        for count in ("one", "1.5", "", "1\0", 2**64)
    ),
    case(stores("CPU", "ENTRY_POINTS", 1, "f", "CODE", RETURN), NO_SOURCE),
    case(stores("CPU", "ENTRY_POINTS", 2, "f", "SOURCE", RETURN), NO_SOURCE),
    case(stores("CPU", "ENTRY_POINTS", 3, "f", "SOURCE", RETURN), NO_SOURCE),
    case(stores("CPU", "TAG", "t", "ENTRY_POINTS", 1, "f", "SOURCE"), NO_SOURCE),
    case(stores("CPUfoo", "ENTRY_POINTS", 1, "f", "SOURCE", RETURN), OK,
         after=[("AI.SCRIPTGET s META", [b"device", b"CPUfoo", b"tag", b"", b"Entry Points", [b"f"]])]),
    case(stores("cpu:0", "ENTRY_POINTS", 1, "f", "SOURCE", RETURN), OK),
    *(
        case(stores(device, "ENTRY_POINTS", 1, "f", "SOURCE", RETURN),
             Error("GPU requested but Torch couldn't find CUDA"))
        for device in ("GPU", "gpu:1")
    ),
    *(
        case(stores(device, "ENTRY_POINTS", 1, "f", "SOURCE", RETURN),
             Error("ERR unsupported device"))
        for device in ("TPU", "", "C", "\0CPU")
    ),
    case(storing("s", RETURN), WRONG_TYPE, "SET s 1", after=[("GET s", b"1")]),
    case(storing("s", "import os"), re.compile("expected def but found 'import' here:.*"), "SET s 1"),
    case(storing("s", RETURN), WRONG_TYPE, "AI.TENSORSET s INT8 1"),
    case(storing("s", RETURN, "g"), Error("Function g does not exist in the given script.")),
    case(storing("s", ""), Error("Function f does not exist in the given script.")),
    case(storing("s", RETURN, ""), Error("Function  does not exist in the given script.")),
    case(storing("s", RETURN, "f..g"), Error("Function f..g does not exist in the given script.")),
    case(storing("s", RETURN + "\0nonsense"), OK, after=[("AI.SCRIPTGET s SOURCE", RETURN.encode())]),
    case(signature("tensors: List[Tensor], keys: List[str])"),
         Error("Wrong number of inputs in function f. Expected 3 but was 2")),
    case(signature("tensors: List[Tensor], keys: List[str], args: List[int])"), Error(BAD_INPUTS)),
    case(signature("keys: List[str], tensors: List[Tensor], args: List[str])"), Error(BAD_INPUTS)),
    case(signature("tensors: Tensor, keys: List[str], args: List[str])"), Error(BAD_INPUTS)),
    case(signature("tensors: List[Tensor], b: List[str], c: List[str])"), OK),
    case(signature("tensors: list[Tensor], b: list[str], c: list[str])"), OK),
    case(signature("tensors: List[torch.Tensor], keys: List[str], args: List[str])"), OK),
    case(signature("tensors: List[Tensor], keys: List[str], args: List[str]) -> List[Tensor]"), OK),
    case(storing("s", "# a comment\ndef g(a: int, b: str):\n    return a\n" + RETURN), OK),
    *(
        case(storing("s", source + RETURN), re.compile(f"expected def but found {found} here:.*"))
        for source, found in (
            ("import math\n", "'import'"), ("class A:\n    pass\n", "'class'"), ("x = 1\n", "'ident'"),
        )
    ),
    *(
        case(storing("s", function(*lines)), re.compile(text))
        for lines, text in (
            (["return torch.nn.functional.relu(tensors[0])"], ".+"),
            (["return torch.linalg.norm(tensors[0])"], ".+"),
            (["return tensors[0].to(torch.float32)"], ".*cannot be used as a value.*"),
            (["raise Exception('x')"], ".*undefined value Exception.*"),
            (["raise RuntimeError('x')"], ".*undefined value RuntimeError.*"),
            (["return math.sqrt(1.0)"], ".*undefined value math.*"),
            (["return np.ones(1)"], ".*undefined value np.*"),
            (["return lambda x: x"], ".+"),
            (["return sum(tensors)"], ".+"),
            (["return redis.call('PING')"], ".+"),
            (["return redis.log('PING', 'x')"], ".+"),
            (["return redisAI.tensor_get('PING')"], ".+"),
            (["return redis.execute('PING')"], ".+"),
            (["return nothing"], ".*undefined value nothing.*"),
            (["return f(tensors, keys, args)"], ".+"),
            (["return ("], ".+"),
            (["return " + "(" * 5000 + "1" + ")" * 5000], ".+"),
            (["return " + "-" * 20000 + "1"], ".+"),
            (["return len('{}'.format(args[0]))"], ".*format is not available in scripts"),
            (["return torch.from_file('/etc/passwd', False, 10)"], ".+"),
            (["return torch._standard_gamma(tensors[0])"], ".+"),
            # those that trust what other functions of torch's give them, and end the server
            *(
                ([f"return {expression}"], rf".*torch\.{name} is not available in scripts.*")
                for name, expression in (
                    ("segment_reduce", "torch.segment_reduce(tensors[0], 'sum', lengths=tensors[0])"),
                    ("ctc_loss", "torch.ctc_loss(tensors[0], tensors[0], tensors[0], tensors[0])"),
                    ("max_pool2d_with_indices_backward",
                     "torch.max_pool2d_with_indices_backward(tensors[0], tensors[0], [2, 2], [2, 2], [0, 0], [1, 1], False, tensors[1])"),
                    ("adaptive_max_pool2d_backward",
                     "torch.adaptive_max_pool2d_backward(tensors[0], tensors[0], tensors[1])"),
                    ("sparse_coo_tensor", "torch.sparse_coo_tensor(tensors[0], tensors[1])"),
                    ("sparse_csr_tensor", "torch.sparse_csr_tensor(tensors[0], tensors[1], tensors[0])"),
                    ("to_sparse", "tensors[0].to_sparse()"),
                    ("resize_", "tensors[0].resize_([4])"),
                )
            ),
        )
    ),
    *(
        case(storing("s", function(*lines)), OK)
        for lines in (
            ["return Torch.relu(tensors[0])"],
            ["return TORCH.linalg_norm(tensors[0])"],
            ["x = REDIS.execute('PING', args)", "return tensors"],
            ["return redisai.model_execute('m', tensors, 1)"],
            ["return [torch.full([1], float(len(args)), dtype=6)]"],
            ["a = [int(x) for x in args]", "d = {x: 1 for x in args}", "return tensors"],
            ["for i, (t, k) in enumerate(zip(tensors, keys)):", "    print(i, t, k)", "return tensors"],
            ["a = sorted([3, 1])", "b = max(a)", "c = '%s %s' % (str(b), 'x')", "return tensors"],
            ["x = redis.execute('GET', 'a')", "if isinstance(x, str):", "    print(x)", "return tensors"],
        )
    ),
    case("AI.SCRIPTGET s SOURCE", RETURN.encode(), storing("s", RETURN)),
    case(storing("s", "nonsense"), re.compile(".+"), storing("s", RETURN),
         after=[("AI.SCRIPTGET s SOURCE", RETURN.encode())]),
    case(storing("s", "#" + "x" * 10**6 + "\n" + RETURN), re.compile("ERR .*")),
]  # fmt: skip

META: list[Reply] = [b"device", b"CPU", b"tag", b"t", b"Entry Points", [b"f"]]
WITH_SOURCE: list[Reply] = [*META, b"source", RETURN.encode()]

SCRIPTGET = [
    *(
        case(f"AI.SCRIPTGET s{words}", reply, storing("s", RETURN))
        for words, reply in (
            ("", WITH_SOURCE), (" META SOURCE", WITH_SOURCE), (" source meta", WITH_SOURCE),
            (" META", META), (" SOURCE", RETURN.encode()), (" WHAT", WITH_SOURCE),
            (" WHAT META", META),
        )
    ),
    case("AI.SCRIPTGET none", NO_SCRIPT),
    case("AI.SCRIPTGET x", WRONG_TYPE, X),
    case("AI.SCRIPTGET x", WRONG_TYPE, "SET x 1"),
    case("AI.SCRIPTGET", arity("ai.scriptget")),
    case("AI.SCRIPTDEL s", OK, storing("s", RETURN), after=[("EXISTS s", 0), ("AI.SCRIPTDEL s", NO_SCRIPT)]),
    case("AI.SCRIPTDEL x", WRONG_TYPE, X, after=[("EXISTS x", 1)]),
    case("AI.SCRIPTDEL", arity("ai.scriptdel")),
    case("AI.SCRIPTDEL s s", arity("ai.scriptdel"), storing("s", RETURN)),
    case("DEL s", 1, storing("s", RETURN), after=[("AI.SCRIPTGET s", NO_SCRIPT)]),
]  # fmt: skip

# ---------------------------------------------------------------- AI.SCRIPTEXECUTE

ADD = """
def f(tensors: List[Tensor], keys: List[str], args: List[str]):
    total = tensors[0].clone()
    for each in tensors[1:]:
        total += each
    for each in args:
        total += int(each)
    return total

def two(a: Tensor, b: Tensor):
    return a + b

def rest(a: Tensor, others: List[Tensor]):
    return a + len(others)

def number(a: Tensor, n: int):
    return a + n

def nothing(a: Tensor):
    print(a)
"""
S = storing("s", ADD)
A = "AI.TENSORSET a INT32 2 VALUES 1 2"
B = "AI.TENSORSET b INT32 2 VALUES 10 20"
KEYS_FIRST = Error("ERR KEYS or INPUTS scope must be provided first for AI.SCRIPTEXECUTE command")
BAD_KEYS = Error("ERR Invalid or negative value found in number of KEYS")
FEW_KEYS = Error(
    "ERR Number of pre declared KEYS to be used in the command does not match the number of "
    "given arguments"
)
NO_COUNT = Error("ERR Invalid arguments provided to AI.SCRIPTEXECUTE")


def ended(scope: str) -> Error:
    return Error(
        f"ERR number of {scope} to AI.SCRIPTEXECUTE command does not match the number of given "
        "arguments"
    )


def invalid(scope: str) -> Error:
    return Error(f"ERR Invalid argument for {scope} count in AI.SCRIPTEXECUTE")


def already(scope: str) -> Error:
    return Error(f"ERR Already Encountered {scope} scope in AI.SCRIPTEXECUTE command")


def unexpected(word: str) -> Error:
    return Error(f"ERR Invalid AI.SCRIPTEXECUTE command. Unexpected argument: {word}")


def runs(words: str, expected: Expected, *after: tuple[Command, Expected]) -> Case:
    """Of the script s, with the tensors a and b at hand."""
    command = ["AI.SCRIPTEXECUTE", *words.split(" ")] if words else ["AI.SCRIPTEXECUTE"]
    return case(command, expected, S, A, B, "SET text 1", after=after)


SUM: tuple[Command, Expected] = ("AI.TENSORGET o VALUES", [11, 22])
NOTHING: tuple[Command, Expected] = ("EXISTS o", 0)

ARGUMENTS = [
    runs("", arity("AI.SCRIPTEXECUTE")),
    runs("s", arity("AI.SCRIPTEXECUTE")),
    runs("s f", KEYS_FIRST),
    runs("s f ARGS 1 1 INPUTS 1 a", KEYS_FIRST),
    runs("s f OUTPUTS 1 o", KEYS_FIRST),
    runs("s f JUNK", KEYS_FIRST),
    runs("s f TIMEOUT 5", KEYS_FIRST),
    runs("s f INPUTS 2 a b OUTPUTS 1 o", OK, SUM),
    runs("s f inputs 2 a b outputs 1 o", OK, SUM),
    runs("s f INPUTS 2 a b KEYS 1 k OUTPUTS 1 o ARGS 1 1", OK, ("AI.TENSORGET o VALUES", [12, 23])),
    runs("s f KEYS 1 none OUTPUTS 1 o INPUTS 2 a b", OK, SUM),
    runs("s f KEYS 1 k INPUTS 2 a b OUTPUTS 1 o TIMEOUT 5000", OK, SUM),
    runs("s f INPUTS 2 a b OUTPUTS 1 o TIMEOUT 9223372036854775807", OK, SUM),
    runs("s f INPUTS 2 a b", OK, NOTHING),
    runs("s f INPUTS 2 a b OUTPUTS 0", OK, NOTHING),
    runs("s f INPUTS 1 a TIMEOUT 5 OUTPUTS 1 o", Error("ERR Encountered problem parsing AI.SCRIPTEXECUTE")),
    runs("s f INPUTS 1 a INPUTS 1 b", already("INPUTS")),
    runs("s f KEYS 1 k KEYS 1 k", already("KEYS")),
    runs("s f INPUTS 1 a OUTPUTS 1 o OUTPUTS 1 o", already("OUTPUTS")),
    runs("s f INPUTS 1 a ARGS 1 o ARGS 1 o", already("ARGS")),
    *(runs(f"s f KEYS {count} k", BAD_KEYS) for count in ("0", "-1", "x", "", "1.5", str(2**64))),
    runs("s f KEYS 2 k", FEW_KEYS),
    runs(f"s f KEYS {2**62} k", FEW_KEYS),
    runs("s f KEYS", Error("ERR Missing arguments after KEYS keyword")),
    runs("s f INPUTS 1 a KEYS", Error("ERR Missing arguments after KEYS keyword")),
    *(runs(f"s f INPUTS {count} a", invalid("inputs")) for count in ("-1", "x", "", str(2**64))),
    *(runs(f"s f INPUTS 1 a OUTPUTS {count} o", invalid("outputs")) for count in ("-1", "x")),
    *(runs(f"s f INPUTS 1 a ARGS {count} o", invalid("keys")) for count in ("-1", "x")),
    *(runs(f"s f INPUTS {count} a", ended("inputs")) for count in (2, 10**9, 2**62)),
    *(runs(f"s f INPUTS 1 a OUTPUTS {count} o", ended("outputs")) for count in (2, 2**62)),
    *(runs(f"s f INPUTS 1 a ARGS {count} 1", ended("args")) for count in (2, 2**62)),
    *(runs(f"s f INPUTS{more}", NO_COUNT) for more in ("", " 1 a OUTPUTS", " 1 a ARGS")),
    runs("s f INPUTS 1 a JUNK", unexpected("JUNK")),
    runs("s f INPUTS 0 a", unexpected("a")),
    runs("s f INPUTS 1 a b", unexpected("b")),
    runs("s f INPUTS 1 a TIMEOUT", Error("ERR No value provided for TIMEOUT in AI.SCRIPTEXECUTE")),
    *(
        runs(f"s f INPUTS 1 a TIMEOUT {ms}", Error("ERR Invalid value for TIMEOUT"))
        for ms in ("0", "-1", "x", "", str(2**64))
    ),
    # the order of checks: script, arguments, inputs
    runs("none", arity("AI.SCRIPTEXECUTE")),
    runs("none f JUNK", NO_SCRIPT),
    runs("a f JUNK", WRONG_TYPE),
    runs("text f INPUTS 1 a", WRONG_TYPE),
    runs("s f INPUTS 1 none JUNK", unexpected("JUNK")),
    runs("s f INPUTS 1 none", NO_TENSOR),
    runs("s f INPUTS 2 a text", WRONG_TYPE),
    runs("s nofn INPUTS 1 none", NO_TENSOR),
    runs("s nofn INPUTS 1 a", Error("Function does not exist: nofn")),
    runs("s f.g INPUTS 1 a", Error("Function does not exist: f.g")),
    case(["AI.SCRIPTEXECUTE", "s", "", "INPUTS", 1, "a"], Error("Function does not exist: "), S, A),
    # functions that are no entry points
    runs("s two INPUTS 2 a b OUTPUTS 1 o", OK, SUM),
    runs("s two INPUTS 3 a b a OUTPUTS 1 o", OK, SUM),
    runs("s two INPUTS 1 a OUTPUTS 1 o", Error("Wrong number of inputs provided to function: two")),
    runs("s rest INPUTS 3 a b b OUTPUTS 1 o", OK, ("AI.TENSORGET o VALUES", [3, 4])),
    runs("s rest INPUTS 1 a OUTPUTS 1 o", OK, ("AI.TENSORGET o VALUES", [1, 2])),
    runs("s number INPUTS 1 a OUTPUTS 1 o", Error("Unsupported input type in function definition: number")),
    runs("s nothing INPUTS 1 a", OK),
]  # fmt: skip


def returns(
    expression: str,
    outputs: str,
    expected: Expected,
    *after: tuple[Command, Expected],
    inputs: str = "a",
) -> Case:
    """Of a script that returns this of the tensors a and b."""
    command = f"AI.SCRIPTEXECUTE s f INPUTS {inputs.count(' ') + 1} {inputs}"
    if outputs:
        command += f" OUTPUTS {outputs.count(' ') + 1} {outputs}"
    lines = expression.split("\n")
    lines[-1] = f"return {lines[-1]}"
    return case(command, expected, storing("s", function(*lines)), A, B, after=after)


UNEXPECTED = Error("Function returned unexpected number of outputs - f")
NO_TENSORS = Error("Function returned non-tensor valuesf")

OUTPUTS = [
    returns("tensors[0] + 1", "o", OK, ("AI.TENSORGET o", tensor("INT32", [2], b"\2\0\0\0\3\0\0\0"))),
    returns("tensors[0] + 1, tensors[0] + 2", "o p", OK, ("AI.TENSORGET p VALUES", [3, 4])),
    returns("[tensors[0] + 1, tensors[0] + 2]", "o p", OK, ("AI.TENSORGET o VALUES", [2, 3])),
    returns("tensors[0] + 1, tensors[0] + 2", "o o", OK, ("AI.TENSORGET o VALUES", [3, 4])),
    returns("tensors[0]", "o p", UNEXPECTED, NOTHING),
    returns("tensors[0], tensors[0]", "o", UNEXPECTED, NOTHING),
    returns("[torch.zeros([1]) for i in range(0)]", "o", UNEXPECTED, NOTHING),
    returns("None", "o", NO_TENSORS, NOTHING),
    returns("1", "o", NO_TENSORS, NOTHING),
    returns("'text'", "o", NO_TENSORS, NOTHING),
    returns("tensors[0], 1", "o p", NO_TENSORS, NOTHING),
    returns("[1, 2]", "o p", NO_TENSORS, NOTHING),
    returns("1", "", OK),
    returns("torch.zeros([])", "o", OK, ("AI.TENSORGET o", tensor("FLOAT", [], b"\0\0\0\0"))),
    returns("torch.zeros([0, 3])", "o", OK, ("AI.TENSORGET o", tensor("FLOAT", [0, 3], b"")),
            ("AI.TENSORGET o VALUES", [])),
    returns("torch.arange(4, dtype=3).reshape([2, 2]).t()", "o", OK, ("AI.TENSORGET o VALUES", [0, 2, 1, 3])),
    returns("torch.arange(6, dtype=1)[1:5:2]", "o", OK, ("AI.TENSORGET o VALUES", [1, 3])),
    returns("torch.zeros([1]).expand([3])", "o", OK, ("AI.TENSORGET o VALUES", [b"0", b"0", b"0"])),
    *(
        returns(f"tensors[0].to({code})", "o", OK, ("AI.TENSORGET o META", [b"dtype", name, b"shape", [2]]))
        for code, name in (
            (0, b"UINT8"), (1, b"INT8"), (2, b"INT16"), (3, b"INT32"), (4, b"INT64"),
            (6, b"FLOAT"), (7, b"DOUBLE"), (11, b"BOOL"),
        )
    ),
    returns("tensors[0].to(5)", "o", re.compile("Half is not supported.*"), NOTHING),
    returns("tensors[0].to(15)", "o", Error("BFloat16 is not supported by dlpack"), NOTHING),
    returns("tensors[0].to(9)", "o", Error("ComplexFloat is not supported by dlpack"), NOTHING),
    returns("tensors[0] + 1, tensors[0].to(15)", "o p", Error("BFloat16 is not supported by dlpack"), NOTHING),
    returns("torch.zeros([2], device='meta')", "o", re.compile(".+"), NOTHING),
    # bytes of its own, whatever it returns
    *(
        returns(expression, "o", OK, ("AI.TENSORSET a INT32 2 VALUES 7 7", OK),
                ("AI.TENSORGET o VALUES", values), ("DEL a", 1), ("AI.TENSORGET o VALUES", values))
        for expression, values in (
            ("tensors[0]", [1, 2]), ("tensors[0][0:1]", [1]), ("tensors[0].t()", [1, 2]),
            ("tensors[0].view([2, 1])", [1, 2]), ("tensors[0].expand([2, 2])", [1, 2, 1, 2]),
            ("tensors[0].unsqueeze(0)", [1, 2]), ("tensors[0].detach()", [1, 2]),
        )
    ),
    returns("tensors[0].add_(5)", "o", OK, ("AI.TENSORGET a VALUES", [1, 2]), ("AI.TENSORGET o VALUES", [6, 7])),
    returns("tensors[0][0:1].add_(5)\ntensors[0]", "o", OK, ("AI.TENSORGET a VALUES", [1, 2]), ("AI.TENSORGET o VALUES", [6, 2])),
    returns("tensors[0].view([2, 1]).zero_()\ntensors[0]", "o", OK, ("AI.TENSORGET a VALUES", [1, 2]), ("AI.TENSORGET o VALUES", [0, 0])),
    returns("tensors[0][0] = 9\ntensors[0]", "o", OK, ("AI.TENSORGET a VALUES", [1, 2]), ("AI.TENSORGET o VALUES", [9, 2])),
    returns("torch.add(tensors[0], 1, out=tensors[0])\ntensors[0]", "o", OK, ("AI.TENSORGET a VALUES", [1, 2])),
    returns("tensors[0].add_(5)", "a", OK, ("AI.TENSORGET a VALUES", [6, 7])),
    returns("tensors[0].add_(5)\ntensors[1]", "o", OK, ("AI.TENSORGET a VALUES", [1, 2]),
            ("AI.TENSORGET o VALUES", [1, 2]), inputs="a a"),
    returns("tensors[0], tensors[0]", "o p", OK, ("AI.TENSORSET o INT32 1", OK), ("AI.TENSORGET p VALUES", [1, 2])),
    returns("tensors[1], tensors[0]", "a b", OK, ("AI.TENSORGET a VALUES", [10, 20]), ("AI.TENSORGET b VALUES", [1, 2]), inputs="a b"),
    # an input that no script can have
    case("AI.SCRIPTEXECUTE s f INPUTS 1 u", Error("Unsupported kUInt bits 16"), storing("s", RETURN),
         "AI.TENSORSET u UINT16 1"),
    case("AI.SCRIPTEXECUTE s f INPUTS 1 u", Error("Unsupported code 7"), storing("s", RETURN),
         "AI.TENSORSET u STRING 1"),
    # an output key of another type: one reply, nothing stored
    case("AI.SCRIPTEXECUTE s f INPUTS 2 a a OUTPUTS 2 o text", WRONG_TYPE, storing("s", RETURN), A,
         "SET text 1", after=[("EXISTS o", 0), ("GET text", b"1")]),
    case("AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 s", WRONG_TYPE, storing("s", RETURN), A,
         after=[("TYPE s", Simple("AI_SCRIPT"))]),
    case("AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 a", OK, storing("s", RETURN), A, "EXPIRE a 100",
         after=[("TTL a", -1)]),
    case(["AI.SCRIPTEXECUTE", "s", "f", "INPUTS", 1, "\0\r\n", "OUTPUTS", 1, "\xff\0"], OK,
         storing("s", RETURN), ["AI.TENSORSET", "\0\r\n", "INT8", 1, "VALUES", 4],
         after=[(["AI.TENSORGET", "\xff\0", "VALUES"], [4])]),
    case(["AI.SCRIPTEXECUTE", "s", "f", "INPUTS", 1, "", "OUTPUTS", 1, ""], OK,
         storing("s", RETURN), ["AI.TENSORSET", "", "INT8", 1, "VALUES", 4]),
]  # fmt: skip

TRACEBACK = (
    r"The following operation failed in the TorchScript interpreter\. Traceback of TorchScript "
    r'\(most recent call last\):   File "<string>", line \d+, in f .*<--- HERE.*RuntimeError: '
)


def fails(*lines: str, text: str = ".*") -> Case:
    return case(
        "AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 o",
        re.compile(TRACEBACK + text),
        storing("s", function(*lines)),
        A,
        after=[NOTHING],
    )


EXECUTE = "AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 o"
USED = "return torch.zeros([len(x)])"
RUNNING = [
    # of constants, which the compiler takes together
    fails("return torch.zeros([1 % 0])", text="integer division by zero "),
    fails("return torch.zeros([(-9223372036854775807 - 1) // -1])", text="integer overflow.*"),
    fails("return torch.zeros([len('a'.ljust(100000000000))])", text="a width is too large "),
    fails("x0 = 'aaaaaaaa'", *(f"x{i + 1} = x{i} + x{i}" for i in range(40)), "return len(x40)",
          text=".*too long "),
    fails("return tensors[0] + torch.zeros([3])", text=r"The size of tensor a .* "),
    fails("assert False, 'my message'", "return tensors", text="AssertionError: my message "),
    fails("return tensors[5]"),
    fails("return torch.zeros([int(args[0])])"),
    fails("n = len(args)", "return torch.zeros([1 // n])"),
    fails("n = len(args)", "return torch.zeros([1 % n])"),
    fails("return torch.zeros([1000000000000])", text=".*memory.*"),
    fails("return torch.zeros([1000000000000000000])"),
    fails("return torch.zeros([-1])"),
    fails("return torch.arange(1000000000000)", text=".*memory.*"),
    fails("return torch.zeros([1]).expand([1000000000000])[0:1000000000000].clone()"),
    fails("x = [0] * 1000000000000", USED),
    fails("x = [[0] * 1000000 for i in range(1000000)]", USED, text=".*memory.*"),
    fails("x = '1'", "for i in range(60):", "    x = x + x", USED),
    fails("x = '1'", "for i in range(60):", "    x = '%s%s' % (x, x)", USED),
    fails("x = '1'", "for i in range(60):", "    x = x.join([x, x, x])", USED),
    fails("x = [1]", "for i in range(60):", "    x = x + x", USED),
    fails("x = [1]", "for i in range(60):", "    x.extend(x)", USED),
    fails("x = 'a'.ljust(100000000000)", USED),
    fails("x = 'a'.center(100000000000)", USED),
    fails("x = '1'.zfill(100000000000)", USED),
    fails("x = '\\t'.expandtabs(100000000000)", USED),
    fails("x = 'a'", "for i in range(60):", "    x = x.replace('a', 'aa')", USED),
    fails("return torch.zeros([int('text')])"),
    fails("d: Dict[str, int] = {}", "return torch.zeros([d['none']])"),
    fails("return [redisAI.model_execute('m', tensors, 1)[0]]"),
    fails("tensors.clear()", "return tensors[0]"),
    case(EXECUTE, re.compile(".*RuntimeError: out of memory.*"), A, storing("s", function(
        "x: List[float] = torch.zeros([1]).expand([10000000000]).tolist()", USED))),
    fails("return torch.split(torch.zeros([1]).expand([10000000000]), 1)"),
    fails("return torch.unbind(torch.zeros([1]).expand([10000000000]))"),
    fails("x = torch.zeros([1]).expand([10000000000])", "return [each for each in x]"),
    fails("return torch.chunk(torch.zeros([1]).expand([10000000000]), 10000000000)"),
]  # fmt: skip

LATE = Simple("TIMEDOUT")
TIMEOUTS = [
    case(
        "AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 o TIMEOUT 30",
        LATE,
        storing("s", function(*lines)),
        A,
        after=[NOTHING],
    )
    for lines in (
        ["while True:", "    pass", "return tensors"],
        ["while True:", "    tensors[0].add_(1)", "return tensors"],
        ["i = 0", "while i >= 0:", "    i = 1 - i", "return tensors"],
        ["for i in range(1000000000000):", "    print(i)", "return tensors"],
        ["return torch.zeros([len([i for i in range(1000000000000)])])"],
        ["while True:", "    redis.execute('PING', args)", "return tensors"],
        ["x = [1]", "while len(x) > 0:", "    x.append(1)", "    x.pop()", "return tensors"],
    )
]

# ---------------------------------------------------------------- AI.DAGEXECUTE

DAG_SCOPES = Error(
    "ERR AI.DAGEXECUTE and AI.DAGEXECUTE_RO commands must contain at least one out of ROUTING, "
    "LOAD, PERSIST keywords"
)
NOT_IN_DAG = Error("ERR INPUT key cannot be found in DAG")


def bad_count(scope: str) -> Error:
    return Error(f"ERR invalid or negative value found in number of keys to {scope}")


def dag(words: str, expected: Expected, *after: tuple[Command, Expected]) -> Case:
    command = f"AI.DAGEXECUTE {words}" if words else "AI.DAGEXECUTE"
    return case(command, expected, S, A, B, "SET text 1", after=after)


def dag_ro(words: str, expected: Expected) -> Case:
    return case(f"AI.DAGEXECUTE_RO {words}", expected, S, A, B)


GOT_A: Reply = [1, 2]
DAGS = [
    dag("", Error("ERR missing arguments for 'AI.DAGEXECUTE' command")),
    dag("LOAD 1 a |>", Error("ERR missing arguments for 'AI.DAGEXECUTE' command")),
    case("AI.DAGEXECUTE_RO", Error("ERR missing arguments for 'AI.DAGEXECUTE_RO' command")),
    dag("LOAD 1 a |> AI.TENSORGET a VALUES", [GOT_A]),
    dag("load 1 a |> ai.tensorget a values", [GOT_A]),
    dag("LOAD 1 a |> AI.TENSORGET a", [tensor("INT32", [2], b"\1\0\0\0\2\0\0\0")]),
    dag("ROUTING x |> AI.TENSORSET t INT8 1 VALUES 3 |> AI.TENSORGET t VALUES", [OK, [3]], ("EXISTS t", 0)),
    dag("PERSIST 1 o |> AI.TENSORSET o INT8 1 VALUES 3", [OK], ("AI.TENSORGET o VALUES", [3])),
    dag("LOAD 2 a b PERSIST 1 o |> AI.SCRIPTEXECUTE s f INPUTS 2 a b OUTPUTS 1 o", [OK], SUM),
    dag("LOAD 2 a b PERSIST 1 o |> AI.SCRIPTEXECUTE s f INPUTS 2 a b OUTPUTS 1 t |> "
        "AI.SCRIPTEXECUTE s f INPUTS 2 t b OUTPUTS 1 o |> AI.TENSORGET t VALUES", [OK, OK, [11, 22]],
        ("AI.TENSORGET o VALUES", [21, 42])),
    dag("LOAD 1 a PERSIST 1 o |> AI.SCRIPTEXECUTE s f ARGS 1 4 INPUTS 1 a OUTPUTS 1 o", [OK],
        ("AI.TENSORGET o VALUES", [5, 6])),
    dag("LOAD 1 a PERSIST 1 o |> AI.SCRIPTEXECUTE s f OUTPUTS 1 o INPUTS 1 a", [OK]),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 a |> AI.TENSORSET a INT8 1 VALUES 9 |> "
        "AI.TENSORGET a VALUES", [OK, OK, [9]], ("AI.TENSORGET a VALUES", [1, 2])),
    dag("LOAD 1 a |> AI.TENSORGET none |> AI.TENSORGET a VALUES", [NA, GOT_A]),
    dag("LOAD 1 a |> AI.TENSORGET a VALUES |> AI.SCRIPTEXECUTE s nofn INPUTS 1 a |> AI.TENSORGET a",
        [GOT_A, Error("Function does not exist: nofn"), NA]),
    dag("LOAD 1 a PERSIST 2 o p |> AI.TENSORSET o INT8 1 |> AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 2 p q",
        [OK, UNEXPECTED], ("EXISTS o p", 0)),
    dag("LOAD 1 a PERSIST 1 text |> AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 text", [OK, WRONG_TYPE],
        ("GET text", b"1")),
    dag("LOAD 1 a PERSIST 2 o text |> AI.TENSORSET o INT8 1 |> AI.TENSORSET text INT8 1",
        [OK, OK, WRONG_TYPE], ("EXISTS o", 0)),
    dag("LOAD 1 a PERSIST 1 a |> AI.TENSORGET a VALUES", [GOT_A], ("AI.TENSORGET a VALUES", [1, 2])),
    dag("LOAD 1 a TIMEOUT 0 |> AI.TENSORGET a VALUES", [GOT_A]),
    dag("TIMEOUT 5000 LOAD 1 a |> AI.TENSORGET a VALUES", [GOT_A]),
    dag("a b |> AI.TENSORGET a VALUES", re.compile("ERR (Invalid DAG command.*|AI.DAGEXECUTE and.*)")),
    dag("LOAD 1 a b |> AI.TENSORGET a", Error("ERR Invalid DAG command. Unexpected argument:  b")),
    dag("|> AI.TENSORGET a VALUES BLOB", DAG_SCOPES),
    dag("TIMEOUT 5 |> AI.TENSORGET a", DAG_SCOPES),
    dag("ROUTING x |> |> |>", Error("ERR DAG is empty")),
    dag("LOAD 2 a b |>", Error("ERR DAG is empty")),
    dag("LOAD 3 a b b", Error("ERR DAG is empty")),
    dag("LOAD 1 a |> PING x", Error("Unsupported command within DAG")),
    dag("LOAD 1 a |> AI.DAGEXECUTE x", Error("Unsupported command within DAG")),
    dag("LOAD 1 a |> AI.SCRIPTRUN s f INPUTS a",
        Error("Deprecated AI.SCRIPTRUN cannot be used in AI.DAGEXECUTE command")),
    *(dag(f"LOAD {count} a |> AI.TENSORGET a", bad_count("LOAD")) for count in ("0", "-1", "x", 2**62, 2**64)),
    *(dag(f"PERSIST {count} a |> AI.TENSORSET a INT8 1", bad_count("PERSIST")) for count in ("0", "-1", "x", 99)),
    dag("LOAD 1 a PERSIST 2 a a |> AI.TENSORGET a", Error("ERR PERSIST keys must be unique")),
    dag("LOAD 1 a PERSIST 1 o |> AI.TENSORGET a", Error("ERR PERSIST key cannot be found in DAG")),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE s f INPUTS 1 b", NOT_IN_DAG),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE s f INPUTS 1 o |> AI.TENSORSET o INT8 1", NOT_IN_DAG),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE s f INPUTS 1 a TIMEOUT 5",
        Error("ERR TIMEOUT not allowed within a DAG command")),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE s f INPUTS 1 a JUNK", unexpected("JUNK")),
    dag("LOAD 1 a |> AI.TENSORSET b INT8", Error("wrong number of arguments for 'AI.TENSORSET' command")),
    dag("LOAD 1 a |> AI.TENSORSET b WHAT 1", NO_TYPE),
    dag("LOAD 1 a |> AI.TENSORSET b INT8 0", BAD_SHAPE),
    dag("LOAD 1 a |> AI.TENSORGET a WHAT", Error("ERR unsupported data format")),
    dag("LOAD 1 none |> AI.TENSORGET a", NO_TENSOR),
    dag("LOAD 2 a text |> AI.TENSORGET a", WRONG_TYPE),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE none f INPUTS 1 a", NO_SCRIPT),
    dag("LOAD 1 a |> AI.SCRIPTEXECUTE text f INPUTS 1 a", WRONG_TYPE),
    dag("LOAD 1 a TIMEOUT x |> AI.TENSORGET a", Error("ERR Invalid value for TIMEOUT")),
    dag("LOAD 1 a TIMEOUT -1 |> AI.TENSORGET a", Error("ERR Invalid value for TIMEOUT")),
    dag_ro("LOAD 1 a |> AI.TENSORGET a VALUES", [GOT_A]),
    dag_ro("LOAD 1 a PERSIST 1 a |> AI.TENSORGET a", Error("ERR PERSIST cannot be specified in a read-only DAG")),
    dag_ro("LOAD 1 a |> AI.SCRIPTEXECUTE s f INPUTS 1 a",
           Error("ERR AI.SCRIPTEXECUTE command cannot be specified in a read-only DAG")),
    case("AI.DAGEXECUTE LOAD 1 a PERSIST 1 o TIMEOUT 30 |> AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 o", LATE,
         storing("s", function("while True:", "    pass", "return tensors")), A, after=[NOTHING]),
    case("AI.DAGEXECUTE LOAD 1 u PERSIST 1 v |> AI.TENSORSET v STRING 1 VALUES x |> AI.SCRIPTEXECUTE s f INPUTS 2 u v",
         [OK, Error("Unsupported kUInt bits 16")], storing("s", RETURN), "AI.TENSORSET u UINT16 1",
         after=[("EXISTS v", 0)]),
]  # fmt: skip

# ---------------------------------------------------------------- what is known of scripts


def facts(duration: Expected, calls: int, errors: int) -> list[Reply]:
    words: list[Reply] = [b"key", b"s", b"type", b"SCRIPT", b"backend", b"TORCH", b"device", b"CPU"]
    counts: list[Reply] = [b"samples", -1, b"calls", calls, b"errors", errors]
    assert isinstance(duration, int)
    return [*words, b"tag", b"t", b"duration", duration, *counts]


NO_INFO = Error("ERR cannot find run info for key")
RUN = "AI.SCRIPTEXECUTE s f INPUTS 1 a"
BACKEND = Error("ERR error loading backend")

KNOWN = [
    case("AI.INFO s", facts(0, 0, 0), S),
    case("AI.INFO s RESETSTAT", OK, S, A, RUN, after=[("AI.INFO s", facts(0, 0, 0))]),
    case(S, OK, S, A, RUN, after=[("AI.INFO s", facts(0, 0, 0))]),
    case("AI.INFO s resetstat", OK, S),
    case("AI.INFO s WHAT", facts(0, 0, 0), S),
    case("AI.INFO none", NO_INFO),
    case("AI.INFO x", NO_INFO, X),
    case("AI.INFO s", NO_INFO, S, "DEL s"),
    case("AI.INFO s", facts(0, 0, 0), S, "RENAME s t", after=[("AI.INFO t", NO_INFO)]),
    case("AI.INFO", arity("ai.info")),
    case(["AI.CONFIG", "BACKENDSPATH", "/a"], OK, after=[("AI.CONFIG GET BACKENDSPATH", b"/a")]),
    case("AI.CONFIG MODEL_CHUNK_SIZE 535822336", OK, after=[("ai.config get model_chunk_size", 535822336)]),
    case("AI.CONFIG GET WHAT", None),
    case("AI.CONFIG BACKENDSPATH", Error("ERR BACKENDSPATH: missing path argument")),
    case("AI.CONFIG MODEL_CHUNK_SIZE", Error("ERR MODEL_CHUNK_SIZE: missing chunk size")),
    *(
        case(f"AI.CONFIG MODEL_CHUNK_SIZE {size}", Error("ERR MODEL_CHUNK_SIZE: invalid chunk size"))
        for size in ("0", "-1", "x", 2**64)
    ),
    case("AI.CONFIG WHAT", Error("ERR unsupported subcommand")),
    case("AI.CONFIG", arity("ai.config")),
    case("AI.CONFIG LOADBACKEND TORCH x.so", BACKEND),
    case("AI.CONFIG LOADBACKEND WHAT x.so", Error("ERR unsupported backend")),
    case("AI._SCRIPTSCAN", [[b"s", b"t"]], S),
    case("AI._SCRIPTSCAN", [], S, "FLUSHALL"),
    case("AI._SCRIPTSCAN", [], S, "AI.SCRIPTDEL s"),
    case("AI._MODELSCAN", [], S),
    case("AI._BACKENDSINFO", re.compile("ERR unknown command .AI._BACKENDSINFO., with args beginning with: ")),
]  # fmt: skip


def test_runs_and_errors_are_counted_by_script(wire: Wire) -> None:
    """AI.INFO counts runs and those that failed, but no errors in the arguments."""
    for command in (S, A, RUN, RUN):
        wire(command)
    check(wire, "AI.SCRIPTEXECUTE s f INPUTS 0 OUTPUTS 1 o", re.compile(TRACEBACK + ".*"))
    check(wire, "AI.SCRIPTEXECUTE s f INPUTS 1 none", NO_TENSOR)
    told = wire("AI.INFO s")
    assert isinstance(told, list) and isinstance(told[11], int) and told[11] > 0
    assert told == facts(told[11], calls=3, errors=1)


# ---------------------------------------------------------------- within MULTI and EVAL

QUEUED = Simple("QUEUED")


@pytest.mark.parametrize(
    "command",
    [
        "AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 o",
        "AI.DAGEXECUTE LOAD 1 a |> AI.TENSORGET a",
        "AI.DAGEXECUTE_RO LOAD 1 a |> AI.TENSORGET a",
        "AI.SCRIPTEXECUTE",
    ],
)
def test_what_would_block_is_refused_in_a_transaction(wire: Wire, command: str) -> None:
    """SCRIPTEXECUTE and DAGs are an error in EXEC's array and in EVAL; what follows them runs."""
    for each in (S, A):
        wire(each)
    check(wire, "MULTI", OK)
    check(wire, command, QUEUED)
    check(wire, "AI.TENSORSET x INT8 1 VALUES 5", QUEUED)
    check(wire, "AI.TENSORGET x VALUES", QUEUED)
    check(wire, storing("t", RETURN), QUEUED)
    check(wire, storing("t", "nonsense"), QUEUED)
    check(wire, "EXEC", [NESTED, OK, [5], OK, re.compile("expected def.*")])  # type: ignore[list-item]
    words = ",".join(f"'{word}'" for word in command.split(" "))
    lua = re.compile("ERR .*Cannot run RedisAI command within a transaction or a LUA script.*")
    check(wire, ["EVAL", f"return redis.call({words})", 0], lua)
    check(wire, "PING", Simple("PONG"))


LUA = [
    case(["EVAL", "return redis.call('AI.TENSORSET', 'x', 'INT8', 1, 'VALUES', 5)", 0], OK,
         after=[("AI.TENSORGET x VALUES", [5])]),
    case(["EVAL", "return redis.call('AI.TENSORGET', 'x', 'VALUES')", 0], [1, -1], X),
    case(["EVAL", "return redis.call('AI.SCRIPTSTORE','s','CPU','ENTRY_POINTS',1,'f','SOURCE',ARGV[1])", 0, RETURN],
         OK, after=[("TYPE s", Simple("AI_SCRIPT"))]),
]  # fmt: skip

# ---------------------------------------------------------------- redis.execute


def calls(*lines: str, args: str = "") -> tuple[Command, ...]:
    """A script with these lines, the tensor a and what else the cases of redis.execute need."""
    script = storing("s", function(*lines, "return tensors[0].clone()"))
    return (script, A, "SET text words", "SET number 42", "RPUSH list a b c", "SET big 4294967297")


REDIS_ERROR = "Redis command returned an error: "


def does(*lines: str, after: Sequence[tuple[Command, Expected]] = ()) -> Case:
    return case(EXECUTE, OK, *calls(*lines), after=after)


def refuses(line: str, text: str = ".*") -> Case:
    return case(EXECUTE, re.compile(TRACEBACK + text), *calls(line), after=[NOTHING])


REFUSED_COMMANDS = (
    "AI.SCRIPTEXECUTE s f INPUTS 1 a", "ai.scriptexecute s f INPUTS 1 a",
    "AI.DAGEXECUTE LOAD 1 a |> AI.TENSORGET a", "AI.DAGEXECUTE_RO LOAD 1 a |> AI.TENSORGET a",
    "SHUTDOWN NOSAVE", "DEBUG SEGFAULT", "DEBUG SLEEP 1000", "MONITOR x", "SUBSCRIBE c", "PSUBSCRIBE c",
    "SSUBSCRIBE c", "REPLICAOF NO ONE", "MODULE LIST", "SYNC x", "PSYNC ? -1", "FAILOVER ABORT", "WAIT 5 0", "SCRIPT FLUSH", "FUNCTION FLUSH",
)  # fmt: skip

HARMLESS_COMMANDS = (
    "MULTI x", "EXEC x", "DISCARD x", "WATCH a", "UNWATCH x", "BLPOP none 0", "BLMOVE none o LEFT LEFT 0",
    "XREAD BLOCK 0 STREAMS none $", "QUIT x", "RESET x", "AUTH x", "HELLO 3", "SELECT 5",
    "CLIENT REPLY OFF", "CLIENT TRACKING ON", "CLIENT ID", "CLIENT GETNAME", "CLIENT SETNAME x", "CLIENT NO-EVICT ON",
    "CLIENT INFO", "CLIENT UNPAUSE", "CONFIG GET maxmemory", "SLOWLOG GET", "ACL WHOAMI", "SUNSUBSCRIBE c", "OBJECT HELP",
    "UNSUBSCRIBE c", "PUBLISH c x", "EVALSHA x 0", "FCALL x 0", "INFO ALL", "LOLWUT 5",
    "COMMAND COUNT", "RESTORE o 0 junk", "DUMP s", "COPY s t", "MIGRATE h 1 k 0 1", "ASKING x", "READONLY x", "CLUSTER INFO",
    "AI.INFO s", "AI._SCRIPTSCAN", "AI.CONFIG WHAT", "AI.TENSORSET", "AI.SCRIPTDEL s", "DEL s", "FLUSHALL", "FLUSHDB", "SWAPDB 0 1",
    "SORT list ALPHA", "LATENCY RESET", "MEMORY DOCTOR", "MEMORY USAGE a", "BGREWRITEAOF x", "LASTSAVE x", "ROLE x", "TIME x",
    "PFCOUNT a", "GETRANGE text 0 1000000000", "SETRANGE text 536870911000 x", "REPLCONF ack 0", "RANDOMKEY x", "KEYS *",
)  # fmt: skip


def call_of(command: str) -> str:
    name, *rest = command.split(" ")
    listed = ", ".join(f"'{word}'" for word in rest)
    return f"redis.execute('{name}', [{listed}])" if rest else f"redis.execute('{name}', args)"


REDIS = [
    does("redis.execute('SET', 'o2', 'x')", after=[("GET o2", b"x")]),
    does("redis.execute('SET', ['o2', 'x'])", after=[("GET o2", b"x")]),
    does("redis.execute('PING', args)"),
    does("x = redis.execute('GET', 'text')", "assert isinstance(x, str)", "assert str(x) == 'words'"),
    does("assert str(redis.execute('SET', 'o2', 'x')) == 'OK'"),
    does("assert str(redis.execute('GET', 'none')) == 'None'"),
    does("assert int(str(redis.execute('GET', 'number'))) == 42"),
    does("assert float(str(redis.execute('GET', 'number'))) == 42.0"),
    does("x = redis.execute('INCR', 'number')", "assert isinstance(x, int)", "assert int(str(x)) == 43"),
    does("x = redis.execute('INCR', 'big')", "assert str(x) == '2'"),
    does("x = redis.asList(redis.execute('LRANGE', 'list', '0', '-1'))", "assert len(x) == 3", "assert str(x[1]) == 'b'"),
    does("assert len(redis.asList(redis.execute('LRANGE', 'none', '0', '-1'))) == 0"),
    does("x = redis.asList(redis.execute('EVAL', 'return {1,{2,{3}},false}', '0'))",
         "assert str(redis.asList(redis.asList(x[1])[1])[0]) == '3'", "assert str(x[2]) == 'None'"),
    does("assert str(redis.execute('BLPOP', 'none', '0')) == 'None'"),
    does("redis.execute('AI.TENSORSET', 'o2', 'FLOAT', '2', 'VALUES', '1', '2')",
         "x = redis.asList(redis.execute('AI.TENSORGET', 'o2', 'VALUES'))", "assert float(str(x[1])) == 2.0",
         after=[("AI.TENSORGET o2 VALUES", [b"1", b"2"])]),
    does("redis.execute('AI.SCRIPTDEL', 's')", after=[("EXISTS s", 0), ("AI.SCRIPTGET s", NO_SCRIPT)]),
    does("redis.execute('FLUSHALL', args)", after=[("AI.TENSORGET o VALUES", [1, 2]), ("DBSIZE", 1)]),
    does("redis.execute('DEL', 'a')", after=[("AI.TENSORGET o VALUES", [1, 2]), ("EXISTS a", 0)]),
    does("redis.execute('AI.TENSORSET', 'a', 'INT8', '1')", after=[("AI.TENSORGET o VALUES", [1, 2]), ("AI.TENSORGET a VALUES", [0])]),
    does("redis.execute('SELECT', '5')", "redis.execute('SET', 'o2', 'x')", after=[("GET o2", b"x")]),
    does("redis.execute('SET', 'o2', 'a\\000b')", after=[("GET o2", b"a")]),
    does("redis.execute('LPUSH', 'o2', ['x' for i in range(1000)])", after=[("LLEN o2", 1000)]),
    does("redis.execute('EVAL', 'return redis.call(\"SET\", \"o2\", 1)', '0')", after=[("GET o2", b"1")]),
    does("redis.execute('AI.SCRIPTSTORE', 's2', 'CPU', 'ENTRY_POINTS', '1', 'f', 'SOURCE', "
         "'def f(tensors: List[Tensor], keys: List[str], args: List[str]):\\n    return tensors\\n')",
         after=[("TYPE s2", Simple("AI_SCRIPT"))]),
    refuses("redis.execute('INCR', 'list')", f"{REDIS_ERROR}WRONGTYPE .* "),
    refuses("redis.execute('INCR', 'text')", f"{REDIS_ERROR}ERR .* "),
    refuses("redis.execute('GET', 'a', 'b')", f"{REDIS_ERROR}Invalid argument "),
    refuses("redis.execute('NONSENSE', 'a', 'b')", f"{REDIS_ERROR}No such file or directory "),
    refuses("redis.execute('PING', 1)"),
    refuses("redis.execute('PING', [1])"),
    refuses("redis.execute('PING', tensors)"),
    refuses("redis.execute('PING', tensors[0])"),
    refuses("redis.execute('', 'a')", f"{REDIS_ERROR}No such file or directory "),
    refuses("redis.execute('\\000GET', 'a')", f"{REDIS_ERROR}No such file or directory "),
    refuses("redis.execute('AI.TENSORGET', 'none')", f"{REDIS_ERROR}ERR tensor key is empty.* "),
    refuses("redis.asList(redis.execute('GET', 'text'))"),
    refuses("redis.asList(1)"),
    refuses("redis.execute('EVAL', 'local a = {} for i = 1, 7000 do a = {a} end return a', '0')"),
    refuses("redis.execute('EVAL', \"return redis.call('AI.SCRIPTEXECUTE', 's', 'f', 'INPUTS', 1, 'a')\", '0')",
            f"{REDIS_ERROR}.*Cannot run RedisAI command within.*"),
    *(refuses(call_of(command)) for command in REFUSED_COMMANDS),
]  # fmt: skip


@pytest.mark.parametrize("command", HARMLESS_COMMANDS)
def test_no_command_of_a_script_harms_the_server(wire: Wire, store: Store, command: str) -> None:
    """Whatever a script has the server do, that is answered, and other clients are served."""
    for each in calls(call_of(command)):
        wire(each)
    reply = wire(EXECUTE)
    assert reply == OK or isinstance(reply, Error)
    for each in calls("x = redis.execute('GET', 'text')", "assert str(x) == 'words'"):
        wire(each)
    check(wire, EXECUTE, OK)
    other = store.connect()
    check(other, "PING", Simple("PONG"))
    check(wire, "PING", Simple("PONG"))
    other.close()


# ---------------------------------------------------------------- what the server knows

FLAGS: dict[str, tuple[set[str], list[Reply]]] = {
    "ai.tensorset": ({"write", "denyoom"}, [1, 1, 1]),
    "ai.scriptstore": ({"write", "denyoom"}, [1, 1, 1]),
    "ai.scriptdel": ({"write"}, [1, 1, 1]),
    "ai.tensorget": ({"readonly"}, [1, 1, 1]),
    "ai.scriptget": ({"readonly"}, [1, 1, 1]),
    "ai.info": ({"readonly"}, [1, 1, 1]),
    "ai.scriptexecute": ({"write", "denyoom", "movablekeys"}, [5, 5, 1]),
    "ai.dagexecute": ({"write", "denyoom", "movablekeys"}, [3, 3, 1]),
    "ai.dagexecute_ro": ({"readonly", "movablekeys"}, [3, 3, 1]),
    "ai.config": ({"write"}, [0, 0, 0]),
}


@pytest.mark.parametrize("command", FLAGS)
def test_the_server_knows_flags_and_keys(wire: Wire, command: str) -> None:
    """COMMAND INFO tells the arity, the flags and the positions of keys."""
    flags, keys = FLAGS[command]
    told = wire(f"COMMAND INFO {command}")
    assert isinstance(told, list) and isinstance(told[0], list)
    assert told[0][:2] == [command.encode(), -1] and told[0][3:6] == keys
    assert isinstance(told[0][2], list)
    module = () if wire.is_old else ("module",)
    assert {each.text for each in told[0][2] if isinstance(each, Simple)} == {*flags, *module}


def test_the_backend_is_in_info(wire: Wire) -> None:
    """INFO MODULES has the section of the backends, where clients look for Torch."""
    told = wire("INFO MODULES")
    assert isinstance(told, bytes)
    assert b"# ai_backends_info\r\n" in told and b"ai_Torch_version:" in told


NO_KEYS = re.compile("ERR .*")
SERVER = [
    case("COMMAND GETKEYS AI.TENSORSET x FLOAT 1", [b"x"]),
    case("COMMAND GETKEYS AI.SCRIPTEXECUTE s f KEYS 1 k INPUTS 2 a b ARGS 1 x OUTPUTS 1 o",
         [b"s", b"k", b"a", b"b", b"o"]),
    case("COMMAND GETKEYS AI.SCRIPTEXECUTE s f INPUTS 1 a OUTPUTS 1 o TIMEOUT 5", [b"s", b"a", b"o"]),
    case("COMMAND GETKEYS AI.SCRIPTEXECUTE s f INPUTS 99 a", [b"s"]),
    case(f"COMMAND GETKEYS AI.SCRIPTEXECUTE s f INPUTS {2**63 - 1} a", [b"s"]),
    case("COMMAND GETKEYS AI.SCRIPTEXECUTE s f INPUTS -5 a", [b"s"]),
    case("COMMAND GETKEYS AI.DAGEXECUTE LOAD 2 a b PERSIST 1 o |> AI.SCRIPTEXECUTE s f INPUTS 1 a |> AI.TENSORGET a",
         [b"a", b"b", b"o", b"s"]),
    case("COMMAND GETKEYS AI.DAGEXECUTE ROUTING r |> AI.TENSORSET x STRING 1 VALUES LOAD |> AI.SCRIPTEXECUTE s f",
         [b"r", b"s"]),
    case("COMMAND GETKEYS AI.DAGEXECUTE LOAD 99 a b |> AI.TENSORGET a", NO_KEYS),
    case(f"COMMAND GETKEYS AI.DAGEXECUTE LOAD 1 a PERSIST {2**63 - 1} b |> AI.TENSORGET a", [b"a"]),
    case("COMMAND GETKEYS AI.SCRIPTEXECUTE", NO_KEYS),
    case("COMMAND GETKEYS AI.DAGEXECUTE", NO_KEYS),
    case("TYPE x", Simple("AI_TENSOR"), X),
    case("TYPE s", Simple("AI_SCRIPT"), S),
    case("COPY x y", Error("ERR not supported for this module key"), X),
    case("COPY s y", Error("ERR not supported for this module key"), S),
    case("RENAME x y", OK, X, after=[("AI.TENSORGET y VALUES", [1, -1]), ("AI.TENSORGET x", NO_TENSOR)]),
    case("RENAME s t", OK, S, A, after=[("AI.SCRIPTEXECUTE t f INPUTS 1 a OUTPUTS 1 o", OK)]),
    case("DEL x", 1, X, after=[("AI.TENSORGET x", NO_TENSOR)]),
    case("EXPIRE x 100", 1, X, after=[("TTL x", 100)]),
    case("PEXPIREAT x 1", 1, X, after=[("AI.TENSORGET x", NO_TENSOR)]),
    case("GET x", WRONG_TYPE, X),
    case("MOVE x 1", 1, X, after=[("AI.TENSORGET x", NO_TENSOR)]),
    case("DEBUG DIGEST", Simple("0" * 40)),
    case("DEBUG RELOAD", OK, X, S, "DEBUG SET-ACTIVE-EXPIRE 1", after=[("AI.TENSORGET x VALUES", [1, -1]),
         ("AI.SCRIPTGET s SOURCE", ADD.encode()), ("AI.INFO s", facts(0, 0, 0))]),
]  # fmt: skip

TABLES = {
    "tensorset": TENSORSET,
    "tensorget": TENSORGET,
    "scriptstore": SCRIPTSTORE,
    "scriptget": SCRIPTGET,
    "arguments": ARGUMENTS,
    "outputs": OUTPUTS,
    "running": RUNNING,
    "timeouts": TIMEOUTS,
    "dags": DAGS,
    "known": KNOWN,
    "lua": LUA,
    "redis": REDIS,
    "server": SERVER,
}


@pytest.mark.parametrize(
    "each",
    [pytest.param(one, id=f"{table} {one}") for table, cases in TABLES.items() for one in cases],
)
def test_the_reply_is_as_the_protocol_has_it(wire: Wire, each: Case) -> None:
    """One command in one state is answered exactly so, and the connection stays in step."""
    play(wire, each)


def test_a_dumped_tensor_is_restored(wire: Wire) -> None:
    """DUMP and RESTORE keep type, shape and bytes; damaged bytes are refused."""
    check(wire, X, OK)
    dumped = wire("DUMP x")
    assert isinstance(dumped, bytes)
    check(wire, ["RESTORE", "y", 0, dumped], OK)
    check(wire, "AI.TENSORGET y", [*X_META, b"blob", X_BLOB])
    check(wire, ["RESTORE", "z", 0, dumped[:-1]], re.compile("ERR .*"))
    check(wire, "PING", Simple("PONG"))
