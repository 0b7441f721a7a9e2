"""Names, pieces and manifests as data: one form only, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from checkpoint.manifest import (
    Manifest,
    PieceRecord,
    piece_name,
    piece_range,
    step_folder,
    step_of,
)
from checkpoint.piece import check_piece_digest, decode_piece, encode_piece

IMAGE = bytes(range(256)) * 5


def manifest(pieces: int = 3) -> Manifest:
    records = []
    for piece in range(pieces):
        file = b"".join(encode_piece(50, "abc", piece, pieces, memoryview(IMAGE)))
        digest = hashlib.sha256(file).hexdigest()
        records.append(PieceRecord(piece_name(piece, pieces), len(file), digest))
    return Manifest(50, "abc", len(IMAGE), tuple(records))


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("size", [0, 1, 5, 1000, 1281])
def test_pieces_cover_the_image_once(pieces: int, size: int) -> None:
    """The ranges follow each other from the first byte to the last, also when some are empty."""
    ends = [piece_range(piece, pieces, size) for piece in range(pieces)]
    assert ends[0][0] == 0
    assert ends[-1][1] == size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))


def test_step_folders_are_told_from_others() -> None:
    """Only the one spelling of a step's folder is a step's folder, for steps of any length."""
    for step in (0, 50, 99_999_999, 123_456_789_012):
        assert step_of(step_folder(step)) == step
    for other in ("step-50", "step-0000000050", "step-00000050.old", "steps", "", "step--0000001"):
        assert step_of(other) is None


def test_a_manifest_survives_json() -> None:
    """What `to_json` writes `from_json` reads, and the layout is a promise to other readers."""
    written = manifest().to_json()
    assert Manifest.from_json(written) == manifest()
    tree = json.loads(written)
    assert (tree["step"], tree["digest"], tree["image_bytes"]) == (50, "abc", len(IMAGE))
    assert tree["pieces"][2]["name"] == "piece-00002-of-00003.safetensors"


def test_a_manifest_with_any_byte_changed_is_refused_or_means_something_else() -> None:
    """No damage to one byte goes unseen: it is a ValueError, or a value that readers compare."""
    written = manifest().to_json()
    for position in range(len(written)):
        for flip in (0x01, 0x20, 0x80):
            damaged = bytearray(written)
            damaged[position] ^= flip
            try:
                read = Manifest.from_json(bytes(damaged))
            except ValueError:
                continue
            assert read != manifest()


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "50"},
        {"step": True},
        {"digest": 7},
        {"image_bytes": 1 << 60},
        {"pieces": []},
        {"pieces": 3},
        {"pieces": [{"name": "../../etc/passwd", "bytes": 10_000, "sha256": "0" * 64}]},
        {"format": 2},
        {"extra": 1},
    ],
)
def test_foreign_manifests_are_refused(change: dict[str, object]) -> None:
    """Wrong types, impossible sizes, names outside the folder, unknown fields: a ValueError."""
    tree = {**json.loads(manifest().to_json()), **change}
    with pytest.raises(ValueError):
        Manifest.from_json((json.dumps(tree, indent=1) + "\n").encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    """Anything but a manifest is a ValueError, never another exception."""
    with pytest.raises(ValueError):
        Manifest.from_json(text)


@pytest.mark.parametrize("size", [0, 2, 1281])
def test_any_safetensors_reader_opens_a_piece(tmp_path: Path, size: int) -> None:
    """The file is the format's: one uint8 tensor and the metadata, empty pieces included."""
    image = memoryview(IMAGE[:size])
    path = tmp_path / "piece.safetensors"
    path.write_bytes(b"".join(encode_piece(50, "abc", 1, 3, image)))
    start, end = piece_range(1, 3, len(image))
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == ["image"]
        assert file.get_tensor("image").tobytes() == image[start:end]
        metadata = file.metadata()
    assert metadata["step"] == "50"
    assert metadata["digest"] == "abc"
    assert (metadata["piece"], metadata["pieces"]) == ("1", "3")
    assert (metadata["start"], metadata["length"]) == (str(start), str(end - start))


def test_a_piece_is_read_back_as_written() -> None:
    """Header and data come back, the data without a copy of the image on the way out."""
    image = memoryview(bytearray(IMAGE))
    header, data = encode_piece(50, "abc", 2, 3, image)
    assert data.obj is image.obj
    decoded, read = decode_piece(header + bytes(data))
    assert (decoded.step, decoded.digest, decoded.piece, decoded.pieces) == (50, "abc", 2, 3)
    assert decoded.image_bytes == len(IMAGE)
    assert read == data
    check_piece_digest(decoded, read)


def test_no_changed_byte_of_a_piece_goes_unseen() -> None:
    """Every byte of the file is covered: header, padding, length and data, cut or grown."""
    file = b"".join(encode_piece(50, "abc", 1, 3, memoryview(IMAGE[:30])))
    original = decode_piece(file)[0]
    variants = [file[:-1], file + b"\0", file[:7], b"", b"\xff" * 8 + file[8:]]
    for position in range(len(file)):
        damaged = bytearray(file)
        damaged[position] ^= 0x01
        variants.append(bytes(damaged))
    for variant in variants:
        try:
            header, data = decode_piece(variant)
            check_piece_digest(header, data)
        except ValueError:
            continue
        # readable still, but then it says that it is a piece of something else
        assert header != original
