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
import gc
import json
import os
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
from fault.registry import Event, Registry
from launcher.blame import Blame
from launcher.emulator_client import Listener
from launcher.home import RunFolder, writing_to
from launcher.inquiry import report
from launcher.inviting import invite
from launcher.platform import EVALUATION_SUFFIX, Platform
from launcher.processes import FUNCTION, Processes
from launcher.relay_counts import relay_counts
from launcher.resuming import reopen
from launcher.revival import Boots, Revival, Standstill
from launcher.summary import Story, summarize
from p2p.aggregate.storing import forget_run
from p2p.core import verdict_on
from p2p.invocation import evaluation_payload
from p2p.spec import RunSpec

POLL_S = 0.25
LOCK_SECONDS = 1.0
FAREWELL_SECONDS = 2.0
"""How long members have to leave once there is an outcome; who still boots is not waited for."""
EVALUATION_SECONDS_WAITED = 60.0
"""How long a finished run waits for the next result of an evaluation."""
EVALUATE_AGAIN_S = 20.0
"""After so long without one, those that are waited for are asked for once more."""
FREE_BYTES = 4 << 20
"""With less room than this on the disk, nothing can be promised any more."""


class Abandoned(Unavailable):
    """The launcher is gone, and nobody else is going to create this run."""


class Supervisor:
    """Over one run; `stopping` says whether the process was asked to end it."""

    def __init__(self, folder: RunFolder, stopping: Callable[[], bool]) -> None:
        self._folder = folder
        self._stopping = stopping
        plan = folder.read(folder.plan)
        if plan is None:
            raise InputError(f"{folder.path} is no run's folder")
        self._plan: dict[str, Any] = plan
        self._relay_counts: list[dict[str, int]] = []
        self._processes = Processes(folder, plan)
        self._timing = timing = Timing(**plan["timing"])
        self._registry = Registry(self._processes.registry_url, plan["run"], timing)
        self._revival = Revival(timing)
        self._boots = Boots()
        self._standstill = Standstill()
        self._blame = Blame(self._boots, self._standstill)
        self._story = Story()
        self._last_event = "0-0"
        for event in folder.read_events():  # of a run that is resumed
            self._last_event = event.id
            self._story.take([event])

    # --- watch ------------------------------------------------------------------------------

    def watch(self) -> None:
        """Starts everything; returns when the run has ended, one way or another."""
        self._check_room()
        self._processes.start()
        self._listener = Listener(self._processes.endpoint)
        reopen(self._folder, self._registry, self._timing)
        self._processes.announce()
        self._evaluate_again()
        while not self._stopping():
            time.sleep(POLL_S)
            self._check_room()
            self._processes.restart_what_died(self._emulator_restarted)
            try:
                if self._look():
                    return
            except RegistryUnavailable:
                self._revival.outage()
        self._stop()

    def _look(self) -> bool:
        """One round; True when the run has an outcome."""
        snapshot = self._registry.read()
        self._read_events()
        now = time.monotonic()
        self._hear(now)
        self._blame.tell(self._registry, now)
        self._keep_going(snapshot)
        abandoned = not self._story.created_at and os.getppid() != self._plan["launcher"]
        if abandoned and not self._registry.spec():
            raise Abandoned(f"the launcher of run {self._folder.id} ended before it began")
        if snapshot.outcome is None:
            return False
        self._story.outcome = asdict(snapshot.outcome)
        return True

    def _hear(self, now: float) -> None:
        for ended in self._listener.heard():
            self._blame.hear(ended, self._story.step, now)

    def _emulator_restarted(self) -> None:
        self._hear(time.monotonic())
        self._listener.close()
        self._listener = Listener(self._processes.endpoint)
        self._revival.platform_died()
        self._evaluate_again()

    def _evaluate_again(self) -> None:
        """What the platform had to deliver when it died is lost."""
        name, endpoint = FUNCTION + EVALUATION_SUFFIX, self._processes.endpoint
        platform = Platform(name, endpoint, patience_seconds=5.0)
        url = self._processes.registry_url
        with contextlib.suppress(PlatformUnavailable):
            for step in sorted(self._story.evaluating):
                platform.invoke(evaluation_payload(self._plan["run"], url, step))

    def _stop(self) -> None:
        outcome = Outcome("stopped", self._story.step, "", "RunStopped", "on request")
        try:
            if not self._registry.spec():
                raise RunStopped(f"run {self._folder.id} was stopped before it began")
            self._registry.finish(outcome)
        except RegistryUnavailable:
            # what is to be stopped is here, and needs no registry
            self._story.outcome = asdict(outcome)

    def _check_room(self) -> None:
        path = self._folder.path
        if shutil.disk_usage(path).free < FREE_BYTES:
            raise StorageFull(
                f"the disk under {path} is full; the run stopped: make room, or use --home"
            )

    def _read_events(self) -> None:
        while events := self._registry.read_events(self._last_event):
            # kept as they come: the registry trims its stream, and this process may be killed
            self._keep(self._folder.events, [asdict(event) for event in events])
            self._last_event = events[-1].id
            self._story.take(events)
            for event in events:
                self._note(event)

    def _keep(self, file: Path, records: list[dict[str, Any]]) -> None:
        lines = "".join([json.dumps(record) + "\n" for record in records])
        with writing_to(self._folder.path), file.open("a", encoding="utf-8") as opened:
            opened.write(lines)

    def _note(self, event: Event) -> None:
        fields = event.fields
        match event.kind:
            case "metrics":
                self._keep(self._folder.metrics, [{"time": event.time, **fields}])
            case "claimed":
                self._blame.claimed(fields["peer"])
            case "view":
                self._boots.joined(tuple(fields["members"]))
            case "boot_failed":
                self._boots.failed(
                    fields["peer"], fields["reason"], fields["error"], fields["trace"]
                )

    def _keep_going(self, snapshot: Snapshot) -> None:
        verdict = self._verdict(snapshot)
        if verdict is not None and snapshot.outcome is None and self._registry.spec():
            self._registry.finish(verdict)
            return
        slots = self._revival.slots_to_grant(snapshot, time.monotonic())
        platform = Platform(FUNCTION, self._processes.endpoint, patience_seconds=2.0)
        # a grant that nobody claims expires, and the slot is granted again
        with contextlib.suppress(PlatformUnavailable):
            invite(slots, self._registry, self._processes.registry_url, platform, self._folder.path)

    def _verdict(self, snapshot: Snapshot) -> Outcome | None:
        """Whether the run is to be given up. Members find the same, but none may be left."""
        for suspect in snapshot.suspects:
            if suspect.convicted:
                return verdict_on(suspect)
        slots = snapshot.target_slots
        members = snapshot.view.members if snapshot.view is not None else ()
        members_left = any(peer in snapshot.leased for peer in members)
        stands_still = self._standstill.verdict(slots, self._story.step)
        return stands_still or self._boots.verdict(slots, members_left)

    # --- end --------------------------------------------------------------------------------

    def end(self, failure: MayflyError | None) -> None:
        """Lets the functions leave, keeps the history, stops everything."""
        if failure is None:
            with contextlib.suppress(RegistryUnavailable, StorageFull):
                self._wait_for_members()
                self._read_events()
                if self._story.outcome.get("state") == "finished":
                    self._wait_for_evaluations()
            with contextlib.suppress(MayflyError):
                endpoints = self._processes.relay_endpoints
                self._relay_counts = relay_counts(endpoints, self._folder.keys)
        self._processes.stop_functions()
        self._forget_in_store()
        self._registry.close()
        self._processes.stop_registry()
        if isinstance(failure, Abandoned):
            shutil.rmtree(self._folder.path, ignore_errors=True)
            return
        if failure is not None:
            self._story.outcome = {
                "state": "stopped" if isinstance(failure, RunStopped) else "failed",
                "error": type(failure).__name__,
                "reason": str(failure),
            }
        self._keep_summary()
        self._processes.remove_traces()

    def _forget_in_store(self) -> None:
        """A store that is not the run's own outlives it; what it has of the run is of no use."""
        outside, text = self._plan.get("store", ""), self._folder.spec_text()
        if outside and text:
            with contextlib.suppress(MayflyError):
                forget_run(outside, RunSpec.from_json(text).prefix)

    def _wait_for_members(self) -> None:
        until = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < until:
            snapshot = self._registry.read()
            members = snapshot.view.members if snapshot.view is not None else ()
            if not any(peer in snapshot.leased for peer in members):
                return
            time.sleep(0.05)

    def _wait_for_evaluations(self) -> None:
        waiting, since = -1, time.monotonic()
        again = since + EVALUATE_AGAIN_S
        while left := len(self._story.evaluating):
            if left != waiting:
                waiting, since = left, time.monotonic()
            elif self._stopping() or time.monotonic() - since > EVALUATION_SECONDS_WAITED:
                return
            elif time.monotonic() > again:
                again = time.monotonic() + EVALUATE_AGAIN_S
                self._evaluate_again()
            time.sleep(0.05)
            self._read_events()

    def _keep_summary(self) -> None:
        # the launcher has completed the plan since this process read it
        plan = self._folder.read(self._folder.plan) or self._plan
        summary = summarize(self._story, plan, str(self._folder.path), self._relay_counts)
        with contextlib.suppress(MayflyError):  # the launcher says that nothing is known
            self._folder.write(self._folder.summary, summary)


def _take(lock: int) -> bool:
    """False when another supervisor has it; who only looks whether one has it is soon gone."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)


def main() -> int:
    gc.freeze()  # modules stay: they need not be looked through, least of all at the end
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    folder = RunFolder(Path(sys.argv[1]))
    lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o600)
    if not _take(lock):
        print(f"run {folder.id} has a supervisor already", file=sys.stderr)
        return InputError.exit_code
    supervisor: Supervisor | None = None
    failure: MayflyError | None = None
    try:
        with writing_to(folder.path):
            for left in (folder.summary, folder.failure, folder.supervisor):
                left.unlink(missing_ok=True)  # of a run that is resumed
            os.ftruncate(lock, 0)  # a shorter number must not keep the end of a longer one
            os.write(lock, str(os.getpid()).encode())
        supervisor = Supervisor(folder, lambda: bool(asked))
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
