"""Creating a run: its folder and supervisor, a look at the job, the spec, the first invocations.

Either all of it succeeds, or nothing of the run is left. What comes after is `runs.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from fault.errors import (
    JobNotFound,
    MayflyError,
    PlatformUnavailable,
    RegistryUnavailable,
    RunExists,
    RunStopped,
    Unavailable,
)
from fault.records import Timing
from fault.registry import Registry
from launcher.emulator_client import EmulatorClient
from launcher.home import Home, RunFolder, writing_to
from launcher.inquiry import JobRequest, ask, reported
from launcher.inviting import invite
from launcher.options import Options
from launcher.platform import LOOK_SUFFIX, Platform
from launcher.preflight import Findings
from launcher.preload import imports_of
from launcher.processes import FUNCTION, START_SECONDS
from p2p.aggregate.engine.build import engine_path
from p2p.spec import Collective, Compress, Links, RunSpec
from p2p.transport.keys import new_keys, read_keys, write_keys

LOOK_PATIENCE_S = 600.0
"""More than the emulator's limits for making a snapshot and for a look come to."""


def create(home: Home, run: str, options: Options) -> RunFolder:
    """Starts a run and returns as soon as its first functions are invoked.

    Raises what is wrong with the job or the surroundings; then nothing is left of the run.
    """
    job = options.job.absolute()
    if not job.is_file():
        raise JobNotFound(f"there is no file {job}")
    if _stores(options):
        # here, where it can be said that it takes a while; the supervisor finds it made
        engine_path(lambda line: print(line, file=sys.stderr, flush=True))
    if options.store:
        from p2p.aggregate.storing import check_store  # brings in numpy

        check_store(options.store)
    if options.registry:
        _check_registry(options.registry, run, options.timing)
    keys = new_keys() if options.keys is None else read_keys(options.keys)
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
            "relays": options.relays,
            "relay_listen": options.relay_listen,
            "workers": options.workers,
            "stores": _stores(options),
            "store": options.store,
            "start": options.start,
            "preload": imports_of(job),
            "listen": options.listen,
            "timing": asdict(options.timing),
        }
        write_keys(keys, folder.keys)
        folder.write(folder.plan, plan)
        supervisor = start_supervisor(folder)  # it comes up while the job is looked at
        import boto3  # noqa: F401 (the first functions are invoked by it; now there is time)

        findings = _preflight(folder, job, options, supervisor)
        options.check_kills(findings.steps)
        options.check_time_limit(findings.import_s, findings.build_s, findings.step_s)
        ready = wait_until_up(folder, supervisor)
        folder.write(folder.plan, {**plan, "samples": findings.samples, "steps": findings.steps})
        # the supervisor read the plan before the job was known; it looks again at the end
        spec = _spec(folder, options, job, findings, ready)
        _launch(folder, spec, ready)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or _was_stopped(folder)
        if supervisor is not None:
            end_supervisor(supervisor)
        home.remove(folder)
        if stopped:
            raise RunStopped(f"run {run} was stopped before it began") from None
        raise
    return folder


def _stores(options: Options) -> int:
    """How many of its own the run has."""
    if options.aggregate != "database" or options.store:
        return 0
    return options.peers if options.stores == "per-peer" else 1


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


def end_supervisor(supervisor: subprocess.Popen[bytes]) -> None:
    supervisor.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(10.0)
    supervisor.kill()  # what it owns dies with it
    supervisor.wait()


def start_supervisor(folder: RunFolder) -> subprocess.Popen[bytes]:
    with writing_to(folder.path), (folder.logs / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.supervisor", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_until_up(folder: RunFolder, supervisor: subprocess.Popen[bytes]) -> dict[str, Any]:
    until = time.monotonic() + 2 * START_SECONDS
    while time.monotonic() < until:
        ready = folder.read(folder.supervisor)
        if ready is not None and ready["pid"] == supervisor.pid:  # and not a dead one's
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
    parts = options.shards * max(1, options.workers)
    request = JobRequest(
        str(job), parts, dict(options.settings), options.threads, options.aggregate
    )
    if options.start == "snapshot":
        # a function has everything imported; whatever it does not like, or dies of, is for a
        # process to say in which nothing but the job is
        endpoint = wait_until_up(folder, supervisor)["endpoint"]
        emulator = EmulatorClient(endpoint, timeout_s=LOOK_PATIENCE_S)
        with contextlib.suppress(PlatformUnavailable):
            return Findings(**emulator.call(FUNCTION + LOOK_SUFFIX, asdict(request)))

    def meanwhile() -> None:
        if supervisor.poll() is not None:
            raise _why_it_ended(folder)

    file = folder.path / "preflight.json"
    return Findings(**ask("launcher.preflight", file, request, meanwhile=meanwhile))


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
        sockets=ready["sockets"],
        checkpoints=folder.checkpoints.as_uri(),
        collective=cast(Collective, options.collective),
        links=cast(Links, options.links),
        compress=cast(Compress, options.compress),
        overlap=options.overlap and findings.gradients_come_once,
        checkpoint_every=options.checkpoint_every,
        evaluate_every=findings.evaluate_every,
        function=FUNCTION,
        aggregate="database" if options.aggregate == "database" else "peers",
        workers=options.workers,
        robust=options.robust,
        sabotage=options.sabotage,
        stores=tuple(ready["stores"]),
        prefix=f"{folder.id}:{secrets.token_hex(4)}",
        threads=options.threads,
        kills=options.kills,
        timing=options.timing,
    )


def _launch(folder: RunFolder, spec: RunSpec, ready: dict[str, Any]) -> None:
    registry = Registry(ready["registry"], spec.run, spec.timing, timeout_s=5.0)
    platform = Platform(FUNCTION, ready["endpoint"])
    try:
        folder.write_text(folder.spec, spec.to_json())
        if not registry.create(spec.to_json(), spec.slots):
            raise RunExists(f"the registry at {registry.where} has a run {spec.run} already")
        try:
            first = [(slot, 1) for slot in range(spec.slots)]
            invite(first, registry, ready["registry"], platform, folder.path)
        except BaseException:
            # the registry may be one that stays; a run that never began must not hold its id there
            with contextlib.suppress(RegistryUnavailable):
                registry.delete_run()
            raise
    finally:
        registry.close()
