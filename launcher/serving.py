"""`p2p-launch store`: a store in the foreground, until a signal ends it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault.errors import StoreUnavailable
from fault.passwords import read_password
from launcher.store_server import Endpoint, StoreServer

GLANCE_S = 0.2


def serve(folder: Path, listen: str, password_file: Path | None, persist: Path | None) -> None:
    """Returns after SIGINT or SIGTERM, when nothing of the store is left running.

    Raises InputError for what cannot be, StoreUnavailable when it does not start or ends by itself.
    """
    endpoint = Endpoint.parse(listen)
    password = read_password(password_file, "--password-file") if password_file is not None else ""
    with signals() as ended:
        server = StoreServer(folder, _name(endpoint), endpoint, password, persist, _say)
        try:
            server.start()
            _say(f"store at {server.url}, log in {server.log}")
            while not ended.wait(GLANCE_S):
                if not server.alive():
                    raise StoreUnavailable(f"{server.name} ended; {server.log} says why")
        finally:
            server.stop()


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM."""
    event = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: event.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(endpoint: Endpoint) -> str:
    return f"{endpoint.host.replace(':', '_')}-{endpoint.port}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
