"""Whatever is wrong, `p2p-launch` says it in one line, with its own code, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fault import errors
from launcher.home import RunFolder

JOB = """
import os

import torch
from p2p import Task
from p2p.plan import Plan


class Rows(torch.utils.data.Dataset):
    def __init__(self, kind, samples, bad):
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
        self.kind, self.bad = kind, bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index == self.bad and self.kind == "raise":
            raise ValueError(f"sample {index} is damaged")
        if index == self.bad and self.kind == "exit":
            os._exit(7)
        if index == self.bad and self.kind == "memory":
            self.much = torch.ones(300 << 20)
        if index == self.bad and self.kind == "nan":
            return self.x[index] * float("nan"), torch.zeros(1)
        return self.x[index], self.x[index].sum().reshape(1)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(4), torch.zeros(1)


def task(kind: str = "", steps: int = 30, samples: int = 256, shards: int = 1):
    if kind == "task":
        raise KeyError("weights")
    plan = Plan(256, shards, 16, steps=steps, seed=0)
    bad = plan.micro_batches(0, 12)[0][0] if kind else -1
    return Task(
        model=torch.nn.Linear(4, 1),
        dataset=Stream() if kind == "stream" else Rows(kind, samples, bad),
        loss=torch.nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        batch_size=16,
        steps=steps,
    )
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("job") / "job.py"
    file.write_text(JOB)
    return file


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home of runs"
    yield home
    assert processes_of(tmp_path) == []
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command and int(process.name) != os.getpid():
            found.append(command)
    return found


def launch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "p2p-launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


def check(
    result: subprocess.CompletedProcess[str], error: type[errors.MayflyError], *said: str
) -> None:
    last = result.stderr.splitlines()[-1]
    assert result.returncode == error.exit_code, result.stderr
    assert last.startswith("p2p-launch: ")
    for text in said:
        assert text in result.stderr
    assert "site-packages" not in result.stderr and "launcher/" not in result.stderr


def test_options_that_make_no_sense_start_nothing(job: Path, home: Path) -> None:
    """The command line is checked before anything is made."""
    for options, said in (
        (("--peers", "0"), "at least one"),
        (("--peers", "four"), "--peers"),
        (("--kill", "9@1"), "slots are 0 to 3"),
        (("--set", "lr"), "NAME=VALUE"),
        (("--patience", "0"), "--patience"),
        (("--time-limit", "nan"), "positive"),
        (("--time-limit", "inf"), "positive"),
        (("--kill", "²@1"), "SLOT@STEP"),
        (("--timing", "lease_ttl_s=nan"), "lease_ttl_s"),
        (("--timing", "beat_s=0"), "beat_s"),
        (("--listen", "127.0.0.1"), "HOST:PORT"),
        (("--listen", "127.0.0.1:99999"), "HOST:PORT"),
        (("--listen", "0.0.0.0:80"), "loopback"),
        (("--aggregate", "cloud"), "peers, database"),
        (("--workers", "2"), "--aggregate database"),
        (("--store", "redis://h"), "--aggregate database"),
        (("--aggregate", "database", "--shards", "8"), "number of peers"),
        (("--aggregate", "database", "--workers", "0"), "1 to"),
        (("--aggregate", "database", "--store", "redis://h:99999"), "redis://h:99999 is no"),
        (("--aggregate", "database", "--store", "redis://:word@h:1"), "?password_file=FILE"),
        (("--registry", "redis://anna:word@h:1"), "?password_file=FILE"),
        (("--registry", "redis://h:1?password_file=/no/such"), "/no/such"),
        (("--compress", "int4"), "none, bf16, int8"),
        (("--aggregate", "database", "--robust", "median", "--compress", "int8"), "--robust"),
        (("--relay-listen", "7700"), "HOST:PORT"),
        (("--relay-listen", "192.0.2.7:65535", "--relays", "2"), "HOST:PORT"),
        (("--relay-listen", "0.0.0.0:7700"), "address at which peers reach"),
        (("--relay-listen", "relay.example:7700"), "address at which peers reach"),
        (("--keys", "/no/such"), "/no/such"),
        (("--aggregate", "database", "--store", "redis://[::1:7"), "is no store"),
    ):
        check(launch("run", job, "--home", home, *options), errors.InputError, said)
    check(launch("run", job.with_name("no.py"), "--home", home), errors.JobNotFound, "no.py")
    assert not home.exists()


def test_what_is_wrong_with_a_job_is_found_before_the_run(job: Path, home: Path) -> None:
    """A trace is trimmed to the user's file, and the same run id can be used again."""
    empty = job.with_name("empty.py")
    empty.write_text("")
    ending = job.with_name("ending.py")
    ending.write_text("import os\nos._exit(7)\n")
    for file, options, error, said in (
        (ending, (), errors.TaskRaised, ("ending.py", "exit code 7")),
        (empty, (), errors.NoTask, ("task()",)),
        (job, ("kind=task",), errors.TaskRaised, ("in task", 'raise KeyError("weights")')),
        (job, ("kind=stream",), errors.InvalidTask, ("map-style",)),
        (job, ("samples=3",), errors.InvalidTask, ("3 samples", "4 shards")),
        (job, ("colour=red",), errors.InputError, ("colour",)),
        (job, ("steps=5",), errors.InputError, ("--kill 1@5", "0 to 4")),
    ):
        settings = [part for option in options for part in ("--set", option)]
        settings += ["--run-id", "same", "--kill", "1@5"]
        result = launch("run", file, "--home", home, *settings)
        check(result, error, *said)
        assert not (home / "runs" / "same").exists()


@pytest.mark.parametrize(
    "name",
    [
        "p2p",
        *(
            pytest.param(name, marks=pytest.mark.acceptance)
            for name in ("checkpoint", "fault", "launcher", "chaos")
        ),
    ],
)
def test_a_file_with_the_name_of_ours_is_refused(name: str, tmp_path: Path, home: Path) -> None:
    """Beside the job it would shadow ours in a function; in the current folder it does nothing."""
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    result = launch("run", tmp_path / "job.py", "--home", home, cwd=tmp_path)
    check(result, errors.ShadowedName, f"{name}.py")


def test_a_registry_that_does_not_answer(job: Path, home: Path) -> None:
    """It is asked before anything else is made."""
    result = launch("run", job, "--home", home, "--registry", "redis://127.0.0.1:1/0")
    check(result, errors.RegistryUnavailable, "127.0.0.1:1")
    assert not home.exists()


def test_a_damaged_record_is_named_and_the_run_can_be_removed(home: Path) -> None:
    """Neither `list` nor `rm` stumbles over a file that is no JSON; `status` says which it is."""
    folder = home / "runs" / "cut"
    folder.mkdir(parents=True)
    for name in ("run.json", "summary.json"):
        (folder / name).write_text('{"x')
    for command in ("status", "report", "attach", "resume"):
        check(launch(command, "cut", "--home", home), errors.StorageUnavailable, "is damaged")
    assert "damaged" in launch("list", "--home", home).stdout
    assert launch("rm", "cut", "--home", home).returncode == 0
    assert not folder.exists()


def test_a_job_that_leaves_a_process_behind_is_not_waited_for(tmp_path: Path, home: Path) -> None:
    """Not even if that process keeps the job's output open."""
    job = tmp_path / "job.py"
    job.write_text("import subprocess\nsubprocess.Popen(['sleep', '600'])\n")
    try:
        check(launch("run", job, "--home", home), errors.NoTask, "task()")
    finally:
        subprocess.run(["pkill", "-f", "^sleep 600$"], check=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "mayfly-test", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    room = shutil.disk_usage(folder).free
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(room - (64 << 10)))


def test_a_disk_that_is_full_before_the_start(job: Path, small_disk: Path) -> None:
    """Nothing is left of the run, so its id can be used again."""
    fill(small_disk)
    check(launch("run", job, "--home", small_disk, "--run-id", "full"), errors.StorageFull, "full")
    assert not (small_disk / "runs" / "full").exists()
    assert processes_of(small_disk) == []


def test_a_disk_that_fills_in_the_middle(job: Path, small_disk: Path) -> None:
    """The run ends, and nothing hangs."""
    run = start(job, small_disk, "--set", "steps=1000000")
    wait_for_line(run, "step ")
    fill(small_disk)
    _, rest = run.communicate(timeout=60)
    assert run.returncode == errors.StorageFull.exit_code, rest
    assert rest.splitlines()[-1].startswith("p2p-launch: the disk under")
    assert processes_of(small_disk) == []


def test_a_loss_that_is_not_finite(job: Path, home: Path) -> None:
    """The run stops at that step, and the checkpoint before it is kept."""
    options = ("--peers", "2", "--set", "kind=nan", "--set", "shards=2", "--checkpoint-every", "5")
    result = launch("run", job, "--home", home, "--run-id", "nan", *options)
    check(result, errors.NonFiniteLoss, "the loss of step 12 is nan")
    manifests = list((home / "runs" / "nan" / "checkpoints").glob("*/manifest.json"))
    assert manifests, "no checkpoint was kept"
    check(launch("run", job, "--home", home, "--run-id", "nan"), errors.RunExists, "nan")


@pytest.mark.parametrize("peers", [4, pytest.param(1, marks=pytest.mark.acceptance)])
def test_a_sample_that_raises_wherever_it_is_computed(job: Path, home: Path, peers: int) -> None:
    """The run ends with the task's own trace, and says which shard and step."""
    options = ("--set", "kind=raise", "--peers", peers, "--shards", "4", "--set", "shards=4")
    result = launch("run", job, "--home", home, *options)
    check(result, errors.Poisoned, "in __getitem__", "shard 0 of step 12", "is damaged")


@pytest.mark.acceptance
@pytest.mark.timeout(400)
def test_a_sample_that_ends_its_process(job: Path, home: Path) -> None:
    """Nobody says what it was, so it takes more deaths; but the run does not go on for ever."""
    options = ("--set", "kind=exit", "--peers", "2", "--set", "shards=2")
    result = launch("run", job, "--home", home, *options)
    check(result, errors.Poisoned, "ended")


@pytest.mark.acceptance
@pytest.mark.parametrize("peers", [1, 2])
def test_a_function_out_of_memory_is_named_as_such(job: Path, home: Path, peers: int) -> None:
    """However many peers there are, and though each is killed without a word."""
    options = ("--set", "kind=memory", "--memory", "600", "--peers", peers)
    result = launch("run", job, "--home", home, *options, "--set", f"shards={peers}")
    check(result, errors.OutOfMemory, "needs more memory than a function has")


def test_a_time_limit_shorter_than_a_boot(job: Path, home: Path) -> None:
    """Both measured times are named before anything is started."""
    result = launch("run", job, "--home", home, "--peers", "1", "--time-limit", "0.5")
    check(result, errors.TimeLimitTooShort, "s to start and ")
    assert not (home / "runs").exists() or not list((home / "runs").iterdir())


# --- a run that is ended from outside ------------------------------------------------------------


def start(job: Path, home: Path, *options: object) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "p2p-launch", "run", job, "--home", home]
    command += ["--peers", "2", "--run-id", "long", *options]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)


def wait_for_line(run: subprocess.Popen[str], beginning: str) -> None:
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the run ended without a line {beginning!r}")


def wait_until_gone(folder: Path) -> None:
    until = time.monotonic() + 20
    while processes_of(folder):
        assert time.monotonic() < until, processes_of(folder)
        time.sleep(0.05)


@pytest.mark.parametrize("when", ["run ", "step "])
def test_ctrl_c_detaches(job: Path, home: Path, when: str) -> None:
    """While it boots and in the middle; the run goes on, and says how to get at it again."""
    run = start(job, home, "--set", "steps=1000000")
    wait_for_line(run, when)
    run.send_signal(signal.SIGINT)
    _, rest = run.communicate(timeout=30)
    assert run.returncode == errors.Detached.exit_code, rest
    last = rest.splitlines()[-1]
    assert "'p2p-launch attach long'" in last and "'p2p-launch stop long'" in last
    command = [Path(sys.executable).parent / "p2p-launch", "attach", "long", "--home", home]
    again = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    wait_for_line(again, "step ")
    assert launch("stop", "long", "--home", home).returncode == 0
    _, rest = again.communicate(timeout=30)
    assert again.returncode == errors.RunStopped.exit_code, rest
    assert "stopped" in launch("list", "--home", home).stdout


def test_a_supervisor_that_is_killed_takes_everything_with_it(job: Path, home: Path) -> None:
    """No process outlives it, and the launcher says what happened."""
    run = start(job, home, "--set", "steps=1000000")
    wait_for_line(run, "step ")
    check(launch("rm", "long", "--home", home), errors.InputError, "is alive")
    pid = next(
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if b"launcher.supervisor\0" + os.fsencode(home) in (process / "cmdline").read_bytes()
    )
    os.kill(pid, signal.SIGKILL)
    _, rest = run.communicate(timeout=30)
    assert run.returncode == errors.RunNotAlive.exit_code, rest
    assert "'p2p-launch resume long' goes on" in rest.splitlines()[-1]
    wait_until_gone(home)
    assert "broken off" in launch("list", "--home", home).stdout
    check(launch("attach", "long", "--home", home), errors.RunNotAlive, "resume long")
    check(launch("scale", "long", "1", "--home", home), errors.RunNotAlive, "resume long")


def test_a_port_in_use(job: Path, home: Path) -> None:
    """The emulator cannot listen where someone else does."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = launch("run", job, "--home", home, "--listen", address)
    check(result, errors.PlatformUnavailable, address)


def break_off(job: Path, home: Path, *options: object) -> RunFolder:
    """A run whose supervisor was killed in the middle, and everything with it."""
    run = start(job, home, "--set", "steps=1000000", *options)
    wait_for_line(run, "step ")
    folder = RunFolder(home / "runs" / "long")
    os.kill(folder.supervisor_pid(), signal.SIGKILL)
    run.communicate(timeout=30)
    wait_until_gone(home)
    return folder


def test_resuming_what_would_compute_other_bits(job: Path, home: Path) -> None:
    """Another torch, or another job file: refused by name, and nothing of the run is lost."""
    folder = break_off(job, home)
    spec = json.loads(folder.spec.read_text())
    folder.spec.write_text(json.dumps({**spec, "torch": "1.0.0"}))
    check(launch("resume", "long", "--home", home), errors.Refused, "torch 1.0.0")
    folder.spec.write_text(json.dumps(spec))
    text = job.read_text()
    job.write_text(text + "\n# changed\n")
    check(launch("resume", "long", "--home", home), errors.Refused, "has changed")
    job.write_text(text)
    assert any(folder.checkpoints.iterdir())


def test_a_launcher_that_dies_before_the_run_began(job: Path, home: Path) -> None:
    """The supervisor ends as well, and the half-made folder does not block the id."""
    slow = job.with_name("slow.py")
    slow.write_text("import time\ntime.sleep(60)\n" + JOB)
    run = start(slow, home)
    until = time.monotonic() + 20
    while not (home / "runs" / "long" / "supervisor.json").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    run.kill()
    run.communicate()
    wait_until_gone(home)
    assert not (home / "runs" / "long").exists()
