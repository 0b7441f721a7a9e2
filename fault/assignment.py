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
    split between those two, so blocks stay contiguous, and such that the most that anyone plays,
    which is what a step waits for, is as little as it can be.
    """
    present = sorted(members, key=slot_of)
    homes = [home_block(slot_of(peer), slots, shards) for peer in present]
    sizes = [len(home) for home in homes]
    befores = homes[-1:] + homes[:-1]
    gaps = [
        (home.start - before.stop) % shards for home, before in zip(homes, befores, strict=True)
    ]
    limit = -(-shards // len(present))
    while (taken := _split(sizes, gaps, limit)) is None:
        limit += 1
    players: list[Peer] = [""] * shards
    for index, (peer, home) in enumerate(zip(present, homes, strict=True)):
        after = (index + 1) % len(present)
        left = gaps[after] - taken[after]
        for shard in range(home.start - taken[index], home.stop + left):
            players[shard % shards] = peer
    return tuple(players)


def _split(sizes: list[int], gaps: list[int], limit: int) -> list[int] | None:
    """What each one takes of the gap before it, if nobody has to play more than `limit` shards.

    The rest of a gap goes to whoever comes before it, and of the first gap to the last on the ring.
    """
    for last_receives in range(gaps[0] + 1):
        taken = [0] * len(gaps)
        received = last_receives
        for index in reversed(range(len(gaps))):
            taken[index] = min(gaps[index], limit - sizes[index] - received)
            received = gaps[index] - taken[index]
        if min(taken) >= 0 and received <= last_receives:
            taken[0] = gaps[0] - last_receives
            return taken
    return None


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
