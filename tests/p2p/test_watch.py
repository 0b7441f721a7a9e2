"""A watch finds whatever happens at its sockets, ZeroMQ's and others, and never sleeps over it."""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Iterator

import pytest
import zmq

from p2p.transport.watch import Watch

LONG_MS = 20_000
"""A look that takes a quarter of it has slept over something."""
Pair = tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]


@pytest.fixture
def pair() -> Iterator[Pair]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    port = left.bind_to_random_port("tcp://127.0.0.1")
    right.connect(f"tcp://127.0.0.1:{port}")
    yield left, right
    context.destroy(linger=0)


def awake(watch: Watch) -> list[object]:
    began = time.monotonic()
    found = [each for each, _ in watch.poll(LONG_MS)]
    assert time.monotonic() - began < LONG_MS / 4000
    return found


def test_what_came_while_something_was_sent_is_found(pair: Pair) -> None:
    """ZeroMQ tells of a message once, by its descriptor, and to send swallows that."""
    left, right = pair
    watch = Watch()
    watch.register(left, zmq.POLLIN)
    right.send(b"first")
    while left not in awake(watch):
        pass
    left.recv()
    assert watch.poll(0) == []
    right.send(b"second")
    assert select.select([left.get(zmq.FD)], [], [], LONG_MS / 1000)[0]
    watch.used(left)
    left.send(b"something else")
    assert awake(watch) == [left]


def test_nothing_is_missed_in_traffic_both_ways(pair: Pair) -> None:
    left, right = pair
    watch, draw = Watch(), random.Random(1)
    for each in pair:
        watch.register(each, zmq.POLLIN)
    waiting = {left: 0, right: 0}
    for _ in range(3000):
        for each, other in ((left, right), (right, left)):
            for _ in range(draw.randrange(3)):
                watch.used(each)
                each.send(b"x")
                waiting[other] += 1
        if any(waiting.values()):
            awake(watch)
        for each in pair:
            while watch.is_readable(each) and draw.random() < 0.9:  # else the rest stays there
                try:
                    each.recv(zmq.NOBLOCK)
                except zmq.Again:
                    watch.found_empty(each)
                else:
                    waiting[each] -= 1
    while any(waiting.values()):
        for each in awake(watch):
            assert isinstance(each, zmq.Socket)
            each.recv()
            waiting[each] -= 1
    assert watch.poll(0) == []


def test_other_sockets_are_found_by_their_descriptors() -> None:
    watch = Watch()
    left, right = socket.socketpair()
    with left, right:
        watch.register(left, zmq.POLLIN | zmq.POLLOUT)
        assert watch.poll(0) == [(left.fileno(), zmq.POLLOUT)]
        right.send(b"x")
        assert watch.poll(0) == [(left.fileno(), zmq.POLLIN | zmq.POLLOUT)]
        assert watch.is_readable(left.fileno()) and not watch.is_exhausted
        assert watch.is_nothing_but({left.fileno(): None}) and not watch.is_nothing_but({})
        watch.found_empty(left.fileno())
        assert not watch.is_readable(left.fileno()) and watch.is_writable(left.fileno())
        watch.found_full(left.fileno())
        assert watch.is_exhausted and not watch.is_writable(left.fileno())
        watch.register(left, zmq.POLLIN)
        right.close()
        assert awake(watch) == [left.fileno()]
        watch.register(left, 0)
        assert watch.poll(0) == []
        watch.register(left, 0)


def test_who_is_not_looked_at_any_more_is_not_found(pair: Pair) -> None:
    left, right = pair
    watch = Watch()
    watch.register(left, zmq.POLLIN)
    right.send(b"x")
    while left not in awake(watch):  # there may be nothing before: a handshake wakes, too
        pass
    watch.register(left, 0)
    watch.used(left)
    assert watch.poll(0) == [] and watch.is_exhausted
    watch.unregister(left)
    watch.register(left, zmq.POLLIN)
    while left not in awake(watch):
        pass
