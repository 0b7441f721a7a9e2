"""The processes a run needs on this machine: registry, relays, stores, emulator; one owner.

They are started, found again where they were when one had to be restarted, and ended. What they
are needed for is not known here: `supervisor.py` watches the run itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault.errors import MayflyError, PlatformUnavailable
from launcher.child import Child
from launcher.database_server import short_folder
from launcher.home import RunFolder, writing_to
from launcher.inquiry import reproducible
from launcher.options import relay_endpoints, stream_ports
from launcher.platform import EVALUATION_SUFFIX, LOOK_SUFFIX, WORKER_SUFFIX
from launcher.registry_server import RegistryServer
from launcher.store_server import StoreServer
from p2p.transport.allocation import HUGE_PAGES
from p2p.transport.keys import KEYS_VARIABLE, PEER_FILE, RELAY_FILE

START_SECONDS = 20.0
RELAY_NAME = "relay-{}.sock"
SOCKET_NAME_BYTES = 32
"""Room for those of relays, and of peers beside them."""
FUNCTION = "mayfly"
EVALUATION_SECONDS = 900.0
LOOK_SECONDS = 60.0
"""A longer look at a job is left to a process of its own, which has no limit."""
LOOK_MEMORY_MB = 1 << 20
"""More than there is: as little a limit."""


class Processes:
    """Those of one run; `plan` is what the launcher asked for."""

    def __init__(self, folder: RunFolder, plan: dict[str, Any]) -> None:
        self._folder = folder
        self._plan = plan
        self._environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        with writing_to(folder.path):
            self._registry = None if plan["registry"] else RegistryServer(folder.path)
        self._sockets = short_folder(folder.path, SOCKET_NAME_BYTES)
        self._relay_endpoints = []
        self._relays: list[tuple[Child, Path]] = []
        """With the file in which each says that it is ready."""
        for number in range(plan["relays"]):
            if plan["relay_listen"]:
                where = plan["relay_listen"], plan["relays"]
                endpoint = relay_endpoints(*where)[number]
                more = ["--stream-port", str(stream_ports(*where)[number])]
                more += ["--keys", str(folder.keys / RELAY_FILE)]
            else:
                endpoint, more = f"ipc://{self._sockets / RELAY_NAME.format(number)}", []
            ready = folder.path / f"relay-{number}.ready"
            bind = ["p2p.transport.relay", "--bind", endpoint, *more]
            self._relay_endpoints.append(endpoint)
            self._relays.append((self._child(f"relay-{number}", bind, ready), ready))
        self._stores = [
            StoreServer(folder.path, f"store-{number}") for number in range(plan.get("stores", 0))
        ]
        self._functions = folder.path / "functions.json"
        self._emulator_ready = folder.path / "emulator.ready"
        self._emulator = self._new_emulator(plan["listen"])
        self.endpoint = ""
        """Where functions are invoked; known from `start` on."""

    @property
    def registry_url(self) -> str:
        if self._registry is None:
            return str(self._plan["registry"])
        return f"unix://{self._registry.socket}"

    def start(self) -> None:
        """Raises what keeps a part from starting."""
        self.remove_traces()  # of a former supervisor that was killed
        self._write_functions()
        self._emulator.ensure()  # first, since its snapshot takes longest
        if self._registry is not None:
            self._registry.start()
        for store in self._stores:
            store.start()
        for relay, _ in self._relays:
            relay.ensure()
        for relay, ready_file in self._relays:
            self._wait_for(ready_file, relay)
        self._wait_for(self._emulator_ready, self._emulator)
        ready = self._folder.read(self._emulator_ready) or {}
        self.endpoint = ready["endpoint"]
        # a restarted emulator must be found where the old one was
        running, address = self._emulator, self.endpoint.removeprefix("http://")
        self._emulator = self._new_emulator(address)
        self._emulator.adopt(running)

    def restart_what_died(self, emulator_restarted: Callable[[], None]) -> None:
        """Says so when it was the emulator, since all that ran in it is gone as well."""
        restarted = [relay.ensure() for relay, _ in self._relays]
        changed = any(restarted)
        for store in [each for each in self._stores if not each.alive()]:
            changed = True
            with contextlib.suppress(MayflyError):  # the next round tries again
                store.start()
        if self._emulator.ensure():
            changed = True
            emulator_restarted()
        if self._registry is not None and not self._registry.alive():
            changed = True
            # it may have to read a long log, or find a full disk; the next round tries again
            with contextlib.suppress(MayflyError):
                self._registry.start()
        if changed:
            self.announce()

    def stop_functions(self) -> None:
        """And the relays they speak through."""
        self._emulator.stop()
        for relay, _ in self._relays:
            relay.stop()
        for store in self._stores:
            store.stop()

    @property
    def relay_endpoints(self) -> list[str]:
        return self._relay_endpoints

    @property
    def store_urls(self) -> list[str]:
        outside = self._plan.get("store", "")
        return [outside] if outside else [store.url for store in self._stores]

    def stop_registry(self) -> None:
        if self._registry is not None:
            self._registry.stop()

    def remove_traces(self) -> None:
        """Whatever in the run's folder means something only while they live."""
        ready_files = [ready for _, ready in self._relays]
        for left in (self._folder.supervisor, self._emulator_ready, *ready_files):
            left.unlink(missing_ok=True)
        self._folder.remove_sockets()

    def announce(self) -> None:
        """Tells where everything is, and that the run can be spoken to."""
        self._folder.write(
            self._folder.supervisor,
            {
                "pid": os.getpid(),
                "registry": self.registry_url,
                "relays": self._relay_endpoints,
                "sockets": str(self._sockets),
                "stores": self.store_urls,
                "endpoint": self.endpoint,
                "pids": {
                    "registry": self._registry.pid if self._registry is not None else 0,
                    **{relay.name: relay.pid for relay, _ in self._relays},
                    **{f"store-{n}": store.pid for n, store in enumerate(self._stores)},
                    "emulator": self._emulator.pid,
                },
            },
        )

    def _child(self, name: str, module: list[str], ready: Path) -> Child:
        # -P: a file of the user's in the current folder must not shadow one of ours
        command = [sys.executable, "-P", "-m", *module, "--ready-file", str(ready)]
        return Child(name, command, self._folder.logs / f"{name}.log", self._environment)

    def _new_emulator(self, listen: str) -> Child:
        module = ["launcher.emulator", "--config", str(self._functions), "--listen", listen]
        module += ["--log-dir", str(self._folder.function_logs)]
        return self._child("emulator", module, self._emulator_ready)

    def _write_functions(self) -> None:
        function: dict[str, Any] = {
            "handler": "launcher.handler.handle",
            "timeout_s": self._plan["time_limit_s"],
            "memory_mb": self._plan["memory_mb"],
            "start": self._plan["start"],
            "preload": self._plan["preload"],
            "working_directory": str(self._folder.path),
            "concurrency": 4 * self._plan["shards"],
            "environment": {
                **reproducible(self._plan["threads"]),
                **HUGE_PAGES,
                KEYS_VARIABLE: str(self._folder.keys / PEER_FILE),
                "PYTHONUNBUFFERED": "1",
                "PYTHONSAFEPATH": "1",
            },
        }
        evaluation = {
            **function,
            "handler": "launcher.handler.evaluate",
            "timeout_s": EVALUATION_SECONDS,
            "concurrency": 1,  # one after another, so that they take little from the training
        }
        functions = {FUNCTION: function, FUNCTION + EVALUATION_SUFFIX: evaluation}
        if self._plan.get("workers"):
            functions[FUNCTION + WORKER_SUFFIX] = {
                **function,
                "handler": "launcher.handler.work",
                "concurrency": 4 * self._plan["shards"] * self._plan["workers"],
            }
        if self._plan["start"] == "snapshot":  # the same one, so a look costs no further imports
            functions[FUNCTION + LOOK_SUFFIX] = {
                **function,
                "handler": "launcher.handler.look",
                "timeout_s": LOOK_SECONDS,
                "memory_mb": LOOK_MEMORY_MB,
                "concurrency": 1,
                "idle_timeout_s": 0.01,  # it has looked once, and may hold a large dataset
            }
        self._folder.write(self._functions, {"functions": functions})

    def _wait_for(self, ready: Path, child: Child) -> None:
        until = time.monotonic() + START_SECONDS
        while not ready.exists():
            if not child.alive() or time.monotonic() > until:
                lines = child.log.read_text("utf-8", "replace").splitlines()
                said = f": {lines[-1]}" if lines else ""
                raise PlatformUnavailable(f"the {child.name} did not start{said}")
            time.sleep(0.01)
