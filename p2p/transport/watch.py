"""What happened at the sockets of one thread."""

from __future__ import annotations

from typing import Any

import zmq

_READ = int(zmq.POLLIN | zmq.POLLERR)


class Watch(zmq.Poller):
    """A poller that remembers what its last look found: to try every socket would cost more.

    A socket is named by itself, one that is not of ZeroMQ by its descriptor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[Any, int] = {}

    def poll(self, timeout: int | None = None) -> list[tuple[Any, int]]:
        found = super().poll(timeout)
        self._found = dict(found)
        return found

    @property
    def is_exhausted(self) -> bool:
        """Nothing is left of what was found."""
        return not self._found

    def is_readable(self, socket: zmq.Socket[bytes] | int) -> bool:
        """Whether there was something, and nobody has come to its end since."""
        return bool(self._found.get(socket, 0) & _READ)

    def found_empty(self, socket: zmq.Socket[bytes] | int) -> None:
        """Nothing more is there until the next look."""
        self._found.pop(socket, None)
