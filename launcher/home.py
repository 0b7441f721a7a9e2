"""Where runs live on this machine: HOME/runs/ID, and what is in such a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fault.errors import InputError, RunExists, RunUnknown, StorageFull, StorageUnavailable
from fault.registry import Event

HOME_VARIABLE = "MAYFLY_HOME"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Says in a line what is wrong with the disk under `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"the disk under {folder} is full: make room, or use --home"
            ) from None
        raise StorageUnavailable(f"{folder} cannot be used: {error.strerror}") from None


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.plan = path / "run.json"
        """What the launcher asked for; read by the supervisor."""
        self.spec = path / "spec.json"
        """What the run is (`p2p.spec`); there from the moment at which it exists."""
        self.supervisor = path / "supervisor.json"
        """Written by the supervisor when everything it owns is up."""
        self.failure = path / "failure.json"
        """Why the supervisor could not start."""
        self.summary = path / "summary.json"
        """How the run ended; written once, when nothing of it is left."""
        self.events = path / "events.jsonl"
        self.metrics = path / "metrics.jsonl"
        """What evaluations found, a line each."""
        self.keys = path / "keys"
        """Those of `p2p.transport.keys`."""
        self.lock = path / "supervisor.lock"
        self.logs = path / "logs"
        self.function_logs = path / "logs" / "functions"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final.safetensors"

    def exists(self) -> bool:
        return self.path.is_dir()

    def read(self, file: Path) -> dict[str, Any] | None:
        """A JSON object, or None when the file is not there. Raises StorageUnavailable."""
        try:
            value: object = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise StorageUnavailable(f"{file} is damaged: it is no JSON object")
        return value

    def write(self, file: Path, value: dict[str, Any]) -> None:
        """A JSON object, whole or not at all."""
        self.write_text(file, json.dumps(value, indent=1) + "\n")

    def write_text(self, file: Path, text: str) -> None:
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        with writing_to(self.path):
            draft.write_text(text, "utf-8")
            draft.replace(file)

    def spec_text(self) -> str:
        """The run's spec as JSON; empty for a run that never began."""
        try:
            return self.spec.read_text("utf-8")
        except FileNotFoundError:
            return ""

    def read_events(self) -> Iterator[Event]:
        """What happened so far, as far as it was written; the last line may be cut off."""
        try:
            lines = self.events.read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            with suppress(ValueError, TypeError):
                yield Event(**json.loads(line))

    def remove_sockets(self) -> None:
        """Servers that were killed leave theirs behind."""
        for socket in self.path.glob("*.sock*"):
            socket.unlink(missing_ok=True)

    def supervisor_pid(self) -> int:
        """Of whom holds the lock, or held it last; 0 when nobody has yet."""
        try:
            return int(self.lock.read_text("ascii") or 0)
        except FileNotFoundError:
            return 0

    def alive(self) -> bool:
        """Whether the run has a supervisor; it holds the lock for as long as it lives."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR)
        except OSError:
            return False
        try:
            # shared: several may look at once
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


class Home:
    """All runs of a user on this machine; `path` defaults to $MAYFLY_HOME or ~/.mayfly."""

    def __init__(self, path: Path | None = None) -> None:
        given = path or os.environ.get(HOME_VARIABLE) or Path.home() / ".mayfly"
        self.path = Path(given).expanduser().absolute()

    def create(self, run: str) -> RunFolder:
        """Raises RunExists, InputError for a name that cannot be one, StorageFull."""
        if not RUN_ID.fullmatch(run):
            raise InputError(
                f"{run!r} cannot name a run: use up to 64 letters, digits, '.', '_' and '-'"
            )
        folder = RunFolder(self.path / "runs" / run)
        with writing_to(self.path):
            folder.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                folder.path.mkdir(mode=0o700)
            except FileExistsError:
                raise RunExists(
                    f"there is a run {run} in {self.path}: choose another --run-id, "
                    f"or remove it with 'p2p-launch rm {run}'"
                ) from None
            try:
                folder.function_logs.mkdir(parents=True)
            except OSError:
                shutil.rmtree(folder.path, ignore_errors=True)
                raise
        return folder

    def find(self, run: str) -> RunFolder:
        """Raises RunUnknown."""
        folder = RunFolder(self.path / "runs" / run)
        if not RUN_ID.fullmatch(run) or not folder.exists():
            raise RunUnknown(f"there is no run {run} in {self.path}; 'p2p-launch list' shows all")
        return folder

    def runs(self) -> list[RunFolder]:
        """The oldest first."""
        parent = self.path / "runs"
        paths = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        return [RunFolder(path) for path in sorted(paths, key=lambda path: path.stat().st_ctime)]

    def remove(self, folder: RunFolder) -> None:
        """Raises InputError for a run that is alive."""
        if folder.alive():
            raise InputError(f"run {folder.id} is alive: 'p2p-launch stop {folder.id}' first")
        with writing_to(self.path):
            shutil.rmtree(folder.path)
