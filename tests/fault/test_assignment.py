"""Who plays which shard, and who watches whom: proved over every membership of small runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from fault.assignment import WATCHERS, assign, home_block, watched_by, watchers_of
from fault.records import Peer, peer_name, slot_of

SHAPES = [
    (slots, shards)
    for slots in range(1, 8)
    for shards in sorted({slots, slots + 1, 2 * slots, 3 * slots - 1})
]


def members_in(slots: tuple[int, ...] | range) -> list[Peer]:
    return [peer_name(slot, 1, "n") for slot in slots]


def memberships(slots: int) -> Iterator[list[Peer]]:
    for count in range(1, slots + 1):
        for present in itertools.combinations(range(slots), count):
            yield members_in(present)


def least_possible(slots: int, shards: int, members: list[Peer]) -> int:
    """The smallest greatest load, by trying every way to split every gap between its neighbours."""
    homes = [home_block(slot_of(peer), slots, shards) for peer in members]
    count = len(homes)
    if count == 1:
        return shards
    gaps = [(homes[(at + 1) % count].start - homes[at].stop) % shards for at in range(count)]
    return min(
        max(
            len(homes[at]) + taken[at] + gaps[at - 1] - taken[at - 1]  # own, after and before
            for at in range(count)
        )
        for taken in itertools.product(*[range(gap + 1) for gap in gaps])
    )


@pytest.mark.parametrize(("slots", "shards"), SHAPES)
def test_home_blocks_cut_the_shards_evenly(slots: int, shards: int) -> None:
    """Home blocks follow one another, cover every shard once, and differ by one in size at most."""
    blocks = [home_block(slot, slots, shards) for slot in range(slots)]
    assert [shard for block in blocks for shard in block] == list(range(shards))
    sizes = [len(block) for block in blocks]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("slots", "shards"), SHAPES)
def test_every_shard_has_one_player_who_keeps_its_home_block(slots: int, shards: int) -> None:
    """For every membership: players are members, home blocks stay, each plays one block."""
    for members in memberships(slots):
        players = assign(shards, slots, members)
        assert len(players) == shards and set(players) == set(members)
        for peer in members:
            assert all(players[shard] == peer for shard in home_block(slot_of(peer), slots, shards))
        # on the ring of shards, each player begins once
        begins = sum(players[shard] != players[shard - 1] for shard in range(shards))
        assert begins == (len(members) if len(members) > 1 else 0)
        order = [peer for peer, _ in itertools.groupby(players)]
        assert sorted(set(order), key=slot_of) == members


@pytest.mark.parametrize(("slots", "shards"), [shape for shape in SHAPES if shape[1] <= 14])
def test_loads_are_as_even_as_contiguous_blocks_allow(slots: int, shards: int) -> None:
    """Nobody plays more than the best of all splits between ring neighbours would give them."""
    for members in memberships(slots):
        loads = Counter(assign(shards, slots, members))
        assert max(loads.values()) == least_possible(slots, shards, members)


def test_adopted_shards_are_shared_when_a_neighbour_has_to_give_way() -> None:
    """With slots 0, 1 and 3 of 6 everyone plays two, though one gap lies beside the busiest."""
    zero, one, three = members = members_in((0, 1, 3))
    assert assign(6, 6, members) == (zero, one, one, three, three, zero)


def test_the_assignment_does_not_depend_on_the_order_of_members() -> None:
    """Whoever proposes spells out the same players, however it lists the members."""
    members = members_in((1, 2, 5, 6))
    assert {assign(17, 8, order) for order in itertools.permutations(members)} == {
        assign(17, 8, members)
    }


def test_a_large_run_is_assigned() -> None:
    """64 shards, one third of the slots gone: nobody plays more than two, none is left out."""
    members = members_in(tuple([slot for slot in range(64) if slot % 3 != 1]))
    loads = Counter(assign(64, 64, members))
    assert sum(loads.values()) == 64 and max(loads.values()) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 11, 40])
def test_watchers_are_few_and_near_and_everyone_watches_as_many(count: int) -> None:
    """Each has five watchers or all others, nearest first, and never watches more than five."""
    members = members_in(range(count))
    for at, peer in enumerate(members):
        watchers = watchers_of(peer, members)
        assert peer not in watchers and len(set(watchers)) == len(watchers)
        assert len(watchers) == min(WATCHERS, count - 1)
        distances = [
            min((at - slot_of(each)) % count, (slot_of(each) - at) % count) for each in watchers
        ]
        assert distances == sorted(distances) and max(distances, default=0) <= 3
        assert len(watched_by(peer, members)) == len(watchers)
        assert all(peer in watchers_of(other, members) for other in watched_by(peer, members))
        # the direct neighbours watch one another
        for neighbour in {members[at - 1], members[(at + 1) % count]} - {peer}:
            assert neighbour in watchers and peer in watchers_of(neighbour, members)
