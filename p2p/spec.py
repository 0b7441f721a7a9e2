"""What a run is: fixed when it is created, recorded in the registry, read by every peer.

A run is joined and resumed only by what fits its spec, versions included, since any of these could
change a bit of the result. What may change while a run goes on (members, slots) is in the views.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from fault.errors import InputError, JobNotFound, Refused
from fault.records import Timing
from p2p.transport.wire import VERSION as WIRE_VERSION

Collective = Literal["ring", "butterfly", "direct"]
Aggregation = Literal["peers", "database"]
Links = Literal["relay", "direct", "auto"]
Compress = Literal["none", "bf16", "int8"]
COLLECTIVES: tuple[str, ...] = get_args(Collective)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
LINKS: tuple[str, ...] = get_args(Links)
COMPRESSIONS: tuple[str, ...] = get_args(Compress)
SHARDS_LIMIT = 64
SEGMENT_BYTES = 2 << 20


def job_source(job: Path | str) -> bytes:
    """The job file's bytes. Raises JobNotFound."""
    try:
        return Path(job).read_bytes()
    except FileNotFoundError:
        raise JobNotFound(f"there is no file {job}") from None
    except OSError as error:
        raise JobNotFound(f"{job} cannot be read: {error.strerror}") from None


def job_digest(job: Path | str) -> str:
    """SHA-256 of the job file. Raises JobNotFound."""
    return sha256(job_source(job)).hexdigest()


def mayfly_version() -> str:
    return version("mayfly-train")


def torch_version() -> str:
    return version("torch")


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Paths are absolute. Sizes are bytes, times seconds."""

    run: str
    job: str
    """The job file, which every function must be able to read."""
    settings: tuple[tuple[str, str], ...]
    """What `--set` gave: (name, value)."""
    job_digest: str
    """SHA-256 of the job file: a function that finds another one refuses to join."""
    seed: int
    shards: int
    slots: int
    """How many slots the run starts with; it can be scaled, the shards cannot."""
    steps: int
    samples: int
    folder: str
    relays: tuple[str, ...]
    """ZeroMQ endpoints; every peer connects to all of them."""
    sockets: str
    """The folder for those of peers on the launcher's host; only their user can enter it."""
    checkpoints: str
    """URL of the folder that takes the checkpoints."""
    collective: Collective = "ring"
    segment_bytes: int = SEGMENT_BYTES
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    """Steps of an epoch, after each of which the state is evaluated; 0: only at the end."""
    function: str = "mayfly"
    overlap: bool = True
    """Gradients are summed while the backward pass still goes on; the result does not tell."""
    links: Links = "auto"
    """Past the relays: no links, TCP between any two peers, or those within a host."""
    compress: Compress = "none"
    """How gradients are rounded on their way; part of the result."""
    aggregate: Aggregation = "peers"
    """Where a peer's contribution is summed and the optimizer works: in the peer, or in a store."""
    workers: int = 0
    """Of each peer, when a store aggregates: so many parts a shard has."""
    robust: str = ""
    """The rule over workers and peers, as `p2p/aggregate/rules.py` reads it; empty for the mean."""
    sabotage: tuple[int, ...] = ()
    """Shards whose gradients are made wrong. For demonstrations."""
    stores: tuple[str, ...] = ()
    """URLs; slot s has number s modulo their number."""
    prefix: str = ""
    """Of this run's keys in a store, which other runs may use as well, even one of the same id."""
    threads: int = 1
    """Threads that a contribution computes with; more than one is not always deterministic."""
    kills: tuple[tuple[int, int], ...] = ()
    """(slot, step): the function in this slot kills itself there, once. For demonstrations."""
    timing: Timing = field(default_factory=Timing)
    torch: str = field(default_factory=torch_version)
    mayfly: str = field(default_factory=mayfly_version)
    wire: int = WIRE_VERSION

    @property
    def parts(self) -> int:
        """Into how many parts the samples are cut: one for each shard, or for each worker of it."""
        return self.shards * max(1, self.workers)

    @property
    def is_on_tcp(self) -> bool:
        """Whether peers need the run's keys."""
        return self.links == "direct" or any(each.startswith("tcp:") for each in self.relays)

    @property
    def is_within_host(self) -> bool:
        """Whether long vectors go from peer to peer through shared memory."""
        return self.links == "auto" and not self.is_on_tcp

    def listens_at(self, peer: str, host: str) -> list[str]:
        """Where a peer takes what others send it past the relays; ZeroMQ endpoints."""
        if self.links == "direct":
            return [f"tcp://{host}:*"]
        return [f"ipc://{self.sockets}/{peer}.sock"] if self.links == "auto" else []

    def store_of(self, slot: int) -> str:
        return self.stores[slot % len(self.stores)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Raises InputError for text that is no spec of this version of Mayfly."""
        try:
            values: dict[str, Any] = json.loads(text)
            known = {each.name for each in fields(cls)}
            if set(values) != known:
                raise ValueError(f"fields {sorted(set(values) ^ known)}")
            values["settings"] = tuple([(name, value) for name, value in values["settings"]])
            values["relays"] = tuple(values["relays"])
            values["stores"] = tuple(values["stores"])
            values["sabotage"] = tuple(values["sabotage"])
            values["kills"] = tuple([(slot, step) for slot, step in values["kills"]])
            values["timing"] = Timing(**values["timing"])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the run's spec was not written by this version of Mayfly: {error}"
            ) from None

    def check_versions(self) -> None:
        """Raises Refused when this process could compute other bits than the run's."""
        for name, theirs, ours in (
            ("torch", self.torch, torch_version()),
            ("Mayfly", self.mayfly, mayfly_version()),
            ("the wire format", self.wire, WIRE_VERSION),
        ):
            if theirs != ours:
                raise Refused(
                    f"run {self.run} began with {name} {theirs}, this function has {ours}: "
                    "deploy the version of the run"
                )
