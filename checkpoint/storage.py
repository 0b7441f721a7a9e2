"""Where checkpoints are kept: a handful of objects with atomic writes.

`Storage` is all that the rest of this package knows of a place: a bucket would do as well as a
folder. Not for anything a step waits on: every write is synced to the disk before it returns.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from fault.errors import CheckpointDamaged, InputError, StorageFull, StorageUnavailable

Bytes = bytes | bytearray | memoryview

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNREADABLE = (errno.EIO, errno.EISDIR)
"""What a single damaged object answers; anything else is wrong with the whole place."""
_PUT_ATTEMPTS = 5
_TEMPORARY = ".tmp"


class Storage(Protocol):
    """Objects named ``folder/name``. Every call may raise StorageUnavailable."""

    def put(self, name: str, parts: Iterable[Bytes]) -> None:
        """Writes the parts one after the other as one object, in place of any former one.

        Whoever reads sees the whole object or the former one, and once this returns it survives
        the loss of every process. Raises StorageFull when there is no room; nothing remains then.
        """

    def get(self, name: str) -> bytes | None:
        """The object's bytes; None if there is none. CheckpointDamaged if it cannot be read."""

    def folders(self) -> list[str]:
        """The folders there are, in no particular order."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Name (within the folder) and size in bytes of each object; empty without the folder."""

    def delete(self, folder: str) -> None:
        """Removes the folder and all in it, if it is there."""

    def delete_object(self, name: str) -> None:
        """Removes one object, if it is there."""


class LocalFolder:
    """Objects as files under a folder, which is made when the first one is put."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def __repr__(self) -> str:
        return f"LocalFolder({str(self.path)!r})"

    def put(self, name: str, parts: Iterable[Bytes]) -> None:
        target = self.path / name
        parts = tuple(parts)
        for _ in range(_PUT_ATTEMPTS):
            try:
                self._put_once(target, parts)
                return
            except FileNotFoundError:
                continue  # the folder was retired between two of our calls; make it again
            except OSError as error:
                raise self._translated(error, target, "written") from error
        raise StorageUnavailable(
            f"{target} cannot be written: its folder is removed again and again"
        )

    def get(self, name: str) -> bytes | None:
        target = self.path / name
        try:
            return target.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _UNREADABLE:
                raise CheckpointDamaged(f"{target} cannot be read: {error.strerror}") from error
            raise self._translated(error, target, "read") from error

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._translated(error, self.path, "read") from error

    def sizes(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        try:
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    if entry.name.endswith(_TEMPORARY):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # retired while we look
                        found[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._translated(error, self.path / folder, "read") from error
        return found

    def delete(self, folder: str) -> None:
        target = self.path / folder
        try:
            shutil.rmtree(target)
            _sync_folder(self.path)
        except FileNotFoundError:
            pass  # another peer retires the same checkpoint
        except OSError as error:
            # ENOTEMPTY: a slow peer puts its piece just now; the next retirement takes that too
            if error.errno != errno.ENOTEMPTY:
                raise self._translated(error, target, "removed") from error

    def delete_object(self, name: str) -> None:
        target = self.path / name
        try:
            target.unlink(missing_ok=True)
            _sync_folder(target.parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._translated(error, target, "removed") from error

    def _put_once(self, target: Path, parts: tuple[Bytes, ...]) -> None:
        _make_folder(target.parent)
        # hidden, and drawn at random: two processes may write the same object at the same time
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_TEMPORARY}")
        try:
            with fresh.open("xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        _sync_folder(target.parent.parent)  # another peer may just have made the folder

    def _translated(
        self, error: OSError, target: Path, done: str
    ) -> StorageFull | StorageUnavailable:
        reason = error.strerror or str(error)
        if done == "written" and error.errno in _FULL:
            return StorageFull(
                f"no room to write {target}: {reason}; make room under {self.path}, "
                "the newest complete checkpoint is untouched"
            )
        return StorageUnavailable(f"{target} cannot be {done}: {reason}")


def open_storage(url: str) -> Storage:
    """The storage a URL names: ``file:///absolute/path``, percent-encoded as `Path.as_uri` does.

    Nothing is made or contacted yet. Raises InputError for any other kind of URL.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url!r} is no URL for checkpoints: {error}") from None
    if parts.scheme != "file":
        kind = f"{parts.scheme}://" if parts.scheme else "no URL"
        raise InputError(
            f"checkpoints cannot be kept at {url!r} ({kind}): give file:///absolute/path"
        )
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"{url!r} names the host {parts.netloc!r}: give file:///absolute/path")
    if parts.query or parts.fragment:
        raise InputError(f"{url!r} has a '?' or '#': write them as %3F and %23 in a file:// URL")
    path = unquote(parts.path)
    if not path.startswith("/") or "\0" in path:
        raise InputError(f"{url!r} names no absolute path: give file:///absolute/path")
    return LocalFolder(Path(path))


def _make_folder(folder: Path) -> None:
    """Makes the folder and its parents, each entry synced, or a power cut takes all in it."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
