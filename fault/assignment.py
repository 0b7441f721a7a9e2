"""Which peer plays which shard: home blocks, and adoption by ring neighbours. Pure.

Whoever proposes a view computes this once and spells the result out in it; nobody recomputes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fault.records import Peer, slot_of

WATCHERS = 5


def home_block(slot: int, slots: int, shards: int) -> range:
    """The shards a slot plays when every slot is filled: contiguous, even sizes but for one."""
    return range(slot * shards // slots, (slot + 1) * shards // slots)


def assign(shards: int, slots: int, members: Sequence[Peer]) -> tuple[Peer, ...]:
    """The player of every shard.

    A present slot plays its home block. The shards between two present neighbours on the ring are
    split between those two so that their loads come out even; blocks stay contiguous.
    """
    present = sorted(members, key=slot_of)
    blocks = {peer: home_block(slot_of(peer), slots, shards) for peer in present}
    load = {peer: len(block) for peer, block in blocks.items()}
    players: list[Peer] = [""] * shards
    for peer, block in blocks.items():
        for shard in block:
            players[shard] = peer
    for index, left in enumerate(present):
        right = present[(index + 1) % len(present)]
        start, end = blocks[left].stop, blocks[right].start
        gap = (end - start) % shards if len(present) > 1 else shards - len(blocks[left])
        to_left = min(max((load[right] + gap - load[left]) // 2, 0), gap)
        if left == right:
            to_left = gap
        for offset in range(gap):
            players[(start + offset) % shards] = left if offset < to_left else right
        load[left] += to_left
        load[right] += gap - to_left
    return tuple(players)


def watchers_of(peer: Peer, members: Sequence[Peer]) -> list[Peer]:
    """The nearest neighbours on the ring of members (sorted by slot), five at most."""
    count = len(members)
    at = members.index(peer)
    ring: list[Peer] = []
    for distance in range(1, count // 2 + 1):
        for offset in (distance, -distance):
            neighbour = members[(at + offset) % count]
            if neighbour != peer and neighbour not in ring:
                ring.append(neighbour)
            if len(ring) == WATCHERS:
                return ring
    return ring


def watched_by(peer: Peer, members: Sequence[Peer]) -> list[Peer]:
    """Whom this peer watches."""
    return [other for other in members if other != peer and peer in watchers_of(other, members)]
