"""Creating a run, following it to its end, stopping it: what the command and `launcher.run` share.

The launcher is needed to create a run and for nothing else; from then on it only watches.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fault import errors
from fault.errors import (
    InputError,
    JobNotFound,
    MayflyError,
    RegistryUnavailable,
    RunExists,
    RunFailed,
    RunStopped,
    Unavailable,
)
from fault.records import Outcome, Timing
from fault.registry import Event, Registry
from launcher.child import bound_command
from launcher.home import Home, RunFolder, writing_to
from launcher.platform import Platform
from launcher.preflight import Findings, reported
from launcher.summary import Story
from launcher.supervisor import FUNCTION, START_SECONDS
from p2p.peer import event_payload
from p2p.spec import COLLECTIVES, SHARDS_LIMIT, RunSpec

STOP_SECONDS = 30.0
Show = Callable[[Story, list[Event]], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose of a run. Raises InputError for what does not go together."""

    job: Path
    peers: int = 4
    shards: int = 0
    """0 for as many as peers."""
    collective: str = "ring"
    settings: Mapping[str, str] = field(default_factory=dict)
    kills: tuple[tuple[int, int], ...] = ()
    time_limit_s: float = 900.0
    memory_mb: int = 3008
    registry: str = ""
    checkpoint_every: int = 50
    threads: int = 1
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", self.shards or self.peers)
        for holds, problem in (
            (self.peers >= 1, f"--peers {self.peers}: a run needs at least one"),
            (
                self.shards <= SHARDS_LIMIT,
                f"--shards {self.shards}: there can be up to {SHARDS_LIMIT}",
            ),
            (
                self.shards >= self.peers,
                f"--shards {self.shards} are too few for {self.peers} peers",
            ),
            (self.timing.patience_s > 0, "--patience must be positive"),
            (self.time_limit_s > 0, f"--time-limit {self.time_limit_s}: must be positive"),
            (self.memory_mb >= 128, f"--memory {self.memory_mb}: 128 MB are the least"),
            (self.checkpoint_every >= 1, "--checkpoint-every must be 1 at least"),
            (self.threads >= 1, "--threads must be 1 at least"),
            (
                self.collective in COLLECTIVES,
                f"--collective {self.collective}: it is one of {', '.join(COLLECTIVES)}",
            ),
        ):
            if not holds:
                raise InputError(problem)
        for slot, step in self.kills:
            if not 0 <= slot < self.peers or step < 0:
                raise InputError(f"--kill {slot}@{step}: the slots are 0 to {self.peers - 1}")

    def check_kills(self, steps: int) -> None:
        """Once the job has been looked at. Raises InputError for a step that never comes."""
        for slot, step in self.kills:
            if step >= steps:
                raise InputError(f"--kill {slot}@{step}: the run's steps are 0 to {steps - 1}")


def new_run_id(job: Path) -> str:
    """From the job's name and the time, with a random end."""
    stem = "".join(letter for letter in job.stem if letter.isalnum() or letter in "-_") or "run"
    return f"{stem[:32]}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def create(home: Home, run: str, options: Options) -> RunFolder:
    """Starts a run and returns as soon as its first functions are invoked.

    Raises what is wrong with the job or the surroundings; then nothing is left of the run.
    """
    job = options.job.absolute()
    if not job.is_file():
        raise JobNotFound(f"there is no file {job}")
    if options.registry:
        _check_registry(options.registry, run, options.timing)
    folder = home.create(run)
    supervisor: subprocess.Popen[bytes] | None = None
    try:
        plan = {
            "run": run,
            "launcher": os.getpid(),
            "job": str(job),
            "slots": options.peers,
            "shards": options.shards,
            "samples": 0,
            "steps": 0,
            "collective": options.collective,
            "registry": options.registry,
            "time_limit_s": options.time_limit_s,
            "memory_mb": options.memory_mb,
            "threads": options.threads,
            "timing": asdict(options.timing),
        }
        folder.write(folder.plan, plan)
        supervisor = _start_supervisor(folder)  # it comes up while the job is looked at
        findings = _preflight(folder, job, options, supervisor)
        options.check_kills(findings.steps)
        ready = _wait_until_up(folder, supervisor)
        folder.write(folder.plan, {**plan, "samples": findings.samples, "steps": findings.steps})
        # the supervisor read the plan before the job was known; it looks again at the end
        spec = _spec(folder, options, job, findings, ready)
        _launch(folder, spec, ready)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or _was_stopped(folder)
        if supervisor is not None:
            _end(supervisor)
        home.remove(folder)
        if stopped:
            raise RunStopped(f"run {run} was stopped before it began") from None
        raise
    return folder


def _check_registry(url: str, run: str, timing: Timing) -> None:
    registry = Registry(url, run, timing)
    try:
        registry.wait_until_up(3.0)
        if registry.spec():
            raise RunExists(f"the registry at {registry.where} has a run {run} already")
    finally:
        registry.close()


def _was_stopped(folder: RunFolder) -> bool:
    failure = folder.read(folder.failure)
    return failure is not None and failure["error"] == RunStopped.__name__


def _end(supervisor: subprocess.Popen[bytes]) -> None:
    supervisor.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(10.0)
    supervisor.kill()  # what it owns dies with it
    supervisor.wait()


def _start_supervisor(folder: RunFolder) -> subprocess.Popen[bytes]:
    with writing_to(folder.path), (folder.logs / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.supervisor", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_until_up(folder: RunFolder, supervisor: subprocess.Popen[bytes]) -> dict[str, Any]:
    until = time.monotonic() + 2 * START_SECONDS
    while time.monotonic() < until:
        ready = folder.read(folder.supervisor)
        if ready is not None:
            return ready
        if supervisor.poll() is not None:
            break
        time.sleep(0.01)
    raise _why_it_ended(folder)


def _why_it_ended(folder: RunFolder) -> MayflyError:
    failure = folder.read(folder.failure)
    if failure is not None:
        return reported(failure)
    said = (folder.logs / "supervisor.log").read_text("utf-8", "replace").splitlines()
    last = "".join([f": {line}" for line in said[-1:]])
    return Unavailable(f"the supervisor of run {folder.id} did not stay{last}")


def _preflight(
    folder: RunFolder, job: Path, options: Options, supervisor: subprocess.Popen[bytes]
) -> Findings:
    """Raises what is wrong with the job, or why the supervisor has ended meanwhile."""
    request = {
        "job": str(job),
        "shards": options.shards,
        "settings": dict(options.settings),
        "threads": options.threads,
    }
    file = folder.path / "preflight.json"
    folder.write(file, request)
    with subprocess.Popen(
        bound_command([sys.executable, "-P", "-m", "launcher.preflight", str(file)]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONHASHSEED": "0"},
    ) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, said = process.communicate(timeout=0.2)
                    break
                if supervisor.poll() is not None:
                    raise _why_it_ended(folder)
        except BaseException:
            process.kill()
            raise
    file.unlink(missing_ok=True)
    lines = out.splitlines()
    if process.returncode or not lines:
        last = "".join([f": {line}" for line in said.strip().splitlines()[-1:]])
        raise errors.TaskRaised(
            f"looking at {job.name} ended the process (exit code {process.returncode}){last}", said
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise reported(answer)
    return Findings(**answer)


def _spec(
    folder: RunFolder, options: Options, job: Path, findings: Findings, ready: dict[str, Any]
) -> RunSpec:
    return RunSpec(
        run=folder.id,
        job=str(job),
        settings=tuple(options.settings.items()),
        job_digest=findings.job_digest,
        seed=findings.seed,
        shards=options.shards,
        slots=options.peers,
        steps=findings.steps,
        samples=findings.samples,
        folder=str(folder.path),
        relays=tuple(ready["relays"]),
        checkpoints=folder.checkpoints.as_uri(),
        collective="butterfly" if options.collective == "butterfly" else "ring",
        checkpoint_every=options.checkpoint_every,
        function=FUNCTION,
        threads=options.threads,
        kills=options.kills,
        timing=options.timing,
    )


def _launch(folder: RunFolder, spec: RunSpec, ready: dict[str, Any]) -> None:
    registry = Registry(ready["registry"], spec.run, spec.timing, timeout_s=5.0)
    platform = Platform(FUNCTION, ready["endpoint"])
    try:
        if not registry.create(spec.to_json(), spec.slots):
            raise RunExists(f"the registry at {registry.where} has a run {spec.run} already")
        try:
            for slot in range(spec.slots):
                token = secrets.token_hex(8)
                if registry.grant(slot, 1, token, "launcher"):
                    platform.invoke(
                        event_payload(
                            spec.run, slot, 1, token, ready["registry"], str(folder.path), ""
                        )
                    )
        except BaseException:
            # the registry may be one that stays; a run that never began must not hold its id there
            with contextlib.suppress(RegistryUnavailable):
                registry.delete_run()
            raise
    finally:
        registry.close()


# --- while it runs, and after --------------------------------------------------------------------


def follow(folder: RunFolder, show: Show) -> dict[str, Any]:
    """Shows each event until nothing is left of the run; returns its summary.

    Raises Unavailable when the run has lost its supervisor.
    """
    story, last = Story(), "0-0"
    plan = folder.read(folder.plan) or {}
    timing = Timing(**plan["timing"])
    registry: Registry | None = None
    while folder.alive():
        try:
            if registry is None:
                ready = folder.read(folder.supervisor)
                if ready is None:
                    time.sleep(0.05)
                    continue
                registry = Registry(ready["registry"], folder.id, timing)
            events = [] if story.outcome else registry.read_events(last, block_ms=200)
        except RegistryUnavailable:
            events = []
        if not events:
            time.sleep(0.05)
        else:
            last = events[-1].id
            story.take(events)
        show(story, events)
    if registry is not None:
        registry.close()
    summary = folder.read(folder.summary)
    if summary is None:
        folder.remove_sockets()
        raise Unavailable(
            f"the supervisor of run {folder.id} is gone and the run has not ended; "
            f"its checkpoints are in {folder.checkpoints}"
        )
    return summary


def check_ended_well(summary: Mapping[str, Any]) -> None:
    """Raises the error that the run ended with, if it did not finish."""
    if summary["state"] == "finished":
        return
    if summary["state"] == "stopped":
        raise RunStopped(f"run {summary['run']} was stopped at step {summary['steps']}")
    kind = getattr(errors, summary["error"] or "RunFailed", RunFailed)
    reason = summary["reason"] or "no reason is known"
    if summary["trace"] and issubclass(kind, RunFailed | errors.TaskRaised):
        raise kind(reason, summary["trace"])
    raise kind(reason)


def stop(folder: RunFolder) -> None:
    """Ends a run that is alive, and returns when nothing of it is left."""
    asked, until = False, time.monotonic() + STOP_SECONDS
    while folder.alive():
        if not asked:
            asked = _stop_through_registry(folder) or _signal(folder, signal.SIGTERM)
        elif time.monotonic() > until:
            _signal(folder, signal.SIGKILL)  # what it owns dies with it
        time.sleep(0.05)


def _stop_through_registry(folder: RunFolder) -> bool:
    """False when it does not answer, or does not know the run yet."""
    ready = folder.read(folder.supervisor)
    if ready is None:
        return False
    plan = folder.read(folder.plan) or {}
    registry = Registry(ready["registry"], folder.id, Timing(**plan["timing"]))
    try:
        if not registry.spec():
            return False
        step = max([doing.step for doing in registry.read().doing.values()], default=0)
        registry.finish(Outcome("stopped", max(0, step), "", "RunStopped", "on request"))
    except RegistryUnavailable:
        return False
    finally:
        registry.close()
    return True


def _signal(folder: RunFolder, number: signal.Signals) -> bool:
    pid = folder.supervisor_pid()
    if not pid or not folder.alive():  # gone, and its number may be another's by now
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return True


def run(
    job: Path | str,
    *,
    home: Path | None = None,
    run_id: str = "",
    show: Show = lambda story, events: None,
    **options: Any,
) -> dict[str, Any]:
    """Runs a job to its end, as `p2p-launch run` does, and returns its summary.

    `options` are those of `Options`. Raises a `MayflyError` for a run that does not finish.
    """
    chosen = Options(Path(job), **options)
    folder = create(Home(home), run_id or new_run_id(chosen.job), chosen)
    try:
        summary = follow(folder, show)
    except KeyboardInterrupt:
        stop(folder)
        raise RunStopped(f"run {folder.id} was stopped") from None
    check_ended_well(summary)
    return summary


__all__ = ["MayflyError", "Options", "check_ended_well", "create", "follow", "run", "stop"]
