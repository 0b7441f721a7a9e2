"""One piece of a state image as a safetensors file.

Written here and not by the safetensors library, for two reasons: the library lists a file's
metadata in an order that changes from process to process, while peers that write one piece twice
must write the same bytes; and it copies the tensor, while here a piece of the image goes to the
disk as it lies in memory. Any safetensors reader opens the files: one uint8 tensor ``image``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from checkpoint.manifest import piece_range

HEADER_LIMIT_BYTES = 64 << 10
_TENSOR = "image"
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class PieceHeader:
    """What a piece says of itself; `sha256` is that of its part of the image."""

    step: int
    digest: str
    piece: int
    pieces: int
    image_bytes: int
    sha256: str

    @property
    def start(self) -> int:
        return piece_range(self.piece, self.pieces, self.image_bytes)[0]

    @property
    def length(self) -> int:
        start, end = piece_range(self.piece, self.pieces, self.image_bytes)
        return end - start

    def encode(self) -> bytes:
        """The file up to the tensor's bytes, the same in every process."""
        metadata = {
            "format": "mayfly",
            "step": str(self.step),
            "digest": self.digest,
            "piece": str(self.piece),
            "pieces": str(self.pieces),
            "start": str(self.start),
            "length": str(self.length),
            "image_bytes": str(self.image_bytes),
            "sha256": self.sha256,
        }
        tensor = {"dtype": "U8", "shape": [self.length], "data_offsets": [0, self.length]}
        text = json.dumps({"__metadata__": metadata, _TENSOR: tensor}, separators=(",", ":"))
        header = text.encode()
        header += b" " * (-len(header) % _LENGTH_BYTES)  # the tensor begins aligned
        return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def encode_piece(
    step: int, digest: str, piece: int, pieces: int, image: memoryview
) -> tuple[bytes, memoryview]:
    """Header and data of a piece of `image` (flat bytes); the data is a view, not a copy."""
    start, end = piece_range(piece, pieces, len(image))
    data = image[start:end]
    sha256 = hashlib.sha256(data).hexdigest()
    return PieceHeader(step, digest, piece, pieces, len(image), sha256).encode(), data


def decode_piece(file: bytes) -> tuple[PieceHeader, memoryview]:
    """Header and data of a piece's file, the data not yet compared with its SHA-256.

    Raises ValueError for bytes that are no piece.
    """
    length = int.from_bytes(file[:_LENGTH_BYTES], "little")
    if len(file) < _LENGTH_BYTES + length or length > HEADER_LIMIT_BYTES:
        raise ValueError("no safetensors header")
    try:
        metadata = json.loads(file[_LENGTH_BYTES : _LENGTH_BYTES + length])["__metadata__"]
        header = PieceHeader(
            step=int(metadata["step"]),
            digest=str(metadata["digest"]),
            piece=int(metadata["piece"]),
            pieces=int(metadata["pieces"]),
            image_bytes=int(metadata["image_bytes"]),
            sha256=str(metadata["sha256"]),
        )
        # whatever else the header says must be what we would have written
        genuine = header.pieces > 0 and file.startswith(header.encode())
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"no header of a piece: {type(error).__name__}: {error}") from None
    data = memoryview(file)[_LENGTH_BYTES + length :]
    if not genuine or len(data) != header.length:
        raise ValueError("not the bytes that were written")
    return header, data


def check_piece_digest(header: PieceHeader, data: memoryview) -> None:
    """Raises ValueError when the data is not what was written."""
    if hashlib.sha256(data).hexdigest() != header.sha256:
        raise ValueError("its data does not have the SHA-256 of its header")
