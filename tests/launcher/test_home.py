"""Folders of runs: made once, private, found by id, removed when nothing of them is alive."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from fault.errors import InputError, RunExists, RunUnknown, StorageUnavailable
from launcher.home import Home


def test_a_run_has_a_private_folder_once(tmp_path: Path) -> None:
    """Others on the machine see nothing of it, and a second run of its name is refused."""
    home = Home(tmp_path / "a home" / "below")
    folder = home.create("first")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with pytest.raises(RunExists, match="first"):
        home.create("first")
    assert [each.id for each in home.runs()] == ["first"]
    assert home.find("first").path == folder.path


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    """Neither to make a run nor to find one."""
    with pytest.raises(InputError):
        Home(tmp_path).create(name)
    with pytest.raises(RunUnknown):
        Home(tmp_path).find(name)


def test_a_home_that_cannot_be_one(tmp_path: Path) -> None:
    """A file in the way is told in a line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="file"):
        Home(tmp_path / "file").create("run")


def test_a_live_run_is_not_removed(tmp_path: Path) -> None:
    """Its supervisor holds the lock; when it ends, however it ends, the lock is free."""
    home = Home(tmp_path)
    folder = home.create("run")
    lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert folder.alive()
    with pytest.raises(InputError, match="alive"):
        home.remove(folder)
    os.close(lock)
    assert not folder.alive()
    home.remove(folder)
    assert home.runs() == []


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """And what was never written is None."""
    folder = Home(tmp_path).create("run")
    assert folder.read(folder.summary) is None
    folder.write(folder.summary, {"state": "finished"})
    assert folder.read(folder.summary) == {"state": "finished"}
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []
