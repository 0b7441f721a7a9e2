"""A relay in a process of its own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], object], limit_s: float = 15.0) -> None:
    """Waits for it."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


class RelayProcess:
    """On an endpoint that stays the same when it is started again."""

    def __init__(self, folder: Path, name: str, endpoint: str | None = None, *options: str) -> None:
        self._options = options
        self.ready = folder / f"{name}.ready"
        self.endpoint = endpoint or f"ipc://{folder}/{name}"
        self.start()

    def start(self) -> None:
        self.ready.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "p2p.transport.relay",
                "--bind",
                self.endpoint,
                "--ready-file",
                str(self.ready),
                *self._options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        until(self.ready.exists)
        self.endpoint = self.ready.read_text().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def memory_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
