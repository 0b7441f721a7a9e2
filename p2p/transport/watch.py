"""What happened at the sockets of one thread.

ZeroMQ's own poller asks each of its sockets twice at every look, which costs more than to receive a
message. Here the kernel is asked, and a socket of ZeroMQ only if its descriptor is readable or if
it was just used: ZeroMQ tells of a change there once, and whatever is done with the socket may
swallow that. Whoever sends with one says so (`used`); all are asked when a look found nothing.
"""

from __future__ import annotations

import select
from collections.abc import Iterable, Mapping
from typing import Protocol, cast

import zmq

_IN, _OUT, _ERROR = int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.POLLERR)
_READ, _WRITE = _IN | _ERROR, _OUT | _ERROR
_TO_KERNEL = {
    0: 0,
    _IN: select.POLLIN,
    _OUT: select.POLLOUT,
    _IN | _OUT: select.POLLIN | select.POLLOUT,
}
_FROM_KERNEL = {events: wanted for wanted, events in _TO_KERNEL.items()}
Socket = zmq.Socket[bytes] | int


class Descriptor(Protocol):
    """A socket that is not of ZeroMQ."""

    def fileno(self) -> int: ...


class Watch:
    """Remembers what its last look found: to try every socket would cost more.

    A socket of ZeroMQ is named by itself, another one by its descriptor. Events are `zmq.POLLIN`,
    `zmq.POLLOUT` and `zmq.POLLERR`.
    """

    def __init__(self) -> None:
        self._found: dict[Socket, int] = {}
        self._poll = select.poll()
        self._wanted: dict[zmq.Socket[bytes], int] = {}
        self._descriptors: dict[int, zmq.Socket[bytes]] = {}
        self._others: set[int] = set()
        self._used: set[zmq.Socket[bytes]] = set()
        """Of ZeroMQ's sockets those that may have something though their descriptors do not say."""

    def register(self, socket: zmq.Socket[bytes] | Descriptor | int, events: int) -> None:
        """What is looked for at the socket from now on; nothing, if it is 0."""
        if not isinstance(socket, zmq.Socket):
            descriptor = socket if isinstance(socket, int) else socket.fileno()
            self._set(descriptor, _TO_KERNEL[events & (_IN | _OUT)], descriptor in self._others)
            (self._others.add if events else self._others.discard)(descriptor)
        elif events:
            descriptor = cast(int, socket.get(zmq.FD))
            # also whether it can be sent to is told by its being readable
            self._set(descriptor, select.POLLIN, socket in self._wanted)
            self._wanted[socket], self._descriptors[descriptor] = events, socket
            self._used.add(socket)
        else:
            self.unregister(socket)

    def unregister(self, socket: zmq.Socket[bytes]) -> None:
        if self._wanted.pop(socket, 0):
            descriptor = next(fd for fd, each in self._descriptors.items() if each is socket)
            del self._descriptors[descriptor]
            self._set(descriptor, 0, True)
            self._used.discard(socket)
            self._found.pop(socket, None)

    def poll(self, timeout_ms: int | None = None) -> list[tuple[Socket, int]]:
        """What there is now, waiting for it at most so long; it may be nothing before."""
        self._found = {}
        if self._used:
            used, self._used = self._used, set()
            self._ask(used)
        ready = self._poll.poll(0 if self._found else timeout_ms)
        for descriptor, events in ready:
            socket = self._descriptors.get(descriptor)
            if socket is not None:
                self._ask((socket,))
                continue
            self._found[descriptor] = _FROM_KERNEL.get(events) or _with_error(events)
        if not ready and not self._found:
            self._ask(self._wanted)
        return [*self._found.items()]

    def used(self, socket: zmq.Socket[bytes]) -> None:
        """It was sent something with."""
        if socket in self._wanted:
            self._used.add(socket)

    @property
    def is_exhausted(self) -> bool:
        """Nothing is left of what was found."""
        return not self._found

    def is_nothing_but(self, sockets: Mapping[int, object]) -> bool:
        """Whether all that was found and is left is at these."""
        return self._found.keys() <= sockets.keys()

    def is_readable(self, socket: Socket) -> bool:
        """Whether there was something, and nobody has come to its end since."""
        return bool(self._found.get(socket, 0) & _READ)

    def is_writable(self, descriptor: int) -> bool:
        """Whether there was room, and nobody has filled it since; or the connection has ended."""
        return bool(self._found.get(descriptor, 0) & _WRITE)

    def found_empty(self, socket: Socket) -> None:
        """Nothing more is there until the next look."""
        if left := self._found.pop(socket, 0) & ~_READ:
            self._found[socket] = left

    def found_full(self, descriptor: int) -> None:
        """Nothing more can be sent, or needs to be, until the next look."""
        if left := self._found.pop(descriptor, 0) & ~_WRITE:
            self._found[descriptor] = left

    def _ask(self, sockets: Iterable[zmq.Socket[bytes]]) -> None:
        for socket in sockets:
            if found := cast(int, socket.get(zmq.EVENTS)) & self._wanted[socket]:
                self._found[socket] = found
                self._used.add(socket)

    def _set(self, descriptor: int, events: int, is_known: bool) -> None:
        if events:
            self._poll.register(descriptor, events)
        elif is_known:
            self._poll.unregister(descriptor)


def _with_error(events: int) -> int:
    """What the kernel tells that is more than was looked for."""
    return _FROM_KERNEL[events & (select.POLLIN | select.POLLOUT)] | _ERROR
