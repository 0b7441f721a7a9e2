"""The function's handler: one event in, one peer's life. Set it as `launcher.handler.handle`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from launcher.logs import beginning
from launcher.platform import EVALUATION_SUFFIX, WORKER_SUFFIX, Platform
from p2p.importing import import_torch
from p2p.invocation import Invocation
from p2p.peer import live

if TYPE_CHECKING:
    from p2p.evaluation import Evaluator

EVALUATION_NICENESS = 10
"""Whoever shares a machine with peers gives way to them."""

_start = ""
_evaluator: Evaluator | None = None


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Lives one invocation; the event is `p2p.invocation.event_payload`."""
    global _start
    start, _start = _start or _first_start(), "warm"
    # `p2p-launch logs --slot` finds by this line which slot a log is about
    print(beginning(event["slot"], event["generation"]) + f", {start} start", flush=True)
    function = os.environ["AWS_LAMBDA_FUNCTION_NAME"]
    peers, evaluations = Platform(function), Platform(function + EVALUATION_SUFFIX)
    workers = Platform(function + WORKER_SUFFIX)

    def invoke(payload: dict[str, Any]) -> None:
        wanted = workers if "worker" in payload else peers if "slot" in payload else evaluations
        wanted.invoke(payload)

    invocation = Invocation(
        **event,
        deadline=time.monotonic() + context.get_remaining_time_in_millis() / 1000,
        start=start,
    )
    return live(invocation, invoke)


def _first_start() -> str:
    snapshot = os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"
    return "restored" if snapshot else "cold"


def work(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Lives a worker's invocation; the event has the fields of a `WorkerInvocation`."""
    from p2p.aggregate.places import WorkerInvocation
    from p2p.aggregate.worker import serve

    deadline = time.monotonic() + context.get_remaining_time_in_millis() / 1000
    return serve(WorkerInvocation(**event), deadline)


def look(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Looks at a job; the event has the fields of a `JobRequest`. Raises what is wrong with it."""
    from launcher.inquiry import JobRequest
    from launcher.preflight import inspect

    return inspect(JobRequest(**event))


def evaluate(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Evaluates one state; the event is `p2p.invocation.evaluation_payload`."""
    global _evaluator
    if _evaluator is None:
        import_torch()
        from p2p.evaluation import Evaluator

        os.setpriority(os.PRIO_PROCESS, 0, EVALUATION_NICENESS)
        _evaluator = Evaluator()
    return _evaluator.evaluate(event["run"], event["registry"], event["step"])
