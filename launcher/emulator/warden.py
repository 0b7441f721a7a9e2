"""Sees to it that nothing a function started outlives it, or outlives the emulator.

A process is known by a mark in its environment, which its children inherit however they detach
themselves; Linux shows it in /proc. Run as a program, this waits until the emulator is gone, by
whatever death, and then ends everything that bears the emulator's mark:

    python -I -S warden.py MARK

It imports next to nothing, so that it starts at once and stays small. Elsewhere than on Linux no
process can be found by its environment, and only what the emulator itself ends is ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time

# as large as a pipe holds; the emulator never writes, so this returns when it is gone
_READ_BYTES = 4096


def marked(mark: bytes) -> list[int]:
    """The live processes, other than this one, whose environment contains `mark`."""
    found = []
    try:
        names = os.listdir("/proc")  # noqa: PTH208 (pathlib takes longer to import than this runs)
    except OSError:
        return []
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environment:  # noqa: PTH123
                if mark in environment.read():
                    found.append(int(name))
        except OSError:
            continue  # ended meanwhile, or someone else's
    return found


def end_marked(mark: bytes, seconds: float = 10.0) -> None:
    """SIGKILLs what bears the mark until two looks in a row find nothing.

    One look is not enough: a process can fork while the list is read. A process that the kernel
    cannot end is given up after `seconds`.
    """
    deadline = time.monotonic() + seconds
    empty = 0
    while empty < 2 and time.monotonic() < deadline:
        processes = marked(mark)
        empty = 0 if processes else empty + 1
        for pid in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if processes:
            time.sleep(0.005)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it must stay until the emulator is gone
    while os.read(0, _READ_BYTES):
        pass
    end_marked(os.fsencode(sys.argv[1]))


if __name__ == "__main__":
    main()
