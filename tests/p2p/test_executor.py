"""Executors of several peers, driven to a mean through everything that a network and views can do.

The mean is compared, bit for bit, with a sum in float32 written from the schedules' descriptions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest

from p2p.collectives.allgather import AllGather
from p2p.collectives.compression import Packing, compression
from p2p.collectives.executor import Executor, Missing, Outgoing, Values
from p2p.collectives.memory import Memory, PlainMemory, Vector
from p2p.collectives.schedule import ALLGATHER, GENERATORS, make_schedule, make_units

COUNTS = (*range(1, 18), 64)
SEGMENT_BYTES = 16
KINDS = ("bf16", "int8")
NAMES = (ALLGATHER, *sorted(GENERATORS))
ALL = pytest.mark.parametrize("name", NAMES)
COMPRESSED = pytest.mark.parametrize(
    ("name", "compress"),
    [(ALLGATHER, "none"), *product(sorted(GENERATORS), ("none", *KINDS))],
)


def contributions(nodes: int, length: int) -> list[Vector]:
    """Of such different sizes that any other order of additions gives other bits."""
    source = np.random.default_rng(nodes * 1000 + length)
    sizes = 10.0 ** source.uniform(-3, 3, (nodes, length))
    return list((source.standard_normal((nodes, length)) * sizes).astype(np.float32))


def ring_mean(inputs: list[Vector]) -> Vector:
    """Chunk c: ((x[c] + x[c+1]) + x[c+2]) + …"""
    nodes, length = len(inputs), len(inputs[0])
    mean = np.empty(length, dtype=np.float32)
    for chunk in range(nodes):
        cut = slice(chunk * length // nodes, (chunk + 1) * length // nodes)
        total = inputs[chunk][cut]
        for offset in range(1, nodes):
            total = total + inputs[(chunk + offset) % nodes][cut]
        mean[cut] = total
    return mean


def butterfly_mean(inputs: list[Vector]) -> Vector:
    """The first pairs folded until a power of two is left, then a tree over neighbours."""
    extra = len(inputs) - (1 << (len(inputs).bit_length() - 1))
    row = [inputs[2 * pair] + inputs[2 * pair + 1] for pair in range(extra)] + inputs[2 * extra :]
    while len(row) > 1:
        row = [left + right for left, right in zip(row[::2], row[1::2], strict=True)]
    return row[0]


MEANS = {
    "ring": ring_mean,
    "butterfly": butterfly_mean,
    "direct": ring_mean,
    ALLGATHER: ring_mean,
}


class SharedMemory(PlainMemory):
    is_shared = True


def new_executor(
    name: str, nodes: int, length: int, compress: str = "none", memory: Memory | None = None
) -> Executor:
    schedule = make_schedule(name, nodes)
    if name == ALLGATHER:
        return AllGather(schedule, make_units(length, 1, SEGMENT_BYTES), length)
    if compress == "none":
        return Executor(schedule, make_units(length, schedule.chunks, SEGMENT_BYTES), length)
    gradients = length - length // 4
    units = make_units(length, schedule.chunks, SEGMENT_BYTES, gradients)
    packing = Packing(compression(compress), units, gradients, seed=3)
    return Executor(schedule, units, length, memory, packing, step=5)


def mean_of(name: str, inputs: list[Vector], compress: str) -> Vector:
    """Without compression from the reference; else from one peer that plays everything."""
    if compress == "none":
        return MEANS[name](inputs)
    executor = new_executor(name, len(inputs), len(inputs[0]), compress)
    executor.play(range(len(inputs)))
    for node, vector in enumerate(inputs):
        executor.contribute(node, vector.copy())
    return executor.mean


@dataclass(eq=False)
class Coming:
    """A segment that is added while it comes, or written to its `place`."""

    peer: int
    executor: Executor
    outgoing: Outgoing
    payload: Values
    place: memoryview | None
    taken: int = 0


@dataclass
class Cluster:
    """Peers that play the nodes between them, and the segments on their way, in no order."""

    name: str
    inputs: list[Vector]
    random: random.Random
    lossy: bool = False
    compress: str = "none"
    players: list[int] = field(default_factory=list)
    executors: dict[int, Executor] = field(default_factory=dict)
    on_the_way: list[tuple[int, Outgoing, Values]] = field(default_factory=list)
    coming: list[Coming] = field(default_factory=list)
    handed_out: list[tuple[Values, bytes]] = field(default_factory=list)
    next_peer: int = 0

    @property
    def nodes(self) -> int:
        return len(self.inputs)

    def new_view(self, peers: int) -> None:
        """Some stay, some are new; each node is played by any of them, each plays at least one."""
        staying = self.random.sample(sorted(self.executors), min(len(self.executors), peers - 1))
        newcomers = range(self.next_peer, self.next_peer + peers - len(staying))
        self.next_peer += len(newcomers)
        self.executors = {peer: self.executors[peer] for peer in staying}
        for peer in newcomers:
            self.executors[peer] = new_executor(
                self.name, self.nodes, len(self.inputs[0]), self.compress
            )
        members = sorted(self.executors)
        self.players = members + self.random.choices(members, k=self.nodes - len(members))
        self.random.shuffle(self.players)
        for peer, executor in self.executors.items():
            executor.play([node for node, player in enumerate(self.players) if player == peer])
            executor.out.extend(executor.ready())
            self.flush(peer)

    def flush(self, peer: int) -> None:
        executor = self.executors[peer]
        for outgoing in executor.out:
            assert self.players[outgoing.destination] != peer
            self.send(peer, outgoing)
        executor.out.clear()

    def send(self, peer: int, outgoing: Outgoing) -> bool:
        round, unit, _, destination = outgoing
        payload = self.executors[peer].payload(round, unit, destination)
        if payload is None:  # as a peer answers an ask: with the total, once it is there
            payload = self.executors[peer].total(unit)
            if payload is None:
                return False
            self.deliver_total(self.players[destination], unit, payload)
            return True
        self.handed_out.append((payload, payload.tobytes()))
        self.on_the_way.append((self.players[destination], outgoing, payload))
        return True

    def carry(self) -> bool:
        """Something goes on that is on its way; False when nothing is."""
        if self.coming and (not self.on_the_way or self.random.random() < 0.6):
            self.go_on()
        elif self.on_the_way:
            self.deliver()
        else:
            return False
        return True

    def deliver(self) -> None:
        peer, outgoing, payload = self.on_the_way.pop(self.random.randrange(len(self.on_the_way)))
        fate = self.random.random() if self.lossy else 1.0
        if peer not in self.executors or fate < 0.15:
            return
        if fate < 0.3:
            self.on_the_way.append((peer, outgoing, payload))
        round, unit, _, destination = outgoing
        octets = payload.data.cast("B")
        executor = self.executors[peer]
        place = executor.place(round, unit, destination)
        can_be_taken = place is not None or executor.is_next(round, unit, destination)
        if can_be_taken and self.random.random() < 0.7:
            self.coming.append(Coming(peer, executor, outgoing, payload, place))
            return
        executor.receive(round, unit, destination, octets)
        self.flush(peer)

    def go_on(self) -> None:
        """A piece of what is coming: some of it, all the rest, or the end of its connection."""
        coming = self.random.choice(self.coming)
        round, unit, _, destination = coming.outgoing
        octets = coming.payload.data.cast("B")
        fate = self.random.random()
        if fate < 0.1:  # it comes again another way
            self.on_the_way.append((coming.peer, coming.outgoing, coming.payload))
        elif coming.taken < len(octets):
            left = (len(octets) - coming.taken) // 4
            stop = coming.taken + 4 * (left if fate < 0.5 else self.random.randint(1, left))
            piece = np.frombuffer(octets[coming.taken : stop], np.uint8).copy()
            if coming.place is not None:
                coming.place[coming.taken : stop] = piece.data
            else:
                coming.executor.add_piece(round, unit, destination, coming.taken, piece.data)
                piece[:] = 255  # the next one comes into the same memory
            coming.taken = stop
            return
        else:
            coming.executor.receive(round, unit, destination, coming.place or b"")
            if self.executors.get(coming.peer) is coming.executor:
                self.flush(coming.peer)
        self.coming.remove(coming)

    def deliver_total(self, peer: int, unit: int, payload: Vector) -> None:
        self.executors[peer].receive_total(unit, payload.data.cast("B"))
        self.flush(peer)

    def compute(self) -> bool:
        """One contribution of one peer; False when none is to be computed."""
        needed = [
            (peer, node)
            for node, peer in enumerate(self.players)
            if self.executors[peer].needs(node)
        ]
        if not needed:
            return False
        peer, node = self.random.choice(needed)
        self.executors[peer].contribute(node, self.inputs[node].copy())
        self.flush(peer)
        return True

    def ask(self) -> bool:
        """Everyone asks for what is missing; False when nobody had anything."""
        answered = False
        for executor in list(self.executors.values()):
            for missing in executor.missing():
                player = self.players[missing.source]
                assert self.executors[player] is not executor
                answered |= self.send(player, Outgoing(*missing))
        return answered

    @property
    def complete(self) -> bool:
        return all(executor.complete for executor in self.executors.values())

    def run(self, stop_after: int = 1 << 30) -> None:
        """Until everyone has the mean, or so many events are over."""
        for _ in range(stop_after):
            if self.complete:
                return
            if self.random.random() < 0.1 or not self.carry():
                is_idle = not (self.compute() or self.on_the_way or self.coming)
                assert not is_idle or self.ask(), "everyone waits for everyone"

    def check(self) -> None:
        reference = mean_of(self.name, self.inputs, self.compress).tobytes()
        for executor in self.executors.values():
            assert executor.mean.tobytes() == reference
            assert not executor.missing()
        for array, octets in self.handed_out:
            assert array.tobytes() == octets


# --- without faults --------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("nodes", COUNTS)
def test_one_peer_that_plays_everything_gets_the_documented_sum(name: str, nodes: int) -> None:
    """Without a single message the mean is the reference's, for lengths below V and above."""
    for length in (0, 1, nodes - 1, nodes, 7 * nodes + 3):
        inputs = contributions(nodes, length)
        executor = new_executor(name, nodes, length)
        executor.play(range(nodes))
        for node in random.Random(length).sample(range(nodes), nodes):
            assert executor.needs(node) == (length > 0)
            executor.contribute(node, inputs[node].copy())
        assert executor.complete and not executor.out and not executor.missing()
        assert executor.mean.tobytes() == MEANS[name](inputs).tobytes()


def test_the_order_of_additions_can_be_seen_in_the_bits() -> None:
    """The references of ring and butterfly, and a plain sum, differ: equal bits prove the order."""
    inputs = contributions(8, 64)
    means = {ring_mean(inputs).tobytes(), butterfly_mean(inputs).tobytes()}
    assert len(means | {np.sum(inputs, axis=0, dtype=np.float32).tobytes()}) == 3


@COMPRESSED
@pytest.mark.parametrize("nodes", COUNTS)
def test_any_partition_and_any_order_of_delivery_gives_the_same_bits(
    name: str, nodes: int, compress: str
) -> None:
    """The nodes fall to any peers, segments arrive in any order: nothing has to be asked for."""
    inputs = contributions(nodes, 3 * nodes + 2)
    for seed in range(3):
        cluster = Cluster(name, inputs, random.Random(seed), compress=compress)
        cluster.new_view(min(nodes, 2 + seed * 2))
        while not cluster.complete:
            if (cluster.random.random() < 0.2 and cluster.compute()) or cluster.carry():
                continue
            assert cluster.compute(), "a segment was not sent by itself"
        cluster.check()


# --- with faults -----------------------------------------------------------------------------


@COMPRESSED
@pytest.mark.parametrize("nodes", COUNTS)
def test_losses_doubles_and_views_do_not_change_a_bit(name: str, nodes: int, compress: str) -> None:
    """Segments lost and doubled, peers gone and new, nodes adopted in the middle of the step:

    everyone ends with the reference's bits, and no array that was handed out changes afterwards.
    """
    inputs = contributions(nodes, 2 * nodes + 3)
    for seed in range(1 if nodes == 64 else 6):
        cluster = Cluster(name, inputs, random.Random(seed), lossy=True, compress=compress)
        for _ in range(4):
            cluster.new_view(cluster.random.randint(1, min(nodes, 6)))
            cluster.run(stop_after=cluster.random.randint(1, 20 * nodes))
        cluster.run()
        cluster.check()


@ALL
def test_who_comes_when_the_others_are_done_gets_the_mean(name: str) -> None:
    """A newcomer in a step that everyone else has finished is served from their totals."""
    cluster = Cluster(name, contributions(6, 40), random.Random(1))
    cluster.new_view(3)
    cluster.run()
    before = set(cluster.executors)
    cluster.new_view(4)
    assert len(before.intersection(cluster.executors)) == 3
    cluster.run()
    cluster.check()


def test_what_was_computed_before_a_view_is_not_computed_again() -> None:
    """A peer that loses a node and gets it back still has its contribution and its sums."""
    executor = new_executor("ring", 4, 16)
    inputs = contributions(4, 16)
    executor.play([0, 1])
    for node in (0, 1):
        executor.contribute(node, inputs[node].copy())
    executor.play([2])
    assert executor.needs(2) and not executor.needs(0) and not executor.needs(1)
    executor.play([0, 1, 2, 3])
    for node in (2, 3):
        executor.contribute(node, inputs[node].copy())
    assert executor.mean.tobytes() == ring_mean(inputs).tobytes()


def test_after_a_view_ready_says_all_that_others_need_again() -> None:
    """Of two nodes that were neighbours in one peer, one moves: their hop is now sent."""
    executor = new_executor("ring", 3, 3)
    inputs = contributions(3, 3)
    executor.play([0, 1])
    for node in (0, 1):
        executor.contribute(node, inputs[node].copy())
    assert [(o.source, o.destination) for o in executor.out] == [(1, 2), (1, 2)]
    executor.play([0])
    assert not executor.out
    # chunk 0 begins at node 0; all that node 0 waits for comes from node 2
    assert executor.ready() == [Outgoing(0, 0, 0, 1)]
    first = executor.payload(0, 0, 1)
    assert first is not None and first.tobytes() == inputs[0][:1].tobytes()
    assert executor.missing() == [Missing(2, 0, 2, 0), Missing(1, 1, 2, 0), Missing(0, 2, 2, 0)]


# --- in one hop ------------------------------------------------------------------------------


def test_in_one_hop_a_peer_needs_each_contribution_once() -> None:
    """Whichever of its nodes it is sent to; and says which it lacks."""
    executor = new_executor(ALLGATHER, 4, 4)
    executor.play([1, 2])
    assert executor.missing() == [Missing(0, 0, 0, 1), Missing(3, 0, 3, 1)]
    vector = np.arange(4, dtype=np.float32)
    executor.contribute(1, vector)
    assert executor.out == [Outgoing(1, 0, 1, 0), Outgoing(1, 0, 1, 3)] == executor.ready()
    assert len({executor.identity(each) for each in executor.out}) == 1
    assert executor.receive(3, 0, 2, vector.tobytes())
    assert not executor.receive(3, 0, 1, vector.tobytes())
    assert executor.missing() == [Missing(0, 0, 0, 1)]
    for round, unit, node, size in ((0, 1, 1, 16), (0, 0, 4, 16), (4, 0, 1, 16), (1, 0, 1, 16)):
        assert not executor.receive(round, unit, node, bytes(size))
    assert not executor.receive(0, 0, 1, bytes(12))


def test_in_one_hop_only_what_was_computed_here_is_handed_on() -> None:
    """What others sent may lie in their memory, and be another vector's by then."""
    executor = new_executor(ALLGATHER, 3, 2)
    executor.play([0])
    mine, others = np.ones(2, np.float32), np.full(2, 5, np.float32)
    executor.contribute(0, mine)
    executor.receive(1, 0, 0, others.tobytes())
    executor.play([0, 1])
    assert executor.needs(1) and executor.payload(1, 0, 2) is None
    executor.contribute(1, others)
    handed_on = executor.payload(1, 0, 2)
    assert handed_on is not None and handed_on.tolist() == [5.0, 5.0]
    assert executor.receive(2, 0, 0, mine.tobytes()) and executor.complete
    assert executor.mean.tolist() == [7.0, 7.0] and mine.tolist() == [1.0, 1.0]


# --- with compression ------------------------------------------------------------------------


@pytest.mark.parametrize("compress", KINDS)
def test_each_hop_of_the_ring_is_rounded_once(compress: str) -> None:
    """Chunk c: Q(Q(Q(x[c]) + x[c+1]) + …), its noise that of the node that hands it on."""
    nodes, length = 4, 4096
    inputs = contributions(nodes, length)
    gradients = length - length // 4
    units = make_units(length, nodes, SEGMENT_BYTES, gradients)
    packing = Packing(compression(compress), units, gradients, seed=3)
    mean = np.empty(length, np.float32)
    for number, unit in enumerate(units):
        cut = slice(unit.start, unit.stop)
        total = inputs[unit.chunk][cut].copy()
        for offset in range(nodes):
            if unit.stop <= gradients:
                payload = np.empty(packing.size(number), np.uint8)
                last = offset == nodes - 1
                node = nodes if last else (unit.chunk + offset) % nodes
                packing.pack(number, 5, node, total, payload)
                packing.unpack(payload, total)
            if offset < nodes - 1:
                total = total + inputs[(unit.chunk + offset + 1) % nodes][cut]
        mean[cut] = total
    assert mean_of("ring", inputs, compress).tobytes() == mean.tobytes()
    exact = ring_mean(inputs)
    assert mean[gradients:].tobytes() == exact[gradients:].tobytes()
    assert not np.array_equal(mean[:gradients], exact[:gradients])


@pytest.mark.parametrize("compress", KINDS)
def test_a_packed_segment_that_does_not_fit_is_refused(compress: str) -> None:
    """Unpacked, too, and the other way round for what is never packed."""
    executor = new_executor("ring", 2, 4096, compress)
    executor.play([0])
    for unit, cut in enumerate(executor.units):
        part = executor.schedule.parts[cut.chunk][0]
        round = part.adds[0][0] if part.adds else part.copy[0] if part.copy else -1
        length = cut.stop - cut.start
        right = compression(compress).size(length) if cut.stop <= 3072 else 4 * length
        for size in {0, length, 2 * length, 4 * length, right - 1, right + 1} - {right}:
            assert not executor.receive(round, unit, 0, bytes(size))
        assert executor.receive(round, unit, 0, bytes(right))


# --- what comes in is checked ----------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    """Wrong length, round, unit or node, before or after the contribution: False, no change."""
    for name in sorted(GENERATORS):
        executor = new_executor(name, 4, 16)
        inputs = contributions(4, 16)
        executor.play([0])
        for _ in range(2):
            adds = [(r, u, n, 16) for r in (-1, 99, 1 << 40) for u in range(4) for n in range(4)]
            wrong = [(0, -1, 0, 16), (0, 4, 0, 16), (0, 0, -1, 16), (0, 0, 4, 16), *adds]
            for unit, chunk in enumerate(executor.schedule.parts):
                for node, part in enumerate(chunk):
                    expected = [round for round, _ in part.adds]
                    expected += [part.copy[0]] if part.copy is not None else []
                    wrong += [(r, unit, node, 16) for r in range(8) if r not in expected]
                    wrong += [(r, unit, node, s) for r in expected for s in (0, 12, 15, 17, 20)]
            for round, unit, node, size in wrong:
                assert not executor.receive(round, unit, node, bytes(size)), (round, unit, node)
            for unit, size in ((-1, 16), (4, 16), (0, 0), (0, 12), (0, 20)):
                assert not executor.receive_total(unit, bytes(size))
            executor.contribute(0, inputs[0].copy())
        assert executor.total(-1) is executor.total(4) is executor.total(0) is None
        for round, unit, node in ((0, -1, 0), (0, 4, 0), (0, 0, -1), (0, 0, 4), (-1, 0, 0)):
            assert executor.payload(round, unit, node) is None
        for round, unit, node in ((99, 0, 0), (0, 0, 0)):
            assert executor.payload(round, unit, node) is None
        assert not executor.complete and all(executor.total(unit) is None for unit in range(4))


def test_without_neighbours_nothing_can_arrive() -> None:
    """A run of one shard has no hops, so no segment fits it, whatever round it names."""
    for name in NAMES:
        executor = new_executor(name, 1, 4)
        executor.play([0])
        assert not executor.receive(0, 0, 0, bytes(16))
        assert not executor.complete


def test_a_segment_counts_once() -> None:
    """The second of a doubled segment is refused: parked, added, or with the total there."""
    executor = new_executor("ring", 2, 2)
    executor.play([0])
    one = np.ones(1, dtype=np.float32)
    assert executor.receive(0, 1, 0, one.tobytes())  # parked: the contribution is to come
    assert not executor.receive(0, 1, 0, one.tobytes())
    executor.contribute(0, np.array([3, 5], dtype=np.float32))
    assert not executor.receive(0, 1, 0, one.tobytes())
    executor.contribute(0, np.array([100, 100], dtype=np.float32))  # nor does a contribution
    assert executor.receive(1, 0, 0, (4 * one).tobytes())
    assert not executor.receive(1, 0, 0, (9 * one).tobytes())
    assert not executor.receive_total(0, (9 * one).tobytes())
    assert executor.complete and executor.mean.tolist() == [4.0, 6.0]


def test_a_piece_counts_once() -> None:
    """Whichever connection brings it: neither what is there, nor what comes before its time."""
    executor = new_executor("ring", 2, 8)
    executor.play([0])
    ones = np.ones(4, dtype=np.float32).data.cast("B")
    assert not executor.is_next(0, 1, 0)  # the contribution is to come
    executor.contribute(0, np.arange(8, dtype=np.float32))
    assert executor.is_next(0, 1, 0) and not executor.is_next(1, 1, 0)
    for start, stop in ((4, 16), (0, 8), (12, 16), (4, 12), (0, 4)):
        executor.add_piece(0, 1, 0, start, ones[start:stop])
        assert not executor.receive(0, 1, 0, b"")  # one connection ended, another goes on
    executor.add_piece(0, 1, 0, 8, ones[8:])
    assert executor.receive(0, 1, 0, b"") and not executor.receive(0, 1, 0, b"")
    assert executor.mean[4:].tolist() == [5.0, 6.0, 7.0, 8.0]
    executor.add_piece(0, 1, 0, 0, ones)
    assert executor.mean[4:].tolist() == [5.0, 6.0, 7.0, 8.0]


def test_only_a_total_that_is_missing_has_a_place() -> None:
    """One that is to be added has none, nor what is there already, or does not exist."""
    inputs = contributions(2, 8)
    executor = new_executor("direct", 2, 8)
    executor.play([0])
    schedule, units = executor.schedule, executor.units
    total = next(
        (hop[0], unit)
        for unit, cut in enumerate(units)
        if (hop := schedule.parts[cut.chunk][0].copy) is not None
    )
    assert executor.place(total[0], total[1], 0) is executor.place(total[0], total[1], 0)
    wrong = [(0, 0, 0), (total[0], len(units), 0), (total[0], -1, 0), (total[0], total[1], 2)]
    assert [executor.place(*each) for each in wrong] == [None] * len(wrong)
    mean = ring_mean(inputs)
    cut = units[total[1]]
    assert executor.receive_total(total[1], mean[cut.start : cut.stop].data.cast("B"))
    assert executor.place(total[0], total[1], 0) is None


@pytest.mark.parametrize("compress", KINDS)
def test_what_comes_packed_is_received_as_a_whole(compress: str) -> None:
    """The same total may come as other bytes, so half of the one and half of the other is none."""
    executor = new_executor("direct", 2, 16, compress)
    executor.play([0])
    executor.contribute(0, np.ones(16, np.float32))
    packed = [unit for unit, cut in enumerate(executor.units) if cut.stop <= 12]
    assert packed
    for unit in packed:
        part = executor.schedule.parts[executor.units[unit].chunk][0]
        for round in (part.copy[0] if part.copy else -1, *[each for each, _ in part.adds]):
            assert executor.place(round, unit, 0) is None
            assert not executor.is_next(round, unit, 0)


@pytest.mark.parametrize("compress", KINDS)
@pytest.mark.parametrize("memory_is", ["own", "lent", "shared"])
def test_a_packed_total_is_passed_on_as_it_came(compress: str, memory_is: str) -> None:
    """Without a copy, unless it lies where somebody else may write something else, or where none
    of those can read it who read this peer's memory."""
    values = contributions(1, 4096)[0]
    memory = SharedMemory() if memory_is == "shared" else None
    executor = new_executor("ring", 3, 4096, compress, memory)
    executor.play([1])
    unit, part = next(
        (unit, part)
        for unit, cut in enumerate(executor.units)
        if (part := executor.schedule.parts[cut.chunk][1]).copy and part.spread
    )
    cut = executor.units[unit]
    rounding = compression(compress)
    total = np.empty(rounding.size(cut.stop - cut.start), np.uint8)
    rounding.pack(values[cut.start : cut.stop], 7, total)
    came = total.copy()
    assert part.copy is not None
    payload = came.data.toreadonly() if memory_is == "lent" else came.data
    assert executor.receive(part.copy[0], unit, 1, payload)
    if memory_is == "lent":
        came[:] = 0
    round, destination = part.spread[0]
    handed_on = executor.payload(round, unit, destination)
    assert handed_on is not None and handed_on.tobytes() == total.tobytes()
    assert np.shares_memory(handed_on, came) == (memory_is == "own")


def test_what_arrives_is_only_read() -> None:
    """Segments come as views of a receive buffer; the executor never writes there."""
    executor = new_executor("ring", 3, 3)
    executor.play([1])
    executor.contribute(1, np.ones(3, dtype=np.float32))
    buffer = bytearray(np.full(1, 7, dtype=np.float32).tobytes())
    before = bytes(buffer)
    assert executor.receive(0, 0, 1, memoryview(buffer))
    assert executor.receive(1, 2, 1, memoryview(buffer))
    assert bytes(buffer) == before
    assert executor.mean[2] == 8.0


@pytest.mark.parametrize("wrong", [np.zeros(1, np.float32), np.zeros(16, np.float64)])
def test_a_contribution_of_another_shape_or_type_is_caught(wrong: Vector) -> None:
    """One element would be added everywhere, float64 rounded elsewhere: a defect, not an input."""
    executor = new_executor("ring", 2, 16)
    executor.play([0])
    with pytest.raises(AssertionError):
        executor.contribute(0, wrong)
