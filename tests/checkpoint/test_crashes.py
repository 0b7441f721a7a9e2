"""Real processes that are killed by SIGKILL while they write, at every point where it matters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.reader import Restored, manifest_of, newest, read, steps
from checkpoint.storage import LocalFolder
from checkpoint.writer import retire, try_complete, write_pieces

PIECES = 3
ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import os, signal, sys
folder, mine, last, deadly = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
from pathlib import Path
from checkpoint.storage import LocalFolder
from checkpoint.writer import retire, try_complete, write_pieces

count = 0
def watch(event, arguments):
    # every opening, renaming, making and removing of a file is a place to die at
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir"):
        count += 1
        if count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

storage = LocalFolder(Path(folder))
sys.addaudithook(watch)
step = 0
while step < last:
    step += 1
    image = bytes((step * 31 + each) % 251 for each in range(1000))
    write_pieces(storage, step, f"d{step}", image, 3, mine)
    if try_complete(storage, step, f"d{step}", 3):
        retire(storage, 1, step)
        print(step, flush=True)
print("end", flush=True)
"""


def image_of(step: int) -> bytearray:
    return bytearray((step * 31 + each) % 251 for each in range(1000))


def writing(folder: Path, mine: list[int], last: int, deadly: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", WRITER, str(folder), str(mine), str(last), str(deadly)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_a_kill_at_any_operation_loses_at_most_the_checkpoint_in_hand(tmp_path: Path) -> None:
    """For each file operation of a checkpoint's life in turn: the newest complete one is read."""
    deadly = 0
    outcomes: set[int] = set()
    while True:
        deadly += 1
        folder = tmp_path / str(deadly)
        storage = LocalFolder(folder)
        write_pieces(storage, 0, "d0", bytes(1000), PIECES, range(PIECES))
        assert try_complete(storage, 0, "d0", PIECES)
        process = writing(folder, [0, 1, 2], 1, deadly)
        output, _ = process.communicate(timeout=60)
        warnings: list[Exception] = []
        restored = read(storage, warnings.append)
        assert restored is not None
        assert not warnings, f"damage after a kill at operation {deadly}: {warnings}"
        for step in steps(storage):
            manifest_of(storage, step)  # raises for half a checkpoint that passes for a whole one
        outcomes.add(restored.step)
        expected = bytearray(1000) if restored.step == 0 else image_of(restored.step)
        assert restored == Restored(restored.step, f"d{restored.step}", expected)
        if "1" in output.split():
            assert restored.step == 1
        # whoever comes next completes it, and nothing of the broken attempt is in the way
        write_pieces(storage, 1, "d1", image_of(1), PIECES, range(PIECES))
        assert try_complete(storage, 1, "d1", PIECES)
        retire(storage, 1, 1)
        assert read(storage) == Restored(1, "d1", image_of(1))
        assert storage.folders() == ["step-00000001"]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert deadly > 30, "the kills did not reach into the writing"
    assert outcomes == {0, 1}


@pytest.mark.parametrize("seed", range(3))
def test_what_was_reported_durable_stays_readable(tmp_path: Path, seed: int) -> None:
    """Killed from outside in the middle of many checkpoints: the last reported is not lost."""
    process = writing(tmp_path, [0, 1, 2], 10_000, 0)
    assert process.stdout is not None
    reported = 0
    for _ in range(20 + 7 * seed):
        reported = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    reported = max([reported, *(int(line) for line in rest.split())])
    restored = read(LocalFolder(tmp_path))
    assert restored is not None
    assert restored.step in (reported, reported + 1)
    assert restored == Restored(restored.step, f"d{restored.step}", image_of(restored.step))


def test_peers_complete_a_checkpoint_together(tmp_path: Path) -> None:
    """Processes that share the pieces, two of them the same one: each step is completed by someone.

    They run without any order among them, so the slower meets retired folders and finished steps.
    """
    peers = [writing(tmp_path, mine, 25, 0) for mine in ([0], [1], [1], [2])]
    completed: set[int] = set()
    for peer in peers:
        output, _ = peer.communicate(timeout=60)
        assert peer.returncode == 0
        *lines, end = output.split()
        assert end == "end"
        completed.update(int(line) for line in lines)
    assert 25 in completed
    warnings: list[Exception] = []
    found = newest(LocalFolder(tmp_path), warnings.append)
    assert found is not None
    assert found.step == 25
    assert read(LocalFolder(tmp_path), warnings.append) == Restored(25, "d25", image_of(25))
    assert not warnings
