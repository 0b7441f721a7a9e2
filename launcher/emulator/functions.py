"""What the emulator is told about each function: handler, limits, environment.

The file is JSON: `{"functions": {NAME: {"handler": "module.function", "timeout_s": 900, …}}}`.
Defaults are Lambda's where Lambda has one. Nothing is started here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fault.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESERVED_PREFIXES = ("AWS_LAMBDA_", "LAMBDA_")
RESERVED = frozenset(
    {
        "_HANDLER",
        "_X_AMZN_TRACE_ID",
        "AWS_ACCESS_KEY_ID",
        "AWS_DEFAULT_REGION",
        "AWS_EXECUTION_ENV",
        "AWS_REGION",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
    }
)
"""The platform's own names; Lambda refuses them in a function's environment as well."""
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
Start = Literal["cold", "warm", "snapshot"]


@dataclass(frozen=True)
class Function:
    """One function's configuration."""

    name: str
    handler: str
    timeout_s: float = 3.0
    """From handing over an event to SIGKILL."""
    memory_mb: int = 128
    environment: Mapping[str, str] = field(default_factory=dict)
    working_directory: str = "."
    """The task root: the process starts in it and imports from it first."""
    concurrency: int = 100
    """Sandboxes at most; further events wait, further synchronous calls are throttled."""
    queue_limit: int = 1000
    """Asynchronous events that may wait, for a sandbox or for their next attempt."""
    retry_delays_s: tuple[float, ...] = (1.0, 2.0)
    """Before each further attempt at an asynchronous event; Lambda waits one and two minutes."""
    init_timeout_s: float = 60.0
    """From the start of a process to its first call for an event. Lambda gives 10 s, and then
    the whole of the function's time limit; here cold starts may share few cores."""
    idle_timeout_s: float = 300.0
    start: Start = "warm"
    """Where an event goes. "cold": to a new process, which ends after it. "warm": to a sandbox that
    is free, otherwise to a new process. "snapshot": to one that is free, otherwise to a process
    forked from a snapshot (`snapshot.py`), whose memory counts as the function's own."""
    preload: tuple[str, ...] = ()
    """Modules that a snapshot has imported, besides its own; what is not there is skipped."""


def read_functions(path: Path) -> dict[str, Function]:
    """The functions that the file names. Raises InputError, saying what to mend."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    entries = document.get("functions") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path} names no functions")
    return {name: _function(name, entry) for name, entry in entries.items()}


def _function(name: str, entry: object) -> Function:
    def refuse(reason: str) -> InputError:
        return InputError(f"function {name!r}: {reason}")

    if not NAME.fullmatch(name):
        raise refuse("a name has 1 to 64 letters, digits, hyphens and underscores")
    if not isinstance(entry, dict):
        raise refuse("its configuration is not an object")
    known = {each.name for each in dataclasses.fields(Function)} - {"name"}
    for key in entry:
        if key not in known:
            raise refuse(f"unknown setting {key!r}")
    values: dict[str, Any] = dict(entry)
    if not isinstance(values.get("handler"), str) or "." not in values["handler"]:
        raise refuse("'handler' must read module.function")
    for key in ("timeout_s", "init_timeout_s", "idle_timeout_s"):
        if key in values and not (_is_number(values[key]) and values[key] > 0):
            raise refuse(f"{key!r} must be a number of seconds above 0")
    for key in ("memory_mb", "concurrency", "queue_limit"):
        if key in values and not (_is_number(values[key]) and int(values[key]) == values[key] > 0):
            raise refuse(f"{key!r} must be a whole number above 0")
    delays = values.get("retry_delays_s", [])
    if not isinstance(delays, list) or not all(_is_number(delay) for delay in delays):
        raise refuse("'retry_delays_s' must be a list of seconds")
    if "retry_delays_s" in values:
        values["retry_delays_s"] = tuple(float(delay) for delay in delays)
    starts = get_args(Start)
    if values.get("start", "warm") not in starts:
        raise refuse(f"'start' must be one of {', '.join(starts)}")
    if values.get("start") == "snapshot" and sys.platform != "linux":
        raise refuse("'start' can be snapshot on Linux only")
    preload = values.get("preload", [])
    if not isinstance(preload, list) or not all(
        isinstance(module, str) and MODULE.fullmatch(module) for module in preload
    ):
        raise refuse("'preload' must be a list of names of modules")
    values["preload"] = tuple(preload)
    environment = values.get("environment", {})
    if not isinstance(environment, dict) or not all(
        isinstance(value, str) for value in environment.values()
    ):
        raise refuse("'environment' must map names to strings")
    for key in environment:
        if key in RESERVED or key.startswith(RESERVED_PREFIXES):
            raise refuse(f"the variable {key} is the platform's own")
    directory = Path(values.get("working_directory", ".")).absolute()
    if not directory.is_dir():
        raise refuse(f"there is no working directory {directory}")
    values["working_directory"] = str(directory)
    return Function(name=name, **values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
