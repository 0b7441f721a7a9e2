"""What the step cycle asks its driver to do, beside `fault.actions`; all answered with an event."""

from __future__ import annotations

from dataclasses import dataclass

from fault.records import Peer
from p2p.collectives.memory import Vector
from p2p.messages import Message


@dataclass(slots=True)
class Send:
    """Send this message; it may get lost."""

    to: Peer
    message: Message
    again: bool = False
    """It was asked for; the first may have got lost, so this goes another way if there is one."""


@dataclass(slots=True)
class Compute:
    """Compute a shard's contribution to the state's step; answer `on_contribution`."""

    step: int
    shard: int


@dataclass(slots=True)
class Apply:
    """Turn the state into that of the next step; answer `on_applied`, or `on_not_finite`."""

    step: int
    mean: Vector


@dataclass(slots=True)
class TakeImage:
    """Copy the state of this step, to be sent; answer `on_image`."""

    step: int


@dataclass(slots=True)
class LoadState:
    """Replace the state by this image; answer `on_loaded`, or `on_load_failed`."""

    step: int
    digest: str
    image: bytearray


@dataclass(slots=True)
class Evaluate:
    """Have the state of this step evaluated, beside the training; needs no answer."""

    step: int


@dataclass(slots=True)
class WritePieces:
    """Write these shards' pieces of the state of this step; answer `on_durable` when all are."""

    step: int
    shards: tuple[int, ...]
