"""Writes the pieces of a checkpoint, completes it with a manifest, and retires old ones.

Every operation may be done by several peers at once, or twice, or be broken off anywhere: a state
image is a function of the run and the step, so whoever writes a file writes the same bytes, and
without a manifest there is no checkpoint. Not for deciding when a checkpoint is due.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpoint.manifest import (
    MANIFEST_NAME,
    PIECES_LIMIT,
    Manifest,
    PieceRecord,
    piece_name,
    step_folder,
)
from checkpoint.piece import check_piece_digest, decode_piece, encode_piece
from checkpoint.reader import manifest_of, steps
from checkpoint.storage import Bytes, Storage
from fault.errors import CheckpointDamaged

log = logging.getLogger(__name__)


def write_pieces(
    storage: Storage, step: int, digest: str, image: Bytes, pieces: int, mine: Sequence[int]
) -> None:
    """Writes the pieces `mine` of `image`, which is cut into `pieces`; durable on return.

    `image` must not change meanwhile. Raises StorageFull or StorageUnavailable.
    """
    _check_pieces(mine, pieces)
    flat = memoryview(image).cast("B")
    for piece in mine:
        name = f"{step_folder(step)}/{piece_name(piece, pieces)}"
        storage.put(name, encode_piece(step, digest, piece, pieces, flat))


def try_complete(storage: Storage, step: int, digest: str, pieces: int) -> bool:
    """True if the checkpoint of this state is complete, or could be completed now.

    It is completed, by writing its manifest, when all pieces are there and each is read back as
    it was written. Raises StorageFull or StorageUnavailable.
    """
    manifest = _manifest_if_whole(storage, step)
    if manifest is not None and (manifest.digest, len(manifest.pieces)) == (digest, pieces):
        return True
    try:
        manifest = _verified(storage, step, digest, pieces)
    except CheckpointDamaged as damage:
        log.warning("%s; it must be written again", damage)
        return False
    if manifest is None:
        return False
    storage.put(f"{step_folder(step)}/{MANIFEST_NAME}", [manifest.to_json()])
    return True


def retire(storage: Storage, keep: int, step: int) -> None:
    """Removes what the checkpoint of `step`, just completed, makes superfluous.

    Of the checkpoints up to `step` the `keep` newest stay; those that broke go as well. Later ones
    are left alone: they are being written, or were found damaged when the run was taken up
    before them, and then they must not count. Raises StorageUnavailable.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint is kept, not {keep}")
    kept = 0
    for older in steps(storage):
        if older > step:
            continue
        if kept < keep and _manifest_if_whole(storage, older) is not None:
            kept += 1
        elif kept:
            # the manifest goes first: what is left of a deletion that broke is no checkpoint
            storage.delete_object(f"{step_folder(older)}/{MANIFEST_NAME}")
            storage.delete(step_folder(older))


def _manifest_if_whole(storage: Storage, step: int) -> Manifest | None:
    try:
        return manifest_of(storage, step)
    except CheckpointDamaged:
        return None  # as good as none: it is written anew, or goes with the next retirement


def _verified(storage: Storage, step: int, digest: str, pieces: int) -> Manifest | None:
    """The manifest of pieces that are all there; None while one is missing.

    Raises CheckpointDamaged when one is there that is not a piece of this state.
    """
    folder = step_folder(step)
    names = [piece_name(piece, pieces) for piece in range(pieces)]
    if not storage.sizes(folder).keys() >= set(names):
        return None
    records: list[PieceRecord] = []
    image_bytes = -1
    for piece, name in enumerate(names):
        file = storage.get(f"{folder}/{name}")
        if file is None:
            return None
        try:
            header, data = decode_piece(file)
            check_piece_digest(header, data)
            if piece == 0:
                image_bytes = header.image_bytes
            found = (header.step, header.digest, header.piece, header.pieces, header.image_bytes)
            if found != (step, digest, piece, pieces, image_bytes):
                raise ValueError(f"it belongs to state {header.digest} of step {header.step}")
        except ValueError as error:
            raise CheckpointDamaged(f"{name} of step {step} cannot be used: {error}") from None
        records.append(PieceRecord(name, len(file), hashlib.sha256(file).hexdigest()))
    return Manifest(step, digest, image_bytes, tuple(records))


def _check_pieces(mine: Sequence[int], pieces: int) -> None:
    if not 0 < pieces <= PIECES_LIMIT or any(not 0 <= piece < pieces for piece in mine):
        raise ValueError(f"{list(mine)} are not numbers of {pieces} pieces")


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a job: durable, or waiting for other peers' pieces, or failed."""

    step: int
    durable: bool
    error: Exception | None = None
    """StorageFull, StorageUnavailable, or a defect; with `durable`, only retiring failed."""


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    digest: str
    image: Bytes
    mine: tuple[int, ...]


class AsyncWriter:
    """Writes checkpoints on a thread of its own, one at a time.

    `report` is called on that thread, once for each job that was taken. A peer that plays no shard
    any more may still submit, with `mine` empty, to complete what others have written.
    """

    def __init__(
        self, storage: Storage, pieces: int, keep: int, report: Callable[[Written], None]
    ) -> None:
        self._storage = storage
        self._pieces = pieces
        self._keep = keep
        self._report = report
        self._changed = threading.Condition()
        self._job: _Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def submit(self, step: int, digest: str, image: Bytes, mine: Sequence[int]) -> bool:
        """Takes a job unless one is being done, or the writer is closed; never waits.

        `image` must stay as it is until the report.
        """
        _check_pieces(mine, self._pieces)
        with self._changed:
            if self._closed or self._job is not None:
                return False
            self._job = _Job(step, digest, image, tuple(mine))
            self._changed.notify_all()
            return True

    def close(self, seconds: float | None = None) -> bool:
        """Takes no more jobs and waits for the one being done; False if that takes too long."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closed)
                job = self._job
            if job is None:
                return
            written = self._done(job)
            with self._changed:
                self._job = None  # before the report, so that it may lead to the next job
            self._report(written)

    def _done(self, job: _Job) -> Written:
        durable = False
        try:
            write_pieces(self._storage, job.step, job.digest, job.image, self._pieces, job.mine)
            durable = try_complete(self._storage, job.step, job.digest, self._pieces)
            if durable:
                retire(self._storage, self._keep, job.step)
        except Exception as error:  # the thread must live, and the caller must know
            return Written(job.step, durable, error)
        return Written(job.step, durable)
