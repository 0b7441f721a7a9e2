"""Bytes on their way from one socket to another that never come into this process's memory.

What a process only passes on the kernel can move by itself: from a socket into a pipe, and from
there into another socket, mostly without a copy; see splice(2).
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from fcntl import F_GETPIPE_SZ, F_SETPIPE_SZ, fcntl
from weakref import WeakSet

CAPACITY_BYTES = 1 << 20
"""An unprivileged process may have no larger ones by default; see pipe(7)."""


class Pipe:
    """Raises OSError when there can be none of `CAPACITY_BYTES`."""

    def __init__(self) -> None:
        self._end = self._entry = -1
        self._end, self._entry = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._length = 0
        with suppress(OSError):
            fcntl(self._entry, F_SETPIPE_SZ, CAPACITY_BYTES)
        if fcntl(self._entry, F_GETPIPE_SZ) < CAPACITY_BYTES:
            self.close()
            raise OSError("the kernel allows small pipes only")

    def __len__(self) -> int:
        """Bytes that are in it."""
        return self._length

    def take(self, descriptor: int, limit: int) -> int:
        """From a socket, which has nothing more if it is 0 bytes. Raises OSError."""
        size = os.splice(descriptor, self._entry, limit, flags=os.SPLICE_F_NONBLOCK)
        self._length += size
        return size

    def give(self, descriptor: int) -> int:
        """To a socket. Raises OSError."""
        size = os.splice(self._end, descriptor, self._length, flags=os.SPLICE_F_NONBLOCK)
        self._length -= size
        return size

    def drain_into(self, memory: memoryview) -> None:
        """All of it, which has to be as long."""
        while self._length:
            size = os.readv(self._end, [memory[len(memory) - self._length :]])
            self._length -= size

    def close(self) -> None:
        if self._end >= 0:
            os.close(self._end)
            os.close(self._entry)
        self._end = self._entry = -1
        self._length = 0

    def __del__(self) -> None:
        self.close()


class Pipes:
    """A few, to be used again and again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit if _are_there_pipes() else 0
        self._empty: list[Pipe] = []
        self.used: WeakSet[Pipe] = WeakSet()
        """Those that somebody has."""

    def take(self) -> Pipe | None:
        """An empty one, if there is one."""
        if len(self.used) >= self._limit:
            return None
        try:
            taken = self._empty.pop() if self._empty else Pipe()
        except OSError:  # too many open files, or too many pipes of one user
            return None
        self.used.add(taken)
        return taken

    def give_back(self, pipe: Pipe) -> None:
        """With what is in it, which nobody wants."""
        self.used.discard(pipe)
        if pipe:
            pipe.close()
        else:
            self._empty.append(pipe)


def _are_there_pipes() -> bool:
    """Whether the kernel moves bytes between sockets this way."""
    near, far = socket.socketpair()
    with near, far:
        try:
            pipe = Pipe()
        except (OSError, AttributeError):  # no Linux
            return False
        try:
            near.send(b"x")
            pipe.take(far.fileno(), 1)
            pipe.give(far.fileno())
            return near.recv(1) == b"x"
        except OSError:
            return False
        finally:
            pipe.close()
