"""What a function is started with: the events, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fault.records import Peer


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a function was started with. `deadline` is in seconds of `time.monotonic`."""

    run: str
    slot: int
    generation: int
    token: str
    registry: str
    folder: str
    predecessor: str = ""
    deadline: float = float("inf")
    start: str = "cold"
    """cold, warm or restored."""

    def another(self, slot: int, generation: int, token: str, predecessor: Peer) -> dict[str, Any]:
        """The event for another function of the same run."""
        return event_payload(
            self.run, slot, generation, token, self.registry, self.folder, predecessor
        )


def event_payload(
    run: str, slot: int, generation: int, token: str, registry: str, folder: str, predecessor: str
) -> dict[str, Any]:
    """The event that starts a function; the handler reads the same names."""
    return {
        "run": run,
        "slot": slot,
        "generation": generation,
        "token": token,
        "registry": registry,
        "folder": folder,
        "predecessor": predecessor,
    }


def evaluation_payload(run: str, registry: str, step: int) -> dict[str, Any]:
    """The event that has a state evaluated; the handler reads the same names."""
    return {"run": run, "registry": registry, "step": step}
