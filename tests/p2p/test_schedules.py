"""The collectives as data: for every number of shards from 1 to 64 the sum is whole and ordered.

What the schedules are compared with is written from their descriptions, not from their code.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from p2p.collectives.hops import Hop
from p2p.collectives.rounding import BLOCK
from p2p.collectives.schedule import (
    ALLGATHER,
    GENERATORS,
    SHORT_BYTES,
    make_schedule,
    make_units,
    schedule_for,
)
from p2p.steps import Shape

COUNTS = range(1, 65)
BOTH = pytest.mark.parametrize("name", sorted(GENERATORS))


def by_chunk(name: str, nodes: int) -> list[list[Hop]]:
    chunks, hops = GENERATORS[name](nodes)
    sorted_out: list[list[Hop]] = [[] for _ in range(chunks)]
    for hop in sorted(hops, key=lambda hop: hop.round):
        sorted_out[hop.chunk].append(hop)
    return sorted_out


def owner_of(nodes: int, hops: list[Hop]) -> int:
    """The only node that never gives its sum away."""
    (owner,) = set(range(nodes)) - {hop.source for hop in hops if hop.adds}
    return owner


# --- who adds what ---------------------------------------------------------------------------


@BOTH
def test_every_contribution_is_summed_once_at_one_owner(name: str) -> None:
    """Sent round by round, contributions never meet twice, and all meet at the chunk's owner.

    A node gives its sum away once, and nothing is added to it in that round or later.
    """
    for nodes in COUNTS:
        owners = []
        for hops in by_chunk(name, nodes):
            sums = [1 << node for node in range(nodes)]
            given_at: dict[int, int] = {}
            for hop in [hop for hop in hops if hop.adds]:
                assert hop.source != hop.destination and hop.source not in given_at
                assert hop.destination not in given_at
                assert sums[hop.source] & sums[hop.destination] == 0
                sums[hop.destination] |= sums[hop.source]
                given_at[hop.source] = hop.round
            for hop in [hop for hop in hops if hop.adds]:
                assert hop.round < given_at.get(hop.destination, nodes * 2)
            owner = owner_of(nodes, hops)
            assert sums[owner] == (1 << nodes) - 1
            owners.append(owner)
        assert len(set(owners)) == len(owners)  # and no node owns two


@BOTH
def test_everyone_gets_every_total_once(name: str) -> None:
    """A total is sent only by who got it in an earlier round, and reaches every node but its owner

    exactly once; all of it after the last round that adds.
    """
    for nodes in COUNTS:
        for hops in by_chunk(name, nodes):
            owner = owner_of(nodes, hops)
            reduced = max([hop.round for hop in hops if hop.adds], default=-1)
            has_since = {owner: reduced}
            for hop in [hop for hop in hops if not hop.adds]:
                assert has_since[hop.source] < hop.round
                assert hop.destination not in has_since
                has_since[hop.destination] = hop.round
            assert len(has_since) == nodes


@BOTH
def test_a_node_hears_at_most_one_add_of_a_chunk_in_a_round(name: str) -> None:
    """So the round alone says which add a segment is."""
    for nodes in COUNTS:
        _, hops = GENERATORS[name](nodes)
        heard = Counter((hop.round, hop.chunk, hop.destination) for hop in hops)
        assert max(heard.values(), default=1) == 1


@BOTH
def test_parts_say_what_hops_say(name: str) -> None:
    """Every hop is found at both its ends, and no more than the hops; adds in order of rounds."""
    for nodes in (*range(1, 18), 33, 64):
        schedule = make_schedule(name, nodes)
        chunks, hops = GENERATORS[name](nodes)
        assert (schedule.chunks, len(schedule.parts)) == (chunks, chunks)
        sent, heard = set(), set()
        for chunk, parts in enumerate(schedule.parts):
            assert len(parts) == nodes
            for node, part in enumerate(parts):
                rounds = [round for round, _ in part.adds]
                assert rounds == sorted(rounds)
                heard |= {Hop(r, chunk, source, node, adds=True) for r, source in part.adds}
                sent |= {Hop(r, chunk, node, to, adds=False) for r, to in part.spread}
                if part.result is not None:
                    sent.add(Hop(part.result[0], chunk, node, part.result[1], adds=True))
                if part.copy is not None:
                    heard.add(Hop(part.copy[0], chunk, part.copy[1], node, adds=False))
        assert sent == heard == set(hops)
        assert all(hop.adds == (hop.round < schedule.reduce_rounds) for hop in hops)


# --- the order of additions ------------------------------------------------------------------


def additions(name: str, nodes: int, chunk: int) -> str:
    """How the chunk's total is bracketed; the operands of one addition sorted by first shard."""
    parts = make_schedule(name, nodes).parts[chunk]

    def summed(node: int) -> tuple[int, str]:
        total = (node, str(node))
        for _, source in parts[node].adds:
            first, second = sorted([total, summed(source)])
            total = (first[0], f"({first[1]}+{second[1]})")
        return total

    (owner,) = [node for node, part in enumerate(parts) if part.result is None]
    return summed(owner)[1]


def chain(nodes: int, chunk: int) -> str:
    """((x[c] + x[c+1]) + x[c+2]) + …, the operands of one addition sorted by first shard."""
    first, total = chunk, str(chunk)
    for offset in range(1, nodes):
        node = (chunk + offset) % nodes
        total = f"({total}+{node})" if first < node else f"({node}+{total})"
        first = min(first, node)
    return total


def tree(nodes: int) -> str:
    """Pairs of the first shards until a power of two is left; then neighbours, level by level."""
    extra = nodes - (1 << (nodes.bit_length() - 1))
    row = [f"({2 * pair}+{2 * pair + 1})" for pair in range(extra)]
    row += [str(node) for node in range(2 * extra, nodes)]
    while len(row) > 1:
        row = [f"({left}+{right})" for left, right in zip(row[::2], row[1::2], strict=True)]
    return row[0]


@pytest.mark.parametrize("name", ["ring", "direct"])
def test_ring_and_direct_add_along_the_chain(name: str) -> None:
    """Chunk c is summed from shard c on, one shard after the other."""
    for nodes in (*range(1, 18), 33, 64):
        assert make_schedule(name, nodes).chunks == nodes
        for chunk in range(nodes):
            assert additions(name, nodes, chunk) == chain(nodes, chunk)


def test_the_butterfly_adds_in_one_tree_over_neighbours() -> None:
    """Every chunk of the butterfly is summed in the same tree, folded from neighbours."""
    assert tree(4) == "((0+1)+(2+3))" and tree(5) == "(((0+1)+2)+(3+4))"
    for nodes in (*range(1, 18), 33, 63, 64):
        schedule = make_schedule("butterfly", nodes)
        assert {additions("butterfly", nodes, c) for c in range(schedule.chunks)} == {tree(nodes)}


# --- what it costs ---------------------------------------------------------------------------


def sent_and_heard(name: str, nodes: int) -> tuple[Counter[int], Counter[int]]:
    """How many chunks each node sends and hears."""
    _, hops = GENERATORS[name](nodes)
    return Counter(hop.source for hop in hops), Counter(hop.destination for hop in hops)


def test_the_ring_is_bandwidth_optimal() -> None:
    """Every node sends and hears 2 (V - 1) of V chunks, one a round, to one neighbour."""
    for nodes in COUNTS:
        chunks, hops = GENERATORS["ring"](nodes)
        sent, heard = sent_and_heard("ring", nodes)
        for node in range(nodes):
            assert sent[node] == heard[node] == 2 * (nodes - 1) and chunks == nodes
        assert max(Counter((hop.round, hop.source) for hop in hops).values(), default=1) == 1
        assert {hop.round for hop in hops} == set(range(2 * (nodes - 1)))
        assert all(hop.destination == (hop.source + 1) % nodes for hop in hops)


def test_direct_is_bandwidth_optimal_and_waits_for_nobody_in_between() -> None:
    """Every node sends its own contribution to the owner of a chunk, and its total to all."""
    for nodes in COUNTS:
        chunks, hops = GENERATORS["direct"](nodes)
        sent, heard = sent_and_heard("direct", nodes)
        for node in range(nodes):
            assert sent[node] == heard[node] == 2 * (nodes - 1) and chunks == nodes
        assert all(hop.destination == hop.chunk for hop in hops if hop.adds)
        assert all(hop.source == hop.chunk for hop in hops if not hop.adds)


def test_the_butterfly_takes_logarithmic_rounds() -> None:
    """2 log2 V rounds and 2 (C - 1) of C chunks per node; one vector and two rounds more, each way,

    for those who are paired because V is no power of two.
    """
    for nodes in COUNTS:
        chunks, hops = GENERATORS["butterfly"](nodes)
        depth, extra = nodes.bit_length() - 1, nodes - chunks
        assert chunks == 1 << depth
        rounds = {hop.round for hop in hops}
        assert len(rounds) == 2 * depth + (2 if extra else 0)
        sent, heard = sent_and_heard("butterfly", nodes)
        for node in range(nodes):
            if node >= 2 * extra:
                assert sent[node] == heard[node] == 2 * (chunks - 1)
            elif node % 2 == 0:
                assert sent[node] == heard[node] == 2 * (chunks - 1) + chunks
            else:
                assert sent[node] == heard[node] == chunks


# --- chunks and segments ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 3, 16, 17, 1000])
@pytest.mark.parametrize("chunks", [1, 2, 5, 16])
@pytest.mark.parametrize("segment_bytes", [1, 16, 30, 1 << 20])
def test_segments_cover_the_vector_once(length: int, chunks: int, segment_bytes: int) -> None:
    """In order and without gaps; none empty or over the limit, sizes in a chunk differ by one."""
    units = make_units(length, chunks, segment_bytes)
    assert [element for unit in units for element in range(unit.start, unit.stop)] == list(
        range(length)
    )
    sizes = defaultdict(list)
    for unit in units:
        sizes[unit.chunk].append(unit.stop - unit.start)
        assert unit.chunk * length // chunks <= unit.start < unit.stop
        assert unit.stop <= (unit.chunk + 1) * length // chunks
    for each in sizes.values():
        assert max(each) - min(each) <= 1 and max(each) <= max(segment_bytes // 4, 1)


@pytest.mark.parametrize("compress", ["none", "bf16", "int8"])
def test_no_segment_takes_more_than_it_may_on_its_way(compress: str) -> None:
    """Rounded ones have as many times as many elements, what is not rounded has not."""
    limit, gradients, length = 64 << 10, 300_000, 500_000
    shape = Shape.of("direct", compress, 2, 1, length, gradients, limit, seed=0)
    sizes = [
        4 * (unit.stop - unit.start) if shape.packing is None else shape.packing.size(number)
        for number, unit in enumerate(shape.units)
    ]
    scales = limit // BLOCK  # int8 has one for each block
    assert 0.9 * limit < max(sizes) <= limit + scales
    assert len(sizes) == {"none": 16 + 16, "bf16": 8 + 2 + 13, "int8": 4 + 1 + 13}[compress]


def test_a_short_vector_does_not_go_around_the_ring() -> None:
    elements = SHORT_BYTES // 4
    assert schedule_for("ring", 4, elements).name == "direct"
    assert schedule_for("ring", 4, elements + 1).name == "ring"
    assert schedule_for("butterfly", 4, elements).name == "butterfly"


@pytest.mark.parametrize(("within_host", "more"), [(False, 96 << 10), (True, 2 << 20)])
def test_a_shorter_one_goes_one_hop(within_host: bool, more: int) -> None:
    """As long as few enough peers receive few enough bytes more, and nothing is compressed."""
    for nodes in (3, 4, 8):
        elements = more * nodes // ((nodes - 1) * (nodes - 2)) // 4
        assert schedule_for("ring", nodes, elements, within_host=within_host).name == ALLGATHER
        longer = schedule_for("ring", nodes, elements + nodes, within_host=within_host)
        assert longer.name == "direct"
        compressed = schedule_for("ring", nodes, elements, True, within_host)
        assert compressed.name == "direct"
    assert schedule_for("ring", 9, 100, within_host=within_host).name == "direct"
    assert schedule_for("direct", 4, 100, within_host=within_host).name == "direct"


def test_in_one_hop_each_hears_from_all_others() -> None:
    schedule = make_schedule(ALLGATHER, 5)
    assert (schedule.chunks, schedule.reduce_rounds) == (1, 5)
    for node, part in enumerate(schedule.parts[0]):
        assert [source for _, source in part.adds] == [n for n in range(5) if n != node]
        assert all(part.hears(round) == (round != node) for round in range(5))
        assert part.result is part.copy is None and not part.spread
