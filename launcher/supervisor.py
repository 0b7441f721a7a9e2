"""The one process of a run that is no function: it owns what functions need on this machine.

    python -m launcher.supervisor FOLDER

It runs the registry's server (unless the run has one elsewhere), the relay and the emulator, starts
them again when they die, and passes on the platform's word on deaths. It revives a run without
members, and when the run has ended it writes the summary, stops everything and goes. It decides
nothing about membership, and the launcher may come and go.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fault.errors import (
    InputError,
    MayflyError,
    PlatformUnavailable,
    RegistryUnavailable,
    RunStopped,
    StorageFull,
    Unavailable,
)
from fault.records import Outcome, Snapshot, Timing
from fault.registry import Registry
from launcher.child import Child
from launcher.emulator_client import EmulatorClient
from launcher.home import RunFolder, writing_to
from launcher.platform import Platform
from launcher.preflight import report
from launcher.registry_server import RegistryServer, short_folder
from launcher.revival import Boots, Revival, Standstill
from launcher.summary import Story, summarize
from p2p.core import verdict_on
from p2p.peer import event_payload

POLL_S = 0.25
START_SECONDS = 20.0
FAREWELL_SECONDS = 2.0
"""How long members have to leave once there is an outcome; who still boots is not waited for."""
BLAME_SECONDS = 6.0
"""How long the platform's word on a death is repeated: the members may take a while to notice."""
FREE_BYTES = 4 << 20
"""With less room than this on the disk, nothing can be promised any more."""
RELAY_NAME = "relay-0.sock"
FUNCTION = "mayfly"

# what the numerical libraries read when they are loaded; one thread is what is deterministic
NUMERICS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Abandoned(Unavailable):
    """The launcher is gone, and nobody else is going to create this run."""


class Supervisor:
    """Everything a run needs on this machine, from start to end."""

    def __init__(self, folder: RunFolder, stopping: Callable[[], bool]) -> None:
        self.folder = folder
        self.stopping = stopping
        """Whether the process was asked to end the run."""
        plan = folder.read(folder.plan)
        if plan is None:
            raise InputError(f"{folder.path} is no run's folder")
        self.plan: dict[str, Any] = plan
        self.timing = Timing(**plan["timing"])
        self._launcher: int = plan["launcher"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        with writing_to(folder.path):
            self.server = None if plan["registry"] else RegistryServer(folder.path)
        relay = short_folder(folder.path, len(RELAY_NAME)) / RELAY_NAME
        self.relay_endpoint = f"ipc://{relay}"
        self.relay_ready = folder.path / "relay.ready"
        self.relay = self._child(
            "relay",
            ["p2p.transport.relay", "--bind", self.relay_endpoint],
            self.relay_ready,
            environment,
        )
        self.emulator_ready = folder.path / "emulator.ready"
        self._functions = folder.path / "functions.json"
        self._environment = environment
        self.emulator = self._emulator("127.0.0.1:0")
        self.endpoint = ""
        self.revival = Revival(self.timing)
        self.boots = Boots()
        self.standstill = Standstill()
        self.story = Story()
        self._last_event = "0-0"
        self._ended_index = 0
        self._blames: dict[str, tuple[str, float]] = {}
        self._peers: dict[tuple[int, int], str] = {}
        self._registry: Registry | None = None

    # --- start ------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises what keeps a part from starting."""
        self._check_room()
        if self.server is not None:
            self.server.start()
        self._write_functions()
        self.relay.ensure()
        self.emulator.ensure()
        self._wait_for(self.relay_ready, self.relay)
        self._wait_for(self.emulator_ready, self.emulator)
        ready = self.folder.read(self.emulator_ready) or {}
        self.endpoint = ready["endpoint"]
        # a restarted emulator must be found where the old one was
        running, self.emulator = (
            self.emulator,
            self._emulator(self.endpoint.removeprefix("http://")),
        )
        self.emulator.adopt(running)
        self._announce()

    def registry_url(self) -> str:
        if self.server is None:
            return str(self.plan["registry"])
        return f"unix://{self.server.socket}"

    def _announce(self) -> None:
        self.folder.write(
            self.folder.supervisor,
            {
                "pid": os.getpid(),
                "registry": self.registry_url(),
                "relays": [self.relay_endpoint],
                "endpoint": self.endpoint,
                "pids": {
                    "registry": self.server.pid if self.server is not None else 0,
                    "relay": self.relay.pid,
                    "emulator": self.emulator.pid,
                },
            },
        )

    def _child(
        self, name: str, module: list[str], ready: Path, environment: dict[str, str]
    ) -> Child:
        # -P: a file of the user's in the current folder must not shadow one of ours
        command = [sys.executable, "-P", "-m", *module, "--ready-file", str(ready)]
        return Child(name, command, self.folder.logs / f"{name}.log", environment)

    def _emulator(self, listen: str) -> Child:
        module = ["launcher.emulator", "--config", str(self._functions), "--listen", listen]
        module += ["--log-dir", str(self.folder.function_logs)]
        return self._child("emulator", module, self.emulator_ready, self._environment)

    def _write_functions(self) -> None:
        function = {
            "handler": "launcher.handler.handle",
            "timeout_s": self.plan["time_limit_s"],
            "memory_mb": self.plan["memory_mb"],
            "working_directory": str(self.folder.path),
            "concurrency": 4 * self.plan["shards"],
            "environment": {
                "PYTHONHASHSEED": "0",
                "PYTHONUNBUFFERED": "1",
                "PYTHONSAFEPATH": "1",
                **{name: str(self.plan["threads"]) for name in NUMERICS},
            },
        }
        self.folder.write(self._functions, {"functions": {FUNCTION: function}})

    def _wait_for(self, ready: Path, child: Child) -> None:
        until = time.monotonic() + START_SECONDS
        while not ready.exists():
            if not child.alive() or time.monotonic() > until:
                lines = child.log.read_text("utf-8", "replace").splitlines()
                said = f": {lines[-1]}" if lines else ""
                raise PlatformUnavailable(f"the {child.name} did not start{said}")
            time.sleep(0.01)

    # --- watch ------------------------------------------------------------------------------

    def watch(self) -> None:
        """Returns when the run has ended, one way or another."""
        self._registry = Registry(self.registry_url(), self.plan["run"], self.timing)
        while not self.stopping():
            time.sleep(POLL_S)
            self._check_room()
            self._restart_what_died()
            try:
                snapshot = self._registry.read()
                self._read_events()
                self._hear_the_platform()
                self._keep_going(snapshot)
                abandoned = not self.story.created_at and os.getppid() != self._launcher
                if abandoned and not self._registry.spec():
                    raise Abandoned(f"the launcher of run {self.folder.id} ended before it began")
            except RegistryUnavailable:
                self.revival.outage()
                continue
            if snapshot.outcome is not None:
                self.story.outcome = asdict(snapshot.outcome)
                return
        self._stop()

    def _stop(self) -> None:
        assert self._registry is not None
        outcome = Outcome("stopped", self.story.step, "", "RunStopped", "on request")
        try:
            if not self._registry.spec():
                raise RunStopped(f"run {self.folder.id} was stopped before it began")
            self._registry.finish(outcome)
        except RegistryUnavailable:
            # what is to be stopped is here, and needs no registry
            self.story.outcome = asdict(outcome)

    def _check_room(self) -> None:
        if shutil.disk_usage(self.folder.path).free < FREE_BYTES:
            raise StorageFull(
                f"the disk under {self.folder.path} is full; the run stopped: make room, or use "
                "--home"
            )

    def _restart_what_died(self) -> None:
        changed = self.relay.ensure()
        if self.emulator.ensure():
            self._ended_index, changed = 0, True
        if self.server is not None and not self.server.alive():
            changed = True
            # it may have to read a long log, or find a full disk; the next round tries again
            with contextlib.suppress(MayflyError):
                self.server.start()
        if changed:
            self._announce()

    def _read_events(self) -> None:
        assert self._registry is not None
        while events := self._registry.read_events(self._last_event):
            # kept as they come: the registry trims its stream, and this process may be killed
            lines = "".join([json.dumps(asdict(event)) + "\n" for event in events])
            with (
                writing_to(self.folder.path),
                self.folder.events.open("a", encoding="utf-8") as file,
            ):
                file.write(lines)
            self._last_event = events[-1].id
            self.story.take(events)
            for event in events:
                if event.kind == "claimed":
                    slot, generation, _ = event.fields["peer"].split(".")
                    self._peers[int(slot), int(generation)] = event.fields["peer"]
                elif event.kind == "view":
                    self.boots.joined(tuple(event.fields["members"]))
                elif event.kind == "boot_failed":
                    fields = event.fields
                    self.boots.failed(
                        fields["peer"], fields["reason"], fields["error"], fields["trace"]
                    )

    def _hear_the_platform(self) -> None:
        """What invocations ended of; the members only see that a peer is gone."""
        assert self._registry is not None
        with contextlib.suppress(PlatformUnavailable):
            for ended in EmulatorClient(self.endpoint).ended(self._ended_index):
                self._ended_index = ended["index"]
                event, cause = ended["event"] or {}, ended["cause"]
                place = event.get("slot", -1), event.get("generation", -1)
                if cause == "ok":
                    continue
                error = "OutOfMemory" if cause == "out of memory" else "BootFailed"
                self.boots.failed(f"{place[0]}.{place[1]}", ended.get("detail") or cause, error)
                if cause in ("crash", "out of memory") and place in self._peers:
                    self.standstill.died(self._peers[place], cause, self.story.step)
                if cause == "out of memory" and place in self._peers:
                    until = time.monotonic() + BLAME_SECONDS
                    self._blames[self._peers[place]] = (cause, until)
        for peer, (cause, until) in list(self._blames.items()):
            self._registry.blame(peer, cause)
            if time.monotonic() > until:
                del self._blames[peer]

    def _keep_going(self, snapshot: Snapshot) -> None:
        assert self._registry is not None
        members = snapshot.view.members if snapshot.view is not None else ()
        members_left = any(peer in snapshot.leased for peer in members)
        # members would find the same, but there may be none left
        convicted = next((each for each in snapshot.suspects if each.convicted), None)
        verdict = (
            verdict_on(convicted)
            if convicted is not None
            else self.standstill.verdict(snapshot.target_slots, self.story.step)
            or self.boots.verdict(snapshot.target_slots, members_left)
        )
        if verdict is not None and snapshot.outcome is None and self._registry.spec():
            self._registry.finish(verdict)
            return
        for slot, generation in self.revival.slots_to_grant(snapshot, time.monotonic()):
            token = secrets.token_hex(8)
            if self._registry.grant(slot, generation, token, "launcher"):
                payload = event_payload(
                    self.plan["run"],
                    slot,
                    generation,
                    token,
                    self.registry_url(),
                    str(self.folder.path),
                    "",
                )
                with contextlib.suppress(PlatformUnavailable):
                    Platform(FUNCTION, self.endpoint, patience_seconds=2.0).invoke(payload)

    # --- end --------------------------------------------------------------------------------

    def end(self, failure: MayflyError | None) -> None:
        """Lets the functions leave, keeps the history, stops everything."""
        if failure is None:
            with contextlib.suppress(RegistryUnavailable, StorageFull):
                self._wait_for_members()
                self._read_events()
        self.emulator.stop()
        self.relay.stop()
        if self._registry is not None:
            self._registry.close()
        if self.server is not None:
            self.server.stop()
        if failure is not None:
            kind = type(failure).__name__
            state = "stopped" if isinstance(failure, RunStopped) else "failed"
            self.story.outcome = {"state": state, "error": kind, "reason": str(failure)}
        if isinstance(failure, Abandoned):
            shutil.rmtree(self.folder.path, ignore_errors=True)
            return
        if self.story.created_at or failure is not None:
            self._keep_history()
        for left in (self.folder.supervisor, self.relay_ready, self.emulator_ready):
            left.unlink(missing_ok=True)
        self.folder.remove_sockets()

    def _wait_for_members(self) -> None:
        assert self._registry is not None
        until = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < until:
            snapshot = self._registry.read()
            members = snapshot.view.members if snapshot.view is not None else ()
            if not any(peer in snapshot.leased for peer in members):
                return
            time.sleep(0.05)

    def _keep_history(self) -> None:
        # the launcher has completed the plan since this process read it
        plan = self.folder.read(self.folder.plan) or self.plan
        summary = summarize(self.story, plan, str(self.folder.path))
        with contextlib.suppress(MayflyError):
            self.folder.write(self.folder.summary, summary)


def main() -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    folder = RunFolder(Path(sys.argv[1]))
    lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"run {folder.id} has a supervisor already", file=sys.stderr)
        return InputError.exit_code
    supervisor: Supervisor | None = None
    failure: MayflyError | None = None
    try:
        with writing_to(folder.path):
            os.write(lock, str(os.getpid()).encode())
        supervisor = Supervisor(folder, lambda: bool(asked))
        supervisor.start()
        supervisor.watch()
    except MayflyError as error:
        failure = error
    except Exception as error:
        # a defect of ours, to be seen in the log; even then nothing may stay behind
        traceback.print_exc()
        failure = MayflyError(
            f"the supervisor of run {folder.id} failed with {type(error).__name__}: {error}; "
            f"see {folder.logs / 'supervisor.log'}"
        )
    if failure is not None:
        with contextlib.suppress(MayflyError):
            folder.write(folder.failure, report(failure))
    if supervisor is not None:
        supervisor.end(failure)
    # the lock is left to the kernel: whoever finds it free finds this process gone as well
    return failure.exit_code if failure is not None else 0


if __name__ == "__main__":
    sys.exit(main())
