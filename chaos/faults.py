"""What can go wrong, as data: drawn by a seed, listed in a trace, taken away one by one.

A fault lasts from `at` for `lasts` seconds of virtual time. What the kinds mean is in `KINDS`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from p2p.collectives.schedule import ALLGATHER

KINDS = {
    "crash": "the processes of these slots die",
    "crash-member": "of these slots, the members die, and not the successors that wait",
    "crash-successor": "of these slots, whoever waits to become a member dies",
    "hang": "the computing threads of these slots stand still from now on",
    "pause": "the processes of these slots stand still, and then go on as if nothing had been",
    "slow": "these slots compute `amount` times slower",
    "loss": "every message is lost with chance `amount`",
    "double": "every message arrives twice with chance `amount`",
    "late": "every message takes up to `amount` seconds longer, so they overtake each other",
    "cut": "nothing goes from the first slot to the second",
    "partition": "these slots and the others hear nothing of each other",
    "registry-cut": "these slots do not reach the registry",
    "answers-lost": "what these slots ask of the registry is done, but the answers get lost",
    "relay-down": "no message arrives",
    "registry-down": "the registry's server is away, and comes back with all it had",
    "registry-older": "the same, and it comes back as it was one second before it went",
    "registry-empty": "the same, and it comes back empty",
    "event-lost": "the next invocations get lost",
    "event-doubled": "the next invocations arrive twice",
    "event-late": "the next invocations arrive `amount` seconds late",
    "boot-crash": "the next functions die while they boot",
    "checkpoint-broken": "checkpoints cannot be written",
    "scale": "the run is to have `amount` slots",
}
EVENTS_AFFECTED = 2


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    at: float
    lasts: float = 0.0
    slots: tuple[int, ...] = ()
    amount: float = 0.0

    def __str__(self) -> str:
        told = [f"{self.at:6.2f}s {self.kind}"]
        if self.slots:
            told.append(f"slots {','.join(map(str, self.slots))}")
        if self.amount:
            told.append(f"amount {self.amount:g}")
        if self.lasts:
            told.append(f"for {self.lasts:.2f}s")
        return "  ".join(told)

    @property
    def ends(self) -> float:
        return self.at + self.lasts


@dataclass(frozen=True, slots=True)
class Schedule:
    """One simulated run, complete: the same schedule gives the same run, event by event."""

    seed: int
    peers: int
    shards: int
    steps: int
    collective: str
    pieces: int
    """Units that each chunk is cut into."""
    time_limit_s: float
    handover_margin_s: float
    faults: tuple[Fault, ...]
    handover_stagger: float = 1.0
    compress: str = "none"

    def __str__(self) -> str:
        limit = f", time limit {self.time_limit_s:.1f}s" if self.time_limit_s < 1e9 else ""
        spread = "spread" if self.handover_stagger else "all at once"
        margin = f", hand-overs {spread}" if limit and self.handover_margin_s >= 0 else ""
        head = f"seed {self.seed}: {self.peers} peers, {self.shards} shards, {self.steps} steps, "
        faults = "".join([f"\n  {fault}" for fault in self.faults])
        packed = f", {self.compress}" if self.compress != "none" else ""
        units = f"{self.collective}, {self.pieces} units a chunk{packed}"
        return f"{head}{units}{limit}{margin}{faults}"


def draw_schedule(seed: int) -> Schedule:
    """2 to 8 peers, and 32 for one seed in a hundred; up to six faults in the first seconds."""
    draw = random.Random(seed)
    large = seed % 100 == 99
    shards = 32 if large else draw.choice([2, 3, 4, 4, 5, 6, 8])
    peers = shards if large or draw.random() < 0.6 else draw.randint(2, shards)
    limited = draw.random() < 0.15
    count = draw.choice([1, 1, 2, 2, 3, 4, 6])
    schedule = Schedule(
        seed=seed,
        peers=peers,
        shards=shards,
        steps=4 if large else draw.randint(50, 90) if limited else draw.randint(5, 10),
        collective=draw.choice(["ring", "butterfly", "direct"]),
        pieces=1 if large else draw.choice([1, 1, 1, 2, 3]),
        time_limit_s=draw.uniform(5.5, 7.5) if limited else float("inf"),
        handover_margin_s=draw.choice([-1.0, 0.3, 0.3, 0.6]) if limited else -1.0,
        faults=tuple(
            sorted(
                [_draw_fault(draw, peers, shards, 6.0 if limited else 2.2) for _ in range(count)],
                key=lambda fault: fault.at,
            )
        ),
        handover_stagger=draw.choice([0.0, 1.0]) if limited else 1.0,
        compress=draw.choice(["none", "none", "bf16", "int8"]),
    )
    if seed % 2 and schedule.collective == "direct" and schedule.compress == "none":
        return replace(schedule, collective=ALLGATHER)
    return schedule


def _draw_fault(draw: random.Random, peers: int, shards: int, until: float) -> Fault:
    kind = draw.choice(["crash", "crash", "crash", *KINDS])
    # a run without faults is over after some two seconds: later faults would meet nobody
    at, lasts = draw.uniform(0.5, until), draw.choice([0.3, 1.0, 2.0, 4.0]) * draw.uniform(0.5, 1.5)
    some = tuple(sorted(draw.sample(range(peers), draw.randint(1, peers))))
    one, pair = (draw.randrange(peers),), tuple(draw.sample(range(peers), 2))
    match kind:
        case "crash" | "crash-member" | "crash-successor":
            return Fault(kind, at, slots=draw.choice([one, one, some]))
        case "hang":
            return Fault(kind, at, slots=draw.choice([one, one, one, some]))
        case "pause" | "registry-cut" | "answers-lost":
            return Fault(kind, at, lasts, draw.choice([one, some]))
        case "slow":
            return Fault(kind, at, lasts, one, draw.choice([3.0, 10.0]))
        case "loss" | "double":
            return Fault(kind, at, lasts, amount=draw.choice([0.05, 0.3]))
        case "late" | "event-late":
            return Fault(kind, at, lasts, amount=draw.choice([0.1, 0.5, 2.0]))
        case "cut":
            return Fault(kind, at, lasts, pair)
        case "partition":
            return Fault(kind, at, lasts, some)
        case "scale":
            return Fault(kind, at, amount=float(draw.randint(1, shards)))
        case _:
            return Fault(kind, at, lasts)
