"""The emulator's own API, which AWS has no counterpart of: look inside, and make it misbehave.

GET  /mayfly/sandboxes               the sandboxes there are
GET  /mayfly/ended?after=N&wait=S    attempts that ended, numbered above N; waits up to S
                                     seconds for one if there is none yet
POST /mayfly/kill                    {"sandbox": ID} or {"slot": S}: SIGKILL to that sandbox,
                                     or to those whose event in hand has that "slot"
POST /mayfly/duplicate               {"event": "next"} or {"event": "last"}: that asynchronous
                                     event is delivered twice, under one request id
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from launcher.emulator.sandbox import Sandbox, describe

if TYPE_CHECKING:
    from launcher.emulator.server import Emulator

WAIT_LIMIT_S = 60.0


def routes(emulator: Emulator) -> Iterable[web.RouteDef]:
    """The paths, bound to `emulator`."""

    async def sandboxes(_: web.Request) -> web.Response:
        return web.json_response([describe(sandbox) for sandbox in emulator.sandboxes()])

    async def ended(request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", "0"))
            wait_s = min(float(request.query.get("wait", "0")), WAIT_LIMIT_S)
        except ValueError:
            raise web.HTTPBadRequest(text="'after' and 'wait' are numbers") from None
        return web.json_response(await emulator.history.after(after, wait_s))

    async def kill(request: web.Request) -> web.Response:
        body = await _object(request)
        if len(body) != 1 or not body.keys() <= {"sandbox", "slot"}:
            raise web.HTTPBadRequest(text="name a 'sandbox' or a 'slot'")
        chosen = [each for each in emulator.sandboxes() if _is_meant(each, body)]
        if not chosen:
            raise web.HTTPNotFound(text=f"no sandbox has {json.dumps(body)}")
        for sandbox in chosen:
            sandbox.kill()
        return web.json_response({"killed": [sandbox.name for sandbox in chosen]})

    async def duplicate(request: web.Request) -> web.Response:
        match (await _object(request)).get("event", "next"):
            case "next":
                emulator.duplicate_next()
                return web.json_response({"request_id": None})
            case "last":
                request_id = emulator.duplicate_last()
                if request_id is None:
                    raise web.HTTPNotFound(text="there was no asynchronous event yet")
                return web.json_response({"request_id": request_id})
        raise web.HTTPBadRequest(text="'event' is 'next' or 'last'")

    return [
        web.get("/mayfly/sandboxes", sandboxes),
        web.get("/mayfly/ended", ended),
        web.post("/mayfly/kill", kill),
        web.post("/mayfly/duplicate", duplicate),
    ]


def _is_meant(sandbox: Sandbox, body: dict[str, Any]) -> bool:
    if "sandbox" in body:
        return bool(sandbox.name == body["sandbox"])
    event = sandbox.invocation.event if sandbox.invocation is not None else None
    return isinstance(event, dict) and event.get("slot") == body["slot"]


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="not a JSON object")
    return body
