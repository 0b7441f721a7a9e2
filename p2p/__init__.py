"""What a peer is and does.

`p2p.Task` is what a job file's `task()` returns. It is loaded when it is first asked for, since the
relay's process is part of this package and must not pay for importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2p.task import Task as Task

__all__ = ["Task"]


def __getattr__(name: str) -> Any:
    if name == "Task":
        from p2p.task import Task

        return Task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
