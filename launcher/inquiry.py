"""A question about a job, answered by a process of its own, which runs the user's code.

`ask` starts `python -m MODULE FILE …` with the question as JSON in the file; there `answer` prints
one JSON object, what was found or the error. So the launcher does without torch, and whatever the
job does to its process, it does not do it to the launcher's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fault import errors
from fault.errors import InvalidTask, MayflyError, TaskRaised
from launcher.child import bound_command
from launcher.home import writing_to

# what the numerical libraries read when they are loaded; one thread is what is deterministic
NUMERICS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def reproducible(threads: int) -> dict[str, str]:
    """The environment variables of whatever computes for a run; they act when it starts."""
    return {"PYTHONHASHSEED": "0", **{name: str(threads) for name in NUMERICS}}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """Which task is meant, and for how many shards, or parts of shards."""

    job: str
    shards: int
    settings: dict[str, str]
    threads: int
    aggregate: str = "peers"


# --- the asking side -----------------------------------------------------------------------------


def ask(
    module: str,
    file: Path,
    question: JobRequest,
    arguments: Sequence[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What the module's process answers. `file` is where the question is written, for a while.

    `meanwhile` is called every 0.2 s, and ends the process by raising. Raises what the answer says
    is wrong, and TaskRaised when there is none.
    """
    with writing_to(file.parent):
        file.write_text(json.dumps(asdict(question)), "utf-8")
    # files, not pipes: a process that the job leaves behind may hold a pipe open for ever
    with tempfile.TemporaryFile() as out_file, tempfile.TemporaryFile() as said_file:
        with subprocess.Popen(
            bound_command([sys.executable, "-P", "-m", module, str(file), *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=said_file,
            env={**os.environ, **reproducible(question.threads)},
        ) as process:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
                        break
                    meanwhile()
            except BaseException:
                process.kill()
                raise
        out, said = _text_of(out_file), _text_of(said_file)
    file.unlink(missing_ok=True)
    lines = out.splitlines()
    if process.returncode or not lines:
        last = "".join([f": {line}" for line in said.strip().splitlines()[-1:]])
        raise TaskRaised(
            f"looking at {Path(question.job).name} ended the process "
            f"(exit code {process.returncode}){last}",
            said,
        )
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise reported(found)
    return found


def _text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def reported(found: Mapping[str, Any]) -> MayflyError:
    """The error again, in another process, that `report` told of."""
    kind: type[MayflyError] = getattr(errors, found["error"], MayflyError)
    return kind(*filter(None, (found["message"], found["trace"])))


# --- the answering side --------------------------------------------------------------------------


def answer(respond: Callable[[JobRequest], dict[str, Any]]) -> int:
    """The main program of a module that is asked; `respond` may raise a MayflyError."""
    # what the job prints, from Python or not, now or at exit, is not the answer
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        question = JobRequest(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
        try:
            found = respond(question)
        except MayflyError as error:
            found = report(error)
        print(json.dumps(found), file=out)
    return 0


def report(error: MayflyError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "message": str(error),
        "trace": getattr(error, "trace", ""),
    }


@contextmanager
def blamed_on(job: Path, what: str) -> Iterator[None]:
    """Whatever is raised inside is the job's: TaskRaised if in its own files, else InvalidTask.

    `what` is what was being computed, as "its first batch was computed".
    """
    from p2p.job import user_trace

    try:
        yield
    except MayflyError:
        raise
    except Exception as error:
        trace = user_trace(error, job)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "  File " in trace:
            raise TaskRaised(f"{job.name} raised {reason} while {what}", trace) from error
        raise InvalidTask(f"{job.name} cannot be trained: {reason}, while {what}") from error
