"""A step inside the database, beside the same step outside of it.

    python -m benchmarks.database --json

K gradients are in a store. What is measured is the time from then until the updated model can be
read from the store, by three ways, in turns:

`inside`      the store averages the gradients and applies SGD with momentum, by RedisAI's commands
`outside`     all gradients, parameters and momentum are fetched as raw bytes, torch averages and
              applies, parameters and momentum are pushed back
`by_client`   the same through the calls of the plain `redisai` client

`less` is by how much `inside` takes less than `outside`. The sizes are those of MobileNetV3-small,
DenseNet-121 and ResNet-18. `--shaped` repeats it behind a link of 600 Mbit/s, which a network
namespace and `tc` make of the loopback; that needs root, and is left out with a message without.

`persistence` is what a store that writes a log costs: the time in which K gradients of
MobileNetV3-small's size are pushed and the step is made, with and without.

`bulk` compares the rates at which a tensor of 47 MB is pushed: by the bulk path, by the plain
client, and by a bare socket that SETs the same bytes.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish, say, surroundings, table, unwind_when_terminated
from benchmarks.shaped import Shaped, why_not
from launcher.store_server import Endpoint, StoreServer
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.storing import ensure_stored, execution

GRADIENTS = 8
MODELS = {"MobileNetV3-small": 2_542_856, "DenseNet-121": 7_978_856, "ResNet-18": 11_689_512}
"""Parameters, as torchvision counts them."""
BULK_BYTES = 47_000_000
LR, MOMENTUM = 0.1, 0.9
PORT = 7391
MEGABIT = 600


class Step:
    """One model's vectors in a store, and the ways to make a step of them."""

    def __init__(self, url: str, length: int) -> None:
        self.store = BulkConnection(url)
        draw = np.random.default_rng(0)
        self.gradients = [f"gradient-{k}" for k in range(GRADIENTS)]
        for key in [*self.gradients, "parameters", "momentum"]:
            self.store.push(key, draw.standard_normal(length, np.float32))
        self._rooms = [np.empty(length, np.float32) for _ in range(GRADIENTS + 2)]
        self._mean, self._sgd = (ensure_stored(self.store, name) for name in ("mean", "sgd"))
        fields = (0, length, LR, MOMENTUM, 0.0, 0.0, 0, 0, 0)
        self._arguments = ["1", *[repr(field) for field in fields]]

    def inside(self) -> None:
        loaded = [*self.gradients, "parameters", "momentum"]
        state = ["parameters", "momentum"]
        mean = execution(self._mean, "mean", self.gradients, ["mean"])
        inputs = ["parameters", "mean", "momentum"]
        step = execution(self._sgd, "sgd", inputs, state, self._arguments)
        words = ["AI.DAGEXECUTE", "LOAD", str(len(loaded)), *loaded, "PERSIST", "2", *state]
        reply = self.store.execute(*words, "|>", *mean, "|>", *step)
        if reply != ["OK", "OK"]:
            raise RuntimeError(f"the step failed: {reply!r}")

    def with_pushes(self, gradient: Any) -> None:
        for key in self.gradients:
            self.store.push(key, gradient)
        self.inside()

    def outside(self) -> None:
        keys = [*self.gradients, "parameters", "momentum"]
        found = [self.store.pull(key, room) for key, room in zip(keys, self._rooms, strict=True)]
        self._apply(found)
        self.store.push_all([("parameters", found[-2]), ("momentum", found[-1])])

    def by_client(self, client: Any) -> None:
        keys = [*self.gradients, "parameters", "momentum"]
        # what it returns cannot be written to
        found = [client.tensorget(key) for key in keys]
        found[-2:] = [array.copy() for array in found[-2:]]
        self._apply(found)
        client.tensorset("parameters", found[-2])
        client.tensorset("momentum", found[-1])

    def _apply(self, arrays: list[Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arrays of the client are read-only
            *gradients, parameters, momentum = [torch.from_numpy(array) for array in arrays]
        mean = gradients[0].clone()
        for gradient in gradients[1:]:
            mean += gradient
        mean /= GRADIENTS
        momentum.mul_(MOMENTUM).add_(mean)
        parameters.add_(momentum, alpha=-LR)

    def close(self) -> None:
        self.store.execute("FLUSHALL")
        self.store.close()


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare_steps(url: str, client: Any, tries: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for model, length in MODELS.items():
        step = Step(url, length)
        ways: dict[str, Callable[[], None]] = {
            "inside": step.inside,
            "outside": step.outside,
            "by_client": partial(step.by_client, client),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(tries + 1):
            for way, action in ways.items():
                took = seconds(action)
                if number:  # the first time, memory is new to everyone
                    times[way].append(took)
        step.close()
        middle = {way: median(each) for way, each in times.items()}
        found[model] = {
            **{f"{way}_s": round(took, 4) for way, took in middle.items()},
            "less": round(1 - middle["inside"] / middle["outside"], 3),
            "less_than_by_client": round(1 - middle["inside"] / middle["by_client"], 3),
        }
        say(f"  {model}: {found[model]}")
    return found


def compare_persistence(urls: dict[str, str], tries: int) -> dict[str, Any]:
    """Seconds of a step with its pushes, in a store that forgets and in one that writes a log."""
    length = MODELS["MobileNetV3-small"]
    gradient = np.random.default_rng(0).standard_normal(length, np.float32)
    steps = {name: Step(url, length) for name, url in urls.items()}
    times: dict[str, list[float]] = {name: [] for name in urls}
    for number in range(tries + 1):
        for name, step in steps.items():
            took = seconds(partial(step.with_pushes, gradient))
            if number:
                times[name].append(took)
    for step in steps.values():
        step.close()
    middle = {name: median(each) for name, each in times.items()}
    return {
        **{f"{name}_s": round(took, 4) for name, took in middle.items()},
        "times": round(middle["log"] / middle["memory"], 2),
    }


def compare_bulk(host: str, port: int, client: Any, tries: int) -> dict[str, Any]:
    """GB/s of a push, and what they are of each other."""
    array = np.random.default_rng(0).standard_normal(BULK_BYTES // 4, np.float32)
    raw = array.view(np.uint8).data
    with (
        BulkConnection(f"redis://{host}:{port}") as store,
        socket.create_connection((host, port)) as bare,
    ):
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = b"*3\r\n$3\r\nSET\r\n$3\r\nraw\r\n$%d\r\n" % len(raw)

        def set_raw() -> None:
            bare.sendall(head)
            bare.sendall(raw)
            bare.sendall(b"\r\n")
            if bare.recv(5, socket.MSG_WAITALL) != b"+OK\r\n":
                raise RuntimeError("SET was refused")

        ways = {
            "bulk": lambda: store.push("tensor", array),
            "raw_set": set_raw,
            "client": lambda: client.tensorset("tensor", array),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(tries + 1):
            for way, action in ways.items():
                took = seconds(action)
                if number:
                    times[way].append(took)
        store.execute("FLUSHALL")
    rates = {way: len(raw) / median(each) / 1e9 for way, each in times.items()}
    return {
        **{f"{way}_gb_per_s": round(rate, 3) for way, rate in rates.items()},
        "of_client": round(rates["bulk"] / rates["client"], 2),
        "of_raw_set": round(rates["bulk"] / rates["raw_set"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.database",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--tries", type=int, default=9)
    parser.add_argument("--shaped-tries", type=int, default=3, help="0: no shaped link")
    options = parser.parse_args()
    unwind_when_terminated()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        import redisai
    found: dict[str, Any] = surroundings()
    with tempfile.TemporaryDirectory(prefix="mayfly-benchmark-") as folder:
        endpoint = Endpoint("127.0.0.1", PORT)
        server = StoreServer(Path(folder), "store", endpoint, say=say)
        server.start()
        try:
            client = redisai.Client(port=PORT)
            found["loopback"] = compare_steps(server.url, client, options.tries)
            found["bulk"] = compare_bulk("127.0.0.1", PORT, client, options.tries)
            logging = Endpoint("127.0.0.1", PORT + 1)
            log = StoreServer(Path(folder), "log", logging, persist=Path(folder, "data"), say=say)
            log.start()
            try:
                urls = {"memory": server.url, "log": log.url}
                found["persistence"] = compare_persistence(urls, options.tries)
            finally:
                log.stop()
        finally:
            server.stop()
        reason = why_not() if options.shaped_tries else "it was not asked for"
        found["shaped"] = {"skipped": reason}
        if not reason:
            with Shaped(MEGABIT) as link:
                found["shaped"] = shaped(link, Path(folder), options.shaped_tries)
        else:
            say(f"without a shaped link: {reason}")
    show(found)
    finish(found, options.json)
    return 0


def shaped(link: Shaped, folder: Path, tries: int) -> dict[str, Any]:
    """The same with the store at the other end of a slow link."""
    import redisai

    endpoint = Endpoint(link.far_host, PORT)
    server = StoreServer(folder, "far", endpoint, password="shaped", inside=link.namespace)
    server.start()
    try:
        client = redisai.Client(host=link.far_host, port=PORT, password="shaped")
        url = f"redis://:shaped@{link.far_host}:{PORT}"
        return {"megabit_per_s": MEGABIT, **compare_steps(url, client, tries)}
    finally:
        server.stop()


def show(found: dict[str, Any]) -> None:
    columns = ("inside_s", "outside_s", "by_client_s", "less", "less_than_by_client")
    for where in ("loopback", "shaped"):
        if "skipped" not in found[where]:
            rows = [[model, *[found[where][model][c] for c in columns]] for model in MODELS]
            table((where, *columns), rows)
    for what in ("persistence", "bulk"):
        table(tuple(found[what]), [tuple(found[what].values())])


if __name__ == "__main__":
    sys.exit(main())
