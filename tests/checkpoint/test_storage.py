"""A folder as storage: whole objects or none, and every failure named for what to do about it."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpoint.storage import LocalFolder, open_storage
from fault.errors import CheckpointDamaged, InputError, StorageUnavailable


def test_objects_come_back(tmp_path: Path) -> None:
    """Parts are joined, a second put replaces the first, and listings tell names and sizes."""
    storage = LocalFolder(tmp_path / "deep" / "down")
    assert storage.folders() == []
    assert storage.sizes("a") == {}
    assert storage.get("a/x") is None
    storage.put("a/x", [b"one", memoryview(b"two"), bytearray(b"!")])
    storage.put("a/y", [])
    storage.put("b/x", [b"other"])
    assert storage.get("a/x") == b"onetwo!"
    assert sorted(storage.folders()) == ["a", "b"]
    assert storage.sizes("a") == {"x": 7, "y": 0}
    storage.put("a/x", [b"short"])
    assert storage.get("a/x") == b"short"


def test_deleting_twice_is_deleting_once(tmp_path: Path) -> None:
    """Objects and folders go, and those that are gone already are no error."""
    storage = LocalFolder(tmp_path / "root")
    for _ in range(2):
        storage.delete("a")
        storage.delete_object("a/x")
    storage.put("a/x", [b"1"])
    storage.put("a/y", [b"2"])
    storage.delete_object("a/x")
    assert storage.sizes("a") == {"y": 1}
    storage.delete("a")
    assert storage.folders() == []


@pytest.mark.parametrize("times", [1, 4])
def test_a_folder_removed_under_a_put_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Peers that retire a step while another still writes it do not make that write fail."""
    storage = LocalFolder(tmp_path)
    sync, retirements = os.fsync, iter(range(times))

    def overtaken(descriptor: int) -> None:
        sync(descriptor)
        if storage.sizes("a") == {} and any(storage.path.glob("a/.*")):
            for _ in itertools.islice(retirements, 1):
                storage.delete("a")

    monkeypatch.setattr(os, "fsync", overtaken)
    storage.put("a/x", [b"late"])
    assert next(retirements, None) is None
    assert storage.get("a/x") == b"late"


def test_readers_never_see_half_an_object(tmp_path: Path) -> None:
    """While one object is put over and over, every read gives one whole version of it."""
    storage = LocalFolder(tmp_path)
    versions = [bytes([turn]) * (1 << 16) for turn in range(20)]
    storage.put("a/x", [versions[0]])

    def write() -> None:
        for version in versions:
            storage.put("a/x", [version])

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert storage.get("a/x") in versions
        assert list(storage.sizes("a")) == ["x"]
    writer.join()
    assert storage.get("a/x") == versions[-1]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """On a real full file system: StorageFull, the former object as it was, no remains."""
    program = f"""
import sys
from pathlib import Path
from checkpoint.storage import LocalFolder
from fault.errors import StorageFull
storage = LocalFolder(Path({str(tmp_path)!r}))
storage.put("a/x", [b"former"])
try:
    storage.put("a/x", [b"1" * 100_000, b"2" * 900_000])
except StorageFull as error:
    print(error)
assert storage.get("a/x") == b"former"
storage.put("a/y", [b"there is room for a small one"])
"""
    limited = (resource.RLIMIT_FSIZE, (200_000, 200_000))
    command = [sys.executable, "-c", program]
    unshare = shutil.which("unshare")
    mount = f'mount -t tmpfs -o size=256k mayfly {tmp_path} && exec "$0" "$@"'
    if unshare and _succeeds([unshare, "-rm", "sh", "-c", mount, "true"]):
        command = [unshare, "-rm", "sh", "-c", mount, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    else:  # no file system of our own to fill: a limit on the size of a file comes closest
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(*limited),
        )
        assert [each.name for each in tmp_path.glob("a/.*")] == []
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no room to write ")
    assert done.stdout.count("\n") == 1


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A file where the folder should be is StorageUnavailable for every call."""
    (tmp_path / "taken").write_bytes(b"")
    storage = LocalFolder(tmp_path / "taken")
    for call in (
        lambda: storage.put("a/x", [b"1"]),
        lambda: storage.get("a/x"),
        lambda: storage.folders(),
        lambda: storage.sizes("a"),
    ):
        with pytest.raises(StorageUnavailable, match="taken"):
            call()


def test_an_object_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    """What is wrong with a single object does not condemn the whole place."""
    (tmp_path / "a" / "x").mkdir(parents=True)
    with pytest.raises(CheckpointDamaged, match="a/x cannot be read"):
        LocalFolder(tmp_path).get("a/x")


def test_file_urls_open_folders(tmp_path: Path) -> None:
    """A path survives the way through a URL, whatever characters it has."""
    strange = tmp_path / "50% of #1? ü"
    for url in (strange.as_uri(), strange.as_uri().replace("file://", "file://localhost")):
        storage = open_storage(url)
        assert isinstance(storage, LocalFolder)
        assert storage.path == strange


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/run",
        "/plain/path",
        "file:relative",
        "file://host/path",
        "",
        "http://[",
        "file:",
        "file:///a#b",
        "file:///a?b",
        "file:///a%00b",
    ],
)
def test_other_urls_are_refused_in_one_line(url: str) -> None:
    """Anything but an absolute file:// URL is an InputError that names it and says what to give."""
    with pytest.raises(InputError) as caught:
        open_storage(url)
    assert repr(url) in str(caught.value)
    assert "\n" not in str(caught.value)
