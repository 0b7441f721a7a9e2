"""Faults on real processes: one run started as a user starts it, and hands on what it consists of.

Everything goes through what is public: the `p2p-launch` command, the run's folder, the registry's
records and the emulator's list of processes. The oracle is the final weights' file alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from fault.errors import PlatformUnavailable, RegistryUnavailable
from fault.records import Timing
from fault.registry import Registry
from launcher.emulator_client import EmulatorClient
from launcher.home import RunFolder
from launcher.runs import stop

GLANCE_S = 0.01


class LiveRun:
    """`p2p-launch run JOB --json OPTIONS`, in the background; a context manager.

    Leaving the context ends whatever is left of the run.
    """

    def __init__(self, job: Path, home: Path, run: str, options: Sequence[str]) -> None:
        self.folder = RunFolder(home / "runs" / run)
        self._home = home
        self._errors = home / f"{run}.stderr"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._process = self._command("run", str(job), "--run-id", run, *options)
        self._registry: Registry | None = None

    def _command(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._errors.open("ab") as errors:
            return subprocess.Popen(
                ["p2p-launch", name, *arguments, "--home", str(self._home), "--json"],
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forget_registry()
        if self.folder.exists() and self.folder.alive():
            stop(self.folder)
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    # --- what is going on -------------------------------------------------------------------

    def wait_for_step(self, step: int, seconds: float = 300.0) -> int:
        """Returns the newest step of any member once it is `step` or later.

        Raises TimeoutError, with the command's last words, when that never happens.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._process.poll() is None:
            reached = self._step()
            if reached >= step:
                return reached
            time.sleep(GLANCE_S)
        raise TimeoutError(f"step {step} was not reached: {self.said()[-2000:]}")

    def _step(self) -> int:
        if self._registry is None:
            ready = self.folder.read(self.folder.supervisor)
            if ready is None:
                return -1
            self._registry = Registry(ready["registry"], self.folder.id, Timing())
        try:
            snapshot = self._registry.read()
        except RegistryUnavailable:
            return -1
        members = snapshot.view.members if snapshot.view is not None else ()
        steps = [doing.step for peer, doing in snapshot.doing.items() if peer in members]
        return max(steps, default=-1)

    def handovers(self) -> int:
        """How many there were so far, as far as the supervisor has written."""
        views = [event for event in self.folder.read_events() if event.kind == "view"]
        kinds = [kind for view in views for _, kind in view.fields["removals"]]
        return kinds.count("swap")

    def process_of(self, slot: int) -> int | None:
        """The process that a slot's oldest function runs in, or None while there is none."""
        return next(iter(self.processes_of(slot)), None)

    def processes_of(self, slot: int) -> list[int]:
        """Those of a slot's functions, the oldest generation first: a member, and who succeeds."""
        found = [
            (event["generation"], pid)
            for event, pid in self._busy()
            if event.get("slot") == slot and "generation" in event
        ]
        return [pid for _, pid in sorted(found)]

    def workers_of(self, slot: int) -> dict[int, list[int]]:
        """The processes of a slot's workers, by their numbers."""
        found: dict[int, list[int]] = {}
        for event, pid in self._busy():
            if event.get("slot") == slot and "worker" in event:
                found.setdefault(event["worker"], []).append(pid)
        return found

    def _busy(self) -> list[tuple[dict[str, Any], int]]:
        """The event and the process of each function that is at work."""
        with contextlib.suppress(PlatformUnavailable):  # it is being started again
            return [
                (sandbox["event"], int(sandbox["pid"]))
                for sandbox in self._emulator().sandboxes()
                if sandbox["state"] == "busy" and sandbox["event"]
            ]
        return []

    def _emulator(self) -> EmulatorClient:
        ready = self.folder.read(self.folder.supervisor)
        if ready is None:
            raise PlatformUnavailable("the run is not up")
        return EmulatorClient(ready["endpoint"])

    def said(self) -> str:
        """What the command wrote to stderr."""
        return self._errors.read_text("utf-8", "replace")

    def pids(self) -> dict[str, int]:
        """The processes that the run's supervisor owns, by name, and its own; {} if it is gone."""
        ready = self.folder.read(self.folder.supervisor)
        return {} if ready is None else {**ready["pids"], "supervisor": ready["pid"]}

    def _forget_registry(self) -> None:
        if self._registry is not None:
            self._registry.close()
            self._registry = None

    # --- faults -----------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL to one of `pids`, or to the command that started the run ("launcher")."""
        pid = self._process.pid if name == "launcher" else self.pids().get(name, 0)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def attach(self) -> None:
        """From here on, what shows the run is a new command."""
        self._replace_command("attach")

    def resume(self) -> None:
        """Waits until nothing of the run lives, and goes on with it."""
        until = time.monotonic() + 30.0
        while self.folder.alive() and time.monotonic() < until:
            time.sleep(GLANCE_S)
        self._forget_registry()
        self._replace_command("resume")

    def _replace_command(self, name: str) -> None:
        self._process.kill()
        self._process.communicate()
        self._process = self._command(name, self.folder.id)

    def scale(self, slots: int) -> None:
        # by the command, as a user would; it returns at once
        subprocess.run(
            ["p2p-launch", "scale", self.folder.id, str(slots), "--home", str(self._home)],
            check=True,
            capture_output=True,
        )

    def send(self, slot: int, number: signal.Signals) -> bool:
        """A signal to a slot's function; False when there is none."""
        process = self.process_of(slot)
        if process is None:
            return False
        try:
            os.kill(process, number)
        except ProcessLookupError:
            return False
        return True

    def duplicate(self, which: str) -> None:
        self._emulator().duplicate(which)

    # --- the end ----------------------------------------------------------------------------

    def result(self, seconds: float = 300.0) -> Result:
        """Waits for the command to end. Raises RuntimeError if it failed."""
        out, _ = self._process.communicate(timeout=seconds)
        if self._process.returncode:
            raise RuntimeError(f"exit code {self._process.returncode}: {self.said()[-4000:]}")
        summary = json.loads(out.decode().splitlines()[-1])
        return Result(summary, fingerprint(self.folder.final))


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended: its summary, and a fingerprint of the weights it left."""

    summary: dict[str, Any]
    weights: str


def fingerprint(weights: Path) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor of a safetensors file."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(weights).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Workload:
    """One computation: a job with all that its result depends on, so it has one result."""

    job: Path
    steps: int
    collective: str
    shards: int = 4
    settings: tuple[str, ...] = ()
    """As for `--set`."""

    def __str__(self) -> str:
        return f"{self.job.stem}-{self.steps}-{self.collective}"

    @property
    def options(self) -> tuple[str, ...]:
        collective = ("--collective", self.collective)
        settings = [f"--set={each}" for each in (f"steps={self.steps}", *self.settings)]
        return ("--shards", str(self.shards), *collective, *settings)


# --- faults as data --------------------------------------------------------------------------


class Fault(Protocol):
    """Something that is done to a run at a step."""

    @property
    def step(self) -> int: ...

    def strike(self, run: LiveRun) -> None: ...


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL for these slots' functions, all at once, `after_s` after the step was seen."""

    step: int
    slots: tuple[int, ...]
    after_s: float = 0.0

    def strike(self, run: LiveRun) -> None:
        time.sleep(self.after_s)
        for slot in self.slots:
            run.send(slot, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class KillWorkers:
    """SIGKILL for these workers of a slot, as soon as all of them are there."""

    step: int
    slot: int
    workers: tuple[int, ...]

    def strike(self, run: LiveRun) -> None:
        until = time.monotonic() + 60.0
        while not set(self.workers) <= set(found := run.workers_of(self.slot)):
            if time.monotonic() > until:
                raise TimeoutError(f"slot {self.slot} has the workers {sorted(found)} only")
            time.sleep(GLANCE_S)
        for pid in [pid for worker in self.workers for pid in found[worker]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Pause:
    """SIGSTOP for a slot's function, and SIGCONT later, as on a machine that swaps."""

    step: int
    slot: int
    seconds: float = 5.0

    def strike(self, run: LiveRun) -> None:
        process = run.process_of(self.slot)
        if process is None:
            return
        try:
            os.kill(process, signal.SIGSTOP)
            time.sleep(self.seconds)
            os.kill(process, signal.SIGCONT)
        except ProcessLookupError:
            print(f"slot {self.slot} was gone before its pause was over", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class DeliverTwice:
    """The next event is delivered twice; the slot's function is killed, so that there is one."""

    step: int
    slot: int

    def strike(self, run: LiveRun) -> None:
        run.duplicate("next")
        run.send(self.slot, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class KillPart:
    """SIGKILL for processes that a run consists of besides its functions, all at once."""

    step: int
    names: tuple[str, ...]
    """Of "launcher", "relay-0", …, "store-0", …, "registry" and "emulator"."""

    def strike(self, run: LiveRun) -> None:
        for name in self.names:
            run.kill(name)
        if "launcher" in self.names:
            run.attach()


@dataclass(frozen=True, slots=True)
class LoseRegistry:
    """The registry's server is killed, and comes back empty, or as it was some time ago."""

    step: int
    older_s: float = 0.0
    """How much older the records are that it comes back with; 0: it has none at all."""

    def strike(self, run: LiveRun) -> None:
        data, kept = run.folder.path / "registry", run.folder.path / "registry.kept"
        if self.older_s:
            shutil.copytree(data, kept, dirs_exist_ok=True)
            time.sleep(self.older_s)
        pid = run.pids().get("registry", 0)
        if not pid:
            return
        os.kill(pid, signal.SIGSTOP)  # so that no successor starts before its data is gone
        for file in sorted(data.rglob("*")):
            if file.is_file():
                file.unlink()
        if self.older_s:
            shutil.copytree(kept, data, dirs_exist_ok=True)
            shutil.rmtree(kept)
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class KillEverything:
    """The supervisor dies, and with it all that it owns, functions included; then `resume`."""

    step: int

    def strike(self, run: LiveRun) -> None:
        run.kill("supervisor")
        run.resume()


@dataclass(frozen=True, slots=True)
class Scale:
    """`p2p-launch scale`."""

    step: int
    slots: int

    def strike(self, run: LiveRun) -> None:
        run.scale(self.slots)


@dataclass(frozen=True, slots=True)
class KillInHandOver:
    """Waits until a slot has a successor, and kills the old peer, the successor, or both."""

    step: int
    slot: int
    which: Literal["old", "new", "both"]
    after_s: float = 0.0
    """From when the successor's function was seen."""

    def strike(self, run: LiveRun) -> None:
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            processes = run.processes_of(self.slot)
            if len(processes) > 1:
                time.sleep(self.after_s)
                chosen = {"old": processes[:1], "new": processes[-1:], "both": processes}
                for pid in chosen[self.which]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return
            time.sleep(GLANCE_S)


def play(
    job: Path, home: Path, run: str, options: Sequence[str], faults: Sequence[Fault]
) -> Result:
    """One run with these faults, in the order of their steps, to its end."""
    with LiveRun(job, home, run, options) as live:
        for fault in sorted(faults, key=lambda fault: fault.step):
            live.wait_for_step(fault.step)
            fault.strike(live)
        return live.result()
