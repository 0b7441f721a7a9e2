"""The two that are compared, a run of ours and one of torchrun: started, hurt and read alike."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from chaos.live import LiveRun
from fault.errors import RegistryUnavailable
from fault.records import Peer, Timing, slot_of
from fault.registry import Registry

PEERS = 4
CHECKPOINT_EVERY = 50
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # With the agent's store shared, restarted workers may find each other's old addresses there,
    # and no restart comes to an end: of five tries on the machine of docs/performance.md, none did.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
"""Of torchrun and its workers."""
ENDLESS = 10_000_000
GLANCE_S = 0.02
BEGIN_S = 120.0
"""How long the first steps may take, or a process that could be killed to appear."""


@dataclass(frozen=True)
class Work:
    """A job and its settings; it is trained for as long as it is measured."""

    job: Path
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Killed:
    """When it was, and whose word on steps is not that of a survivor ("": nobody survives)."""

    at: float
    teller: Peer = ""


class Subject(Protocol):
    """Something that trains. Times are seconds of `time.time`."""

    def steps(self, without: Peer = "") -> list[tuple[float, int]]:
        """(time, step) of each time that anyone but `without` finished a step, as time went.

        A step that is computed again is there again.
        """
        ...

    def kill_one(self, draw: random.Random) -> Killed:
        """SIGKILL to one of the processes that train, at random."""
        ...

    def is_whole(self) -> bool:
        """Whether as many train as are meant to."""
        ...


class Ours:
    """`p2p-launch run` with four peers; a context manager that ends it."""

    def __init__(self, work: Work, home: Path, name: str, *options: str) -> None:
        settings = [f"--set={key}={value}" for key, value in work.settings.items()]
        options = (*options, f"--checkpoint-every={CHECKPOINT_EVERY}", f"--peers={PEERS}")
        options = (*options, f"--set=steps={ENDLESS}", "--start=snapshot", *settings)
        self.live = LiveRun(work.job, home, name, options)
        self._home = home
        self._registry: Registry | None = None
        self._last = "0-0"
        self._told: list[tuple[float, int, Peer]] = []
        self._members: list[Peer] = []

    def __enter__(self) -> Ours:
        try:
            self.live.wait_for_step(20, BEGIN_S)
            until = time.monotonic() + BEGIN_S
            while not self.steps():  # what was told of them comes a little later
                if time.monotonic() > until:
                    raise TimeoutError(f"no step was told of: {self.live.said()[-2000:]}")
                time.sleep(GLANCE_S)
        except BaseException:  # there is no `with` yet that would end it
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._registry is not None:
            self._registry.close()
        self.live.__exit__(kind, error, trace)

    def summary(self) -> dict[str, object]:
        """Stops the run and says what it says of itself."""
        self.live.__exit__(None, None, None)
        summary: dict[str, object] = json.loads(self.live.folder.summary.read_text("utf-8"))
        return summary

    def steps(self, without: Peer = "") -> list[tuple[float, int]]:
        self._read()
        return sorted((at, step) for at, step, teller in self._told if teller != without)

    def kill_one(self, draw: random.Random) -> Killed:
        until = time.monotonic() + BEGIN_S
        while time.monotonic() < until:
            slot = draw.randrange(PEERS)
            pid = self.live.process_of(slot)
            self._read()
            teller = next((peer for peer in self._members if slot_of(peer) == slot), "")
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself: another one
                    at = time.time()
                    os.kill(pid, signal.SIGKILL)
                    return Killed(at, teller)
            time.sleep(GLANCE_S)
        raise TimeoutError(f"there is no function to be killed: {self.live.said()[-2000:]}")

    def is_whole(self) -> bool:
        self._read()
        return len(self._members) == PEERS

    def _read(self) -> None:
        if self._registry is None:
            ready = self.live.folder.read(self.live.folder.supervisor)
            assert ready is not None
            self._registry = Registry(ready["registry"], self.live.folder.id, Timing())
        with contextlib.suppress(RegistryUnavailable):
            while events := self._registry.read_events(self._last):
                self._last = events[-1].id
                for event in events:
                    if event.kind == "steps":
                        teller = event.key.rpartition(":")[0]
                        self._told += [(at, step, teller) for step, at, _ in event.fields["rows"]]
                    elif event.kind == "view":
                        self._members = event.fields["members"]


class Torchrun:
    """`torchrun --max-restarts` with four workers; a context manager that ends it."""

    def __init__(
        self, work: Work, folder: Path, environment: Mapping[str, str] = ENVIRONMENT
    ) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = {**work.settings, "steps": str(ENDLESS)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(PEERS), "--max-restarts", "1000"]
        command += [str(Path(__file__).with_name("torchrun_job.py")), str(work.job), str(folder)]
        command += [str(CHECKPOINT_EVERY), *[f"{key}={value}" for key, value in settings.items()]]
        with (folder / "torchrun.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **environment, "TMPDIR": str(folder)},
            )

    def __enter__(self) -> Torchrun:
        until = time.monotonic() + BEGIN_S
        try:
            while not self.steps() or self.steps()[-1][1] < 20:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise TimeoutError(f"torchrun does not begin: {self._said()}")
                time.sleep(0.1)
        except BaseException:  # there is no `with` yet that would end it
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """All of it, whatever state it is in."""
        self._process.kill()
        self._process.wait()
        for pid in self._workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def steps(self, without: Peer = "") -> list[tuple[float, int]]:
        """Those of all ranks, each in its own line: a step is there once for each rank."""
        found = []
        for log in self._folder.glob("rank-*.log"):
            for line in log.read_text("utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # the last one of a rank that is killed may lack its end
                    step, at = line.split()
                    found.append((float(at), int(step)))
        return sorted(found)

    def kill_one(self, draw: random.Random) -> Killed:
        until = time.monotonic() + BEGIN_S
        while time.monotonic() < until:
            workers = self._workers()
            if workers:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself: another one
                    at = time.time()
                    os.kill(draw.choice(workers), signal.SIGKILL)
                    return Killed(at)
            time.sleep(GLANCE_S)
        raise TimeoutError(f"there is no worker to be killed: {self._said()}")

    def is_whole(self) -> bool:
        return len(self._workers()) == PEERS

    def _said(self) -> str:
        return (self._folder / "torchrun.log").read_text("utf-8", "replace")[-2000:]

    def _workers(self) -> list[int]:
        """They are known by the folder they were given, whether they train already or not."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.fsencode(self._folder) in (process / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return sorted(pid for pid in found if pid != self._process.pid)
