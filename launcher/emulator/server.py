"""The emulator as a whole: its functions' pools, its three APIs on one port, its start and end.

It leaves nothing behind. Every process it starts dies with it (`function_process.py`), and what
those started is ended by the warden (`warden.py`), also when the emulator itself is SIGKILLed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from aiohttp import web

from fault.errors import InputError
from launcher.emulator import control_api, invoke_api, runtime_api
from launcher.emulator.functions import Function
from launcher.emulator.invocation import History, Invocation, Outcome
from launcher.emulator.pool import Pool, Throttled
from launcher.emulator.process import Start, mark, start_cold
from launcher.emulator.sandbox import Sandbox
from launcher.emulator.snapshot import Snapshot
from p2p.transport.hosts import is_loopback

logger = logging.getLogger(__name__)

PAYLOAD_LIMIT_BYTES = 6 << 20
"""Of a synchronous call and of a result, as on Lambda."""
_WARDEN = Path(__file__).with_name("warden.py")
_WARDEN_SECONDS = 15.0


@dataclass(frozen=True)
class Address:
    """A loopback address to listen on; port 0 lets the system choose."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, _, port = text.rpartition(":")
        host = host.strip("[]")
        try:
            number = int(port)
        except ValueError:
            raise InputError(f"{text!r} is no address: write 127.0.0.1:PORT") from None
        if not is_loopback(host):
            raise InputError(
                f"{host} is not a loopback address; the emulator asks for no passwords"
            )
        return cls(host, number)


class Emulator:
    """The functions and what happens to their events; made inside a running event loop."""

    def __init__(
        self,
        functions: Mapping[str, Function],
        host: str,
        log_folder: Path,
        nonce: str,
        start: Start = start_cold,
    ) -> None:
        self.history = History()
        names = (f"{nonce}-{ordinal:04d}" for ordinal in itertools.count(1))
        self._snapshots: dict[object, Snapshot] = {}
        """One for all functions that would have the same."""
        starts: dict[str, Start] = {}
        for name, function in functions.items():
            if function.start == "snapshot":
                what = (function.working_directory, function.preload, *function.environment.items())
                if what not in self._snapshots:
                    self._snapshots[what] = Snapshot(
                        function, f"{nonce}-snapshot-{name}", host, log_folder
                    )
                starts[name] = self._snapshots[what].start
        self._pools = {
            name: Pool(function, names, host, log_folder, self.history, starts.get(name, start))
            for name, function in functions.items()
        }
        self._doubles_due = 0
        self._last: tuple[Pool, Invocation] | None = None

    def pool(self, function: str) -> Pool | None:
        return self._pools.get(function)

    def sandboxes(self) -> list[Sandbox]:
        return [sandbox for pool in self._pools.values() for sandbox in pool.sandboxes.values()]

    def sandbox(self, name: str) -> Sandbox | None:
        return next((each for each in self.sandboxes() if each.name == name), None)

    def submit(self, pool: Pool, payload: bytes) -> str:
        """Takes an asynchronous event and returns its request id. Raises Throttled."""
        invocation = Invocation(str(uuid4()), payload)
        pool.submit(invocation)
        self._last = (pool, invocation)
        if self._doubles_due:
            self._doubles_due -= 1
            self._submit_again(pool, invocation)
        return invocation.request_id

    async def call(self, pool: Pool, payload: bytes) -> tuple[str, Outcome]:
        """Takes a synchronous event; returns its request id and how it ended. Raises Throttled."""
        reply: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        invocation = Invocation(str(uuid4()), payload, reply)
        pool.submit(invocation)
        return invocation.request_id, await reply

    def duplicate_next(self) -> None:
        self._doubles_due += 1

    def duplicate_last(self) -> str | None:
        """Delivers the last asynchronous event once more; None if there was none."""
        if self._last is None:
            return None
        pool, invocation = self._last
        self._submit_again(pool, invocation)
        return invocation.request_id

    async def close(self) -> None:
        """Ends every sandbox; callers that wait are let go."""
        self.history.close()
        await asyncio.gather(
            # first the pools: they must not try again what fails without a snapshot
            *(pool.close() for pool in self._pools.values()),
            *(snapshot.close() for snapshot in self._snapshots.values()),
        )

    def _submit_again(self, pool: Pool, invocation: Invocation) -> None:
        try:
            pool.submit(Invocation(invocation.request_id, invocation.payload))
        except Throttled:
            logger.warning("no room for a double of request %s", invocation.request_id)


async def serve(
    functions: Mapping[str, Function], address: Address, ready_file: Path | None, log_folder: Path
) -> None:
    """Serves until SIGTERM or SIGINT. Raises InputError when it cannot begin."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        listener = socket.create_server(
            (address.host, address.port),
            family=socket.AF_INET6 if ":" in address.host else socket.AF_INET,
        )
    except OSError as error:
        raise InputError(
            f"the emulator cannot use {address.host}:{address.port}: {error}"
        ) from None
    shown = f"[{address.host}]" if ":" in address.host else address.host
    host = f"{shown}:{listener.getsockname()[1]}"

    nonce = secrets.token_hex(4)
    warden = await _start_warden(nonce)
    emulator = Emulator(functions, host, log_folder, nonce)
    application = web.Application(client_max_size=PAYLOAD_LIMIT_BYTES + 1)
    for api in (invoke_api, runtime_api, control_api):
        application.add_routes(api.routes(emulator))
    # requests under way end with their sandboxes
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    if ready_file is not None:
        _announce(ready_file, host)
    logger.info("serving %s at http://%s", ", ".join(functions), host)
    try:
        await stop.wait()
    finally:
        await emulator.close()
        await runner.cleanup()
        assert warden.stdin is not None
        warden.stdin.close()
        await asyncio.wait_for(warden.wait(), _WARDEN_SECONDS)


async def _start_warden(nonce: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        str(_WARDEN),
        os.fsdecode(mark(f"{nonce}-")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


def _announce(ready_file: Path, host: str) -> None:
    fresh = ready_file.with_name(f"{ready_file.name}.{os.getpid()}")
    fresh.write_text(json.dumps({"endpoint": f"http://{host}", "pid": os.getpid()}), "utf-8")
    fresh.replace(ready_file)
