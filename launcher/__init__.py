"""What surrounds the peers: the command, the platform, the supervisor; and `run`, to embed it all.

import launcher
summary = launcher.run("job.py", peers=4)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.runs import Options, run

__all__ = ["Options", "run"]


def __getattr__(name: str) -> Any:
    # the emulator and each function import this package too, and need nothing of it
    if name in __all__:
        from launcher import runs

        return getattr(runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
