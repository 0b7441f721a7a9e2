"""From a job file to a task, and what is said when that fails."""

from __future__ import annotations

import random
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from fault.errors import (
    InputError,
    InvalidTask,
    JobNotFound,
    NoTask,
    ShadowedName,
    TaskRaised,
)
from p2p import Task
from p2p.job import load_task, user_trace
from p2p.spec import job_digest

USUAL = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from p2p import Task

def make(**changes):
    values = dict(
        model=nn.Linear(3, 2),
        dataset=TensorDataset(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)),
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        batch_size=4,
        epochs=1,
    )
    return Task(**{**values, **changes})
"""


def write(folder: Path, text: str, name: str = "job.py") -> Path:
    path = folder / name
    path.write_text(USUAL + text)
    return path


def test_a_job_is_loaded(tmp_path: Path) -> None:
    """task() is called and its Task returned; the file's digest names what was run."""
    job = write(tmp_path, "def task():\n    return make(batch_size=6)\n")
    assert load_task(job, {}).batch_size == 6
    assert job_digest(job) == sha256(job.read_bytes()).hexdigest()


def test_an_edited_job_is_loaded_anew(tmp_path: Path) -> None:
    """A second load within one second sees the edit: no bytecode is cached by timestamp."""
    for size in (4, 5, 6):
        job = write(tmp_path, f"def task():\n    return make(batch_size={size})\n")
        assert load_task(job, {}).batch_size == size
    assert not list(tmp_path.rglob("*.pyc"))


def test_a_job_imports_its_neighbours(tmp_path: Path) -> None:
    """Modules beside the job can be imported, as from a script."""
    (tmp_path / "neighbour_of_a_job.py").write_text("SIZE = 7\n")
    job = write(
        tmp_path,
        "from neighbour_of_a_job import SIZE\ndef task():\n    return make(batch_size=SIZE)\n",
    )
    assert load_task(job, {}).batch_size == 7


def test_settings_reach_the_parameters(tmp_path: Path) -> None:
    """Values become what the annotation says, or the type of the default."""
    job = write(
        tmp_path,
        """
def task(a: int, b: "float" = 1, c: bool = True, d="text", e=2, f: int | None = 3, *, g=None,
         h: float | str = 0.0, i=False):
    found = (a, b, c, d, e, f, g, h, i)
    return make(evaluate=lambda model: {"found": found})
""",
    )
    texts = ("1", "2", "no", "3", "4", "none", "5", "6", "on")
    task = load_task(job, dict(zip("abcdefghi", texts, strict=True)))
    assert task.evaluate is not None
    found: Any = task.evaluate(task.model)["found"]
    assert found == (1, 2.0, False, "3", 4, None, "5", 6.0, True)
    assert [type(value) for value in found] == [
        *(int, float, bool, str, int, type(None), str, float, bool)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": "1", "x": "2"}, "has no parameter 'x'; it has: a, flag"),
        ({}, "needs a value for 'a': --set a="),
        ({"a": "one"}, "--set a=one: task.. takes int there"),
        ({"a": "1", "flag": "maybe"}, "--set flag=maybe: task.. takes bool there"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    """Unknown, missing and unreadable settings are InputErrors that name them."""
    job = write(tmp_path, "def task(a: int, flag=False):\n    return make()\n")
    with pytest.raises(InputError, match=message):
        load_task(job, settings)


def test_weights_follow_from_the_seed(tmp_path: Path) -> None:
    """Loading twice gives the same weights; a parameter `seed` gives others; the process's own
    generators neither matter nor change."""
    job = write(
        tmp_path,
        """
import numpy, random
TOP = torch.rand(1).item() + numpy.random.rand() + random.random()
def task(seed: int = 0):
    total = TOP + torch.rand(1).item() + numpy.random.rand() + random.random()
    return make(seed=seed, evaluate=lambda model: {"drawn": total})
""",
    )

    def drawn(settings: dict[str, str]) -> tuple[float, list[float]]:
        task = load_task(job, settings)
        assert task.evaluate is not None
        weights = task.model.weight
        assert isinstance(weights, torch.Tensor)
        return task.evaluate(task.model)["drawn"], weights.flatten().tolist()

    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    first = drawn({})
    after = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    assert states == after
    torch.manual_seed(8)
    assert drawn({}) == first == drawn({"seed": "0"})
    assert drawn({"seed": "1"}) != first


def test_there_must_be_a_file(tmp_path: Path) -> None:
    """A job that is not there, or is a folder, is JobNotFound."""
    for call in (lambda job: load_task(job, {}), job_digest):
        with pytest.raises(JobNotFound, match=r"there is no file .*none\.py"):
            call(tmp_path / "none.py")
        with pytest.raises(JobNotFound, match="cannot be read: Is a directory"):
            call(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no function task"),
        ("task = 3\n", "defines no function task"),
        ("def task():\n    return 3\n", "returned int, not a p2p.Task"),
    ],
)
def test_there_must_be_a_task(tmp_path: Path, text: str, message: str) -> None:
    """A file without task(), or whose task() returns something else, is NoTask."""
    with pytest.raises(NoTask, match=message):
        load_task(write(tmp_path, text), {})


def test_the_trace_is_the_users(tmp_path: Path) -> None:
    """A task() that raises inside a library shows the frames of the user's files alone."""
    (tmp_path / "deeper_in_a_job.py").write_text("def fail(call):\n    return call()\n")
    job = write(
        tmp_path,
        """
from deeper_in_a_job import fail
def task():
    try:
        fail(lambda: torch.zeros(2).reshape(3))
    except RuntimeError as error:
        raise ValueError("a wrong shape") from error
""",
    )
    with pytest.raises(
        TaskRaised, match=r"task\(\) of job.py raised ValueError: a wrong shape"
    ) as e:
        load_task(job, {})
    trace = e.value.trace
    assert "in task" in trace and "deeper_in_a_job.py" in trace and "invalid for input" in trace
    files = {line.split('"')[1] for line in trace.splitlines() if line.startswith("  File")}
    assert files == {str(job), str(tmp_path / "deeper_in_a_job.py")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", "the job file of job.py raised ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "the job file of job.py raised SystemExit: 3"),
        ("def task(:\n", "the job file of job.py raised SyntaxError"),
        ("import no_such_module_here\n", "raised ModuleNotFoundError"),
    ],
)
def test_a_file_that_raises(tmp_path: Path, text: str, message: str) -> None:
    """Errors while the file itself runs are TaskRaised, with a trace that leads into it."""
    job = write(tmp_path, text)
    with pytest.raises(TaskRaised, match=message) as raised:
        load_task(job, {})
    assert str(job) in raised.value.trace


def test_user_trace_of_a_sample(tmp_path: Path) -> None:
    """The trace of an error from anywhere can be trimmed to the job's folder."""
    job = write(tmp_path, "def task():\n    raise KeyError('here')\n")
    namespace: dict[str, Any] = {}
    exec(compile(job.read_bytes(), str(job), "exec"), namespace)
    try:
        namespace["task"]()
    except KeyError as error:
        assert __file__ not in user_trace(error, job)
        assert "raise KeyError('here')" in user_trace(error, job)


@pytest.mark.parametrize("name", ["p2p", "checkpoint", "fault", "launcher", "chaos"])
def test_names_of_ours_beside_the_job(tmp_path: Path, name: str) -> None:
    """A module or package of the user's with a name of ours is refused; a folder of data is not."""
    job = write(tmp_path, "def task():\n    return make()\n")
    (tmp_path / name).mkdir()
    (tmp_path / name / "step-50.safetensors").touch()
    load_task(job, {})
    (tmp_path / name / "module.py").touch()
    with pytest.raises(ShadowedName, match=f"{name} has the name of a package of Mayfly's"):
        load_task(job, {})
    (tmp_path / name / "module.py").unlink()
    (tmp_path / f"{name}.py").touch()
    with pytest.raises(ShadowedName, match=f"{name}.py has the name"):
        load_task(job, {})


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model is of type int"),
        ({"dataset": Stream()}, "dataset is of type Stream, not a map-style dataset"),
        ({"dataset": iter([1])}, "not a map-style dataset"),
        ({"loss": None}, "loss is of type NoneType, not a function"),
        ({"optimizer": 0.1}, "optimizer is of type float, not a function"),
        ({"scheduler": 0.1}, "scheduler is of type float"),
        ({"evaluate": 0.1}, "evaluate is of type float"),
        ({"steps": 5}, "either epochs or steps"),
        ({"epochs": None}, "either epochs or steps"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_tasks_are_checked_where_they_are_made(changes: dict[str, Any], message: str) -> None:
    """A Task with values that cannot be trained with is an InvalidTask at once."""
    values: dict[str, Any] = {
        "model": nn.Linear(3, 2),
        "dataset": TensorDataset(torch.zeros(8, 3)),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD,
        "batch_size": 4,
        "epochs": 1,
    }
    Task(**values)
    with pytest.raises(InvalidTask, match=message):
        Task(**{**values, **changes})


def test_importing_p2p_does_not_import_torch() -> None:
    """The relay's process imports p2p and stays light; p2p.Task is there when it is asked for."""
    code = (
        "import sys, p2p, p2p.transport.relay\n"
        "assert 'torch' not in sys.modules\n"
        "from p2p import Task\n"
        "assert 'torch' in sys.modules and Task is p2p.Task\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
