"""Child processes that never outlive their parent, restarted when they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.home import writing_to

# Runs in the child: bind its life to that of its parent, then become the command. A preexec_fn
# would do the same between fork and exec, where a process with threads may hang.
BIND_AND_BECOME = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""
RESTART_DELAY_S = 0.2


def bound_command(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` for as long as the calling process lives."""
    return [sys.executable, "-I", "-S", "-c", BIND_AND_BECOME, str(os.getpid()), *command]


class Child:
    """One process that should run until `stop`. Start it from a thread that stays."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.command = command
        self.log = log
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ensure(self) -> bool:
        """Starts the process if it is not running, at most every 0.2 s; True when it did."""
        if self.alive() or time.monotonic() - self._started_at < RESTART_DELAY_S:
            return False
        self._started_at = time.monotonic()
        with writing_to(self.log.parent):
            log = self.log.open("ab")
        with log:
            self._process = subprocess.Popen(
                bound_command(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                start_new_session=True,  # a Ctrl-C for the launcher is none for the run
            )
        return True

    def adopt(self, other: Child) -> None:
        """Takes over the process that `other` has started; this one's command restarts it."""
        self._process, other._process = other._process, None

    def stop(self, seconds: float = 5.0) -> None:
        """Ends the process, by force after `seconds`, and waits for it."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
