"""A state goes on from the store: its outline has no tensor, and makes the image whole again."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.outline import MAGIC, Memory, Outline, cut
from p2p.aggregate.places import Place
from p2p.state import digest_of
from tests.p2p.aggregate.training import OPTIMIZERS, averaging, built, step

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_outline_is_small_and_becomes_the_image(optimizer: str, urls: list[str]) -> None:
    """At the start and after steps, in the store where the state is and in another one."""
    one = built(optimizer)
    sender, warnings = averaging(one, 0, urls)
    for _ in range(3):
        image = one.state.image()
        sent = sender.outline()
        assert sent is not None and len(sent) < 8000 < len(image) / 10
        for slot in (0, 1):
            other = built(optimizer)
            receiver, _ = averaging(other, slot, urls)
            whole = receiver.whole(bytearray(sent), one.state.digest())
            assert whole == image
            other.state.load(whole)
            step(other, receiver)
        step(one, sender)
        assert one.state.digest() == other.state.digest()
    assert not warnings


def test_who_goes_on_publishes_nothing_again(urls: list[str]) -> None:
    """The state that was taken over is in the place where it was found, and nowhere else."""
    one, other = built("adam"), built("adam")
    sender, _ = averaging(one, 0, urls[:1])
    step(one, sender)
    sent = sender.outline()
    assert sent is not None
    with BulkConnection(urls[0]) as store:
        before = store.execute("KEYS", "r:1:*")
        receiver, _ = averaging(other, 0, urls[:1])
        other.state.load(receiver.whole(bytearray(sent), one.state.digest()))
        step(other, receiver)
        assert sorted(store.execute("KEYS", "r:1:*")) == sorted(before)  # type: ignore[arg-type, type-var]


def test_a_held_place_outlasts_steps_and_then_goes(urls: list[str]) -> None:
    """Whoever was told of a place finds it, though others train on; nothing is left for ever."""
    one = built("momentum")
    sender, _ = averaging(one, 0, urls[:1])
    step(one, sender)
    image, sent = one.state.image(), sender.outline()
    assert sent is not None
    for _ in range(4):
        step(one, sender)
    receiver, _ = averaging(built("momentum"), 1, urls[:1])
    assert receiver.whole(bytearray(sent), digest_of(image)) == image
    outline = Outline.from_bytes(sent)
    assert outline is not None
    with BulkConnection(urls[0]) as store:
        store.execute("DEL", Place(outline.place).held)
        step(one, sender)
        assert store.execute("KEYS", f"{outline.place}*") == []
        assert len(store.execute("KEYS", "*:ready")) == 2  # type: ignore[arg-type]
    assert receiver.whole(bytearray(sent), one.state.digest()) == b""


def test_without_a_store_the_whole_image_is_sent(urls: list[str], tmp_path: Path) -> None:
    """A store that is away is no reason to let a candidate wait."""
    one = built("adam")
    sender, warnings = averaging(one, 0, [f"unix://{tmp_path}/none"])
    assert sender.outline() is None
    assert len(warnings) == 1 and warnings[0].startswith("a state is sent without the store")
    assert sender.whole(bytearray(one.state.image()), one.state.digest()) == one.state.image()


def test_a_damaged_outline_is_no_error(urls: list[str]) -> None:
    """Whichever of its bytes is another one: what comes of it is for its digest to refuse."""
    one = built("momentum")
    sender, _ = averaging(one, 0, urls[:1])
    step(one, sender)
    sent = sender.outline()
    assert sent is not None
    receiver, _ = averaging(built("momentum"), 1, urls[:1])
    refused = 0
    for place in range(0, len(sent), 3):
        damaged = bytearray(sent)
        damaged[place] ^= 0x55
        refused += digest_of(receiver.whole(damaged, one.state.digest())) != one.state.digest()
    assert refused > len(sent) / 6


def test_pieces_are_cut_where_stored_memory_begins_and_ends() -> None:
    """Whatever overlaps: bytes before, between and after stored memories are carried."""
    memory = np.arange(100, dtype=np.uint8)
    stored = [Memory.of(memory[60:90], "b", 7), Memory.of(memory[10:40], "a")]
    stored += [Memory.of(memory[50:50], "empty")]
    pieces = cut([b"head", memory.data, memory[20:30].data, memory[95:].data], stored)
    shown = [piece if isinstance(piece, bytes) else astuple(piece) for piece in pieces]
    assert shown == [
        b"head",
        *(
            bytes(range(10)),
            ("a", 0, 30),
            bytes(range(40, 60)),
            ("b", 7, 37),
            bytes(range(90, 100)),
        ),
        ("a", 10, 20),
        bytes(range(95, 100)),
    ]
    tensors = {"a": memory[10:40], "b": memory[53:90]}
    outline = replace(Outline(3, 0, "p", ()), pieces=pieces)
    again = Outline.from_bytes(outline.to_bytes())
    assert again is not None
    expected = b"head" + memory.tobytes() + memory[20:30].tobytes() + memory[95:].tobytes()
    assert again.image(tensors.__getitem__) == expected


@pytest.mark.parametrize("data", [b"", b"MAYFLY\0\1", b"\xc0", b"\x95\1\2\3\4\5", bytes(100)])
def test_what_is_no_outline_is_not_taken_for_one(data: bytes) -> None:
    assert Outline.from_bytes(data) is None
    assert digest_of(data)


@pytest.mark.parametrize("pieces", [7, [7], [["a", 1]], [["a", 1, "x"]], [None], [{}]])
def test_an_outline_with_odd_pieces_is_damaged(pieces: Any) -> None:
    data = msgpack.packb([MAGIC, 1, 0, "p", pieces])
    with pytest.raises((ValueError, TypeError)):
        Outline.from_bytes(data)
