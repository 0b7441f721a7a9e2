"""What the pure core asks its driver to do; the driver answers later with an event."""

from __future__ import annotations

from dataclasses import dataclass

from fault.records import Outcome, Peer, Proposal, View


@dataclass(slots=True)
class Propose:
    """Put this proposal to the registry (with the spec, for a restore); answer `on_proposed`."""

    proposal: Proposal


@dataclass(slots=True)
class GrantSlot:
    """Ask the registry for this grant and, if it is given, invoke; answer `on_granted`."""

    slot: int
    generation: int
    token: str
    predecessor: Peer = ""


@dataclass(slots=True)
class Exit:
    """Leave now. `cause` is told to the registry when the peer died of its own work."""

    reason: str
    cause: str = ""
    blunt: bool = False
    """Kill the process: its computing thread does not come back."""


@dataclass(slots=True)
class LoadCheckpoint:
    """Read the newest checkpoint, or build the state of step 0; answer `on_loaded`."""


@dataclass(slots=True)
class ContactNow:
    """Make contact with the registry at once rather than with the next beat."""


@dataclass(slots=True)
class Finish:
    """Tell the registry how the run ended."""

    outcome: Outcome


@dataclass(slots=True)
class PushView:
    """Send the view to these peers."""

    view: View
    to: tuple[Peer, ...]
