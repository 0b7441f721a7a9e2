"""Every error of Mayfly, split by what the caller can do about it.

A `MayflyError` is meant for people: its text says what happened, to which peer, slot, step or
file, and what to do. The command line prints it as one line and exits with `exit_code`;
`docs/exit-codes.md` has a paragraph for each number. Anything else that escapes is a bug.
"""

from __future__ import annotations


class MayflyError(Exception):
    """Base of all errors that are shown to the user as one line."""

    exit_code = 1


# --- the input is at fault: mend it and try again ------------------------------------------


class InputError(MayflyError):
    """A value given on the command line or to the API cannot be used."""

    exit_code = 2


class JobNotFound(InputError):
    """There is no such job file."""

    exit_code = 10


class NoTask(InputError):
    """The job file defines no `task()` that returns a `p2p.Task`."""

    exit_code = 11


class TaskRaised(InputError):
    """The job file, or its `task()`, raised. `trace` is trimmed to the user's own file."""

    exit_code = 12

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class InvalidTask(InputError):
    """The task cannot be trained: not a map-style dataset, fewer samples than shards, …"""

    exit_code = 13


class TimeLimitTooShort(InputError):
    """A function's life is too short for a start and a step."""

    exit_code = 15


class ShadowedName(InputError):
    """A file beside the job has the name of one of Mayfly's own packages."""

    exit_code = 14


class ImpureTask(InvalidTask):
    """The task computes other bits from the same state, shard and step."""

    exit_code = 16


class RunExists(InputError):
    """A run with this id is there already."""

    exit_code = 20


class RunUnknown(InputError):
    """There is no run with this id."""

    exit_code = 21


class RunEnded(InputError):
    """The run is over, so there is nothing to attach to, to scale or to resume."""

    exit_code = 22


class RunNotAlive(InputError):
    """The run has not ended, but nothing of it is running."""

    exit_code = 23


# --- the surroundings are at fault: repair them, then retry or resume ----------------------


class Unavailable(MayflyError):
    """Something Mayfly needs does not answer; retrying may help."""

    exit_code = 30


class RegistryUnavailable(Unavailable):
    """The registry's server does not answer."""

    exit_code = 31


class StorageFull(Unavailable):
    """The disk under the run's folder is full."""

    exit_code = 32


class PlatformUnavailable(Unavailable):
    """Functions cannot be invoked."""

    exit_code = 33


class CheckpointDamaged(MayflyError):
    """A checkpoint's bytes are not those its manifest promises."""

    exit_code = 34


class StorageUnavailable(Unavailable):
    """The place that keeps the checkpoints cannot be read or written."""

    exit_code = 35


class EngineUnavailable(Unavailable):
    """The store's engine cannot be compiled here."""

    exit_code = 36


class StoreUnavailable(Unavailable):
    """The store does not answer, or cannot do what is asked of it."""

    exit_code = 37


class StoreError(Unavailable):
    """The store refuses a command, in its own words: it is full, read-only, or gives no right."""

    exit_code = 38


# --- the run itself came to an end: read the reason ----------------------------------------


class RunFailed(MayflyError):
    """The run stopped; its last checkpoint is kept. `trace` is the function's own, if any."""

    exit_code = 40

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class NonFiniteLoss(RunFailed):
    """The loss of a step is NaN or infinite."""

    exit_code = 41


class OutOfMemory(RunFailed):
    """A function needs more memory than its limit."""

    exit_code = 42


class Poisoned(RunFailed):
    """A (shard, step) kills or stops every peer that computes it."""

    exit_code = 43


class BootFailed(RunFailed):
    """Functions die before they can join."""

    exit_code = 44


class Refused(RunFailed):
    """This process may not join: other hardware, versions or job file than the run's own."""

    exit_code = 45


class RunStopped(MayflyError):
    """The run was stopped on request."""

    exit_code = 50


class Detached(MayflyError):
    """The command ended before the run, which goes on."""

    exit_code = 51
