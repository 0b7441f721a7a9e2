"""Names in a store: where the state of a step is, what is made of it, and who works on that.

A *place* is one state of one run in one store. It is named by the step and by a digest, of the
state itself or, when a store has made it, of the state before: so what is found in a place is
always the same, whoever put it there and however often.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


def places_of(prefix: str) -> str:
    """The key of all places of a run in a store, by their steps: a sorted set."""
    return f"{prefix}:places"


@dataclass(frozen=True, slots=True)
class Place:
    """A state in a store, and the keys that belong to it."""

    name: str

    @classmethod
    def of(cls, prefix: str, step: int, digest: str) -> Place:
        """Of a state that somebody brings."""
        return cls(f"{prefix}:{step}:{digest}")

    @classmethod
    def after(cls, prefix: str, step: int, digest: str) -> Place:
        """Of the state that the store makes of the one with this digest, at this step."""
        return cls(f"{prefix}:{step + 1}:after:{digest}")

    @property
    def parameters(self) -> str:
        """The trainable parameters, flat float32."""
        return f"{self.name}:parameters"

    @property
    def rest(self) -> str:
        """All other bytes of the model: frozen parameters and buffers, uint8."""
        return f"{self.name}:rest"

    @property
    def mean(self) -> str:
        """The mean gradient that the state was made with, flat float32."""
        return f"{self.name}:mean"

    @property
    def ready(self) -> str:
        """There when everything above is."""
        return f"{self.name}:ready"

    @property
    def making(self) -> str:
        """There for a while when somebody has begun to make it."""
        return f"{self.name}:making"

    @property
    def held(self) -> str:
        """There for a while when somebody was told to take the state from here."""
        return f"{self.name}:held"

    def keys(self, vectors: Iterable[str], parts: int) -> list[str]:
        """All that may lie there, but for what goes by itself; shards are no more than parts."""
        keys = [self.ready, self.parameters, self.rest, self.mean]
        keys += map(self.optimizer, vectors)
        for number in range(parts):
            keys += [self.contribution(number), self.total(number)]
        return keys

    def optimizer(self, vector: str) -> str:
        return f"{self.name}:optimizer:{vector}"

    def contribution(self, part: int) -> str:
        """What a worker's part of the samples adds, flat float32."""
        return f"{self.name}:part:{part}"

    def total(self, shard: int) -> str:
        """The sum over a shard's parts."""
        return f"{self.name}:shard:{shard}"


@dataclass(frozen=True, slots=True)
class Part:
    """A task for a worker: what this part of the samples adds to the state's step."""

    place: str
    step: int
    part: int

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: bytes) -> Part:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Result:
    """A worker's word on a task, or on itself: `error` is a traceback, `expiring` its number."""

    place: str = ""
    part: int = -1
    error: str = ""
    refused: str = ""
    """The store's words, if it did not take the result."""
    expiring: int = -1

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: bytes) -> Result:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Presence:
    """What a living worker says of itself, again and again."""

    nonce: str
    task: str = ""
    """The text of the part it is at."""
    progress: int = 0

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: bytes) -> Presence:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Team:
    """The workers of one slot: their queues and their words, whoever leads them."""

    prefix: str
    slot: int

    @property
    def tasks(self) -> str:
        return f"{self.prefix}:slot:{self.slot}:tasks"

    @property
    def results(self) -> str:
        return f"{self.prefix}:slot:{self.slot}:results"

    def worker(self, number: int) -> str:
        return f"{self.prefix}:slot:{self.slot}:worker:{number}"


@dataclass(frozen=True, slots=True)
class WorkerInvocation:
    """What a worker is started with: its fields are the event's."""

    run: str
    registry: str
    store: str
    slot: int
    worker: int
