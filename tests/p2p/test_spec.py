"""A run's spec goes through JSON unchanged, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fault.errors import InputError, Refused
from fault.records import Timing
from p2p.spec import RunSpec

SPEC = RunSpec(
    run="r1",
    job="/jobs/digits.py",
    settings=(("epochs", "2"), ("name", 'a "quoted" name, ü')),
    job_digest="ab" * 32,
    seed=7,
    shards=8,
    slots=4,
    steps=120,
    samples=1500,
    folder="/runs/r1",
    relays=("ipc:///runs/r1/relay-0", "tcp://127.0.0.1:5000"),
    sockets="",
    checkpoints="file:///runs/r1/checkpoints",
    collective="butterfly",
    segment_bytes=1 << 16,
    kills=((0, 3), (2, 50)),
    timing=Timing(beat_s=0.05, patience_s=7.5),
)


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(SPEC.to_json()), **values})


def test_a_spec_comes_back_equal() -> None:
    """Through JSON and back a spec is equal, hashable and of the same text."""
    back = RunSpec.from_json(SPEC.to_json())
    assert back == SPEC and hash(back) == hash(SPEC) and back.to_json() == SPEC.to_json()
    back.check_versions()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "null",
        "[]",
        "3",
        "{}",
        SPEC.to_json()[:-1],
        changed(surprise=1),
        changed(settings=[["only a name"]]),
        changed(settings=5),
        changed(relays=None),
        changed(kills=[1, 2]),
        changed(timing=None),
        changed(timing={"beat_s": 0.1, "unheard_of_s": 1.0}),
        json.dumps({k: v for k, v in json.loads(SPEC.to_json()).items() if k != "seed"}),
    ],
)
def test_foreign_text_is_an_input_error(text: str) -> None:
    """What this version did not write is refused in one sentence, whatever is wrong with it."""
    with pytest.raises(InputError, match="was not written by this version of Mayfly"):
        RunSpec.from_json(text)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ({"torch": "1.0.0"}, "torch 1.0.0"),
        ({"mayfly": "0.0.0"}, "Mayfly 0.0.0"),
        ({"wire": -1}, "wire format -1"),
    ],
)
def test_other_versions_are_refused_by_name(version: dict[str, Any], says: str) -> None:
    """A function with another torch, Mayfly or wire reads the spec, and says why it cannot join."""
    spec = RunSpec.from_json(replace(SPEC, **version).to_json())
    with pytest.raises(Refused, match=f"run r1 began with .*{says}"):
        spec.check_versions()
