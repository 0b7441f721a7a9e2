"""Faults on real processes: one run started as a user starts it, and hands on what it consists of.

Everything goes through what is public: the `p2p-launch` command, the run's folder, the registry's
records and the emulator's list of processes. The oracle is the final weights' file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fault.errors import PlatformUnavailable, RegistryUnavailable
from fault.records import Timing
from fault.registry import Registry
from launcher.emulator_client import EmulatorClient
from launcher.home import RunFolder

GLANCE_S = 0.01


class LiveRun:
    """`p2p-launch run JOB --json OPTIONS`, in the background; a context manager.

    Leaving the context ends whatever is left of the run.
    """

    def __init__(self, job: Path, home: Path, run: str, options: Sequence[str]) -> None:
        self.folder = RunFolder(home / "runs" / run)
        command = ["p2p-launch", "run", str(job), "--home", str(home), "--run-id", run, "--json"]
        self._errors = home / f"{run}.stderr"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=errors
            )
        self._registry: Registry | None = None

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._registry is not None:
            self._registry.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                ready = self.folder.read(self.folder.supervisor)
                if ready is not None:
                    os.kill(ready["pid"], signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    # --- what is going on -------------------------------------------------------------------

    def wait_for_step(self, step: int, seconds: float = 120.0) -> int:
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

    def process_of(self, slot: int) -> int | None:
        """The process that a slot's function runs in, or None while there is none."""
        try:
            for sandbox in self._emulator().sandboxes():
                event = sandbox["event"]
                if sandbox["state"] == "busy" and event and event["slot"] == slot:
                    return int(sandbox["pid"])
        except PlatformUnavailable:
            pass  # it is being started again
        return None

    def _emulator(self) -> EmulatorClient:
        ready = self.folder.read(self.folder.supervisor)
        if ready is None:
            raise PlatformUnavailable("the run is not up")
        return EmulatorClient(ready["endpoint"])

    def said(self) -> str:
        """What the command wrote to stderr."""
        return self._errors.read_text("utf-8", "replace")

    # --- faults -----------------------------------------------------------------------------

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


# --- faults as data --------------------------------------------------------------------------


class Fault(Protocol):
    """Something that is done to a run at a step."""

    step: int

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


def play(
    job: Path, home: Path, run: str, options: Sequence[str], faults: Sequence[Fault]
) -> Result:
    """One run with these faults, in the order of their steps, to its end."""
    with LiveRun(job, home, run, options) as live:
        for fault in sorted(faults, key=lambda fault: fault.step):
            live.wait_for_step(fault.step)
            fault.strike(live)
        return live.result()
