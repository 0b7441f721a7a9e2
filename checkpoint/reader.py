"""Finds the newest checkpoint and reads it back, trusting no byte of it.

A checkpoint that is not what its manifest says is skipped, with a warning, and the one before is
used: determinism makes up for the steps between. Nothing here removes or mends anything.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import NamedTuple

from checkpoint.manifest import (
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    Manifest,
    piece_range,
    step_folder,
    step_of,
)
from checkpoint.piece import PieceHeader, decode_piece
from checkpoint.storage import Storage
from fault.errors import CheckpointDamaged

log = logging.getLogger(__name__)

Skipped = Callable[[CheckpointDamaged], None]
"""Told of each checkpoint that is passed over, and why."""


class Restored(NamedTuple):
    """A state read back from a checkpoint."""

    step: int
    digest: str
    image: bytearray


def warn(damage: CheckpointDamaged) -> None:
    log.warning("%s; using the checkpoint before it", damage)


def newest(storage: Storage, skipped: Skipped = warn) -> Manifest | None:
    """The newest checkpoint whose files are all there with the sizes its manifest gives.

    Cheap: reads manifests, not pieces. Raises StorageUnavailable.
    """
    for step in steps(storage):
        try:
            manifest = manifest_of(storage, step)
        except CheckpointDamaged as damage:
            skipped(damage)
            continue
        if manifest is not None:
            return manifest
    return None


def read(storage: Storage, skipped: Skipped = warn) -> Restored | None:
    """The newest checkpoint that is whole to the last byte; None if there is none.

    Every file's size and SHA-256 is compared with the manifest. Raises StorageUnavailable.
    """
    tried: set[int] = set()
    while True:
        # listed anew each time: what we failed to read may just have been retired for a newer one
        step = next((step for step in steps(storage) if step not in tried), None)
        if step is None:
            return None
        tried.add(step)
        try:
            manifest = manifest_of(storage, step)
            if manifest is not None:
                return Restored(step, manifest.digest, load(storage, manifest))
        except CheckpointDamaged as damage:
            skipped(damage)


def steps(storage: Storage) -> list[int]:
    """Steps that have a folder, complete or not, newest first."""
    found = [step_of(folder) for folder in storage.folders()]
    return sorted((step for step in found if step is not None), reverse=True)


def manifest_of(storage: Storage, step: int) -> Manifest | None:
    """The manifest of a step's checkpoint; None without one, for then there is no checkpoint.

    Raises CheckpointDamaged when it cannot be understood, is not this step's, or promises files
    that are not there or have other sizes.
    """
    folder = step_folder(step)
    sizes = storage.sizes(folder)
    if MANIFEST_NAME not in sizes:
        return None
    damage = f"checkpoint of step {step} is damaged: "
    if sizes[MANIFEST_NAME] > MANIFEST_LIMIT_BYTES:
        raise CheckpointDamaged(f"{damage}its manifest has {sizes[MANIFEST_NAME]} bytes")
    data = storage.get(f"{folder}/{MANIFEST_NAME}")
    if data is None:
        return None
    try:
        manifest = Manifest.from_json(data)
    except ValueError as error:
        raise CheckpointDamaged(f"{damage}its manifest cannot be used: {error}") from None
    if manifest.step != step:
        raise CheckpointDamaged(f"{damage}its manifest is that of step {manifest.step}")
    for piece in manifest.pieces:
        size = sizes.get(piece.name)
        if size != piece.bytes:
            state = "is missing" if size is None else f"has {size} bytes, not {piece.bytes}"
            raise CheckpointDamaged(f"{damage}{piece.name} {state}")
    return manifest


def load(storage: Storage, manifest: Manifest) -> bytearray:
    """The image a manifest stands for. Raises CheckpointDamaged unless every byte is right."""
    damage = f"checkpoint of step {manifest.step} is damaged: "
    image = bytearray(manifest.image_bytes)
    count = len(manifest.pieces)
    for index, record in enumerate(manifest.pieces):
        file = storage.get(f"{step_folder(manifest.step)}/{record.name}")
        if file is None:
            raise CheckpointDamaged(f"{damage}{record.name} is missing")
        sha256 = hashlib.sha256(file).hexdigest()
        if sha256 != record.sha256:
            raise CheckpointDamaged(f"{damage}{record.name} does not have the manifest's SHA-256")
        try:
            header, data = decode_piece(file)
        except ValueError as error:
            raise CheckpointDamaged(f"{damage}{record.name}: {error}") from None
        expected = PieceHeader(
            manifest.step, manifest.digest, index, count, manifest.image_bytes, header.sha256
        )
        if header != expected:
            raise CheckpointDamaged(f"{damage}{record.name} belongs to another checkpoint")
        start, end = piece_range(index, count, manifest.image_bytes)
        image[start:end] = data
    return image
