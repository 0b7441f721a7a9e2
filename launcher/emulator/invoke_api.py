"""Lambda's Invoke API, as boto3 speaks it: where events come in, and how errors are worded."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import uuid4

from aiohttp import web

from launcher.emulator.pool import Pool, Throttled
from launcher.emulator.process import ACCOUNT, REGION

if TYPE_CHECKING:
    from launcher.emulator.server import Emulator

logger = logging.getLogger(__name__)

EVENT_LIMIT_BYTES = 1 << 20
"""Of an asynchronous event, as on Lambda."""


def routes(emulator: Emulator) -> Iterable[web.RouteDef]:
    """The one path, bound to `emulator`."""

    async def invoke(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        pool = emulator.pool(name)
        if pool is None:
            arn = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"
            return _error(404, "ResourceNotFoundException", f"Function not found: {arn}")
        kind = request.headers.get("X-Amz-Invocation-Type", "RequestResponse")
        try:
            payload = await request.read() or b"{}"
        except web.HTTPRequestEntityTooLarge:
            return _too_large(pool)
        if kind == "Event" and len(payload) > EVENT_LIMIT_BYTES:
            return _too_large(pool)
        try:
            json.loads(payload)
        except ValueError as error:
            reason = f"Could not parse request body into json: {error}"
            return _error(400, "InvalidRequestContentException", reason)
        try:
            if kind == "DryRun":
                return web.Response(status=204, headers=_headers())
            if kind == "Event":
                request_id = emulator.submit(pool, payload)
                return web.Response(status=202, headers=_headers(request_id))
            if kind == "RequestResponse":
                return await _call(emulator, pool, payload)
        except Throttled as throttled:
            return _error(429, "TooManyRequestsException", f"Rate Exceeded: {throttled}")
        return _error(400, "InvalidParameterValueException", f"no invocation type {kind!r}")

    return [web.post("/2015-03-31/functions/{name}/invocations", invoke)]


async def _call(emulator: Emulator, pool: Pool, payload: bytes) -> web.Response:
    request_id, outcome = await emulator.call(pool, payload)
    headers = _headers(request_id) | {"X-Amz-Executed-Version": "$LATEST"}
    if outcome.cause != "ok":
        headers["X-Amz-Function-Error"] = "Unhandled"
    return web.Response(body=outcome.body, headers=headers, content_type="application/json")


def _headers(request_id: str = "") -> dict[str, str]:
    return {"x-amzn-RequestId": request_id or str(uuid4())}


def _too_large(pool: Pool) -> web.Response:
    reason = f"the payload for {pool.function.name} is larger than Lambda allows"
    return _error(413, "RequestTooLargeException", reason)


def _error(status: int, kind: str, message: str) -> web.Response:
    logger.info("refused: %s: %s", kind, message)
    headers = _headers() | {"x-amzn-ErrorType": kind}
    # Lambda writes 'Message' for some errors and 'message' for others; botocore reads either
    return web.json_response({"Type": "User", "Message": message}, status=status, headers=headers)
