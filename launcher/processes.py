"""The processes a run needs on this machine: registry, relay and emulator, with one owner.

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
from launcher.home import RunFolder, writing_to
from launcher.inquiry import reproducible
from launcher.registry_server import RegistryServer, short_folder

START_SECONDS = 20.0
RELAY_NAME = "relay-0.sock"
FUNCTION = "mayfly"


class Processes:
    """Those of one run; `plan` is what the launcher asked for."""

    def __init__(self, folder: RunFolder, plan: dict[str, Any]) -> None:
        self._folder = folder
        self._plan = plan
        self._environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        with writing_to(folder.path):
            self._registry = None if plan["registry"] else RegistryServer(folder.path)
        relay = short_folder(folder.path, len(RELAY_NAME)) / RELAY_NAME
        self._relay_endpoint = f"ipc://{relay}"
        self._relay_ready = folder.path / "relay.ready"
        bind = ["p2p.transport.relay", "--bind", self._relay_endpoint]
        self._relay = self._child("relay", bind, self._relay_ready)
        self._functions = folder.path / "functions.json"
        self._emulator_ready = folder.path / "emulator.ready"
        self._emulator = self._new_emulator("127.0.0.1:0")
        self.endpoint = ""
        """Where functions are invoked; known from `start` on."""

    @property
    def registry_url(self) -> str:
        if self._registry is None:
            return str(self._plan["registry"])
        return f"unix://{self._registry.socket}"

    def start(self) -> None:
        """Raises what keeps a part from starting."""
        if self._registry is not None:
            self._registry.start()
        self._write_functions()
        self._relay.ensure()
        self._emulator.ensure()
        self._wait_for(self._relay_ready, self._relay)
        self._wait_for(self._emulator_ready, self._emulator)
        ready = self._folder.read(self._emulator_ready) or {}
        self.endpoint = ready["endpoint"]
        # a restarted emulator must be found where the old one was
        running, address = self._emulator, self.endpoint.removeprefix("http://")
        self._emulator = self._new_emulator(address)
        self._emulator.adopt(running)
        self._announce()

    def restart_what_died(self, emulator_restarted: Callable[[], None]) -> None:
        """Says so when it was the emulator, since all that ran in it is gone as well."""
        changed = self._relay.ensure()
        if self._emulator.ensure():
            changed = True
            emulator_restarted()
        if self._registry is not None and not self._registry.alive():
            changed = True
            # it may have to read a long log, or find a full disk; the next round tries again
            with contextlib.suppress(MayflyError):
                self._registry.start()
        if changed:
            self._announce()

    def stop_functions(self) -> None:
        """And the relay they speak through."""
        self._emulator.stop()
        self._relay.stop()

    def stop_registry(self) -> None:
        if self._registry is not None:
            self._registry.stop()

    def remove_traces(self) -> None:
        """Whatever in the run's folder means something only while they live."""
        for left in (self._folder.supervisor, self._relay_ready, self._emulator_ready):
            left.unlink(missing_ok=True)
        self._folder.remove_sockets()

    def _announce(self) -> None:
        self._folder.write(
            self._folder.supervisor,
            {
                "pid": os.getpid(),
                "registry": self.registry_url,
                "relays": [self._relay_endpoint],
                "endpoint": self.endpoint,
                "pids": {
                    "registry": self._registry.pid if self._registry is not None else 0,
                    "relay": self._relay.pid,
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
        function = {
            "handler": "launcher.handler.handle",
            "timeout_s": self._plan["time_limit_s"],
            "memory_mb": self._plan["memory_mb"],
            "working_directory": str(self._folder.path),
            "concurrency": 4 * self._plan["shards"],
            "environment": {
                **reproducible(self._plan["threads"]),
                "PYTHONUNBUFFERED": "1",
                "PYTHONSAFEPATH": "1",
            },
        }
        self._folder.write(self._functions, {"functions": {FUNCTION: function}})

    def _wait_for(self, ready: Path, child: Child) -> None:
        until = time.monotonic() + START_SECONDS
        while not ready.exists():
            if not child.alive() or time.monotonic() > until:
                lines = child.log.read_text("utf-8", "replace").splitlines()
                said = f": {lines[-1]}" if lines else ""
                raise PlatformUnavailable(f"the {child.name} did not start{said}")
            time.sleep(0.01)
