"""The function's handler: one event in, one peer's life. Set it as `launcher.handler.handle`."""

from __future__ import annotations

import os
import time
from typing import Any

from launcher.logs import beginning
from launcher.platform import Platform
from p2p.peer import Invocation, live

_start = ""


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Lives one invocation; the event is `p2p.peer.event_payload`."""
    global _start
    start, _start = _start or _first_start(), "warm"
    # `p2p-launch logs --slot` finds by this line which slot a log is about
    print(beginning(event["slot"], event["generation"]) + f", {start} start", flush=True)
    platform = Platform(os.environ["AWS_LAMBDA_FUNCTION_NAME"])
    invocation = Invocation(
        **event,
        deadline=time.monotonic() + context.get_remaining_time_in_millis() / 1000,
        start=start,
    )
    return live(invocation, platform.invoke)


def _first_start() -> str:
    snapshot = os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"
    return "restored" if snapshot else "cold"
