"""Writing, completing, reading and retiring checkpoints, in one process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from checkpoint.manifest import MANIFEST_NAME, piece_name, step_folder
from checkpoint.reader import Restored, newest, read
from checkpoint.storage import Bytes, LocalFolder
from checkpoint.writer import AsyncWriter, Written, retire, try_complete, write_pieces
from fault.errors import CheckpointDamaged, StorageUnavailable


def image_of(step: int, size: int = 10_007) -> bytes:
    return bytes((step * 31 + position) % 251 for position in range(size))


def save(storage: LocalFolder, step: int, pieces: int = 4, size: int = 10_007) -> None:
    write_pieces(storage, step, f"d{step}", image_of(step, size), pieces, range(pieces))
    assert try_complete(storage, step, f"d{step}", pieces)


@pytest.fixture
def storage(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "checkpoints")


def steps_there(storage: LocalFolder) -> list[str]:
    return sorted(storage.folders())


@pytest.mark.parametrize("pieces", [1, 4, 64])
@pytest.mark.parametrize("size", [0, 3, 10_007])
def test_an_image_comes_back(storage: LocalFolder, pieces: int, size: int) -> None:
    """Step, digest and every byte of the image are read back, however it was cut."""
    save(storage, 50, pieces, size)
    assert read(storage) == Restored(50, "d50", bytearray(image_of(50, size)))


def test_nothing_is_there_before_the_first(storage: LocalFolder) -> None:
    """An empty or absent place holds no checkpoint, and asking makes nothing."""
    assert newest(storage) is None
    assert read(storage) is None
    assert not try_complete(storage, 50, "d", 4)
    retire(storage, 2, 50)
    assert not storage.path.exists()


def test_pieces_without_a_manifest_are_no_checkpoint(storage: LocalFolder) -> None:
    """It exists only once all pieces are there and the manifest was written after them."""
    save(storage, 50)
    image = image_of(100)
    write_pieces(storage, 100, "d100", image, 4, [0, 2, 3])
    assert not try_complete(storage, 100, "d100", 4)
    assert read(storage) == Restored(50, "d50", bytearray(image_of(50)))
    write_pieces(storage, 100, "d100", image, 4, [1])
    assert read(storage) == Restored(50, "d50", bytearray(image_of(50)))
    assert try_complete(storage, 100, "d100", 4)
    assert read(storage) == Restored(100, "d100", bytearray(image))


def test_writing_twice_writes_the_same_files(storage: LocalFolder) -> None:
    """Peers that write one checkpoint twice, adopted shards and all, change no byte of it."""
    save(storage, 50)
    files = {path.name: path.read_bytes() for path in (storage.path / step_folder(50)).iterdir()}
    save(storage, 50)
    again = {path.name: path.read_bytes() for path in (storage.path / step_folder(50)).iterdir()}
    assert again == files
    assert sorted(files) == [MANIFEST_NAME] + [piece_name(piece, 4) for piece in range(4)]


def test_pieces_of_different_states_are_never_joined(storage: LocalFolder) -> None:
    """One piece from another state, as a corrupted peer would write, and it stays incomplete."""
    write_pieces(storage, 50, "d50", image_of(50), 4, [0, 1, 2])
    write_pieces(storage, 50, "wrong", image_of(51), 4, [3])
    assert not try_complete(storage, 50, "d50", 4)
    assert not try_complete(storage, 50, "wrong", 4)
    write_pieces(storage, 50, "d50", image_of(50), 4, [3])
    assert try_complete(storage, 50, "d50", 4)


def test_a_damaged_piece_is_not_completed(storage: LocalFolder) -> None:
    """A piece is read back and compared before the manifest vouches for it."""
    write_pieces(storage, 50, "d50", image_of(50), 4, range(4))
    flip(storage, 50, piece_name(2, 4))
    assert not try_complete(storage, 50, "d50", 4)
    write_pieces(storage, 50, "d50", image_of(50), 4, [2])
    assert try_complete(storage, 50, "d50", 4)


def flip(storage: LocalFolder, step: int, name: str, position: int = -1) -> None:
    path = storage.path / step_folder(step) / name
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def damages() -> dict[str, tuple[str, bytes | None]]:
    piece = piece_name(1, 4)
    return {
        "piece missing": (piece, None),
        "piece empty": (piece, b""),
        "manifest empty": (MANIFEST_NAME, b""),
        "manifest foreign": (MANIFEST_NAME, b'{"step": 100}'),
        "manifest binary": (MANIFEST_NAME, bytes(range(256))),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    storage: LocalFolder, damage: str
) -> None:
    """It is skipped with a warning that names step and reason, and mended by writing it again."""
    save(storage, 50)
    save(storage, 100)
    name, content = damages()[damage]
    path = storage.path / step_folder(100) / name
    path.unlink() if content is None else path.write_bytes(content)
    warnings: list[CheckpointDamaged] = []
    assert read(storage, warnings.append) == Restored(50, "d50", bytearray(image_of(50)))
    found = newest(storage, warnings.append)
    assert found is not None
    assert found.step == 50
    assert len(warnings) == 2
    assert all("step 100 is damaged" in str(warning) for warning in warnings)
    save(storage, 100)
    assert read(storage) == Restored(100, "d100", bytearray(image_of(100)))


@pytest.mark.parametrize("position", [0, 9, 60, 200, -1])
def test_flipped_bits_are_found_on_reading(storage: LocalFolder, position: int) -> None:
    """Sizes may be right: the digest of each file decides, wherever the bit was."""
    save(storage, 50)
    save(storage, 100)
    flip(storage, 100, piece_name(3, 4), position)
    warnings: list[CheckpointDamaged] = []
    assert read(storage, warnings.append) == Restored(50, "d50", bytearray(image_of(50)))
    assert [piece_name(3, 4) in str(warning) for warning in warnings] == [True]


def test_a_checkpoint_under_another_steps_name_is_refused(storage: LocalFolder) -> None:
    """A folder copied or renamed is whole to the byte, and still not that step's."""
    save(storage, 50)
    (storage.path / step_folder(50)).rename(storage.path / step_folder(100))
    warnings: list[CheckpointDamaged] = []
    assert read(storage, warnings.append) is None
    assert "is that of step 50" in str(warnings[0])


def test_retirement_keeps_the_newest(storage: LocalFolder) -> None:
    """By count; checkpoints that broke do not count, and go when a complete one is newer."""
    for step in (50, 100, 150, 200):
        save(storage, step)
    write_pieces(storage, 175, "d175", image_of(175), 4, [1])
    write_pieces(storage, 250, "d250", image_of(250), 4, [0])
    (storage.path / step_folder(120)).mkdir()
    (storage.path / "notes").mkdir()
    retire(storage, 2, 200)
    kept = ["notes", step_folder(150), step_folder(200), step_folder(250)]
    assert steps_there(storage) == kept
    retire(storage, 2, 200)
    assert steps_there(storage) == kept


def test_retirement_never_removes_what_was_just_written(storage: LocalFolder) -> None:
    """Later checkpoints that turned out damaged do not push out those the run lives by now."""
    for step in (50, 100, 150):
        save(storage, step)
    for step in (100, 150):
        flip(storage, step, piece_name(0, 4))
    save(storage, 60)
    retire(storage, 2, 60)
    assert read(storage, lambda _: None) == Restored(60, "d60", bytearray(image_of(60)))
    assert steps_there(storage)[0] == step_folder(50)


def test_a_checkpoint_retired_while_it_is_read_leads_to_the_newer_one(
    storage: LocalFolder,
) -> None:
    """A reader that is overtaken by the writers ends with their newest, not with an older one."""

    class Overtaken(LocalFolder):
        """Completes and retires checkpoints just before the first piece is read."""

        moved = False

        def get(self, name: str) -> bytes | None:
            if name.endswith(".safetensors") and not self.moved:
                self.moved = True
                save(storage, 150)
                retire(storage, 1, 150)
            return super().get(name)

    save(storage, 50)
    save(storage, 100)
    restored = read(Overtaken(storage.path), lambda _: None)
    assert restored == Restored(150, "d150", bytearray(image_of(150)))


def test_the_writer_works_beside_its_caller(storage: LocalFolder) -> None:
    """Two peers' writers: the first waits for the other's pieces, the second completes."""
    first: queue.SimpleQueue[Written] = queue.SimpleQueue()
    second: queue.SimpleQueue[Written] = queue.SimpleQueue()
    one = AsyncWriter(storage, 4, 2, first.put)
    two = AsyncWriter(storage, 4, 2, second.put)
    for step in (50, 100, 150):
        assert one.submit(step, f"d{step}", image_of(step), [0, 1])
        assert first.get(timeout=30) == Written(step, durable=False)
        assert two.submit(step, f"d{step}", image_of(step), [2, 3])
        assert second.get(timeout=30) == Written(step, durable=True)
        assert one.submit(step, f"d{step}", b"", [])
        assert first.get(timeout=30) == Written(step, durable=True)
    assert steps_there(storage) == [step_folder(100), step_folder(150)]
    assert read(storage) == Restored(150, "d150", bytearray(image_of(150)))
    assert one.close(30)
    assert two.close(30)


class Held(LocalFolder):
    """A slow disk: every put waits until it is let through."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached = threading.Event()
        self.open = threading.Event()

    def put(self, name: str, parts: Iterable[Bytes]) -> None:
        self.reached.set()
        assert self.open.wait(30)
        super().put(name, parts)


def test_a_busy_writer_refuses_and_closing_waits(storage: LocalFolder) -> None:
    """One job at a time, nothing queued; close() ends after the job, and then nothing is taken."""
    held = Held(storage.path)
    done: queue.SimpleQueue[Written] = queue.SimpleQueue()
    writer = AsyncWriter(held, 1, 1, done.put)
    assert writer.submit(50, "d50", image_of(50), [0])
    assert held.reached.wait(30)
    assert not writer.submit(100, "d100", image_of(100), [0])
    assert not writer.close(0)
    held.open.set()
    assert writer.close(30)
    assert done.get_nowait() == Written(50, durable=True)
    assert done.empty()
    assert not writer.submit(100, "d100", image_of(100), [0])
    assert steps_there(storage) == [step_folder(50)]


def test_the_report_may_submit_the_next_job(storage: LocalFolder) -> None:
    """The writer is free again by the time it reports."""
    done: queue.SimpleQueue[Written] = queue.SimpleQueue()

    def report(written: Written) -> None:
        if written.step == 50:
            assert writer.submit(100, "d100", image_of(100), [0])
        done.put(written)

    writer = AsyncWriter(storage, 1, 1, report)
    assert writer.submit(50, "d50", image_of(50), [0])
    assert done.get(timeout=30) == Written(50, durable=True)
    assert done.get(timeout=30) == Written(100, durable=True)
    assert writer.close(30)


def test_a_failure_is_reported_and_the_writer_lives(tmp_path: Path) -> None:
    """The error comes with the step; once the place is usable again, so is the writer."""
    blocker = tmp_path / "checkpoints"
    blocker.write_bytes(b"")
    done: queue.SimpleQueue[Written] = queue.SimpleQueue()
    writer = AsyncWriter(LocalFolder(blocker), 1, 1, done.put)
    assert writer.submit(50, "d50", image_of(50), [0])
    failed = done.get(timeout=30)
    assert (failed.step, failed.durable) == (50, False)
    assert isinstance(failed.error, StorageUnavailable)
    blocker.unlink()
    assert writer.submit(100, "d100", image_of(100), [0])
    assert done.get(timeout=30) == Written(100, durable=True)
    assert writer.close(30)


@pytest.mark.parametrize(("pieces", "mine"), [(0, []), (4, [4]), (4, [-1])])
def test_pieces_that_do_not_exist_are_a_defect_of_the_caller(
    storage: LocalFolder, pieces: int, mine: list[int]
) -> None:
    """They are refused before anything is written."""
    with pytest.raises(ValueError, match="pieces"):
        write_pieces(storage, 50, "d", b"image", pieces, mine)
    assert not storage.path.exists()
