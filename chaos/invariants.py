"""What must hold in every simulated run, whatever happens to it, checked as it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fault.records import Peer, View, generation_of, slot_of

if TYPE_CHECKING:
    from chaos.simulated_peer import SimulatedPeer
    from chaos.world import World
    from p2p.collectives.memory import Vector

HARMLESS = frozenset(
    {"registry-down", "relay-down", "event-doubled", "event-late", "checkpoint-broken", "slow"}
)
"""Faults after which every peer lives and is heard, so none may be evicted."""


class Violation(AssertionError):
    """Something happened that must not."""


class Invariants:
    """One world's watch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._highest = -1
        self._views = 0
        self._lost_at = -float("inf")
        self._removed: set[Peer] = set()
        self._claimed: set[tuple[int, int, str]] = set()

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            self._world.tell("VIOLATION", what)
            raise Violation(what)

    # --- views ------------------------------------------------------------------------------

    def registry_lost_something(self) -> None:
        self._highest = -1
        self._lost_at = self._world.now
        self._removed.clear()
        self._claimed.clear()

    def on_view(self, before: View | None) -> None:
        world = self._world
        view = world.ledger.view
        if view is None:
            return
        told = " ".join(f"{peer}:{view.shards_of(peer)}" for peer in view.members)
        world.tell("registry", f"view {view.number} {told}")
        self._views += 1
        self._demand(view.number > self._highest, f"view {view.number} after {self._highest}")
        self._highest = view.number
        slots = [slot_of(peer) for peer in view.members]
        self._demand(
            len(slots) == len(set(slots)), f"two members in one slot of view {view.number}"
        )
        self._demand(
            len(view.players) == world.schedule.shards and set(view.players) <= set(view.members),
            f"view {view.number} leaves a shard to nobody",
        )
        self._demand(world.ledger.outcome is None, f"view {view.number} of a run that is over")
        old = before.members if before is not None else ()
        self._removed.update(peer for peer in old if peer not in view.members)
        for peer in view.members:
            self._demand(peer not in self._removed, f"{peer} comes back under its old identity")
            process = world.peers.get(peer)
            if process is not None and peer not in old:
                self._demand(process.step >= 0, f"{peer} is admitted without a state")
        self._nothing_is_given_up(before, view)
        self._nobody_is_evicted_for_nothing(before, view)

    def _nothing_is_given_up(self, before: View | None, view: View) -> None:
        """A view that goes back to a checkpoint leaves no living member behind that was heard."""
        world = self._world
        held = [p.step for p in world.peers.values() if p.me in view.members]
        for peer in before.members if before is not None else ():
            process = world.peers[peer]
            healthy = (
                process.alive
                and not process.paused
                and not process.hung
                and world.now - process.registry_unbroken_since > 3 * world.timing.lease_ttl_s
                and world.now - self._lost_at > 3 * world.timing.lease_ttl_s
                and not world.active
            )
            self._demand(
                peer in view.members or not healthy or process.step - max(held, default=-1) <= 1,
                f"view {view.number} goes back before step {process.step}, which {peer} holds",
            )

    def _nobody_is_evicted_for_nothing(self, before: View | None, view: View) -> None:
        world = self._world
        harmless = all(fault.kind in HARMLESS for fault in world.schedule.faults)
        if not harmless or world.schedule.time_limit_s < 1e9:
            return
        alone = world.schedule.peers <= 2  # of two, neither can tell whose link it is
        if alone and any(fault.kind == "relay-down" for fault in world.schedule.faults):
            return
        for peer in before.members if before is not None else ():
            self._demand(
                peer in view.members or not world.peers[peer].alive,
                f"view {view.number} evicts {peer}, to which nothing happened",
            )

    # --- processes --------------------------------------------------------------------------

    def on_start(self, peer: Peer) -> None:
        self._demand(peer not in self._world.peers, f"two processes with the name {peer}")

    def on_claim(self, peer: SimulatedPeer, token: str) -> None:
        """The registry gave the grant to this process."""
        grant = (peer.slot, generation_of(peer.me), token)
        self._demand(self._world.ledger.outcome is None, f"{peer.me} claims in a run that is over")
        self._demand(grant not in self._claimed, f"{peer.me} claims what was claimed before")
        self._claimed.add(grant)

    def on_snapshot_read(self, peer: SimulatedPeer, view: View | None) -> None:
        """A member that has just read of a view without itself is gone."""
        membership = peer.core.membership
        if view is None or peer.me in view.members or membership.role != "member":
            return
        mine = membership.view
        self._demand(
            mine is None or view.number < mine.number,
            f"{peer.me} goes on although view {view.number} is without it",
        )

    # --- states -----------------------------------------------------------------------------

    def on_mean(self, peer: SimulatedPeer, step: int, mean: Vector) -> None:
        self._demand(
            mean.tobytes() == self._world.reference.means[step],
            f"{peer.me} has another mean of step {step} than a run without faults",
        )

    def on_state(self, peer: SimulatedPeer) -> None:
        self._demand(
            peer.digest == self._world.reference.digests[peer.step],
            f"{peer.me} has another state of step {peer.step} than a run without faults",
        )

    # --- the end ----------------------------------------------------------------------------

    def no_progress(self) -> None:
        world = self._world
        alive = [f"{p.me}@{p.step}" for p in world.peers.values() if p.alive]
        self._demand(
            False,
            f"not finished {world.now - world.quiet_at:.0f}s after the last fault; "
            f"alive: {', '.join(alive) or 'nobody'}",
        )

    def at_the_end(self) -> None:
        world = self._world
        outcome, reference = world.ledger.outcome, world.reference
        if outcome is None:
            self.no_progress()
            return
        steps = world.schedule.steps
        self._demand(steps in world.checkpoints, "finished, and the last state is not durable")
        self._demand(
            (outcome.state, outcome.step, outcome.digest)
            == ("finished", steps, reference.digests[steps]),
            f"the run ended as {outcome.state} at step {outcome.step}: {outcome.reason}",
        )
        faults, lived = len(world.schedule.faults), world.now
        generations = len(world.peers)
        self._demand(
            self._views <= 20 + 12 * (faults + generations),
            f"{self._views} views for {faults} faults and {generations} processes",
        )
        peers, shards = world.schedule.peers, world.schedule.shards
        bound = generations * lived * 400 + 400 * steps * shards * shards
        self._demand(
            world.messages <= bound, f"{world.messages} messages of {peers} peers in {lived:.0f}s"
        )
