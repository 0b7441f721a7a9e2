"""Who must leave the view, judged from what the registry shows. Pure functions.

Every rule here has its reason in a schedule that breaks without it; `docs/protocol.md` tells them.
"""

from __future__ import annotations

from fault.assignment import watchers_of
from fault.records import Peer, Removal, Snapshot, View, slot_of


def removals(
    view: View, snapshot: Snapshot, me: Peer, lease_unbroken: bool, stalled: bool
) -> list[Removal]:
    """The members to remove, each with its ground; never the caller itself.

    `lease_unbroken`: the caller's own contact with the registry has not failed for one lease time,
    so a lease missing there is the other's fault. `stalled`: no step finishes.
    """
    found: dict[Peer, Removal] = {}
    silent: dict[Peer, set[Peer]] = {}
    accused_at_all: dict[Peer, set[Peer]] = {}
    for accusation in snapshot.accusations:
        accused_at_all.setdefault(accusation.accused, set()).add(accusation.accuser)
        if accusation.kind == "silent":
            silent.setdefault(accusation.accused, set()).add(accusation.accuser)
        elif accusation.kind in ("hung", "corrupt") and accusation.accused in view.members:
            found[accusation.accused] = Removal(accusation.accused, accusation.kind)
    for peer in view.members:
        if peer == me:
            continue
        if peer in snapshot.departed:
            found[peer] = Removal(peer, "left")
        elif peer not in found:
            watchers = watchers_of(peer, view.members)
            leased_watchers = [w for w in watchers if w in snapshot.leased]
            accusers = silent.get(peer, set()).intersection(watchers)
            if 2 * len(accusers.intersection(leased_watchers)) > len(leased_watchers) > 0:
                found[peer] = Removal(peer, "silent")
            elif peer not in snapshot.leased and lease_unbroken:
                # An outage of the registry takes every lease; it must not take the members too.
                others = [w for w in leased_watchers if w != me]
                if accused_at_all.get(peer, set()).intersection(watchers) or (
                    not others and me not in watchers
                ):
                    found[peer] = Removal(peer, "lease")
    grounds = bool(found)  # also against the caller itself, who then has no one else to blame
    found.pop(me, None)
    staying = [peer for peer in view.members if peer not in found]
    heirs = [peer for peer in staying if slot_of(peer) < snapshot.target_slots]
    furthest = max([_step_of(peer, snapshot) for peer in heirs], default=-2)
    for peer in staying:
        # until somebody who stays has caught up, the others must carry the state on
        surplus = slot_of(peer) >= snapshot.target_slots > 0 and peer != me
        if heirs and surplus and furthest >= _step_of(peer, snapshot) - 1:
            found[peer] = Removal(peer, "scaled")
    if not grounds and not found and stalled:
        scapegoat = highest_degree(view, snapshot)
        if scapegoat is not None and scapegoat != me:
            found[scapegoat] = Removal(scapegoat, "unreachable")
    return [found[peer] for peer in view.members if peer in found]


def _step_of(peer: Peer, snapshot: Snapshot) -> int:
    doing = snapshot.doing.get(peer)
    return doing.step if doing is not None else -1


def highest_degree(view: View, snapshot: Snapshot) -> Peer | None:
    """The one member that most 'unreachable' accusations touch, made or received.

    A dead link shows at both its ends; only the member with the most dead links is at fault. Ties
    go to the highest slot, so that everyone names the same.
    """
    degree: dict[Peer, int] = {}
    for accusation in snapshot.accusations:
        pair = (accusation.accuser, accusation.accused)
        if accusation.kind == "unreachable" and all(peer in view.members for peer in pair):
            for peer in pair:
                degree[peer] = degree.get(peer, 0) + 1
    return max(degree, key=lambda peer: (degree[peer], slot_of(peer)), default=None)


def dissenters(view: View, snapshot: Snapshot, step: int) -> tuple[list[Peer], bool]:
    """Members whose state of `step` differs from the majority's, and whether there is a majority.

    Judged only once every leased member stands at `step`; until then nobody is named, and True is
    returned.
    """
    digests: dict[str, list[Peer]] = {}
    for peer in view.members:
        doing = snapshot.doing.get(peer)
        if peer not in snapshot.leased:
            continue
        if doing is None or doing.step != step:
            return [], True
        digests.setdefault(doing.digest, []).append(peer)
    if len(digests) < 2:
        return [], True
    ranked = sorted(digests.values(), key=len, reverse=True)
    minority = [peer for group in ranked[1:] for peer in group]
    return minority, len(ranked[0]) > len(minority)
