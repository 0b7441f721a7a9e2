"""How the registry's records look as bytes: msgpack arrays, in the order of the records' fields.

`fault/registry.py` uses it at one end; the scripts in `fault/scripts` read and write the same
arrays at the other, so an order changed here is changed there. Floats are IEEE doubles throughout
and come back bit for bit. Nothing is ever unpickled.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache
from typing import Any, cast

import msgpack

from fault.records import (
    Accusation,
    Contact,
    Death,
    Doing,
    Grant,
    Outcome,
    Peer,
    Proposal,
    Snapshot,
    Suspect,
    Timing,
    View,
)

UNICODE_ERRORS = "surrogatepass"
"""A traceback may quote a file name that is not UTF-8; it must not stop the report of a failure."""


def pack(value: Any) -> bytes:
    # the server's msgpack knows no separate type for bytes
    return cast(bytes, msgpack.packb(value, use_bin_type=False, unicode_errors=UNICODE_ERRORS))


def unpack(data: bytes) -> Any:
    """Of values that hold nothing but text, numbers and containers."""
    return msgpack.unpackb(data, raw=False, strict_map_key=False, unicode_errors=UNICODE_ERRORS)


def text(data: bytes) -> str:
    return data.decode("utf-8", UNICODE_ERRORS)


def timing_to_bytes(timing: Timing) -> bytes:
    """The durations that the scripts know."""
    return pack(
        (
            timing.lease_ttl_s,
            timing.accusation_ttl_s,
            timing.grant_ttl_s,
            timing.join_timeout_s,
        )
    )


def view_to_bytes(view: View) -> bytes:
    return pack((view.number, view.id, view.members, view.players, view.slots))


@lru_cache(maxsize=16)
def view_from_bytes(data: bytes) -> View:
    # every contact brings the view, and it hardly ever changes
    number, identity, members, players, slots = unpack(data)
    return View(number, identity, tuple(members), tuple(players), slots)


def outcome_to_bytes(outcome: Outcome) -> bytes:
    return pack(astuple(outcome))


def outcome_from_bytes(data: bytes) -> Outcome:
    return Outcome(*unpack(data))


def contact_arguments(contact: Contact) -> tuple[Any, ...]:
    doing = contact.doing
    return (
        contact.peer,
        pack((doing.step, doing.digest, doing.computing, doing.near_deadline)),
        doing.step,
        contact.ready,
        contact.accusations,
    )


def proposal_arguments(proposal: Proposal) -> tuple[Any, ...]:
    view = proposal.view
    removals = tuple((removal.peer, removal.kind) for removal in proposal.removals)
    event = {
        "number": view.number,
        "id": view.id,
        "kind": proposal.kind,
        "proposer": proposal.proposer,
        "members": view.members,
        "players": view.players,
        "slots": view.slots,
        "removals": removals,
    }
    return (
        proposal.proposer,
        proposal.kind,
        proposal.expected_number,
        proposal.expected_id,
        view.number,
        view.id,
        view.members,
        view.slots,
        removals,
        view_to_bytes(view),
        pack(event),
    )


def snapshot_from_bytes(data: bytes, life: str) -> Snapshot:
    """What `snapshot()` of the scripts answers. Where the order means nothing, names sort it."""
    now, head, leased, ready, accusations, grants, doing, departed, suspects = msgpack.unpackb(
        data, raw=True
    )
    born, view, outcome, checkpoint, slots, highest = head
    return Snapshot(
        life=life,
        born=text(born or b""),
        now=float(now),
        view=view_from_bytes(view) if view else None,
        leased=frozenset(map(text, leased)),
        ready={text(peer): int(step) for peer, step in _pairs(ready)},
        accusations=_accusations(_pairs(accusations)),
        grants={grant.slot: grant for grant in sorted(map(_grant, grants), key=lambda g: g.slot)},
        doing={text(peer): Doing(*unpack(value)) for peer, value in _pairs(doing)},
        departed=frozenset(map(text, departed)),
        suspects=tuple(sorted(map(_suspect, suspects), key=lambda s: (s.shard, s.step))),
        outcome=outcome_from_bytes(outcome) if outcome else None,
        checkpoint=int(checkpoint or -1),
        target_slots=int(slots or 0),
        highest_view=int(highest or -1),
    )


def _pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _accusations(pairs: list[tuple[bytes, bytes]]) -> tuple[Accusation, ...]:
    found: list[tuple[Peer, Peer, Any]] = []
    for pair, kind in pairs:
        accuser, accused = text(pair).split(" ", 1)
        found.append((accuser, accused, text(kind)))
    return tuple([Accusation(*fields) for fields in sorted(found)])


def _grant(data: bytes) -> Grant:
    slot, generation, token, granted_at, expires_at, claimant, claimed_at, fails = unpack(data)
    return Grant(
        slot,
        generation,
        token,
        float(granted_at),
        float(expires_at),
        claimant,
        float(claimed_at),
        fails,
    )


def _suspect(data: bytes) -> Suspect:
    shard, step, deaths = unpack(data)
    return Suspect(
        shard,
        step,
        tuple(
            [Death(peer, float(at), float(claimed), cause) for peer, at, claimed, cause in deaths]
        ),
    )
