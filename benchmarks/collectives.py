"""Allreduce beside Gloo's, on one machine.

    python -m benchmarks.collectives --json

N processes sum vectors of 4 KB to 94 MB, again and again: by Mayfly's step cycle, with all that is
on the way of its bytes, and by `torch.distributed` with Gloo. Each way of ours is alive beside Gloo
and measured in turns with it; a figure is the median of the samples, a sample the mean over several
sums in a row, of the slowest process. `speed` is how many times as fast as Gloo's ours is.

Three ways for the bytes: `host`, between processes of one host as it is fastest; `tcp`, over TCP
from process to process; `relay`, through one relay's Unix socket. `floor` is the least that each
can take, from the rates of memory and sockets measured in the same run (`floors.py`). Gloo's bytes
are neither encrypted nor compressed, and so are these; `tcp_curve` is `tcp` with keys, as in a run,
`relay_bf16` and `relay_int8` are `relay` with compression.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from statistics import median
from types import TracebackType
from typing import Any

from benchmarks.floors import Rates, measure_rates
from benchmarks.report import finish, say, surroundings, table, unwind_when_terminated
from benchmarks.shaped import Star
from p2p.transport.keys import PEER_FILE, RELAY_FILE, new_keys, write_keys

PROCESSES = (2, 4, 8)
SIZES = {
    "4KB": 1 << 10,
    "64KB": 1 << 14,
    "1MB": 1 << 18,
    "4MB": 1 << 20,
    "47MB": 11_750_000,
    "94MB": 23_500_000,
}
SAMPLE_BYTES = 32 << 20
"""A sample sums so much in a row, or a vector of more once."""
REPEATS_LIMIT = 50


@dataclass(frozen=True, slots=True)
class Way:
    direct: str
    """Where a process listens itself, if it does."""
    compress: str = "none"
    encrypted: bool = False


WAYS = {
    "host": Way("ipc://{folder}/peer-{{}}"),
    "tcp": Way("tcp://127.0.0.1:*"),
    "relay": Way(""),
    "tcp_curve": Way("tcp://127.0.0.1:*", encrypted=True),
    "relay_bf16": Way("", "bf16"),
    "relay_int8": Way("", "int8"),
}
PLAIN = ("host", "tcp", "relay")


class Group:
    """The processes that sum together, ready for any number of vectors.

    In a `star`, each is on a machine of its own, and listens there if it `listens`.
    """

    def __init__(
        self, size: int, *options: str, star: Star | None = None, listens: bool = True
    ) -> None:
        before: list[list[str]] = [[] for _ in range(size)]
        after: list[list[str]] = [[] for _ in range(size)]
        if star is not None:
            before = [["ip", "netns", "exec", each] for each in star.namespaces]
            if listens:
                after = [["--direct", f"tcp://{host}:*"] for host in star.hosts]
        self.again = 0
        """Segments that were sent again in all sums so far, for they were asked for."""
        self._processes = [
            subprocess.Popen(
                [
                    *before[rank],
                    *(sys.executable, "-m", "benchmarks.reducing"),
                    *("--rank", str(rank), "--size", str(size), *options, *after[rank]),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def prepare(self, length: int) -> None:
        self._ask({"length": length})

    def sample(self, repeat: int) -> float:
        """Seconds for one sum."""
        return self._ask({"repeat": repeat}) / repeat

    def _ask(self, wanted: dict[str, int]) -> float:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(wanted).encode() + b"\n")
            process.stdin.flush()
        answers = []
        with DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, EVENT_READ, rank)
            while waiting.get_map():
                for key, _ in waiting.select():
                    answers.append(self._answer_of(key.data))
                    waiting.unregister(key.fileobj)
        return max(answers)

    def _answer_of(self, rank: int) -> float:
        process = self._processes[rank]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:  # the others wait for it, and would for ever
            raise SystemExit(f"the process of rank {rank} ended with {process.wait()}")
        answer = json.loads(line)
        self.again += answer["again"]
        return float(answer["seconds"])


class Relay:
    """A relay of ours, in its own process: on a Unix socket, or at `host` with keys of `folder`."""

    def __init__(self, folder: Path, host: str = "") -> None:
        ready = folder / "relay"
        options = ["--bind", f"tcp://{host}:*" if host else f"ipc://{folder}/relay.sock"]
        options += ["--keys", str(folder / RELAY_FILE)] if host else []
        command = [sys.executable, "-m", "p2p.transport.relay", "--ready-file", str(ready)]
        self._process = subprocess.Popen([*command, *options])
        while not ready.exists():
            if self._process.poll() is not None:
                raise SystemExit(f"the relay ended with {self._process.returncode}")
            time.sleep(0.01)
        self.endpoint = ready.read_text().strip()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()


def measure(
    size: int, ways: list[str], sizes: list[str], samples: int, collective: str, rates: Rates
) -> dict[str, dict[str, float]]:
    """For each size of vector: milliseconds of Gloo, and of each way with how often as fast."""
    times: dict[str, dict[str, list[float]]] = {name: {"gloo": []} for name in sizes}
    found: dict[str, dict[str, float]] = {name: {} for name in sizes}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        gloo = stack.enter_context(Group(size, "--gloo", f"{folder}/gloo"))
        for way in ways:
            with ExitStack() as pair:
                group = _start(size, way, Path(folder) / way, collective, pair)
                for name in sizes:
                    ours, theirs = _alternate(group, gloo, SIZES[name], samples)
                    times[name][way] = ours
                    times[name]["gloo"] += theirs
                    found[name][f"{way}_speed"] = round(median(theirs) / median(ours), 2)
                    say(f"N = {size}, {name}, {way}: {found[name][f'{way}_speed']}")
    for name, row in found.items():
        for way, each in times[name].items():
            row[f"{way}_ms"] = round(1000 * median(each), 3)
        for way in [way for way in ways if way in PLAIN]:
            row[f"{way}_floor_ms"] = round(1000 * rates.least_s(way, 4 * SIZES[name], size), 3)
    return found


def _start(size: int, way: str, place: Path, collective: str, stack: ExitStack) -> Group:
    place.mkdir(mode=0o700)
    relay = stack.enter_context(Relay(place))
    options = ["--relay", relay.endpoint, "--collective", collective]
    options += ["--direct", WAYS[way].direct.format(folder=place)]
    options += ["--compress", WAYS[way].compress]
    if WAYS[way].encrypted:
        write_keys(new_keys(), place)
        options += ["--keys", str(place / PEER_FILE)]
    return stack.enter_context(Group(size, *options))


def _alternate(
    ours: Group, theirs: Group, length: int, samples: int
) -> tuple[list[float], list[float]]:
    """Seconds for a sum of each, measured in turns."""
    repeat = min(REPEATS_LIMIT, max(1, SAMPLE_BYTES // (4 * length)))
    times: tuple[list[float], list[float]] = ([], [])
    for group in (ours, theirs):
        group.prepare(length)
        group.sample(1)
    for _ in range(samples):
        for group, each in zip((ours, theirs), times, strict=True):
            each.append(group.sample(repeat))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--processes", type=int, nargs="*", default=[*PROCESSES])
    parser.add_argument("--ways", nargs="*", default=[*WAYS], choices=WAYS)
    parser.add_argument("--sizes", nargs="*", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--collective", default="ring")
    options = parser.parse_args()
    unwind_when_terminated()
    found: dict[str, Any] = {"benchmark": "collectives", **surroundings()}
    found["collective"] = options.collective
    rates = measure_rates()
    found["gb_per_s"] = {name: round(rate / 1e9, 2) for name, rate in asdict(rates).items()}
    say(f"GB/s: {found['gb_per_s']}")
    for size in options.processes:
        found[f"N={size}"] = measure(
            size, options.ways, options.sizes, options.samples, options.collective, rates
        )
    for size in options.processes:
        rows = [[name, *row.values()] for name, row in found[f"N={size}"].items()]
        if rows:
            table([f"N = {size}", *next(iter(found[f"N={size}"].values()))], rows)
    finish(found, options.json)


if __name__ == "__main__":
    main()
