"""What a process computed of a task, kept by name in a file, and how two such files differ.

The file is NumPy's .npz. It is written array by array, so that no more than one is in memory.
Without torch: the comparison is made by whoever asked. What is computed is `purity.py`'s.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

WHOLE_STATE = "digest of the whole state"
"""Also covers what no array of its own stands for."""


@dataclass(frozen=True, slots=True)
class Label:
    """What an array is. Those with equal `step`, and with or without `shard`, arise together."""

    tensor: str
    step: int | None
    """None for what there is before the first step."""
    shard: int | None = None
    """Whose contribution to the step this belongs to; None for the state after it."""

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.tensor} before the first step"
        if self.shard is None:
            return f"{self.tensor} after step {self.step}"
        return f"{self.tensor}, shard {self.shard}, step {self.step}"

    @property
    def stage(self) -> tuple[int | None, bool]:
        return self.step, self.shard is not None


@dataclass(frozen=True, slots=True)
class Difference:
    """One array that is not the same in both processes, bit for bit."""

    label: Label
    how: str
    differing: int
    """How many of its values; all of them where the shapes or types differ."""
    values: int
    largest: float | None
    """The largest distance between two values; None where it is not a finite number."""

    def __str__(self) -> str:
        return f"{self.label}: {self.how}"

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.label),
            "how": self.how,
            "differing": self.differing,
            "values": self.values,
            "largest": self.largest,
        }


class Evidence:
    """Writes one file. Use it as a context manager; each label is given once."""

    def __init__(self, file: Path) -> None:
        self._archive = zipfile.ZipFile(file, "w")
        self._labels: list[Label] = []

    def __enter__(self) -> Evidence:
        return self

    def __exit__(self, *_: object) -> None:
        with self._archive:
            self._archive.writestr("labels.json", json.dumps([asdict(e) for e in self._labels]))

    def add(self, label: Label, array: Array) -> None:
        with self._archive.open(f"{len(self._labels)}.npy", "w", force_zip64=True) as out:
            np.lib.format.write_array(out, array, allow_pickle=False)
        self._labels.append(label)


def labels_of(file: Path) -> list[Label]:
    """In the order in which they were added."""
    with zipfile.ZipFile(file) as archive:
        return [Label(**each) for each in json.loads(archive.read("labels.json"))]


def differences(first: Path, second: Path) -> list[Difference]:
    """Those of the earliest stage that has any, in the order of the first file.

    What arises later is computed from it, and differs for no reason of its own.
    """
    labels = labels_of(first)
    places = {label: place for place, label in enumerate(labels_of(second))}
    with np.load(first, allow_pickle=False) as ours, np.load(second, allow_pickle=False) as theirs:

        def compared(stage: list[tuple[int, Label]]) -> Iterator[Difference]:
            for place, label in stage:
                other = theirs[str(places[label])] if label in places else None
                difference = compare(label, ours[str(place)], other)
                if difference is not None:
                    yield difference

        for stage, group in groupby(enumerate(labels), lambda each: each[1].stage):
            found = list(compared(list(group)))
            missing = [e for e in places if e.stage == stage and e not in labels]
            found += [Difference(e, "is there in one process only", 0, 0, None) for e in missing]
            if found:
                return [e for e in found if e.label.tensor != WHOLE_STATE] or found
    return []


def compare(label: Label, ours: Array, theirs: Array | None) -> Difference | None:
    """None when they are the same, bit for bit."""
    if theirs is None:
        return Difference(label, "is there in one process only", ours.size, ours.size, None)
    if (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype):
        unequal = _bytes(ours) != _bytes(theirs)
        differing = int(unequal.any(axis=1).sum())
        if not differing:
            return None
    else:
        differing = max(ours.size, theirs.size)
    largest = _largest(ours, theirs)
    if ours.size == theirs.size == 1:
        one, other = str(ours.reshape(-1)[0]), str(theirs.reshape(-1)[0])
        how = f"is {one} in one process and {other} in the other"
    elif (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        one, other = (f"{each.dtype} of shape {each.shape}" for each in (ours, theirs))
        how = f"is {one} in one process and {other} in the other"
    else:
        how = f"differs in {differing} of {ours.size} values"
        if largest is not None:
            how += f", largest difference {largest:.2g}"
    return Difference(label, how, differing, ours.size, largest)


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    """One row per value."""
    return np.frombuffer(array.tobytes(), dtype=np.uint8).reshape(array.size, array.itemsize)


def _largest(ours: Array, theirs: Array) -> float | None:
    numbers = all(each.dtype.kind in "biuf" for each in (ours, theirs))
    if not numbers or ours.shape != theirs.shape or not ours.size:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
    return largest if np.isfinite(largest) else None
