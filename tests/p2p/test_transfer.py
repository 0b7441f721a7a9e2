"""States of many parts reach their receiver, whatever the network does and whoever sends them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fault.records import Peer
from p2p.actions import LoadState, Send, TakeImage
from p2p.messages import StatePart, Want
from p2p.transfer import BUSY_S, IMAGE_LIFE_S, PART_BYTES, WINDOW_PARTS, Transfer

MINE = -1
"""The step of a receiver that has no state."""
BEAT_S = 0.2


def image_of(step: int, parts: int, short_by: int = 100) -> memoryview:
    """An image whose every part says which it is, and whose last part is not full."""
    image = bytearray(parts * PART_BYTES - short_by)
    for part in range(parts):
        image[part * PART_BYTES : part * PART_BYTES + 8] = step.to_bytes(4) + part.to_bytes(4)
    return memoryview(image)


def taken(transfer: Transfer) -> list[object]:
    actions = list(transfer.out)
    transfer.out.clear()
    return actions


def messages(transfer: Transfer) -> list[tuple[Peer, Want | StatePart]]:
    found = []
    for action in taken(transfer):
        assert isinstance(action, Send) and isinstance(action.message, Want | StatePart)
        found.append((action.to, action.message))
    return found


@dataclass
class Network:
    """Receivers and senders, 10 ms between a message and its arrival, two parts per 10 ms each.

    `steps_every_s` moves every sender on to the next step: by then it would offer another image.
    """

    senders: dict[Peer, Transfer]
    receivers: dict[Peer, Transfer]
    parts: int
    steps_every_s: float = 1e9
    lost: Callable[[StatePart | Want], bool] = lambda message: False
    doubled: bool = False
    order: random.Random | None = None
    now: float = 0.0
    loaded: dict[Peer, LoadState] = field(default_factory=dict)
    on_the_way: list[tuple[Peer, Peer, Want | StatePart]] = field(default_factory=list)
    images: dict[int, memoryview] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return 10 + int(self.now / self.steps_every_s)

    def flush(self, peer: Peer, transfer: Transfer) -> None:
        for action in taken(transfer):
            if isinstance(action, Send):
                assert isinstance(action.message, Want | StatePart)
                self.on_the_way += [(peer, action.to, action.message)] * (1 + self.doubled)
            elif isinstance(action, TakeImage):
                image = self.images.setdefault(self.step, image_of(self.step, self.parts))
                transfer.on_image(self.step, f"digest {self.step}", image, self.now)
                self.flush(peer, transfer)
            else:
                assert isinstance(action, LoadState) and transfer.loading
                assert peer not in self.loaded
                self.loaded[peer] = action

    def deliver(self) -> None:
        arriving, self.on_the_way = self.on_the_way, []
        heard: dict[Peer, int] = {}
        if self.order is not None:
            self.order.shuffle(arriving)
        for source, to, message in arriving:
            if isinstance(message, StatePart):
                heard[to] = heard.get(to, 0) + 1
                if heard[to] > 2:
                    self.on_the_way.append((source, to, message))
                    continue
            if self.lost(message):
                continue
            if isinstance(message, Want):
                if to in self.senders:
                    step = self.step
                    self.senders[to].on_want(source, message, step, f"digest {step}", self.now)
            elif to in self.receivers:
                self.receivers[to].on_part(source, message, MINE)

    def run(self, seconds: float) -> None:
        """Until everyone has loaded a state; each asks the senders in turn, at its beats."""
        turn, started = 0, self.now
        due = {peer: self.now + 0.07 * index for index, peer in enumerate(self.receivers)}
        while len(self.loaded) < len(self.receivers):
            assert self.now - started < seconds, f"only {list(self.loaded)} have a state"
            for peer, receiver in self.receivers.items():
                if self.now >= due[peer] and peer not in self.loaded:
                    due[peer] += BEAT_S
                    turn += 1
                    receiver.want(sorted(self.senders)[turn % len(self.senders)], MINE)
            self.deliver()
            for peer, transfer in {**self.senders, **self.receivers}.items():
                self.flush(peer, transfer)
                transfer.tick(self.now)
            self.now += 0.01

    def check(self) -> None:
        for load in self.loaded.values():
            assert load.digest == f"digest {load.step}"
            assert load.image == self.images[load.step]


def network(receivers: int, senders: int, parts: int) -> Network:
    return Network(
        {f"s{index}": Transfer([]) for index in range(senders)},
        {f"r{index}": Transfer([]) for index in range(receivers)},
        parts,
    )


# --- whole transfers -------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, WINDOW_PARTS, WINDOW_PARTS + 1, 3 * WINDOW_PARTS])
def test_an_image_arrives_whole(parts: int) -> None:
    """Every part in its place, the short last one too; the receiver then waits for its driver."""
    peers = network(1, 1, parts)
    peers.run(seconds=5.0)
    peers.check()
    receiver = peers.receivers["r0"]
    receiver.want("s0", MINE)
    receiver.on_part("s0", StatePart(99, "newer", 0, 1, b"part"), MINE)
    assert taken(receiver) == []  # nothing while the state is being loaded


def test_an_empty_image_arrives() -> None:
    """A state of no bytes is one part of no bytes."""
    sender, receiver = Transfer([]), Transfer([])
    sender.on_want("r", Want(MINE, -1, "", ()), 4, "digest", 0.0)
    assert taken(sender) == [TakeImage(4)]
    sender.on_image(4, "digest", memoryview(b""), 0.0)
    ((to, part),) = messages(sender)
    assert to == "r" and isinstance(part, StatePart)
    receiver.on_part("s", part, MINE)
    assert taken(receiver) == [LoadState(4, "digest", bytearray())]


@pytest.mark.parametrize("seed", range(3))
def test_losses_doubles_and_disorder_are_repaired(seed: int) -> None:
    """Every fifth message is lost, each is doubled, and they overtake one another."""
    fate = random.Random(seed)
    peers = network(1, 2, 2 * WINDOW_PARTS + 3)
    peers.lost = lambda message: fate.random() < 0.2
    peers.doubled, peers.order = True, random.Random(seed)
    peers.run(seconds=30.0)
    peers.check()


@pytest.mark.parametrize(("receivers", "senders"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_transfers_end_while_the_senders_train_on(receivers: int, senders: int) -> None:
    """Each 50 ms there is a newer state, and a transfer takes six times as long: it is not begun

    anew for it, neither because another sender is asked nor because another receiver asks.
    """
    peers = network(receivers, senders, 4 * WINDOW_PARTS)
    peers.steps_every_s = 0.05
    peers.run(seconds=1.5 * receivers)
    peers.check()


def test_another_sender_takes_over_with_its_own_state() -> None:
    """The sender dies in the middle: who is asked next is further on, and sends what it has."""
    peers = network(1, 1, 3 * WINDOW_PARTS)
    survivor = Transfer([])
    killed = False

    def lost(message: StatePart | Want) -> bool:
        nonlocal killed
        if isinstance(message, StatePart) and message.index == WINDOW_PARTS + 2 and not killed:
            killed = True
            peers.senders = {"s1": survivor}
            peers.on_the_way.clear()
            peers.steps_every_s = peers.now / 5
        return killed and isinstance(message, StatePart) and message.step == 10

    peers.lost = lost
    peers.run(seconds=5.0)
    peers.check()
    assert killed and peers.loaded["r0"].step > 10


# --- the receiver ----------------------------------------------------------------------------


def part_of(step: int, index: int, count: int, digest: str = "digest") -> StatePart:
    return StatePart(step, digest, index, count, b"%d," % index)


def test_two_senders_of_one_state_fill_one_image() -> None:
    """Parts are told apart by (step, digest) alone: whoever has that state can carry it on."""
    receiver = Transfer([])
    for index in (3, 0):
        receiver.on_part("s0", part_of(4, index, 4), MINE)
    for index in (0, 1, 2):
        receiver.on_part("s1", part_of(4, index, 4), MINE)
    assert taken(receiver) == [LoadState(4, "digest", bytearray(b"0,1,2,3,"))]


def test_the_first_of_a_doubled_part_counts() -> None:
    """A part that is there is not replaced, nor counted twice towards the window."""
    receiver = Transfer([])
    for _ in range(2 * WINDOW_PARTS):
        receiver.on_part("s", part_of(4, 1, 100), MINE)
        receiver.on_part("s", StatePart(4, "digest", 1, 100, b"other"), MINE)
    assert taken(receiver) == []


def test_a_newer_state_replaces_the_one_that_is_coming() -> None:
    """Its parts start over; what still comes of the older one, or of another digest, is dropped."""
    receiver = Transfer([])
    receiver.on_part("s0", part_of(4, 0, 2), MINE)
    receiver.on_part("s1", part_of(6, 0, 3), MINE)
    receiver.on_part("s0", part_of(4, 1, 2), MINE)
    receiver.on_part("s0", part_of(6, 1, 3, digest="another"), MINE)
    receiver.on_part("s0", part_of(6, 1, 2), MINE)
    assert taken(receiver) == []
    receiver.on_part("s0", part_of(6, 1, 3), MINE)
    receiver.on_part("s1", part_of(6, 2, 3), MINE)
    assert taken(receiver) == [LoadState(6, "digest", bytearray(b"0,1,2,"))]


def test_the_state_never_goes_back() -> None:
    """Parts of a state that is not newer than one's own are dropped, and asked for no longer."""
    receiver = Transfer([])
    receiver.on_part("s", part_of(4, 0, 1), 4)
    receiver.on_part("s", part_of(3, 0, 1), 4)
    receiver.on_part("s", part_of(5, 0, 2), 4)
    receiver.on_part("s", part_of(5, 1, 2), 5)  # meanwhile the step was ended by oneself
    assert taken(receiver) == []
    receiver.want("s", 5)
    assert messages(receiver) == [("s", Want(5, -1, "", ()))]


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0), (0, 1 << 17), (5, -1)])
def test_a_part_that_cannot_be_is_dropped(index: int, count: int) -> None:
    """Indices outside the image and images beyond any limit change nothing."""
    receiver = Transfer([])
    receiver.on_part("s", part_of(4, index, count), MINE)
    receiver.want("s", MINE)
    assert messages(receiver) == [("s", Want(MINE, -1, "", ()))]


def test_a_window_is_asked_for_when_the_last_one_is_there() -> None:
    """Out of order or not: sixteen new parts, then the sixteen lowest that are missing."""
    receiver = Transfer([])
    for index in random.Random(2).sample(range(WINDOW_PARTS), WINDOW_PARTS - 1):
        receiver.on_part("s", part_of(4, index, 40), MINE)
    assert taken(receiver) == []
    receiver.on_part("s", part_of(4, 20, 40), MINE)  # one that nobody asked for counts as well
    ((to, want),) = messages(receiver)
    assert to == "s" and isinstance(want, Want)
    assert (want.transfer_step, want.transfer_digest) == (4, "digest")
    assert len(want.missing) == WINDOW_PARTS and sorted(want.missing) == list(want.missing)
    assert want.missing[-1] < 40 and 20 not in want.missing


def test_a_transfer_that_moves_is_left_alone() -> None:
    """Asked at every beat: nothing while parts come, then the sender once more, then others."""
    receiver = Transfer([])
    for index in range(3):
        receiver.on_part("s", part_of(4, index, 30), MINE)
        receiver.want("t", MINE)
        assert taken(receiver) == []
    asked = []
    for _ in range(3):
        receiver.want("t", MINE)
        asked += messages(receiver)
    assert [to for to, _ in asked] == ["s", "t", "t"]
    missing = tuple(range(3, 3 + WINDOW_PARTS))
    assert {want for _, want in asked} == {Want(MINE, 4, "digest", missing)}


# --- the sender ------------------------------------------------------------------------------


FRESH = Want(MINE, -1, "", ())


def sender_at(step: int, parts: int) -> Transfer:
    """A sender whose image of `step` was taken at time 0 for peer r."""
    sender = Transfer([])
    sender.on_want("r", FRESH, step, "digest", 0.0)
    assert taken(sender) == [TakeImage(step)]
    sender.on_image(step, "digest", image_of(step, parts), 0.0)
    return sender


def test_no_more_than_a_window_is_sent_at_once() -> None:
    """Whatever is asked for: first the window at the front, then the first sixteen of the list."""
    sender = sender_at(4, 3 * WINDOW_PARTS)
    assert [part.index for _, part in messages(sender)] == list(range(WINDOW_PARTS))  # type: ignore[union-attr]
    wanted = (-5, 10_000, *range(30))
    sender.on_want("r", Want(MINE, 4, "digest", wanted), 4, "digest", 0.1)
    assert [part.index for _, part in messages(sender)] == list(range(14))  # type: ignore[union-attr]


def test_one_image_is_taken_for_all_who_wait() -> None:
    """While the state is being copied more peers ask: all are served from one copy, once each."""
    sender = Transfer([])
    for peer in ("a", "b", "a", "c"):
        sender.on_want(peer, FRESH, 4, "digest", 0.0)
    assert taken(sender) == [TakeImage(4)]
    sender.on_image(4, "digest", image_of(4, 1), 0.0)
    assert [to for to, _ in messages(sender)] == ["a", "b", "c"]


def test_a_transfer_goes_on_after_the_sender_has_moved_on() -> None:
    """Steps later the parts are still those of the state that the transfer began with."""
    sender = sender_at(4, 20)
    taken(sender)
    sender.on_want("r", Want(MINE, 4, "digest", (17, 19)), 9, "later", 1.0)
    parts = [part for _, part in messages(sender)]
    image = image_of(4, 20)
    assert parts == [
        StatePart(4, "digest", index, 20, image[index * PART_BYTES : (index + 1) * PART_BYTES])
        for index in (17, 19)
    ]


def test_a_long_transfer_does_not_give_way_to_another() -> None:
    """A newcomer waits for the end of it, but not for a receiver that asks no more."""
    sender = sender_at(4, WINDOW_PARTS + 1)
    taken(sender)
    sender.on_want("q", FRESH, 5, "later", 0.1)
    sender.on_want("r", FRESH, 5, "later", 0.1)  # an ask that crossed the first parts
    assert taken(sender) == []
    sender.on_want("q", FRESH, 5, "later", BUSY_S)
    assert taken(sender) == [TakeImage(5)]


def test_a_state_of_one_window_gives_way_at_once() -> None:
    """It was sent whole, so whoever comes next gets the newest."""
    sender = sender_at(4, WINDOW_PARTS)
    taken(sender)
    sender.on_want("q", FRESH, 5, "later", 0.0)
    assert taken(sender) == [TakeImage(5)]


def test_who_joins_a_transfer_of_the_present_state_is_served_at_once() -> None:
    """Several receivers share one image; a repeated ask is served again only after a while."""
    sender = sender_at(4, 2 * WINDOW_PARTS)
    taken(sender)
    sender.on_want("q", FRESH, 4, "digest", 0.1)
    assert {to for to, _ in messages(sender)} == {"q"}
    sender.on_want("q", FRESH, 4, "digest", 0.2)
    assert taken(sender) == []
    sender.on_want("q", FRESH, 4, "digest", 0.1 + BUSY_S)
    assert len(taken(sender)) == WINDOW_PARTS


def test_an_image_is_kept_as_long_as_it_is_asked_for() -> None:
    """Two seconds after the last ask its memory is free, and the next one gets the newest state."""
    sender = sender_at(4, 2 * WINDOW_PARTS)
    more = Want(MINE, 4, "digest", (20,))
    now = 0.0
    for _ in range(5):
        now += 0.9 * IMAGE_LIFE_S
        sender.tick(now)
        taken(sender)
        sender.on_want("r", more, 9, "later", now)
        assert len(messages(sender)) == 1
    sender.tick(now + 1.1 * IMAGE_LIFE_S)
    sender.on_want("r", more, 9, "later", now + 1.1 * IMAGE_LIFE_S)
    assert taken(sender) == [TakeImage(9)]


def test_what_is_first_sent_to_somebody_is_not_old() -> None:
    """Though it is asked for all the time: an outline tells of tensors that may have gone."""
    sender = sender_at(4, 1)
    for tenth in range(1, int(10 * IMAGE_LIFE_S)):
        sender.on_want("r", FRESH, 4, "digest", tenth / 10)
        assert TakeImage(4) not in taken(sender)
    sender.on_want("r", FRESH, 4, "digest", IMAGE_LIFE_S)
    assert taken(sender) == [TakeImage(4)]


def test_an_image_is_kept_while_a_part_takes_long_to_come() -> None:
    """Over a slow link a window takes seconds, and nothing is to be asked for meanwhile."""
    sender, receiver = sender_at(4, 2 * WINDOW_PARTS), Transfer([])
    (_, first), *_ = messages(sender)
    assert isinstance(first, StatePart)
    receiver.want("host", MINE, is_coming=True)
    assert taken(receiver) == [], "whose it is is not known yet"
    receiver.on_part("s", first, MINE)
    now = 0.0
    for _ in range(5):
        now += 0.9 * IMAGE_LIFE_S
        receiver.want("host", MINE, is_coming=True)
        ((to, keep),) = messages(receiver)
        assert to == "s" and isinstance(keep, Want)
        sender.on_want("r", keep, 9, "later", now)
        sender.tick(now)
        assert taken(sender) == []
    sender.on_want("r", Want(MINE, 4, "digest", (20,)), 9, "later", now)
    assert len(messages(sender)) == 1
    sender.tick(now + 1.1 * IMAGE_LIFE_S)
    sender.on_want("r", keep, 9, "later", now + 1.1 * IMAGE_LIFE_S)
    assert taken(sender) == [], "what cannot be kept is no reason for another"
