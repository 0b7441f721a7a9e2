"""What memory and loopback carry here, and how long an allreduce takes at least with that.

Of a vector of S bytes each of N processes has to receive (N - 1)/N of S to be added, and as much to
be copied: that it is in the memory of another process, or in a socket, is all that differs. A
process that has a core to itself adds and copies at the rates of one core; more processes than
cores share them. What a socket takes is measured with both its ends at work, on two cores.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

VECTOR_BYTES = 48 << 20
STREAM_BYTES = 1 << 30
PIECE_BYTES = 1 << 20
TRIES = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """In bytes a second: of one core, and of a pair of processes."""

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
        # a pair of processes keeps two cores busy
        pairs = max(1.0, cores / 2)
        sockets = {"host": 0.0, "tcp": moved / self.tcp, "relay": 2 * moved / self.unix}
        return local + sockets[way] / pairs


def measure_rates() -> Rates:
    mine, other = np.zeros(VECTOR_BYTES // 4, np.float32), np.zeros(VECTOR_BYTES // 4, np.float32)
    copy = VECTOR_BYTES / _best(lambda: np.copyto(mine, other))
    add = VECTOR_BYTES / _best(lambda: np.add(mine, other, out=mine))
    return Rates(copy, add, _stream(socket.AF_INET), _stream(socket.AF_UNIX))


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def _stream(family: int) -> float:
    """Bytes a second from one process to another, in pieces as large as segments."""
    near, far = _connected(family)
    process = multiprocessing.get_context("fork").Process(target=_pour, args=(far,))
    process.start()
    far.close()
    room = memoryview(bytearray(PIECE_BYTES))
    taken, began = near.recv_into(room), time.perf_counter()
    while count := near.recv_into(room):
        taken += count
    rate = taken / (time.perf_counter() - began)
    process.join()
    near.close()
    return rate


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
    far.close()
