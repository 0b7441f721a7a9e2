"""When a peer invites its successor: early enough for a start, and not when the others do. Pure."""

from __future__ import annotations

from fault.records import Timing

BOOT_FACTOR = 1.5
"""Starts differ, and the machine is never quite as idle as the last time."""
LIFE_SHARE = 0.6
"""Never earlier than this part of a life before its end, however slow the starts are."""
SPREAD_SHARE = 0.25


def lead_s(
    timing: Timing, boot_s: float, step_s: float, life_s: float, slot: int, slots: int, alone: bool
) -> float:
    """How long before its deadline the peer in `slot` invites, or -1 for never.

    `boot_s` is what a start took, from the grant until the process could take part; `life_s` is
    from there to the deadline, `step_s` the longest step of late. Peers launched together are due
    together: the slots' invitations are spread over as long as their starts take one after another,
    so that they do not coincide. Who is alone allows for more: no one else carries the state on.
    """
    if timing.handover_margin_s < 0:
        return -1.0
    spread = min(slots * boot_s, SPREAD_SHARE * life_s) * timing.handover_stagger
    lead = BOOT_FACTOR * boot_s + 2 * step_s + timing.handover_margin_s
    lead = (2 * lead if alone else lead) + spread * slot / max(1, slots)
    return min(lead, LIFE_SHARE * life_s)
