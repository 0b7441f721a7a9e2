"""Vectors that another process reads where they lie: it gets the right bytes, or none."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from p2p.transport.shared import (
    MAPPED_STEPS,
    SHORT_BLOCK_BYTES,
    SHORT_MAPPED_STEPS,
    Gone,
    Pool,
    Reader,
    Reference,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memfd here")
LENGTH = 50_000


def reference_of(pool: Pool, part: np.ndarray) -> Reference:  # type: ignore[type-arg]
    found = pool.reference(part.data.cast("B"))
    assert found is not None
    return Reference.from_bytes(found.to_bytes())


def owner(ours: Connection, length: int = LENGTH) -> None:
    """Another process, which lends what it has until it is told to end."""
    pool = Pool()
    vector = pool.take(length)
    vector[:] = np.arange(length)
    ours.send(reference_of(pool, vector[100:200]))
    ours.recv()


def test_another_process_reads_a_part_of_a_vector() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=owner, args=(there,))
    process.start()
    reference, reader = here.recv(), Reader()
    for _ in range(2):
        found = np.frombuffer(reader.copy(reference), np.float32)
        assert found.tolist() == list(range(100, 200))
    here.send("end")
    process.join()
    assert np.frombuffer(reader.copy(reference), np.float32)[0] == 100  # what is mapped stays
    with pytest.raises(Gone):
        Reader().copy(reference)


def test_a_block_is_used_again_after_two_steps_and_then_says_so() -> None:
    """What was referred to before is gone, and not mistaken for what is there now."""
    pool, reader = Pool(), Reader()
    vector = pool.take(LENGTH)
    vector[:] = 1
    reference = reference_of(pool, vector)
    address = vector.ctypes.data
    del vector
    pool.next_step(0)
    assert pool.take(LENGTH).ctypes.data != address
    assert np.frombuffer(reader.copy(reference), np.float32)[-1] == 1
    pool.next_step(0)
    again = [pool.take(LENGTH) for _ in range(2)]
    assert address in [each.ctypes.data for each in again]
    with pytest.raises(Gone, match="another vector"):
        reader.copy(reference)


def test_a_view_keeps_its_block() -> None:
    """A vector is let go of with the last view of it, and not before."""
    pool = Pool()
    vector = pool.take(LENGTH)
    address, view = vector.ctypes.data, vector[7:9]
    view[:] = 5
    del vector
    for _ in range(5):
        pool.next_step(0)
        assert pool.take(LENGTH).ctypes.data != address
    assert view.tolist() == [5, 5]


def test_memory_of_others_has_no_reference() -> None:
    pool = Pool()
    vector = pool.take(LENGTH)
    assert not pool.is_shared
    assert pool.reference(np.zeros(LENGTH, np.float32).data.cast("B")) is None
    assert pool.reference(vector.data.cast("B")) is not None and pool.is_shared
    assert pool.take(0).shape == (0,)


def test_no_memory_but_that_of_blocks_is_read() -> None:
    """Whatever a reference says: files, other memory, what lies beside a block."""
    pool, reader = Pool(), Reader()
    vector = pool.take(LENGTH)
    good = reference_of(pool, vector)
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1 << 20))
        file.flush()
        plain = os.memfd_create("mayfly", os.MFD_ALLOW_SEALING)  # not sealed: it might shrink
        os.ftruncate(plain, 1 << 20)
        for wrong in (
            replace(good, descriptor=file.fileno()),
            replace(good, descriptor=plain),
            replace(good, descriptor=0),
            replace(good, descriptor=10_000),
            replace(good, process=2**32 - 1),
            replace(good, block=good.block + 1),
            replace(good, generation=good.generation + 1),
            replace(good, start=4),
            replace(good, start=2**64 - 1),
            replace(good, length=good.length + 1),
            replace(good, length=2**64 - 1),
        ):
            with pytest.raises(Gone):
                reader.copy(wrong)
        os.close(plain)
    assert len(reader.copy(good)) == 4 * LENGTH
    for damaged in (b"", b"x" * 39, b"x" * 41):
        with pytest.raises(ValueError, match="unpack"):
            Reference.from_bytes(damaged)


def test_what_is_borrowed_holds_until_its_block_is_used_again() -> None:
    """A step's borrowed bytes are judged together, and only those of steps of this time are."""
    pool, reader = Pool(), Reader()
    vector, other = pool.take(LENGTH), pool.take(LENGTH)
    vector[:] = 3
    reader.give_back(7)
    reference = reference_of(pool, vector)
    assert [reader.borrow(reference, step) for step in (6, 7, 8, 9)] == [False, True, True, False]
    assert reader.borrow(reference_of(pool, other), 8)
    assert np.frombuffer(reader.view(reference), np.float32)[-1] == 3
    del other
    for _ in range(2):
        pool.next_step(0)
    assert reader.holds(7) and reader.holds(8) and reader.holds(9)
    kept = pool.take(LENGTH)
    assert reader.holds(7) and not reader.holds(8)
    reader.give_back(9)
    assert reader.holds(8) and kept is not None


def mapped_bytes() -> int:
    """Of blocks, by this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "/memfd:mayfly" in line]
    return sum(int(stop, 16) - int(start, 16) for start, stop in ranges)


@pytest.mark.parametrize(
    ("length", "steps"), [(1000, SHORT_MAPPED_STEPS), (SHORT_BLOCK_BYTES, MAPPED_STEPS)]
)
def test_the_memory_of_who_sends_no_more_is_let_go(length: int, steps: int) -> None:
    """A peer that died would keep its memory for as long as others have it mapped."""
    gc.collect()
    before = mapped_bytes()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=owner, args=(there, length))
    process.start()
    reader = Reader()
    reader.give_back(0)
    view = reader.view(here.recv())
    here.send("end")
    process.join()
    reader.give_back(steps)
    assert mapped_bytes() > before
    reader.give_back(steps + 1)
    assert np.frombuffer(view, np.float32)[0] == 100  # what is in use stays
    del view
    gc.collect()
    assert mapped_bytes() == before
