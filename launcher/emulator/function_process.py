"""The program of a sandbox's process: binds its life to the emulator's, then becomes the function.

    python -P function_process.py EMULATOR_PID HANDLER

It is run as a file and imports nothing of Mayfly, so that a cold start costs what AWS's runtime
client costs, and the function sees a fresh interpreter.
"""

from __future__ import annotations

import os
import sys

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def main() -> None:
    parent, handler = sys.argv[1:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != int(parent):
        return  # the emulator died before its death could be felt
    sys.path.insert(0, os.environ["LAMBDA_TASK_ROOT"])
    from awslambdaric.__main__ import main as serve

    sys.argv = ["awslambdaric", handler]
    serve(sys.argv)


if __name__ == "__main__":
    main()
