"""What peers say to each other: plain, frozen, and only of types that the wire can check.

A field named `payload` travels as a raw second frame. `view` is the number of the sender's view;
`digest` is the digest of the state that the sender holds, or computed from.
"""

from __future__ import annotations

from dataclasses import dataclass

from fault.records import View

Payload = bytes | memoryview
"""Raw little-endian float32 (segments, totals) or a range of a state's image."""


ENDPOINTS_LIMIT = 4


@dataclass(frozen=True, slots=True)
class Beat:
    """I am alive. `progress` only grows; it stands still when the peer is stuck."""

    view: int
    step: int
    digest: str
    progress: int
    computing: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A candidate holds a state of this step and could be admitted."""

    step: int
    digest: str


@dataclass(frozen=True, slots=True)
class ViewIs:
    """The newest view the sender knows; only members pass views on."""

    view: View


@dataclass(frozen=True, slots=True)
class Segment:
    """What arrives at node `dst` in round `round` of the step's collective, for one unit."""

    view: int
    step: int
    round: int
    unit: int
    dst: int
    digest: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Total:
    """One unit of a step's mean, for a peer that asks after the step is done."""

    step: int
    unit: int
    digest: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Ask:
    """Send me these segments; `items` holds (round, unit, dst) one after another."""

    view: int
    step: int
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NotYet:
    """I do not have what you asked for. `busy`: I am computing; otherwise I wait as you do."""

    view: int
    step: int
    busy: bool
    progress: int


@dataclass(frozen=True, slots=True)
class Want:
    """Send me the state, mine is of step `step` (-1: none).

    Of a transfer that has begun, `transfer_step` and `transfer_digest` say which, and `missing`
    which parts are still to come.
    """

    step: int
    transfer_step: int
    transfer_digest: str
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StatePart:
    """Part `index` of `count` of the image of the state of `step`; keyed by (step, digest)."""

    step: int
    digest: str
    index: int
    count: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Follow:
    """A candidate holds this state, and wants the mean of this step as soon as it is whole.

    `missing` names the units that are still to come of a mean that has partly arrived.
    """

    step: int
    digest: str
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hello:
    """You may send to one of these endpoints directly, if you knock with this number."""

    endpoints: tuple[str, ...]
    number: int

    def __post_init__(self) -> None:
        if self.number < 0 or len(self.endpoints) > ENDPOINTS_LIMIT:
            raise ValueError("a hello with an odd number, or with too many endpoints")
        for endpoint in self.endpoints:
            if not endpoint.isprintable() or not endpoint.startswith(("ipc://", "tcp://")):
                raise ValueError(f"a hello with the endpoint {endpoint!r}")


Message = Beat | Ready | ViewIs | Segment | Total | Ask | NotYet | Want | StatePart | Follow | Hello
KINDS = (Beat, Ready, ViewIs, Segment, Total, Ask, NotYet, Want, StatePart, Follow, Hello)
