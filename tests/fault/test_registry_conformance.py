"""The scripts in the server obey the Ledger: the same calls give the same answers and records.

Seeded random sequences of operations run on a `Ledger` and, through `Registry`, on a real server
with the same clock. Few slots, short times and deliberately wrong arguments make refusals, expiry
and collisions frequent; `test_everything_was_tried` proves that each rule was met from both sides.
A failure names its seed and the calls that led to it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from fault.ledger import SUSPECTS_LIMIT, Ledger
from fault.records import (
    AccusationKind,
    Contact,
    Doing,
    Outcome,
    OutcomeState,
    Peer,
    Proposal,
    ProposalKind,
    Removal,
    RemovalKind,
    Snapshot,
    Timing,
    View,
    peer_name,
    slot_of,
)
from fault.registry import Registry
from launcher.registry_server import RegistryServer

SEQUENCES = 600
OPERATIONS = 60
BATCHES = 8
TIMING = Timing(lease_ttl_s=2.0, accusation_ttl_s=0.6, grant_ttl_s=2.5, join_timeout_s=6.0)

tried: Counter[tuple[str, bool]] = Counter()
ground: Counter[tuple[str, bool]] = Counter()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    server = RegistryServer(tmp_path_factory.mktemp("registry"))
    server.start()
    yield server
    server.stop()


def in_order(snapshot: Snapshot) -> Snapshot:
    """The Ledger answers in the order of insertion, the server in that of names."""
    return replace(
        snapshot,
        accusations=tuple(
            sorted(snapshot.accusations, key=lambda a: (a.accuser, a.accused, a.kind))
        ),
        suspects=tuple(sorted(snapshot.suspects, key=lambda s: (s.shard, s.step))),
    )


class Pair:
    """A Ledger and a server's records of one run, driven alike."""

    def __init__(self, socket: Path, run: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1_700_000_000.0 + self.random.random() * 1e6
        self.ledger = Ledger(TIMING)
        self.registry = Registry(socket, run, TIMING, clock=lambda: self.now)
        self.ledger.life = self.registry.read().life
        self.slots = self.random.randint(1, 4)
        self.story: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.names: list[Peer] = [peer_name(0, 1, "stranger")]

    def both(self, operation: str, *arguments: Any, timed: bool = True) -> Any:
        self.story.append(f"{self.now!r} {operation}{arguments}")
        times = (self.now,) if timed else ()
        expected = getattr(self.ledger, operation)(*arguments, *times)
        answer = getattr(self.registry, operation)(*arguments)
        if isinstance(expected, Snapshot):
            assert answer == in_order(expected)
        else:
            assert answer == expected
        if isinstance(expected, bool):
            tried[operation, expected] += 1
        return expected

    # --- arguments that are right often enough ----------------------------------------------

    def peer(self) -> Peer:
        view = self.ledger.view
        current = [grant.claimant for grant in self.ledger.grants.values() if grant.claimant]
        current += view.members if view else ()
        return self.random.choice(current if current and self.random.random() < 0.9 else self.names)

    def proposal(self) -> Proposal:
        draw, old = self.random, self.ledger.view
        before = old.members if old else ()
        kinds = ("first", "revive", "restore") if old is None else ("change", "revive", "restore")
        weights = (6, 2, 1) if old is None else (8, 2, 1)
        kind: ProposalKind = draw.choices(kinds, weights)[0]  # type: ignore[assignment]
        if draw.random() < 0.05:
            kind = draw.choice(get_args(ProposalKind))
        removals = []
        members = []
        for peer in before:
            departed = peer in self.ledger.departed
            if draw.random() < (0.9 if departed else 0.3 if kind == "change" else 0.6):
                removals.append(Removal(peer, self.removal(peer)))
            else:
                members.append(peer)
        if draw.random() < 0.1:
            removals = removals[1:]  # a removal without a ground
        for slot, grant in self.ledger.grants.items():
            free = all(slot_of(peer) != slot for peer in members)
            if grant.claimant and (free or draw.random() < 0.03) and draw.random() < 0.8:
                members.append(grant.claimant)
        if not members or draw.random() < 0.05:
            members.append(draw.choice(self.names))
        proposer = draw.choice(before or members)
        if kind == "revive" or draw.random() < 0.1:
            proposer = draw.choice(members)
        if removals and removals[0].kind == "swap" and draw.random() < 0.7:
            proposer = removals[0].peer
        number = self.ledger.highest_view + 1 + (draw.random() < 0.1) - (draw.random() < 0.05)
        expected = (old.number, old.id) if old else (-1, "")
        if draw.random() < 0.08:
            expected = draw.choice([(expected[0], "other"), (expected[0] - 1, expected[1])])
        view = View(
            number,
            f"{draw.getrandbits(64):016x}",
            tuple(dict.fromkeys(members)),
            tuple(draw.choice(members) for _ in range(4)),
            draw.randint(1, 4),
        )
        return Proposal(proposer, kind, *expected, view, tuple(removals))

    def removal(self, peer: Peer) -> RemovalKind:
        ledger = self.ledger
        likely: list[RemovalKind] = ["swap", "scaled"]
        if not ledger.leased(peer, self.now):
            likely += ["lease"] * 4
        if peer in ledger.departed:
            likely += ["left"] * 12
        accused = [kind for (_, whom), (kind, _) in ledger.accusations.items() if whom == peer]
        likely += accused * 3
        return self.random.choice(likely if self.random.random() < 0.9 else get_args(RemovalKind))

    # --- one operation each -----------------------------------------------------------------

    def create(self) -> None:
        if self.both("create", "the spec", self.slots, timed=False):
            self.events.append(("created", ""))

    def scale(self) -> None:
        before, slots = self.ledger.target_slots, self.random.randint(0, 4)
        if self.both("scale", slots, timed=False) and slots != before:
            self.events.append(("scaled", str(slots)))

    def reopen(self) -> None:
        if self.both("reopen", timed=False):
            self.events.append(("resumed", ""))

    def grant(self) -> None:
        draw = self.random
        slot = draw.randint(-1, 4) if draw.random() < 0.1 else draw.randrange(self.slots)
        last = self.ledger.grants.get(slot)
        generation = (last.generation if last else 0) + 1
        if draw.random() < 0.1:
            generation += draw.choice([-1, 1])
        occupant = self.ledger.view.member_in(slot) if self.ledger.view else None
        by = (
            occupant if occupant and draw.random() < 0.5 else draw.choice(["launcher", self.peer()])
        )
        token = f"{draw.getrandbits(32):x}"
        if self.both("grant", slot, generation, token, by):
            self.events.append(("granted", f"{slot}.{generation}"))

    def claim(self) -> None:
        draw = self.random
        if not self.ledger.grants:
            return
        unclaimed = [grant for grant in self.ledger.grants.values() if not grant.claimant]
        some = draw.choice(unclaimed or list(self.ledger.grants.values()))
        generation = some.generation - (draw.random() < 0.05)
        token = some.token if draw.random() < 0.95 else "forged"
        peer = peer_name(some.slot, generation, f"{draw.getrandbits(32):08x}")
        if self.both("claim", some.slot, generation, token, peer):
            self.events.append(("claimed", peer))
            self.names.append(peer)

    def contact(self) -> None:
        draw = self.random
        accusations = tuple(
            (self.peer(), draw.choice(get_args(AccusationKind)))
            for _ in range(draw.choice([0, 0, 1, 2]))
        )
        doing = Doing(draw.randint(-1, 3), "digest", draw.randint(-1, 2), draw.random() < 0.2)
        self.both("contact", Contact(self.peer(), doing, draw.choice([-1, 0, 7]), accusations))

    def propose(self) -> None:
        self.put(self.proposal(), "propose")

    def restore(self) -> None:
        self.put(replace(self.proposal(), kind="restore"), "restore", "the spec", self.slots)

    def put(self, proposal: Proposal, operation: str, *more: Any) -> None:
        done = self.both(operation, *more, proposal)
        ground[proposal.kind, done] += 1
        for removal in proposal.removals:
            if proposal.kind == "change":
                ground[removal.kind, done] += 1
        if done:
            view = proposal.view
            self.events.append(("view", f"{view.number}.{view.id}"))

    def leave(self) -> None:
        peer = self.peer()
        goes = self.ledger.may_hold_lease(peer)
        tried["leave", goes] += 1
        self.both("leave", peer, self.random.choice(["", "", "out of memory"]))
        if goes:
            self.events.append(("left", peer))

    def blame(self) -> None:
        self.both("blame", self.peer(), self.random.choice(["", "time", "memory"]), timed=False)

    def admit_hardware(self) -> None:
        self.both("admit_hardware", self.random.choice(["", "probe", "other"]), timed=False)

    def checkpointed(self) -> None:
        step = self.random.randint(0, 20)
        newer = step > self.ledger.checkpoint
        self.both("checkpointed", step, timed=False)
        if newer:
            self.events.append(("checkpoint", str(step)))

    def finish(self) -> None:
        first = self.ledger.outcome is None
        state = self.random.choice(get_args(OutcomeState))
        self.both("finish", Outcome(state, self.random.randrange(9), "d", "E"), timed=False)
        if first:
            self.events.append(("outcome", ""))

    def read(self) -> None:
        self.both("read")

    def wait(self) -> None:
        """Time passes; now and then up to the very moment at which something expires."""
        grants, ledger = self.ledger.grants.values(), self.ledger
        moments = [grant.expires_at for grant in grants]
        moments += [grant.claimed_at + TIMING.join_timeout_s for grant in grants]
        moments += [grant.claimed_at + TIMING.lease_ttl_s for grant in grants]
        moments += [*ledger.leases.values(), *(until for _, until in ledger.accusations.values())]
        ahead = [moment for moment in moments if moment > self.now]
        if ahead and self.random.random() < 0.4:
            self.now = self.random.choice(ahead)
        else:
            self.now += self.random.choice([0.0, 0.01, 0.1, 0.3, 0.6, 1.0, 2.0, 7.0])


WEIGHTS = {
    Pair.contact: 34,
    Pair.propose: 20,
    Pair.grant: 16,
    Pair.claim: 16,
    Pair.wait: 14,
    Pair.read: 10,
    Pair.leave: 6,
    Pair.restore: 2,
    Pair.scale: 2,
    Pair.reopen: 1.5,
    Pair.blame: 3,
    Pair.checkpointed: 2,
    Pair.admit_hardware: 1,
    Pair.create: 1,
    Pair.finish: 0.4,
}


@pytest.mark.parametrize("batch", range(BATCHES))
def test_same_answers(server: RegistryServer, batch: int) -> None:
    """Whatever is called, in whatever order and at whatever time, both answer the same."""
    for seed in range(batch, SEQUENCES, BATCHES):
        pair = Pair(server.socket, f"seed-{seed}", seed)
        if seed % 10:
            pair.create()  # else the run is there later, by a restore, or never
        try:
            for operation in pair.random.choices(
                list(WEIGHTS), list(WEIGHTS.values()), k=OPERATIONS
            ):
                operation(pair)
            pair.read()
            events = pair.registry.read_events()
            assert [(event.kind, event.key) for event in events] == pair.events
            assert pair.registry.spec() == pair.ledger.spec
        except AssertionError as error:
            error.add_note(f"seed {seed}\n" + "\n".join(pair.story))
            raise
        pair.registry.close()


def test_suspects_are_bounded(server: RegistryServer) -> None:
    """Past the limit both take up no new suspect, but further deaths of a known one."""
    pair = Pair(server.socket, "suspects", 0)
    pair.slots = 1
    pair.create()
    for generation in range(1, SUSPECTS_LIMIT + 10):
        peer = peer_name(0, generation, "nonce")
        assert pair.both("grant", 0, generation, "token", "launcher")
        assert pair.both("claim", 0, generation, "token", peer)
        step = generation if generation < SUSPECTS_LIMIT + 5 else 1
        pair.both("contact", Contact(peer, Doing(step, "digest", 0)))
        pair.both("leave", peer, "memory")
    pair.both("read")
    assert len(pair.ledger.suspects) == SUSPECTS_LIMIT
    assert len(pair.ledger.suspects[0, 1].deaths) == 6


def test_everything_was_tried() -> None:
    """Every operation was accepted and refused, and every ground held and did not."""
    if not all((name, True) in tried for name in ("create", "propose")):
        pytest.skip("needs the sequences of this module to have run before it, in one process")
    both = ("create", "scale", "reopen", "grant", "claim", "propose", "restore", "leave")
    assert [(name, done) for name in both for done in (True, False) if tried[name, done] < 20] == []
    kinds = [*get_args(ProposalKind), *get_args(RemovalKind)]
    assert [
        (kind, done) for kind in kinds for done in (True, False) if ground[kind, done] < 10
    ] == []
