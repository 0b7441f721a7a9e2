"""Lambda's Runtime API, as a function's process speaks it: fetch an event, tell how it went.

Each sandbox has a path prefix of its own, so one port serves them all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from aiohttp import web

from launcher.emulator.process import ACCOUNT, REGION
from launcher.emulator.sandbox import Misuse, Sandbox

if TYPE_CHECKING:
    from launcher.emulator.server import Emulator

_ROOT = "/{sandbox}/2018-06-01/runtime"
Answer = Callable[[Sandbox, web.Request], Awaitable[web.Response]]


def routes(emulator: Emulator) -> Iterable[web.RouteDef]:
    """The paths under every sandbox's prefix, bound to `emulator`."""

    def bound(answer: Answer) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            sandbox = emulator.sandbox(request.match_info["sandbox"])
            if sandbox is None:
                return _refusal(410, "the sandbox has ended")
            try:
                return await answer(sandbox, request)
            except Misuse as misuse:
                return _refusal(403, str(misuse))

        return handle

    return [
        web.get(f"{_ROOT}/invocation/next", bound(_next)),
        web.post(f"{_ROOT}/invocation/{{request}}/response", bound(_response)),
        web.post(f"{_ROOT}/invocation/{{request}}/error", bound(_invocation_error)),
        web.post(f"{_ROOT}/init/error", bound(_init_error)),
        # what a function calls when it has run its hooks around a snapshot
        web.get(f"{_ROOT}/restore/next", bound(_restore_next)),
        web.post(f"{_ROOT}/restore/error", bound(_init_error)),
    ]


async def _next(sandbox: Sandbox, request: web.Request) -> web.Response:
    invocation = await sandbox.next()
    assert sandbox.deadline is not None
    arn = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{sandbox.function.name}"
    headers = {
        "Lambda-Runtime-Aws-Request-Id": invocation.request_id,
        "Lambda-Runtime-Deadline-Ms": str(int(sandbox.deadline * 1000)),
        "Lambda-Runtime-Invoked-Function-Arn": arn,
    }
    return web.Response(body=invocation.payload, headers=headers, content_type="application/json")


async def _response(sandbox: Sandbox, request: web.Request) -> web.Response:
    request_id = request.match_info["request"]
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        sandbox.fail(
            request_id,
            b'{"errorType": "Function.ResponseSizeTooLarge", '
            b'"errorMessage": "Response payload size exceeded maximum allowed"}',
        )
        return _refusal(413, "the response is too large")
    sandbox.respond(request_id, body)
    return _accepted()


async def _invocation_error(sandbox: Sandbox, request: web.Request) -> web.Response:
    sandbox.fail(request.match_info["request"], await request.read())
    return _accepted()


async def _init_error(sandbox: Sandbox, request: web.Request) -> web.Response:
    sandbox.fail_init(await request.read())
    return _accepted()


async def _restore_next(sandbox: Sandbox, request: web.Request) -> web.Response:
    return web.Response()  # the process is the restored one already


def _accepted() -> web.Response:
    return web.json_response({"status": "OK"}, status=202)


def _refusal(status: int, message: str) -> web.Response:
    document = {"errorType": "InvalidStateTransition", "errorMessage": message}
    return web.json_response(document, status=status)
