"""What a user may choose of a run, and what does not go together. Pure."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from math import isfinite
from pathlib import Path

from fault.errors import InputError, TimeLimitTooShort
from fault.passwords import checked
from fault.records import Timing
from p2p.aggregate.rules import Robust
from p2p.spec import AGGREGATIONS, COLLECTIVES, COMPRESSIONS, LINKS, SHARDS_LIMIT
from p2p.transport.hosts import is_loopback

STARTS = ("cold", "warm", "snapshot")
"""A new process each time; one that is free, or a new one; one that is free, or a fork of a process
that has everything imported."""
RELAYS_LIMIT = 16
TIME_LIMIT_S = 10 * 365 * 86400.0
WORKERS_LIMIT = 32
LEAST_TIMES = {"handover_margin_s": float("-1e9"), "handover_stagger": 0.0}
"""Of those durations that may be zero, or negative for never."""
STORES = ("shared", "per-peer")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose of a run. Raises InputError for what does not go together."""

    job: Path
    peers: int = 4
    shards: int = 0
    """0 for as many as peers."""
    collective: str = "ring"
    links: str = "auto"
    compress: str = "none"
    overlap: bool = True
    """Gradients are summed while the backward pass still goes on."""
    settings: Mapping[str, str] = field(default_factory=dict)
    kills: tuple[tuple[int, int], ...] = ()
    time_limit_s: float = 900.0
    memory_mb: int = 3008
    registry: str = ""
    checkpoint_every: int = 50
    threads: int = 1
    relays: int = 1
    aggregate: str = "peers"
    """Where contributions are summed and the optimizer works: in the peers, or in a database."""
    workers: int = -1
    """Of each peer; -1 for one, with a database, and else none."""
    stores: str = "shared"
    """One store for all, or one for each peer."""
    store: str = ""
    """redis://… to use instead of the run's own."""
    robust: str = ""
    """A rule instead of the mean, with a database: see `p2p/aggregate/rules.py`."""
    sabotage: tuple[int, ...] = ()
    """Shards whose gradients are made wrong, to see what a rule does."""
    start: str = "snapshot"
    """How functions start when none is free: see `STARTS`."""
    listen: str = "127.0.0.1:0"
    """Where the emulator listens; port 0 for any that is free."""
    relay_listen: str = ""
    """HOST:PORT of the first relay, the others at the ports after it, and after these the relays'
    streams; empty for Unix sockets."""
    keys: Path | None = None
    """The folder with the run's keys, as `p2p-launch keys` writes them; None for new ones."""
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", self.shards or self.peers)
        database = self.aggregate == "database"
        if self.workers == -1:
            object.__setattr__(self, "workers", int(database))
        for holds, problem in (
            (self.peers >= 1, f"--peers {self.peers}: a run needs at least one"),
            (
                self.shards <= SHARDS_LIMIT,
                f"--shards {self.shards}: there can be up to {SHARDS_LIMIT}",
            ),
            (
                self.shards >= self.peers,
                f"--shards {self.shards} are too few for {self.peers} peers",
            ),
            (
                0 < self.time_limit_s <= TIME_LIMIT_S,
                f"--time-limit {self.time_limit_s:g}: must be positive, and {TIME_LIMIT_S:g} "
                "seconds at most",
            ),
            (self.memory_mb >= 128, f"--memory {self.memory_mb}: 128 MB are the least"),
            (self.checkpoint_every >= 1, "--checkpoint-every must be 1 at least"),
            (self.threads >= 1, "--threads must be 1 at least"),
            (
                1 <= self.relays <= RELAYS_LIMIT,
                f"--relays {self.relays}: there can be 1 to {RELAYS_LIMIT}",
            ),
            (
                self.aggregate in AGGREGATIONS,
                f"--aggregate {self.aggregate}: it is one of {', '.join(AGGREGATIONS)}",
            ),
            (
                database or not self.workers,
                f"--workers {self.workers}: only --aggregate database has workers",
            ),
            (
                int(database) <= self.workers <= WORKERS_LIMIT,
                f"--workers {self.workers}: there can be 1 to {WORKERS_LIMIT}",
            ),
            (
                self.stores in STORES,
                f"--stores {self.stores}: it is one of {', '.join(STORES)}",
            ),
            (
                database or not self.store,
                "--store is only for --aggregate database",
            ),
            (
                not self.store or self.stores == "shared",
                "--store names one store for all: leave --stores per-peer away",
            ),
            (
                not database or self.shards == self.peers,
                f"--shards {self.shards}: with --aggregate database it is the number of peers",
            ),
            (self.links in LINKS, f"--links {self.links}: it is one of {', '.join(LINKS)}"),
            (
                self.compress in COMPRESSIONS,
                f"--compress {self.compress}: it is one of {', '.join(COMPRESSIONS)}",
            ),
            (self.start in STARTS, f"--start {self.start}: it is one of {', '.join(STARTS)}"),
            (
                self.collective in COLLECTIVES,
                f"--collective {self.collective}: it is one of {', '.join(COLLECTIVES)}",
            ),
        ):
            if not holds:
                raise InputError(problem)
        if self.robust:
            if not database:
                raise InputError("--robust is only for --aggregate database")
            Robust.parse(self.robust).check(self.peers, "peers")
            if self.compress != "none":
                raise InputError("--compress: a --robust rule takes gradients as they are")
        for shard in self.sabotage:
            if not database or not self.robust or not 0 <= shard < self.shards:
                raise InputError(
                    f"--sabotage {shard}: the shards are 0 to {self.shards - 1}, "
                    "and it is only for --robust"
                )
        _check_timing(self.timing)
        check_address(self.listen)
        if self.relay_listen:
            _check_relay_address(self.relay_listen, self.relays)
        object.__setattr__(self, "registry", checked("--registry", self.registry))
        object.__setattr__(self, "store", checked("--store", self.store))
        for slot, step in self.kills:
            if not 0 <= slot < self.peers or step < 0:
                raise InputError(f"--kill {slot}@{step}: the slots are 0 to {self.peers - 1}")

    def check_kills(self, steps: int) -> None:
        """Once the job has been looked at. Raises InputError for a step that never comes."""
        for slot, step in self.kills:
            if step >= steps:
                raise InputError(f"--kill {slot}@{step}: the run's steps are 0 to {steps - 1}")

    def check_time_limit(self, import_s: float, build_s: float, step_s: float) -> None:
        """Once the job has been looked at. Raises TimeLimitTooShort, with what was measured."""
        boot_s = build_s if self.start == "snapshot" else import_s + build_s
        needed_s = boot_s + step_s + self.timing.deadline_slack_s
        if self.time_limit_s < needed_s:
            raise TimeLimitTooShort(
                f"--time-limit {self.time_limit_s:g}: on this machine a function needs "
                f"{boot_s:.1f} s to start and {step_s:.2f} s for a step with all peers there, so "
                f"it would never get one done; give it {2 * boot_s + 2 * needed_s:.0f} s or more"
            )


def _check_timing(timing: Timing) -> None:
    """Raises InputError for a duration with which the protocol would stand still."""
    for each in fields(timing):
        value = getattr(timing, each.name)
        least = LEAST_TIMES.get(each.name, 0.0)
        if not isfinite(value) or value < least or (value == 0 and each.name not in LEAST_TIMES):
            name = "--patience" if each.name == "patience_s" else f"--timing {each.name}={value:g}"
            raise InputError(f"{name}: it must be a positive number of seconds")


def relay_endpoints(listen: str, relays: int) -> list[str]:
    """ZeroMQ endpoints of relays over TCP."""
    host, _, port = listen.rpartition(":")
    return [f"tcp://{host}:{int(port) + number}" for number in range(relays)]


def stream_ports(listen: str, relays: int) -> list[int]:
    """Where the same relays take large messages."""
    return [int(listen.rpartition(":")[2]) + relays + number for number in range(relays)]


def _check_relay_address(listen: str, relays: int) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65536 - 2 * relays:
        raise InputError(f"--relay-listen {listen}: write it as HOST:PORT, as in 192.0.2.7:7700")
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is None or address.is_unspecified:
        raise InputError(
            f"--relay-listen {listen}: name the IP address at which peers reach this machine"
        )


def check_address(listen: str) -> None:
    """Raises InputError for what is no HOST:PORT on loopback."""
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--listen {listen}: write it as HOST:PORT, as in 127.0.0.1:8080")
    if not is_loopback(host):
        raise InputError(f"--listen {listen}: the emulator listens on loopback only")


def new_run_id(job: Path) -> str:
    """From the job's name and the time, with a random end."""
    stem = "".join(letter for letter in job.stem if letter.isalnum() or letter in "-_") or "run"
    return f"{stem[:32]}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
