"""The program of a snapshot's process: imports what a function needs, then forks to order.

    python -P snapshot_process.py EMULATOR_PID CONNECTION_FD MODULE...

CONNECTION_FD is one end of a pair of SOCK_SEQPACKET sockets. A `ForkRequest` comes in with the
file descriptor of a log; a `Report` goes out for it, and one for each child that ends. A child
becomes what `function_process.py` would be after a fresh start, except for what is imported.

It is run as a file and needs nothing of Mayfly, which a function need not have. The emulator's
half, which imports the two messages from here, is `snapshot.py`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

MESSAGE_BYTES = 128 << 10
"""Of one message at most; less than what a socket's buffer holds."""
MARK_VARIABLE = "AWS_LAMBDA_LOG_STREAM_NAME"
"""Whose value marks a sandbox's processes."""
MODULES = (
    "numpy",
    "zmq",
    "redis",
    "checkpoint",
    "launcher.platform",
    "p2p.peer",
    "p2p.computer",
)
"""What a peer imports, besides torch and boto3."""


@dataclass(frozen=True)
class ForkRequest:
    """What a new child is to be."""

    handler: str
    working_directory: str
    environment: dict[str, str]

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> ForkRequest:
        return cls(**json.loads(message))


@dataclass(frozen=True)
class Report:
    """What the snapshot has to say: of itself, of the request in hand, or of one of its own."""

    kind: Literal["ready", "started", "failed", "exited"]
    pid: int = 0
    status: int = 0
    """With which a child ended, negative for a signal."""
    reason: str = ""
    """Why there is no child."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Report:
        return cls(**json.loads(message))


@dataclass(frozen=True)
class Fresh:
    """How this process was before it imported anything, and a child is to be again."""

    handlers: dict[int, Any]
    blocked: set[int]
    mark_address: int
    mark_room: int

    @classmethod
    def look(cls) -> Fresh:
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        return cls(
            {number: signal.getsignal(number) for number in signal.valid_signals()},
            {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())},
            getenv(MARK_VARIABLE.encode()),
            len(os.environb[MARK_VARIABLE.encode()]),
        )

    def restore_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)

    def write_mark(self, mark: bytes) -> None:
        """Over the snapshot's own, in place: /proc shows the strings that a process began with,
        to a child as well, and by them the warden knows a sandbox's processes."""
        if len(mark) > self.mark_room:
            raise ValueError(f"{mark!r} is longer than {self.mark_room} bytes")
        ctypes.memmove(self.mark_address, mark.ljust(self.mark_room, b"\0"), self.mark_room)


def main() -> None:
    emulator, descriptor, *modules = sys.argv[1:]
    function = _function_process()
    if not function.bind_life(int(emulator)):
        return
    fresh = Fresh.look()
    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)
    threads = prepare(os.environ["LAMBDA_TASK_ROOT"], modules)
    connection.send(Report("ready").encode())

    snapshot = os.getpid()

    def become(request: ForkRequest, log: int) -> None:
        os.setsid()
        if not function.bind_life(snapshot):
            os._exit(1)
        fresh.write_mark(os.fsencode(request.environment[MARK_VARIABLE]))
        redirect(log)
        os.chdir(request.working_directory)
        os.environ.clear()  # one by one, so that what it will exec inherits the right ones
        os.environ.update(request.environment)
        time.tzset()
        fresh.restore_signals()
        diversify()
        if threads:
            sys.modules["torch"].set_num_threads(threads)

    handler = serve_forks(connection, become)
    if handler is None:
        os._exit(0)  # the emulator is gone, and nothing here is worth an orderly end
    function.serve(handler)


def prepare(task_root: str, modules: Iterable[str]) -> int:
    """Imports everything; returns how many threads torch would use, 0 without torch."""
    threads = 0

    def torch() -> None:
        nonlocal threads
        threads = prepare_torch()

    # modules stay; a collector that looks through them meanwhile takes a fifth of the time
    gc.disable()
    # as in the function, which puts it there before it imports anything
    sys.path.insert(0, task_root)
    attempt("torch", torch)
    attempt("boto3", prepare_boto3)
    for module in (*MODULES, *modules):
        attempt(module, partial(importlib.import_module, module))
    if task_root in sys.path:
        sys.path.remove(task_root)
    gc.enable()
    gc.collect()
    gc.freeze()  # a child's collections leave these pages shared
    return threads


def attempt(name: str, load: Callable[[], object]) -> None:
    """What cannot be loaded is for the function to fail with, if it needs it at all."""
    began = time.monotonic()
    try:
        load()
    except (Exception, SystemExit) as error:
        print(f"snapshot: {name} is skipped: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"snapshot: {name} in {time.monotonic() - began:.2f} s", flush=True)


def prepare_torch() -> int:
    """Also what the first step of an optimizer imports. Returns the number of threads to use."""
    import torch

    threads = torch.get_num_threads()
    # threads do not survive a fork: a child would wait for the parent's for ever
    torch.set_num_threads(1)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        # not through a backward pass, which starts threads where there is an accelerator
        weight = torch.nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.ones(2, 2)
        kind([weight], lr=0.1).step()
    return threads


def prepare_boto3() -> None:
    """Also what the first client imports. Nothing is sent, and nobody's credentials are read."""
    import boto3

    boto3.session.Session().client(
        "lambda",
        endpoint_url="http://127.0.0.1:9",
        region_name="us-east-1",
        aws_access_key_id="none",
        aws_secret_access_key="none",
    )


def serve_forks(
    connection: socket.socket, become: Callable[[ForkRequest, int], None]
) -> str | None:
    """Returns in each child, once it has become what it should, with its handler; and None in
    the snapshot when the emulator is gone."""
    children: dict[int, int] = {}  # process ids by the descriptors that tell of their ends
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != connection.fileno():
                poll.unregister(descriptor)
                os.close(descriptor)
                pid, status = os.waitpid(children.pop(descriptor), 0)
                report = Report("exited", pid, os.waitstatus_to_exitcode(status))
            else:
                message, logs, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
                if not message:
                    return None
                request = ForkRequest.decode(message)
                try:
                    pid, watch = fork(request, logs[0], become)
                    if pid == 0:
                        connection.close()
                        for inherited in children:
                            os.close(inherited)
                        return request.handler
                except OSError as error:
                    report = Report("failed", reason=str(error))
                else:
                    children[watch] = pid
                    poll.register(watch, select.POLLIN)
                    report = Report("started", pid)
                finally:
                    os.close(logs[0])
            try:
                connection.send(report.encode())
            except OSError:
                return None


def fork(
    request: ForkRequest, log: int, become: Callable[[ForkRequest, int], None]
) -> tuple[int, int]:
    """Zeros in the child; here, as soon as it is a process group of its own, its process id and a
    descriptor that becomes readable when it ends.

    Raises OSError with the child's reason when it cannot become what is requested.
    """
    sys.stdout.flush()  # or a child would write it again
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            become(request, log)
        except Exception as error:
            os.write(writer, str(error).encode())
            os._exit(1)
        os.close(writer)  # which says that all is well
        return 0, 0
    os.close(writer)
    try:
        with open(reader, "rb") as answer:  # noqa: PTH123
            reason = answer.read().decode()
        if reason:
            raise OSError(reason)
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def redirect(log: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)


def diversify() -> None:
    """Children must not all draw the same numbers. `random` sees to that itself."""
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random is not None:
        numpy_random.seed()
    if torch is not None:
        torch.default_generator.seed()


def _function_process() -> ModuleType:
    """The file beside this one. Not through `sys.path`, which is the function's."""
    file = Path(__file__).with_name("function_process.py")
    spec = importlib.util.spec_from_file_location("function_process", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
