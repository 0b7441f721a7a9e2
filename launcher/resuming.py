"""Resuming a run of which nothing lives any more: stopped, failed, or killed as a whole.

The records of the registry and the checkpoints are in the run's folder, and so is the spec; only
the first two know how far the run was. What is left of them decides: with the records, peers go on
from the newest checkpoint under new views; without them, the run is created again and its first
view starts from the newest checkpoint. Either way the steps since then are computed again, to the
same bits.
"""

from __future__ import annotations

import os
import time

from fault.errors import InputError, Refused, RegistryUnavailable, RunEnded
from fault.records import Timing
from fault.registry import Registry
from launcher.creation import end_supervisor, start_supervisor, wait_until_up
from launcher.home import RunFolder
from launcher.inviting import invite
from launcher.platform import Platform
from launcher.processes import FUNCTION
from launcher.revival import open_slots
from p2p.spec import RunSpec, job_digest


def resume(folder: RunFolder) -> None:
    """Starts what the run needs and its functions; returns as soon as they are invoked.

    Raises RunEnded for a finished run, InputError for one that is alive or never began, and Refused
    when this installation or the job file would not compute the run's bits.
    """
    plan, spec = _check(folder)
    folder.write(folder.plan, {**plan, "launcher": os.getpid()})
    supervisor = start_supervisor(folder)
    try:
        ready = wait_until_up(folder, supervisor)
        _invoke(folder, spec, ready["registry"], ready["endpoint"])
    except BaseException:
        end_supervisor(supervisor)
        raise


def _check(folder: RunFolder) -> tuple[dict[str, object], RunSpec]:
    if folder.alive():
        raise InputError(f"run {folder.id} is alive: 'p2p-launch attach {folder.id}' shows it")
    summary = folder.read(folder.summary)
    if summary is not None and summary["state"] == "finished":
        raise RunEnded(f"run {folder.id} has finished; its weights are {folder.final}")
    plan = folder.read(folder.plan)
    text = folder.spec_text()
    if plan is None or not text:
        raise InputError(f"run {folder.id} never began; remove it and run the job again")
    spec = RunSpec.from_json(text)
    spec.check_versions()
    if job_digest(spec.job) != spec.job_digest:
        raise Refused(
            f"{spec.job} has changed since run {folder.id} was created; put the file back, "
            "or begin another run"
        )
    return plan, spec


def _invoke(folder: RunFolder, spec: RunSpec, registry_url: str, endpoint: str) -> None:
    """The supervisor has opened the run again; what it finds open later, it invokes itself."""
    registry = Registry(registry_url, spec.run, spec.timing, timeout_s=5.0)
    platform = Platform(FUNCTION, endpoint)
    try:
        slots = open_slots(registry.read(), spec.timing)
        invite(slots, registry, registry_url, platform, folder.path)
    finally:
        registry.close()


def reopen(folder: RunFolder, registry: Registry, timing: Timing) -> None:
    """The supervisor's part, before anyone may look: the records say that the run goes on.

    Does nothing for a run that is only being created. Raises RegistryUnavailable when the
    registry, which may have to read a long log back, does not answer for long.
    """
    text = folder.spec_text()
    if not text:
        return
    registry.wait_until_up(10.0)
    until = time.monotonic() + 10.0
    while not (registry.reopen() or registry.create(text, RunSpec.from_json(text).slots)):
        outcome = registry.read().outcome
        if outcome is not None and outcome.state == "finished":
            return  # it finished while its supervisor was away
        if time.monotonic() > until:
            raise RegistryUnavailable(f"the records of run {folder.id} cannot be opened again")
