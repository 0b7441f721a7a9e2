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
from fault.records import Timing
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


@dataclass(frozen=True)
class Work:
    """A job and its settings; it is trained for as long as it is measured."""

    job: Path
    settings: Mapping[str, str]


class Subject(Protocol):
    """Something that trains. Times are seconds of `time.time`."""

    def steps(self) -> list[tuple[float, int]]:
        """(time, step) of each step that anyone has finished, in the order of time."""
        ...

    def kill_one(self, draw: random.Random) -> float:
        """SIGKILL to one of the processes that train, at random; the time of it."""
        ...

    def is_whole(self) -> bool:
        """Whether as many train as are meant to."""
        ...


class Ours:
    """`p2p-launch run` with four peers; a context manager that ends it."""

    def __init__(self, work: Work, home: Path, name: str, *options: str) -> None:
        settings = [f"--set={key}={value}" for key, value in work.settings.items()]
        options = (*options, f"--checkpoint-every={CHECKPOINT_EVERY}", f"--peers={PEERS}")
        options = (*options, f"--set=steps={ENDLESS}", *settings)
        self.live = LiveRun(work.job, home, name, options)
        self._home = home
        self._registry: Registry | None = None
        self._last = "0-0"
        self._steps: dict[int, float] = {}
        self._members = 0

    def __enter__(self) -> Ours:
        self.live.wait_for_step(20)
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

    def steps(self) -> list[tuple[float, int]]:
        self._read()
        return [(self._steps[step], step) for step in sorted(self._steps)]

    def kill_one(self, draw: random.Random) -> float:
        while (pid := self.live.process_of(draw.randrange(PEERS))) is None:
            time.sleep(GLANCE_S)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        return at

    def is_whole(self) -> bool:
        self._read()
        return self._members == PEERS

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
                        for step, at, _ in event.fields["rows"]:
                            self._steps.setdefault(step, at)
                    elif event.kind == "view":
                        self._members = len(event.fields["members"])


class Torchrun:
    """`torchrun --max-restarts` with four workers; a context manager that ends it."""

    def __init__(self, work: Work, folder: Path) -> None:
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
                env={**os.environ, **ENVIRONMENT},
            )

    def __enter__(self) -> Torchrun:
        until = time.monotonic() + 120.0
        while not self.steps() or self.steps()[-1][1] < 20:
            if time.monotonic() > until or self._process.poll() is not None:
                self.end()
                raise TimeoutError((self._folder / "torchrun.log").read_text("utf-8")[-2000:])
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """All of it, whatever state it is in; workers are known by the folder they were given."""
        self._process.kill()
        self._process.wait()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.fsencode(self._folder) in (process / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    def steps(self) -> list[tuple[float, int]]:
        """A step counts when all ranks have finished it, as it does in a checkpoint or a result."""
        found = [(at, step) for rank in range(PEERS) for step, at in self._finished(rank)]
        return sorted(found)

    def kill_one(self, draw: random.Random) -> float:
        workers = self._workers()
        at = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[draw.randrange(len(workers))], signal.SIGKILL)
        return at

    def is_whole(self) -> bool:
        return True

    def _lines(self, rank: int, kind: str) -> list[list[str]]:
        log = self._folder / f"rank-{rank}.log"
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        fields = [line.split() for line in lines]
        return [each for each in fields if len(each) == 3 and each[0] == kind]

    def _finished(self, rank: int) -> list[tuple[int, float]]:
        return [(int(step), float(at)) for _, step, at in self._lines(rank, "step")]

    def _workers(self) -> list[int]:
        """The newest process of each rank."""
        starts = [self._lines(rank, "start") for rank in range(PEERS)]
        return [int(lines[-1][1]) for lines in starts if lines]
