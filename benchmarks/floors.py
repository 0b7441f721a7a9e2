"""What memory and loopback carry here, and how long an allreduce takes at least with that.

Of a vector of S bytes each of N processes has to receive (N - 1)/N of S to be added, and as much to
be copied: that it is in the memory of another process, or in a socket, is all that differs. A
process that has a core to itself adds and copies at the rates of one core; more processes than
cores share them. What sockets take is measured with as many pairs of processes as there are cores,
since a single pair waits for being woken in between; and with more and with less of it on its way,
since less may stay in the cores' caches.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from p2p.transport.stream import HOST_BUFFER_BYTES

VECTOR_BYTES = 48 << 20
STREAM_BYTES = 512 << 20
BUFFERS_BYTES = (0, HOST_BUFFER_BYTES)
"""For what is on its way; 0: as much as the kernel likes."""
PIECE_BYTES = 1 << 20
TRIES = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """In bytes a second: of one core, and of sockets with all cores at work."""

    copy: float
    add: float
    tcp: float
    unix: float

    def least_s(self, way: str, size: int, processes: int) -> float:
        """The least time of an allreduce: what the cores have to do, shared among them."""
        share = size * (processes - 1) / processes
        cores = min(processes, os.cpu_count() or 1)
        local = processes * (share / self.add + share / self.copy) / cores
        moved = 2 * share * processes
        sockets = {"host": 0.0, "tcp": moved / self.tcp, "relay": 2 * moved / self.unix}
        return local + sockets[way]


def measure_rates() -> Rates:
    mine, other = np.zeros(VECTOR_BYTES // 4, np.float32), np.zeros(VECTOR_BYTES // 4, np.float32)
    copy = VECTOR_BYTES / _best(lambda: np.copyto(mine, other))
    add = VECTOR_BYTES / _best(lambda: np.add(mine, other, out=mine))
    return Rates(copy, add, _streams(socket.AF_INET), _streams(socket.AF_UNIX))


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def _streams(family: int) -> float:
    """Bytes a second from processes to as many others, in pieces of `PIECE_BYTES`."""
    pairs = os.cpu_count() or 1
    times = [_best(partial(_stream, family, pairs, buffer)) for buffer in BUFFERS_BYTES]
    return pairs * STREAM_BYTES / min(times)


def _stream(family: int, pairs: int, buffer_bytes: int) -> None:
    context = multiprocessing.get_context("fork")
    connected = [_connected(family) for _ in range(pairs)]
    processes = []
    for near, far in connected:
        if buffer_bytes:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        processes += [
            context.Process(target=end, args=(one,)) for end, one in ((_drain, near), (_pour, far))
        ]
    for process in processes:
        process.start()
    for one in chain(*connected):
        one.close()
    for process in processes:
        process.join()


def _connected(family: int) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    return near, far


def _pour(far: socket.socket) -> None:
    piece = bytes(PIECE_BYTES)
    for _ in range(STREAM_BYTES // PIECE_BYTES):
        far.sendall(piece)


def _drain(near: socket.socket) -> None:
    room, taken = memoryview(bytearray(PIECE_BYTES)), 0
    while taken < STREAM_BYTES:
        count = near.recv_into(room)
        if not count:
            raise ConnectionError("who sends has gone")
        taken += count
