"""The one kind of edge in a collective's graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hop:
    """In `round`, node `source` sends `chunk` to node `destination`, which adds or copies it."""

    round: int
    chunk: int
    source: int
    destination: int
    adds: bool
