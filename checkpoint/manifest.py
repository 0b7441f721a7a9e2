"""What a checkpoint consists of: names, sizes and digests, as plain data and as JSON.

The manifest is a function of the state and the number of pieces alone, so peers that write it at
the same time write the same bytes. Nothing here touches a file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

MANIFEST_NAME = "manifest.json"
MANIFEST_LIMIT_BYTES = 8 << 20
"""No manifest is larger; a larger file of that name is not read."""
PIECES_LIMIT = 10_000
_FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: str) -> int | None:
    """The step whose checkpoint a folder holds; None for a folder that holds none."""
    match = _FOLDER.fullmatch(folder)
    if match is None or step_folder(step := int(match[1])) != folder:
        return None
    return step


def piece_name(piece: int, pieces: int) -> str:
    return f"piece-{piece:05d}-of-{pieces:05d}.safetensors"


def piece_range(piece: int, pieces: int, image_bytes: int) -> tuple[int, int]:
    """Where a piece of the image begins and where it ends."""
    return piece * image_bytes // pieces, (piece + 1) * image_bytes // pieces


@dataclass(frozen=True, slots=True)
class PieceRecord:
    """One file of a checkpoint; `bytes` and `sha256` are the whole file's."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One complete checkpoint. `digest` is the state's, and opaque here."""

    step: int
    digest: str
    image_bytes: int
    pieces: tuple[PieceRecord, ...]

    def to_json(self) -> bytes:
        tree = {
            "format": _FORMAT,
            "step": self.step,
            "digest": self.digest,
            "image_bytes": self.image_bytes,
            "pieces": [
                {"name": each.name, "bytes": each.bytes, "sha256": each.sha256}
                for each in self.pieces
            ],
        }
        return (json.dumps(tree, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises ValueError, saying what is wrong, for bytes that `to_json` did not write."""
        try:
            tree: dict[str, Any] = json.loads(data)
            if tree["format"] != _FORMAT:
                raise ValueError(f"format {tree['format']}, known is {_FORMAT}")
            pieces = tuple(
                PieceRecord(each["name"], each["bytes"], each["sha256"]) for each in tree["pieces"]
            )
            manifest = cls(tree["step"], tree["digest"], tree["image_bytes"], pieces)
            manifest._check()
            written = manifest.to_json()
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if written != data:
            raise ValueError("not the bytes that were written")
        return manifest

    def _check(self) -> None:
        if not (_is_count(self.step) and _is_count(self.image_bytes)):
            raise ValueError("the step or the image's size is no count")
        if not isinstance(self.digest, str):
            raise ValueError("the state's digest is no text")
        if not 0 < len(self.pieces) <= PIECES_LIMIT:
            raise ValueError(f"{len(self.pieces)} pieces")
        for index, piece in enumerate(self.pieces):
            start, end = piece_range(index, len(self.pieces), self.image_bytes)
            if piece.name != piece_name(index, len(self.pieces)):
                raise ValueError(f"piece {index} is named {piece.name!r}")
            # a file is its header and its part of the image, so readers may trust the sum
            if not _is_count(piece.bytes) or piece.bytes <= end - start:
                raise ValueError(f"{piece.name} cannot have {piece.bytes!r} bytes")
            if not isinstance(piece.sha256, str) or not _SHA256.fullmatch(piece.sha256):
                raise ValueError(f"{piece.name} has no SHA-256")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
