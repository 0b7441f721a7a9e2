"""The program of a sandbox's process: binds its life to the emulator's, then becomes the function.

    python -P function_process.py EMULATOR_PID HANDLER

It is run as a file and imports nothing of Mayfly, so that a cold start costs what AWS's runtime
client costs, and the function sees a fresh interpreter.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def main() -> None:
    parent, handler = sys.argv[1:]
    if bind_life(int(parent)):
        serve(handler)


def bind_life(parent: int) -> bool:
    """This process dies with `parent` from here on; False if that one is dead already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    return os.getppid() == parent  # if not, it died before its death could be felt


def serve(handler: str) -> None:
    """Does as `python -m awslambdaric HANDLER`; the environment says where the platform is."""
    from awslambdaric import bootstrap
    from awslambdaric.lambda_config import LambdaConfigProvider
    from awslambdaric.lambda_runtime_client import LambdaRuntimeClient

    sys.argv = ["awslambdaric", handler]
    sys.path.insert(0, os.environ["LAMBDA_TASK_ROOT"])
    config = LambdaConfigProvider(sys.argv)
    host, _, sandbox = config.api_address.partition("/")
    client = LambdaRuntimeClient(host, config.use_thread_polling)
    # its native half takes an address with a path, but this half, which tells of a failed
    # initialisation, takes one without
    call = client.call_rapid

    def call_with_path(method: str, path: str, *rest: Any, **named: Any) -> None:
        call(method, f"/{sandbox}{path}", *rest, **named)

    client.call_rapid = call_with_path
    bootstrap.run(config.handler, client)


if __name__ == "__main__":
    main()
