"""The official client of RedisAI, with its own calls, finds what it expects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis

from tests.p2p.aggregate.stores import Store, function

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports pkg_resources
    import redisai

ADD = function("return tensors[0] + tensors[1]")
SCALED = function("return tensors[0] * float(args[0])", name="scaled")


@pytest.fixture
def client(store: Store) -> Iterator[Any]:
    one = redisai.Client(unix_socket_path=str(store.socket), socket_timeout=10)
    one.flushall()
    yield one
    assert one.ping()
    one.close()


DTYPES = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_numpy_array_comes_back_as_it_was(
    client: Any, dtype: str, shape: tuple[int, ...]
) -> None:
    """Arrays of every dtype, and of shapes from a scalar on, are set and got bit by bit."""
    array = np.array(np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2, dtype)
    assert client.tensorset("x", array) == "OK"
    got = client.tensorget("x")
    assert got.dtype == array.dtype and got.shape == shape and np.array_equal(got, array)


def test_values_and_strings_come_back(client: Any) -> None:
    """Lists are sent as VALUES, strings as their own type, and META alone has no data."""
    client.tensorset("x", [1.5, -2.5], dtype="float", shape=[2])
    assert client.tensorget("x").tolist() == [1.5, -2.5]
    client.tensorset("y", [-1, 2, 3, 4], dtype="int64", shape=[2, 2])
    assert client.tensorget("y", as_numpy=False)["values"] == [-1, 2, 3, 4]
    assert client.tensorget("y", meta_only=True) == {"dtype": "INT64", "shape": [2, 2]}
    client.tensorset("z", np.array(["one", "", "three"]))
    assert client.tensorget("z").tolist() == ["one", "", "three"]
    with pytest.raises(redis.ResponseError, match=r"^tensor key is empty or in a different shard$"):
        client.tensorget("none")


def test_a_script_lives_from_store_to_delete(client: Any) -> None:
    """A script is stored, shown, listed, run with all that a call can have, counted and deleted."""
    assert client.scriptstore("s", "CPU", ADD + SCALED, ["f", "scaled"], tag="v1") == "OK"
    shown = client.scriptget("s")
    assert shown["source"] == ADD + SCALED and shown["tag"] == "v1" and shown["device"] == "CPU"
    assert shown["entry points"] == [b"f", b"scaled"]
    assert "source" not in client.scriptget("s", meta_only=True)
    assert client.scriptscan() == [["s", "v1"]]
    client.tensorset("a", np.array([1, 2], np.float32))
    client.tensorset("b", np.array([10, 20], np.float32))
    done = client.scriptexecute(
        "s", "f", keys=["k"], inputs=["a", "b"], outputs=["o"], timeout=5000
    )
    assert done == "OK" and client.tensorget("o").tolist() == [11, 22]
    client.scriptexecute("s", "scaled", inputs="o", args=[0.5], outputs="o")
    assert client.tensorget("o").tolist() == [5.5, 11]
    with pytest.raises(redis.ResponseError, match=r"^Function does not exist: g$"):
        client.scriptexecute("s", "g", inputs=["a"])
    told = client.infoget("s")
    assert (told["type"], told["calls"], told["errors"]) == ("SCRIPT", 3, 1)
    assert client.inforeset("s") == "OK" and client.infoget("s")["calls"] == 0
    assert client.scriptdel("s") == "OK"
    with pytest.raises(redis.ResponseError, match=r"^script key is empty$"):
        client.scriptget("s")


def test_a_dag_is_run_at_once(client: Any) -> None:
    """A DAG loads, runs, answers each operation and persists what it was told to."""
    client.scriptstore("s", "CPU", ADD, ["f"])
    client.tensorset("a", np.array([1, 2], np.float32))
    dag = client.dag(load=["a"], persist=["o"])
    dag.tensorset("b", np.array([10, 20], np.float32))
    dag.scriptexecute("s", "f", inputs=["a", "b"], outputs=["o"])
    dag.tensorget("o")
    answers = dag.execute()
    assert answers[:2] == ["OK", "OK"] and answers[2].tolist() == [11, 22]
    assert client.tensorget("o").tolist() == [11, 22] and not client.exists("b")
    seen = client.dag(load=["o"], readonly=True).tensorget("o").execute()
    assert seen[0].tolist() == [11, 22]


def test_pipelines_are_answered_in_order(client: Any) -> None:
    """A pipeline that is no transaction may set, run and get."""
    client.scriptstore("s", "CPU", ADD, ["f"])
    pipe = client.pipeline(transaction=False)
    pipe.tensorset("a", np.array([1, 2], np.int32))
    pipe.set("native", 1)
    pipe.execute_command(
        *["AI.SCRIPTEXECUTE", "s", "f", "INPUTS", "2", "a", "a", "OUTPUTS", "1", "o"]
    )
    pipe.tensorget("o")
    answers = pipe.execute()
    assert answers[1] is True and answers[3].tolist() == [2, 4]


def test_a_backend_cannot_be_loaded(client: Any) -> None:
    """Torch is in the engine already: to load a backend is an error, as it is when done twice."""
    with pytest.raises(redis.ResponseError, match=r"^error loading backend$"):
        client.loadbackend("TORCH", "redisai_torch.so")
    with pytest.raises(redis.ResponseError, match="unsupported backend"):
        client.loadbackend("WHAT", "what.so")
    assert client.config("BACKENDSPATH", "/tmp") == "OK"
    assert client.config("BACKENDSPATH") == "/tmp"
