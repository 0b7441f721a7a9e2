"""Vectors that other processes of this host read where they lie, so no socket carries their bytes.

A *block* is a memfd: a page of header, then room for one vector. Its owner says where a range of
it is (`Reference`); others of the same user map the block through `/proc` and read it there. When
the owner uses the block for another vector, it goes on to the next *generation*: whoever finds the
same one before and after has read what was meant.

A block is used again two steps after its vector was let go of: whoever has the mean of step s + 1
knows that all members are through with step s, since it has the contributions of all to s + 1. So
it is only a peer that others took for dead that may find a vector gone.

Where there is no memfd, vectors are in ordinary memory, and nothing can be referred to.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import struct
import threading
import weakref
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from p2p.transport.wire import Malformed

Vector = npt.NDArray[np.float32]

NAME = "mayfly"
HEADER_BYTES = mmap.PAGESIZE
RESTED_STEPS = 2
_REFERENCE = struct.Struct("<IIQQQQ")
_SEALS = (
    fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    if hasattr(os, "memfd_create")
    else 0
)
MAPPED_LIMIT = 256
"""Blocks of others that are kept mapped,"""
MAPPED_STEPS = 4
"""and for so long after they were last read: their owner may be dead, and its memory is not free
before."""
SHORT_BLOCK_BYTES = 2 << 20
SHORT_MAPPED_STEPS = 16
"""Of short ones, which hold now and then a vector that nobody reads: mapped anew, they cost page
faults."""


class Gone(Malformed):
    """The block is not there any more, or holds another vector."""


@dataclass(frozen=True, slots=True)
class Reference:
    """`length` bytes from `start` on, in the vector that a block holds in this generation."""

    process: int
    descriptor: int
    block: int
    generation: int
    start: int
    length: int

    BYTES: ClassVar[int] = _REFERENCE.size

    def to_bytes(self) -> bytes:
        return _REFERENCE.pack(
            self.process, self.descriptor, self.block, self.generation, self.start, self.length
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Reference:
        """Raises ValueError."""
        try:
            return cls(*_REFERENCE.unpack(data))
        except struct.error as error:
            raise ValueError(str(error)) from None


class _Block:
    """The memory of one vector, made by this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, HEADER_BYTES + size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self.memory = mmap.mmap(self.descriptor, HEADER_BYTES + size)
        self.header = np.frombuffer(self.memory, np.uint64, 2)
        self.header[0] = self.number = secrets.randbits(63)
        self.address = self.header.ctypes.data + HEADER_BYTES
        self.let_go_at = 0


class Pool:
    """Vectors that can be referred to, and what is read of others'; a `Memory` of collectives.

    `take` may be called by any thread.
    """

    def __init__(self) -> None:
        self.reader = Reader()
        self._lock = threading.Lock()
        self._step = 0
        self._blocks: dict[int, _Block] = {}
        self._addresses: list[int] = []
        self._let_go: deque[_Block] = deque()
        self._free: list[_Block] = []
        self._works = hasattr(os, "memfd_create")
        self.is_shared = False
        """Something was referred to, so others may be told of what lies here."""

    def take(self, length: int) -> Vector:
        """A vector of whatever values. Its block is used again some steps after it was let go."""
        size = 4 * length
        if not self._works or not size:
            return np.empty(length, np.float32)
        with self._lock:
            block = next((each for each in self._free if each.size == size), None)
            if block is not None:
                self._free.remove(block)
            else:
                try:
                    block = self._made(size)
                except OSError:  # forbidden here, or too many open files
                    self._works = False
                    return np.empty(length, np.float32)
            block.header[1] += np.uint64(1)
        buffer: Any = (ctypes.c_char * size).from_buffer(block.memory, HEADER_BYTES)
        weakref.finalize(buffer, self._let_go_of, block).atexit = False
        return np.frombuffer(buffer, np.float32)

    def holds(self, step: int) -> bool:
        return self.reader.holds(step)

    def next_step(self, step: int) -> None:
        self.reader.give_back(step)
        with self._lock:
            self._step += 1
            while self._let_go and self._let_go[0].let_go_at <= self._step - RESTED_STEPS:
                self._free.append(self._let_go.popleft())

    def reference(self, part: memoryview) -> Reference | None:
        """Where others find this part of a vector of the pool; None for other memory."""
        self.is_shared = True
        address = np.frombuffer(part, np.uint8).ctypes.data
        place = bisect_right(self._addresses, address) - 1
        if place < 0:
            return None
        block = self._blocks[self._addresses[place]]
        start = address - block.address
        if start + part.nbytes > block.size:
            return None
        generation = int(block.header[1])
        return Reference(
            os.getpid(), block.descriptor, block.number, generation, start, part.nbytes
        )

    def close(self) -> None:
        """Nothing can be referred to any more; vectors that are still in use stay."""
        with self._lock:
            self._works = False
            for block in self._blocks.values():
                os.close(block.descriptor)
            self._blocks.clear()
            self._addresses.clear()
            self._free.clear()

    def _made(self, size: int) -> _Block:
        block = _Block(size)
        self._blocks[block.address] = block
        self._addresses = sorted(self._blocks)
        return block

    def _let_go_of(self, block: _Block) -> None:
        # called wherever the last reference goes, even in a thread that is inside of `take`
        block.let_go_at = self._step
        self._let_go.append(block)


class _Mapped:
    """A block of another process."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.bytes = memoryview(memory)
        self.used_at = 0
        is_short = len(memory) <= SHORT_BLOCK_BYTES
        self.kept_steps = SHORT_MAPPED_STEPS if is_short else MAPPED_STEPS
        self._generation = self.bytes[8:16].cast("Q")

    def holds(self, generation: int) -> bool:
        return self._generation[0] == generation


class Reader:
    """What lies in the blocks of other processes. Owned by one thread."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int, int], _Mapped] = {}
        self._borrowed: dict[int, set[tuple[_Mapped, int]]] = {}
        """For each step the blocks of which views are in use, with their generations."""
        self._step = -1

    def view(self, reference: Reference) -> memoryview:
        """The bytes where they are, which may be others at any time. Raises Gone."""
        return self._find(reference)[1]

    def copy(self, reference: Reference) -> memoryview:
        """The bytes, in memory of their own. Raises Gone."""
        mapped, view = self._find(reference)
        copied = np.array(view, np.uint8)
        if not mapped.holds(reference.generation):
            raise Gone("its block holds another vector by now")
        return copied.data

    def borrow(self, reference: Reference, step: int) -> bool:
        """A view is of use for this step as long as it `holds`; False for no step of this time."""
        if not self._step <= step <= self._step + 1:
            return False
        mapped, _ = self._find(reference)
        self._borrowed.setdefault(step, set()).add((mapped, reference.generation))
        return True

    def holds(self, step: int) -> bool:
        """Whether everything that was borrowed for the step is still what it was."""
        borrowed = self._borrowed.get(step, ())
        return all(mapped.holds(generation) for mapped, generation in borrowed)

    def give_back(self, step: int) -> None:
        """Nothing that was borrowed before this step is of use any more."""
        self._step = step
        for old in [each for each in self._borrowed if each < step]:
            del self._borrowed[old]
        self._mapped = {
            key: mapped
            for key, mapped in self._mapped.items()
            if step - mapped.used_at <= mapped.kept_steps
        }

    def _find(self, reference: Reference) -> tuple[_Mapped, memoryview]:
        key = (reference.process, reference.descriptor, reference.block)
        mapped = self._mapped.get(key)
        if mapped is None:
            if len(self._mapped) >= MAPPED_LIMIT:
                self._mapped.clear()
            mapped = self._mapped[key] = _Mapped(_map(reference))
        mapped.used_at = self._step
        start = HEADER_BYTES + reference.start
        stop = start + reference.length
        if stop > len(mapped.bytes):
            raise Gone("it is longer than its block")
        if not mapped.holds(reference.generation):
            raise Gone("its block holds another vector by now")
        return mapped, mapped.bytes[start:stop]


def _map(reference: Reference) -> mmap.mmap:
    path = Path(f"/proc/{reference.process}/fd/{reference.descriptor}")
    try:
        # of all that a name under /proc may lead to, nothing but a block of ours is opened
        if not str(path.readlink()).startswith(f"/memfd:{NAME}"):
            raise Gone(f"{path} is no block")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Gone(f"{path}: {error.strerror}") from None
    try:
        # sealed, so that it does not shrink under the one who reads it
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise Gone(f"{path} may change its size")
        memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise Gone(f"{path}: {error}") from None
    finally:
        os.close(descriptor)
    if len(memory) <= HEADER_BYTES or int.from_bytes(memory[:8], "little") != reference.block:
        raise Gone(f"{path} is another block")
    return memory
