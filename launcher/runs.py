"""Following a run to its end, and stopping it: what the command and `launcher.run` share.

The launcher is needed to create a run (`creation.py`); from then on it only watches.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fault import errors
from fault.errors import (
    InputError,
    MayflyError,
    RegistryUnavailable,
    RunEnded,
    RunFailed,
    RunNotAlive,
    RunStopped,
)
from fault.records import Outcome, Timing
from fault.registry import Event, Registry
from launcher.creation import create
from launcher.home import Home, RunFolder
from launcher.options import Options, new_run_id
from launcher.summary import Story

STOP_SECONDS = 30.0
Show = Callable[[Story, list[Event]], None]


def follow(folder: RunFolder, show: Show) -> dict[str, Any]:
    """Shows each event until nothing is left of the run; returns its summary.

    Raises RunNotAlive when the run has lost its supervisor.
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
            # with an outcome the registry may be gone at any moment, so it is not waited for
            events = registry.read_events(last, block_ms=0 if story.outcome else 200)
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
        raise RunNotAlive(
            f"the supervisor of run {folder.id} is gone and the run has not ended: "
            f"'p2p-launch resume {folder.id}' goes on from its newest checkpoint"
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


def check_alive(folder: RunFolder) -> None:
    """Raises RunEnded for a run that is over, RunNotAlive for one that has lost its processes."""
    if folder.alive():
        return
    summary = folder.read(folder.summary)
    if summary is None:
        raise RunNotAlive(
            f"nothing of run {folder.id} is running, and it has not ended: "
            f"'p2p-launch resume {folder.id}' goes on"
        )
    raise RunEnded(
        f"run {folder.id} is over ({summary['state']}): 'p2p-launch status {folder.id}' says how"
    )


def scale(folder: RunFolder, slots: int) -> None:
    """Sets how many slots the run should have; returns at once, the members see to it.

    Raises RunEnded, RunNotAlive, and InputError for a number that the run cannot have.
    """
    check_alive(folder)
    plan, ready = folder.read(folder.plan) or {}, folder.read(folder.supervisor)
    if not 1 <= slots <= plan["shards"]:
        raise InputError(
            f"run {folder.id} has {plan['shards']} shards: it can have 1 to as many "
            f"slots, and not {slots}"
        )
    if ready is None or not folder.spec_text():
        raise RunNotAlive(f"run {folder.id} is just starting: try again in a moment")
    registry = Registry(ready["registry"], folder.id, Timing(**plan["timing"]))
    try:
        if not registry.scale(slots):
            raise RunEnded(f"run {folder.id} is over")
    finally:
        registry.close()


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


__all__ = [
    "MayflyError",
    "Options",
    "check_alive",
    "check_ended_well",
    "create",
    "follow",
    "new_run_id",
    "run",
    "scale",
    "stop",
]
