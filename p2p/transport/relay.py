"""A relay: the process that every peer dials out to, and that hands their messages on.

    python -m p2p.transport.relay --bind tcp://192.0.2.7:7700 --keys relay.key

A peer sends [destination, frames…]; the destination gets [source, frames…]. The relay looks at
nothing else and copies no payload. A message to `relay` of the one frame `stats` is answered with
the counters as a msgpack map, and `stream` with an invitation to a connection beside ZeroMQ, on
which large messages go faster (`exchange.py`).

It waits for nobody who does not read. What cannot be delivered is counted and dropped, for the
peers ask again. What it holds by ZeroMQ for one destination that does not read is bounded twice:
messages of `LARGE_BYTES` and more by their bytes (`--queue-bytes`, counted from when they are
accepted until ZeroMQ has written them out), smaller ones by ZeroMQ's own limit of
`SEND_LIMIT_MESSAGES`. A destination that stays silent for `HEARTBEAT_TIMEOUT_MS` loses its
connection, and the relay what it held for it. One source may take half of a destination's room, so
that others find some.

With `--keys` only those get in that have the key of the relay's run (`keys.py`); so a relay serves
one run, and nobody speaks to another's peers. Without, it listens where this machine alone reaches
it.

Not here: what the messages are (`wire.py`), whom a peer talks to, starting and restarting relays.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from fault.errors import InputError, MayflyError
from p2p.transport.allocation import keep_large_blocks
from p2p.transport.exchange import UNIX_SUFFIX, Exchange
from p2p.transport.hosts import host_of, is_loopback
from p2p.transport.keys import Gate, RelayKeys
from p2p.transport.passing import Room
from p2p.transport.stream import Address, are_unix_sockets_fast
from p2p.transport.watch import Watch

RELAY = b"relay"
"""The identity that the relay itself answers to."""
STATS, STREAM = b"stats", b"stream"

QUEUE_BYTES = 64 << 20
LARGE_BYTES = 64 << 10
"""Following a message costs 5 to 10 µs, so only those that could fill the memory are followed."""
SEND_LIMIT_MESSAGES = 1024
RECEIVE_LIMIT_MESSAGES = 32
"""Per connection, while the relay is behind; then the sender's own limit holds the sender back."""
MESSAGE_LIMIT_BYTES = (256 << 20) + (1 << 20)
HEARTBEAT_INTERVAL_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000
HANDSHAKE_MS = 5000
FRAMES_LIMIT = 8
BATCH_MESSAGES = 256
IPC_PATH_LIMIT = 107 - len(UNIX_SUFFIX)
TICK_MS = 250
QUEUES_SWEPT_ABOVE = 256
REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(slots=True)
class Counters:
    """Since the relay started. `peers` is the number of open connections, of which each peer has
    two; `refused` is how many handshakes failed, or showed no ticket."""

    messages: int = 0
    bytes: int = 0
    dropped: int = 0
    unknown: int = 0
    refused: int = 0
    peers: int = 0


class _Queue:
    """The large messages on their way to one destination by ZeroMQ, the oldest first."""

    def __init__(self) -> None:
        self.room = Room()
        self._entries: deque[tuple[zmq.MessageTracker, bytes, int]] = deque()

    def settle(self) -> bool:
        """Forgets what ZeroMQ is done with; whether anything is left."""
        while self._entries and self._entries[0][0].done:
            _, source, size = self._entries.popleft()
            self.room.give_back(source, size)
        return bool(self._entries)

    def add(self, tracker: zmq.MessageTracker, source: bytes, size: int) -> None:
        self._entries.append((tracker, source, size))
        self.room.take(source, size)


class Relay:
    """One ROUTER socket on any number of endpoints. Owned by one thread.

    Those of our own connections are beside them, over TCP at `stream_port` (0: any). Raises
    InputError for an endpoint that cannot be bound, or that others can reach when there are no
    `keys`.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        queue_bytes: int = QUEUE_BYTES,
        keys: RelayKeys | None = None,
        stream_port: int = 0,
    ) -> None:
        self.counters = Counters()
        self.endpoints: list[str] = []
        self._queue_bytes = queue_bytes
        self._queues: dict[bytes, _Queue] = {}
        self._connections: set[int] = set()
        self._files: list[tuple[Path, int]] = []
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        _configure(self._router)
        self._gate: Gate | None = None
        if keys is not None:
            self._gate = Gate(self._context, keys.peers)
            self._gate.guard(self._router, keys.secret)
        self._monitor = self._router.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | REFUSALS
        )
        self._watch = Watch()
        self._exchange: Exchange | None = None
        addresses: list[Address] = []
        try:
            for endpoint in endpoints:
                self._bind(endpoint)
            addresses += dict.fromkeys(_beside(each, stream_port) for each in self.endpoints)
            if are_unix_sockets_fast() or not any(isinstance(each, Path) for each in addresses):
                self._exchange = Exchange(
                    addresses,
                    self._watch,
                    keys is not None,
                    queue_bytes,
                    self.counters,
                    self._forward_large,
                )
        except OSError as error:
            self.close()
            at = f"port {stream_port}" if stream_port else ", ".join(map(str, addresses))
            said = os.strerror(error.errno or 0)
            raise InputError(f"the relay cannot listen at {at}: {said}") from None
        except BaseException:
            self.close()
            raise

    def serve(self, stop: socket.socket) -> None:
        """Hands messages on until `stop` has something to read."""
        for each in (self._router, self._monitor, stop):
            self._watch.register(each, zmq.POLLIN)
        handlers: dict[object, Callable[[], None]] = {
            self._router: self._forward_waiting,
            self._monitor: self._count_connections,
        }
        ticked_at = 0.0
        while True:
            for ready, _ in self._watch.poll(TICK_MS):
                if ready == stop.fileno():  # the poller names sockets of others by descriptors
                    return
                handler = handlers.get(ready)
                if handler is not None:
                    handler()
                elif isinstance(ready, int) and self._exchange is not None:
                    self._exchange.serve(ready)
            if self._exchange is not None and time.monotonic() - ticked_at > TICK_MS / 1000:
                ticked_at = time.monotonic()
                self._exchange.tick()

    def close(self) -> None:
        if self._exchange is not None:
            self._exchange.entrance.close()
        # a full monitor would hold up ZeroMQ's own thread, and that this one
        for endpoint in self.endpoints:
            self._router.unbind(endpoint)
        self._count_connections()
        self._router.disable_monitor()
        self._monitor.close(linger=0)
        self._router.close(linger=0)
        if self._gate is not None:
            self._gate.close()
        self._context.destroy(linger=0)
        for file, inode in self._files:
            # a successor may have bound the same name by now
            with suppress(FileNotFoundError):
                if file.stat().st_ino == inode:
                    file.unlink()

    def _bind(self, endpoint: str) -> None:
        path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
        if path is not None:
            _prepare_folder(path)
        elif self._gate is None and not is_loopback(
            endpoint.removeprefix("tcp://").rpartition(":")[0]
        ):
            raise InputError(
                f"the relay cannot listen on {endpoint}: others could reach it and speak as any "
                "peer; give it --keys, as 'p2p-launch keys' makes them, or a loopback address"
            )
        self._router.ipv6 = "[" in endpoint
        try:
            self._router.bind(endpoint)
        except zmq.ZMQError as error:
            raise InputError(f"the relay cannot listen on {endpoint}: {error.strerror}") from None
        if path is not None:
            self._files.append((path, path.stat().st_ino))
        # with the port that was chosen for tcp://…:*
        self.endpoints.append(self._router.getsockopt_string(zmq.LAST_ENDPOINT))

    def _forward_waiting(self) -> None:
        # in batches, so that a flood does not keep the relay from a signal or a connection's end
        for _ in range(BATCH_MESSAGES):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._forward(frames)

    def _forward(self, frames: list[zmq.Frame]) -> None:
        if not 3 <= len(frames) <= FRAMES_LIMIT:
            self.counters.dropped += 1
            return
        destination = frames[1].bytes
        if destination == RELAY:
            self._answer(frames[0], frames[2:])
            return
        size = sum(map(len, frames)) - len(destination)
        if size >= LARGE_BYTES:
            queue, source = self._queue(destination), frames[0].bytes
            queue.settle()
            if not queue.room.is_enough(source, size, self._queue_bytes):
                self.counters.dropped += 1
                return
            # ZeroMQ is done with a message's frames at about the same time: one tells for all
            largest = max(range(2, len(frames)), key=lambda index: len(frames[index]))
            tracked = zmq.Frame(frames[largest].buffer, track=True, copy=False)
            frames[largest] = tracked
        frames[0], frames[1] = frames[1], frames[0]
        if self._send(frames):
            self.counters.messages += 1
            self.counters.bytes += size
            if size >= LARGE_BYTES:
                queue.add(tracked.tracker, source, size)

    def _forward_large(
        self, source: bytes, destination: bytes, header: bytes, payload: memoryview
    ) -> None:
        self._forward([zmq.Frame(frame) for frame in (source, destination, header, payload)])

    def _send(self, frames: list[zmq.Frame]) -> bool:
        self._watch.used(self._router)
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK, copy=False)
            return True
        except zmq.Again:
            self.counters.dropped += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters.unknown += 1
        return False

    def _answer(self, source: zmq.Frame, request: list[zmq.Frame]) -> None:
        asked = [frame.bytes for frame in request]
        if asked == [STATS]:
            self.counters.peers = len(self._connections)
            if self._exchange is not None:
                self.counters.refused += self._exchange.entrance.taken_refused()
            answer = [msgpack.packb(asdict(self.counters))]
        elif asked == [STREAM] and self._exchange is not None:
            answer = [STREAM, self._exchange.entrance.invite(source.bytes).to_bytes()]
        else:
            self.counters.dropped += 1
            return
        self._send([source, zmq.Frame(RELAY), *map(zmq.Frame, answer)])

    def _queue(self, destination: bytes) -> _Queue:
        queue = self._queues.get(destination)
        if queue is None:
            if len(self._queues) >= QUEUES_SWEPT_ABOVE:
                self._queues = {name: each for name, each in self._queues.items() if each.settle()}
            queue = self._queues[destination] = _Queue()
        return queue

    def _count_connections(self) -> None:
        with suppress(zmq.Again):
            for _ in range(BATCH_MESSAGES):
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
                if event["event"] == zmq.EVENT_ACCEPTED:
                    self._connections.add(int(event["value"]))
                elif event["event"] == zmq.EVENT_DISCONNECTED:
                    self._connections.discard(int(event["value"]))
                else:
                    self.counters.refused += 1


def _configure(router: zmq.Socket[bytes]) -> None:
    for option, value in (
        (zmq.LINGER, 0),
        # the unknown and the full are told apart and counted, instead of dropped in silence
        (zmq.ROUTER_MANDATORY, 1),
        # a peer that reconnects before its old connection is noticed dead takes its name over
        (zmq.ROUTER_HANDOVER, 1),
        (zmq.SNDHWM, SEND_LIMIT_MESSAGES),
        (zmq.RCVHWM, RECEIVE_LIMIT_MESSAGES),
        (zmq.MAXMSGSIZE, MESSAGE_LIMIT_BYTES),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.BACKLOG, 1024),
    ):
        router.setsockopt(option, value)


def _prepare_folder(path: Path) -> None:
    """Whoever can enter the folder of an ipc endpoint can speak as any peer."""
    if len(os.fsencode(path)) > IPC_PATH_LIMIT:
        raise InputError(f"{path} is longer than a socket's name may be ({IPC_PATH_LIMIT} bytes)")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = path.parent.stat()
    except OSError as error:
        raise InputError(f"the relay cannot use {path.parent}: {error.strerror}") from None
    if folder.st_uid != os.getuid() or stat.S_IMODE(folder.st_mode) & 0o077:
        raise InputError(f"others may enter {path.parent}: make it yours, with mode 700")


def _beside(endpoint: str, port: int) -> Address:
    """Where our own connections come in beside a ZeroMQ endpoint."""
    if endpoint.startswith("ipc://"):
        return Path(endpoint.removeprefix("ipc://") + UNIX_SUFFIX)
    return host_of(endpoint), port


def _announce(file: Path, endpoints: Sequence[str]) -> None:
    # renamed, so that who waits for the file never reads half of it
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text("".join(f"{endpoint}\n" for endpoint in endpoints))
    draft.rename(file)


def main(arguments: Sequence[str] | None = None) -> int:
    gc.freeze()  # modules stay: they need not be looked through, least of all at the end
    parser = argparse.ArgumentParser(prog="python -m p2p.transport.relay", description="A relay.")
    parser.add_argument("--bind", action="append", required=True, metavar="ENDPOINT")
    parser.add_argument(
        "--ready-file", type=Path, help="gets the endpoints, one a line, once bound"
    )
    parser.add_argument("--queue-bytes", type=int, default=QUEUE_BYTES, help="per destination")
    parser.add_argument(
        "--stream-port", type=int, default=0, help="for large messages over TCP (default: any)"
    )
    parser.add_argument("--keys", type=Path, help="relay.key, as 'p2p-launch keys' writes it")
    options = parser.parse_args(arguments)
    keep_large_blocks()
    stopped, stop = socket.socketpair()
    stop.setblocking(False)
    # the byte written for a signal ends `serve`; the handler only has to exist for that
    signal.set_wakeup_fd(stop.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        keys = RelayKeys.read(options.keys) if options.keys is not None else None
        relay = Relay(options.bind, options.queue_bytes, keys, options.stream_port)
    except MayflyError as error:
        print(f"relay: {error}", file=sys.stderr)
        return error.exit_code
    try:
        if options.ready_file is not None:
            _announce(options.ready_file, relay.endpoints)
        relay.serve(stopped)
    finally:
        relay.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
