"""From a job file to a task: finding it, running it, and saying what is wrong with it.

Not here: whether the task fits the run's shards (`plan.py`) or can be trained (`state.py`).
"""

from __future__ import annotations

import inspect
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from fault.errors import (
    InputError,
    MayflyError,
    NoTask,
    ShadowedName,
    TaskRaised,
)
from p2p.seeding import BEFORE_STEPS, NO_SHARD, seeded
from p2p.spec import job_source
from p2p.task import Task

OUR_NAMES = ("p2p", "checkpoint", "fault", "launcher", "chaos")
MODULE_NAME = "mayfly_job"

_OUR_FOLDER = Path(__file__).resolve().parent.parent
_TRUTHS = {"true": True, "yes": True, "on": True, "1": True}
_TRUTHS |= {"false": False, "no": False, "off": False, "0": False}


def load_task(job: Path, settings: Mapping[str, str]) -> Task:
    """Runs the job file and its `task()`, with `settings` as arguments.

    Both run under seeded generators, which are put back after: the file under seed 0, and
    `task()` under the value of its parameter `seed`, if it has one that is a whole number, or 0.
    The job's folder comes first in `sys.path`, as for a script.

    Raises JobNotFound, NoTask, ShadowedName, TaskRaised with the user's part of the traceback,
    InvalidTask, and InputError for a setting that `task()` has no parameter for.
    """
    source = job_source(job)
    job = job.resolve()
    _refuse_shadows(job)
    if str(job.parent) not in sys.path:
        sys.path.insert(0, str(job.parent))
    module = types.ModuleType(MODULE_NAME)
    module.__file__ = str(job)
    sys.modules[MODULE_NAME] = module

    def code() -> types.CodeType:
        return compile(source, str(job), "exec", dont_inherit=True)

    with seeded(0, BEFORE_STEPS, NO_SHARD):
        # not through importlib: a cached .pyc is told from the source by a timestamp in seconds
        _run(job, "the job file", lambda: exec(code(), module.__dict__))
    function = getattr(module, "task", None)
    if not callable(function):
        raise NoTask(f"{job.name} defines no function task()")
    arguments = _arguments(job, function, settings)
    with seeded(_seed(function, arguments), BEFORE_STEPS, NO_SHARD):
        task: object = _run(job, "task()", lambda: function(**arguments))
    if not isinstance(task, Task):
        raise NoTask(f"task() in {job.name} returned {type(task).__name__}, not a p2p.Task")
    return task


def user_trace(error: BaseException, job: Path) -> str:
    """The traceback, without the frames that are not of files in the job's folder."""
    folder = job.resolve().parent
    described = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    pending = [described]
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        each.stack = traceback.StackSummary.from_list(
            [frame for frame in each.stack if _is_users(frame.filename, folder)]
        )
        pending.extend(e for e in (each.__cause__, each.__context__) if e is not None)
    return "".join(described.format())


def _is_users(filename: str, folder: Path) -> bool:
    if filename.startswith("<"):  # frozen modules and the like, which are no files
        return False
    path = Path(filename).resolve()
    ours = any(path.is_relative_to(_OUR_FOLDER / name) for name in OUR_NAMES)
    return path.is_relative_to(folder) and not ours and "site-packages" not in path.parts


def _refuse_shadows(job: Path) -> None:
    for name in OUR_NAMES:
        file, folder = job.parent / f"{name}.py", job.parent / name
        if folder == _OUR_FOLDER / name:
            continue
        # a folder without Python in it, such as one for checkpoints, is in nobody's way
        shadow = file if file.exists() else folder if any(folder.glob("*.py")) else None
        if shadow is not None:
            raise ShadowedName(
                f"{shadow} has the name of a package of Mayfly's, so one would be imported for the "
                "other; rename it"
            )


def _run(job: Path, what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except MayflyError:
        raise
    except (Exception, SystemExit) as error:
        trace = user_trace(error, job)
        summary = traceback.format_exception_only(error)[-1].strip()
        raise TaskRaised(f"{what} of {job.name} raised {summary}", trace) from error


def _arguments(
    job: Path, function: Callable[..., Any], settings: Mapping[str, str]
) -> dict[str, Any]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # annotations that name something only a type checker sees
        signature = inspect.signature(function)
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    for name in settings:
        if name not in named:
            known = ", ".join(named) or "none"
            raise InputError(f"task() in {job.name} has no parameter {name!r}; it has: {known}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in settings:
            raise InputError(f"task() in {job.name} needs a value for {name!r}: --set {name}=…")
    return {name: _converted(name, text, named[name]) for name, text in settings.items()}


def _converted(name: str, text: str, parameter: inspect.Parameter) -> Any:
    kind = parameter.annotation
    if kind is parameter.empty or isinstance(kind, str):
        default = parameter.default
        kind = str if default is parameter.empty or default is None else type(default)
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for each in sorted(kinds, key=lambda each: each is str):
        if each is types.NoneType and text.lower() == "none":
            return None
        if each is bool and text.lower() in _TRUTHS:
            return _TRUTHS[text.lower()]
        if each in (int, float, str):
            try:
                return each(text)
            except ValueError:
                continue
    expected = " or ".join(getattr(each, "__name__", str(each)) for each in kinds)
    raise InputError(f"--set {name}={text}: task() takes {expected} there")


def _seed(function: Callable[..., Any], arguments: Mapping[str, Any]) -> int:
    parameter = inspect.signature(function).parameters.get("seed")
    default = parameter.default if parameter is not None else 0
    seed = arguments.get("seed", default)
    return seed if type(seed) is int else 0
