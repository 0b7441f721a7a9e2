"""Inviting functions from outside of the run: a grant first, then the invocation that it allows."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from fault.registry import Registry
from launcher.platform import Platform
from p2p.invocation import event_payload


def invite(
    slots: Iterable[tuple[int, int]],
    registry: Registry,
    registry_url: str,
    platform: Platform,
    folder: Path,
) -> None:
    """For (slot, generation) each, unless somebody was faster.

    Raises RegistryUnavailable, and PlatformUnavailable for an invocation that was not taken; the
    grant that was given for it expires.
    """
    for slot, generation in slots:
        token = secrets.token_hex(8)
        if registry.grant(slot, generation, token, "launcher"):
            event = event_payload(
                registry.run, slot, generation, token, registry_url, str(folder), ""
            )
            platform.invoke(event)
