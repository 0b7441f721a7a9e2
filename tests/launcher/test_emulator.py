"""The emulator keeps Lambda's promises with real processes, and leaves none of them behind.

Handlers speak to the tests through a `Gate`: a connection tells what a process is doing, holds it
until the test lets it go, and breaks when the process is gone, which is how a death is awaited.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

PATIENCE_S = 30.0

HANDLERS = '''
import json, os, socket, subprocess, sys, time

calls = 0
kept = []

def meet(port, about):
    """Tells the test about this process and returns the connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall((json.dumps({"pid": os.getpid(), "about": about}) + "\\n").encode())
    return connection

def handle(event, context):
    global calls
    calls += 1
    return globals()[event.get("do", "describe")](event, context)

def describe(event, context):
    print("described", event.get("word"))
    return {
        "event": event, "calls": calls, "pid": os.getpid(), "environment": dict(os.environ),
        "directory": os.getcwd(), "path": sys.path, "request_id": context.aws_request_id,
        "memory_mb": context.memory_limit_in_mb, "log_stream": context.log_stream_name,
        "remaining_ms": context.get_remaining_time_in_millis(),
    }

def wait(event, context):
    with meet(event["port"], event.get("word")) as connection:
        connection.recv(1)
    return "released"

def keep(event, context):
    kept.append(meet(event["port"], "kept"))

def spawn(event, context):
    """Leaves a child in a session of its own, and waits beside it."""
    code = "import handlers, sys; handlers.meet(int(sys.argv[1]), 'child').recv(1)"
    subprocess.Popen([sys.executable, "-c", code, str(event["port"])], start_new_session=True)
    return wait(event, context)

def fail(event, context):
    raise ValueError("this handler always fails")

def leave(event, context):
    os._exit(3)

def grow(event, context):
    kept.append(bytearray(256 << 20))
    for start in range(0, len(kept[-1]), 4096):
        kept[-1][start] = 1
    return wait(event, context)

def linger(event, context):
    """From here on, the process meets the test before it asks for its next event."""
    import runtime_client
    following = runtime_client.next
    def lingering():
        meet(event["port"], "between events").recv(1)
        return following()
    runtime_client.next = lingering
'''

FUNCTIONS: dict[str, dict[str, Any]] = {
    "plain": {"timeout_s": 60, "memory_mb": 512, "environment": {"COLOUR": "green"}},
    "hasty": {"timeout_s": 0.3},
    "small": {"timeout_s": 60, "memory_mb": 96, "retry_delays_s": []},
    "single": {"timeout_s": 60, "concurrency": 1, "queue_limit": 1},
    "fleeting": {"timeout_s": 60, "idle_timeout_s": 0.1},
    "homeless": {"working_directory": "home", "retry_delays_s": []},
    "absent": {"handler": "nowhere.handle", "retry_delays_s": []},
    "faulty": {"handler": "faulty.handle"},
    "stuck": {"handler": "stuck.handle", "init_timeout_s": 0.3, "retry_delays_s": []},
}


class Visitor:
    """A process that has come to the gate."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        self.connection = connection
        line = connection.makefile().readline()
        told = json.loads(line)
        self.pid: int = told["pid"]
        self.about = told["about"]

    def release(self) -> None:
        self.connection.sendall(b"!")

    def await_death(self) -> None:
        """Returns when the process is gone; the test fails if it stays."""
        try:
            assert self.connection.recv(1) == b""
        except ConnectionResetError:
            return


class Gate:
    """Where handlers meet the test."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE_S)
        self.port: int = self.listener.getsockname()[1]

    def visitor(self) -> Visitor:
        return Visitor(self.listener.accept()[0])


class Running:
    """An emulator's process."""

    def __init__(self, folder: Path, functions: dict[str, dict[str, Any]]) -> None:
        self.logs = folder / "logs"
        config = folder / "functions.json"
        ready = folder / "ready.json"
        config.write_text(json.dumps({"functions": functions}))
        self.process = subprocess.Popen(
            [*COMMAND, "--config", config, "--ready-file", ready, "--log-dir", self.logs],
            cwd=folder,
            env=os.environ | {"PRIVATE_TO_THE_EMULATOR": "yes"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said = [self.process.stderr.readline()]
        assert "serving" in self.said[0], self.said + self.process.stderr.readlines()
        self.reader = threading.Thread(target=self.said.extend, args=(self.process.stderr,))
        self.reader.start()
        self.endpoint: str = json.loads(ready.read_text())["endpoint"]
        self.client = boto3.client(
            "lambda",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="any",
            aws_secret_access_key="any",
            config=Config(retries={"total_max_attempts": 1}, proxies={}, max_pool_connections=32),
        )

    def call(self, function: str, **event: Any) -> Any:
        """A synchronous call; the parsed result."""
        answer = self.client.invoke(FunctionName=function, Payload=json.dumps(event))
        assert answer["StatusCode"] == 200
        return json.loads(answer["Payload"].read()), answer.get("FunctionError")

    def send(self, function: str, **event: Any) -> str:
        """An asynchronous event; its request id."""
        answer = self.client.invoke(
            FunctionName=function, InvocationType="Event", Payload=json.dumps(event)
        )
        assert answer["StatusCode"] == 202
        return answer["ResponseMetadata"]["RequestId"]

    def refusal(self, function: str, **call: Any) -> tuple[str, int]:
        """The error code and status of a call that is refused."""
        with pytest.raises(ClientError) as refused:
            self.client.invoke(FunctionName=function, **call)
        response = refused.value.response
        return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]

    def look(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.endpoint}/mayfly/{path}", timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def order(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}/mayfly/{path}", data, method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def ended(self, request_id: str, count: int) -> list[dict[str, Any]]:
        """Waits until `count` attempts at the request are over."""
        found: list[dict[str, Any]] = []
        index = 0
        while len(found) < count:
            records = self.look(f"ended?after={index}&wait={PATIENCE_S}")
            assert records, f"only {found} of {count}"
            index = records[-1]["index"]
            found += [record for record in records if record["request_id"] == request_id]
        return found

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(PATIENCE_S)
        self.reader.join()
        self.client.close()
        return code


COMMAND = [sys.executable, "-m", "launcher.emulator"]


def prepare(folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the handlers; returns the configuration of the functions."""
    (folder / "home").mkdir()
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "faulty.py").write_text("raise RuntimeError('broken at import')\n")
    (folder / "stuck.py").write_text("import threading\nthreading.Event().wait()\n")
    standard = {
        "handler": "handlers.handle",
        "working_directory": str(folder),
        "retry_delays_s": [0.05, 0.1],
    }
    return {name: standard | settings for name, settings in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("emulator")
    running = Running(folder, prepare(folder))
    yield running
    assert running.stop() == 0
    assert not any("Traceback" in line for line in running.said), running.said


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.listener.close()


# --- calls and their answers -----------------------------------------------------------------


def test_a_result_and_an_error_come_back_as_from_lambda(emulator: Running) -> None:
    """A synchronous call returns what the handler returned, or raised, with its traceback."""
    result, error = emulator.call("plain", word="hello")
    assert (result["event"], error) == ({"word": "hello"}, None)
    assert result["memory_mb"] == "512"
    assert 59_000 < result["remaining_ms"] <= 60_000

    result, error = emulator.call("plain", do="fail")
    assert error == "Unhandled"
    assert result["errorType"] == "ValueError"
    assert result["errorMessage"] == "this handler always fails"
    assert "in fail" in result["stackTrace"][-1]


def test_the_environment_is_lambdas(emulator: Running) -> None:
    """A function sees Lambda's variables, its own, and none of the emulator's; it can tell its
    sandbox from the name of its log stream."""
    result, _ = emulator.call("plain")
    environment = result["environment"]
    assert environment["AWS_LAMBDA_FUNCTION_NAME"] == "plain"
    assert environment["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] == "512"
    assert environment["_HANDLER"] == "handlers.handle"
    assert environment["COLOUR"] == "green"
    assert environment["AWS_REGION"] == "us-east-1"
    assert environment["AWS_ENDPOINT_URL_LAMBDA"] == emulator.endpoint
    assert "PRIVATE_TO_THE_EMULATOR" not in environment
    assert result["directory"] == environment["LAMBDA_TASK_ROOT"] == result["path"][0]
    sandbox = environment["AWS_LAMBDA_RUNTIME_API"].rpartition("/")[2]
    assert result["log_stream"].endswith(f"]{sandbox}")
    assert sandbox in [each["sandbox"] for each in emulator.look("sandboxes")]


def test_a_second_event_finds_a_warm_process(emulator: Running, gate: Gate) -> None:
    """An idle sandbox takes the next event, also straight after its last; two events at once
    need two sandboxes."""
    request = emulator.send("plain", do="wait", port=gate.port)
    with_first = gate.visitor()
    others = [emulator.send("plain", do="wait", port=gate.port) for _ in range(3)]
    visitors = [with_first, *(gate.visitor() for _ in others)]
    assert len({visitor.pid for visitor in visitors}) == 4
    for visitor in visitors:
        visitor.release()
    starts = [emulator.ended(each, 1)[0]["start"] for each in (request, *others)]
    assert starts.count("cold") >= 3
    pids = {emulator.call("plain")[0]["pid"] for _ in range(20)}
    assert len(pids) == 1
    assert pids <= {visitor.pid for visitor in visitors}


def test_refusals_are_botocores(emulator: Running) -> None:
    """What Lambda refuses is refused with the code and status that boto3 expects."""
    assert emulator.refusal("nobody") == ("ResourceNotFoundException", 404)
    assert emulator.refusal("plain", Payload=b"{") == ("InvalidRequestContentException", 400)
    large = json.dumps("x" * (1 << 20)).encode()
    assert emulator.refusal("plain", Payload=large, InvocationType="Event") == (
        "RequestTooLargeException",
        413,
    )
    assert emulator.refusal("plain", Payload=large * 7) == ("RequestTooLargeException", 413)
    with pytest.raises(emulator.client.exceptions.ResourceNotFoundException):
        emulator.client.invoke(FunctionName="nobody")
    dry = emulator.client.invoke(FunctionName="plain", InvocationType="DryRun")
    assert dry["StatusCode"] == 204


def test_the_limit_of_sandboxes_throttles_and_queues(emulator: Running, gate: Gate) -> None:
    """At the limit a synchronous call is refused, an event waits for its turn, and one too many
    is refused as well."""
    first = emulator.send("single", do="wait", port=gate.port)
    visitor = gate.visitor()
    assert emulator.refusal("single") == ("TooManyRequestsException", 429)
    second = emulator.send("single")
    assert emulator.refusal("single", InvocationType="Event") == ("TooManyRequestsException", 429)
    visitor.release()
    assert [emulator.ended(each, 1)[0]["start"] for each in (first, second)] == ["cold", "warm"]
    assert emulator.call("single")[0]["pid"] == visitor.pid


# --- ends ------------------------------------------------------------------------------------


def test_the_time_limit_kills_and_the_event_is_tried_three_times(
    emulator: Running, gate: Gate
) -> None:
    """A function that outlives its limit is SIGKILLed; the event comes twice more, under the same
    request id, each time to a fresh process."""
    request = emulator.send("hasty", do="wait", port=gate.port)
    visitors = [gate.visitor() for _ in range(3)]
    for visitor in visitors:
        visitor.await_death()
    records = emulator.ended(request, 3)
    assert [record["attempt"] for record in records] == [1, 2, 3]
    assert {record["cause"] for record in records} == {"timeout"}
    assert {record["exit"] for record in records} == {-signal.SIGKILL}
    assert [record["pid"] for record in records] == [visitor.pid for visitor in visitors]
    assert "Task timed out after 0.30 seconds" in records[0]["detail"]["errorMessage"]
    log = (emulator.logs / f"{records[0]['sandbox']}.log").read_text()
    assert f"START RequestId: {request} Version: $LATEST\n" in log
    assert f"END RequestId: {request}\n" in log


def test_too_much_memory_is_named_as_such(emulator: Running, gate: Gate) -> None:
    """A process over its memory limit is killed, and the cause says why; one below lives."""
    assert emulator.call("small", word="modest")[1] is None
    record = emulator.ended(emulator.send("small", do="grow", port=gate.port), 1)[0]
    assert (record["cause"], record["exit"]) == ("out of memory", -signal.SIGKILL)
    assert record["detail"]["errorType"] == "Runtime.OutOfMemory"
    assert "96 MB" in record["detail"]["errorMessage"]


def test_an_error_is_tried_again_in_the_process_that_lives_on(emulator: Running) -> None:
    """A handler that raises does not cost its process, and its traceback is in the record."""
    emulator.call("plain")
    records = emulator.ended(emulator.send("plain", do="fail"), 3)
    assert [record["cause"] for record in records] == ["error"] * 3
    assert {record["exit"] for record in records} == {None}
    assert {record["start"] for record in records} == {"warm"}
    assert records[0]["detail"]["errorType"] == "ValueError"


def test_a_crash_is_told_from_an_error(emulator: Running) -> None:
    """A process that ends under its event is a crash, with its exit status."""
    records = emulator.ended(emulator.send("plain", do="leave", slot=3), 3)
    assert {(record["cause"], record["exit"]) for record in records} == {("crash", 3)}
    assert records[0]["event"] == {"do": "leave", "slot": 3}
    result, error = emulator.call("plain", do="leave")
    assert error == "Unhandled"
    assert result["errorType"] == "Runtime.ExitError"
    assert result["errorMessage"].endswith("exit status 3")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("absent", "No module named 'nowhere'"),
        ("faulty", "broken at import"),
        ("stuck", "no start within 0.30 seconds"),
    ],
)
def test_what_cannot_start_is_an_init_failure(emulator: Running, function: str, words: str) -> None:
    """A handler that cannot be imported, or never is, ends the attempt with the reason."""
    attempts = 3 if function == "faulty" else 1
    records = emulator.ended(emulator.send(function), attempts)
    assert {record["cause"] for record in records} == {"init"}
    assert all(words in record["detail"]["errorMessage"] for record in records)


def test_a_process_that_cannot_be_made_is_an_init_failure(emulator: Running) -> None:
    """The emulator outlives the loss of a function's folder and says what is missing."""
    shutil.rmtree(emulator.logs.parent / "home")
    result, error = emulator.call("homeless")
    assert error == "Unhandled"
    assert "No such file" in result["errorMessage"]


# --- chaos -----------------------------------------------------------------------------------


def test_kill_by_slot_and_by_sandbox(emulator: Running, gate: Gate) -> None:
    """The control API kills the sandbox that has a slot's event, or that has a name, and no
    other; both deaths are crashes and are delivered again."""
    requests = {
        slot: emulator.send("plain", do="wait", port=gate.port, slot=slot, word=slot)
        for slot in (0, 1)
    }
    visitors = {visitor.about: visitor for visitor in (gate.visitor(), gate.visitor())}
    assert emulator.order("kill", slot=0)["killed"]
    visitors[0].await_death()
    again = gate.visitor()
    assert again.about == 0
    busy = {each["pid"]: each for each in emulator.look("sandboxes") if each["state"] == "busy"}
    assert busy.keys() == {visitors[1].pid, again.pid}
    assert busy[again.pid]["event"]["slot"] == 0
    emulator.order("kill", sandbox=busy[again.pid]["sandbox"])
    again.await_death()
    gate.visitor().release()
    visitors[1].release()
    causes = [record["cause"] for record in emulator.ended(requests[0], 3)]
    assert causes == ["crash", "crash", "ok"]
    assert emulator.ended(requests[1], 1)[0]["cause"] == "ok"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        emulator.order("kill", slot=77)


def test_an_event_can_be_delivered_twice(emulator: Running, gate: Gate) -> None:
    """The next or the last asynchronous event comes once more, at the same time, with the same
    request id."""
    emulator.order("duplicate", event="next")
    request = emulator.send("plain", do="wait", port=gate.port)
    visitors = [gate.visitor(), gate.visitor()]
    assert emulator.order("duplicate", event="last") == {"request_id": request}
    visitors.append(gate.visitor())
    assert len({visitor.pid for visitor in visitors}) == 3
    for visitor in visitors:
        visitor.release()
    assert [record["cause"] for record in emulator.ended(request, 3)] == ["ok"] * 3


def test_an_event_whose_sandbox_died_before_seeing_it_is_not_lost(
    emulator: Running, gate: Gate
) -> None:
    """An event that was meant for a warm process, which dies before it asks for it, goes to
    another one and costs no attempt."""
    emulator.call("single", do="linger", port=gate.port)
    between = gate.visitor()
    request = emulator.send("single")
    assert [each["request_id"] for each in emulator.look("sandboxes")].count(request) == 1
    os.kill(between.pid, signal.SIGKILL)
    record = emulator.ended(request, 1)[0]
    assert (record["cause"], record["attempt"], record["start"]) == ("ok", 1, "cold")
    assert record["pid"] != between.pid


def test_an_idle_process_expires(emulator: Running, gate: Gate) -> None:
    """A sandbox without events ends after its idle time, and nothing is recorded of it."""
    request = emulator.send("fleeting", do="keep", port=gate.port)
    gate.visitor().await_death()
    assert len(emulator.ended(request, 1)) == 1


# --- nothing stays ---------------------------------------------------------------------------


def test_a_sandbox_takes_along_what_it_started(emulator: Running, gate: Gate) -> None:
    """When a sandbox ends, so does a child that left its session."""
    emulator.send("small", do="spawn", port=gate.port, slot=9)
    visitors = [gate.visitor(), gate.visitor()]
    assert {visitor.about for visitor in visitors} == {"child", None}
    emulator.order("kill", slot=9)
    for visitor in visitors:
        visitor.await_death()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_emulator(tmp_path: Path, gate: Gate, number: signal.Signals) -> None:
    """However the emulator ends, its busy and idle processes and their detached children end."""
    running = Running(tmp_path, prepare(tmp_path))
    running.send("plain", do="keep", port=gate.port)
    visitors = [gate.visitor()]
    running.send("small", do="spawn", port=gate.port)
    visitors += [gate.visitor(), gate.visitor()]
    running.send("hasty", do="wait", port=gate.port)  # and one that is about to be retried
    visitors.append(gate.visitor())
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE_S) == (0 if number == signal.SIGTERM else -number)
    for visitor in visitors:
        visitor.await_death()
    # the last one to go is the warden, which holds the other end of stderr
    running.reader.join(PATIENCE_S)
    assert not running.reader.is_alive()
    running.client.close()


def test_an_ending_emulator_lets_its_callers_go(tmp_path: Path, gate: Gate) -> None:
    """SIGTERM ends the emulator at once although somebody waits for news of it."""
    running = Running(tmp_path, prepare(tmp_path))
    running.send("plain", do="wait", port=gate.port)
    visitor = gate.visitor()
    news: list[Any] = []
    asker = threading.Thread(target=lambda: news.append(running.look("ended?after=1&wait=30")))
    asker.start()
    assert running.stop() == 0
    visitor.await_death()
    asker.join(PATIENCE_S)
    assert not asker.is_alive()


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "listen", "words"),
    [
        ("{", "127.0.0.1:0", "is not JSON"),
        ('{"functions": {}}', "127.0.0.1:0", "names no functions"),
        ('{"functions": {"f": {"handler": "plain"}}}', "127.0.0.1:0", "module.function"),
        ('{"functions": {"f": {"handler": "a.b", "tmeout": 1}}}', "127.0.0.1:0", "tmeout"),
        ('{"functions": {"f": {"handler": "a.b", "timeout_s": 0}}}', "127.0.0.1:0", "timeout_s"),
        (
            '{"functions": {"f": {"handler": "a.b", "environment": {"AWS_REGION": "x"}}}}',
            "127.0.0.1:0",
            "AWS_REGION",
        ),
        ('{"functions": {"f": {"handler": "a.b"}}}', "0.0.0.0:0", "not a loopback address"),
        ('{"functions": {"f": {"handler": "a.b"}}}', "127.0.0.1", "is no address"),
    ],
)
def test_bad_input_is_one_line(
    config: str, listen: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be served is refused in one line that names it, with the exit code for input."""
    from launcher.emulator.__main__ import main

    file = tmp_path / "functions.json"
    file.write_text(config)
    code = main(["--config", str(file), "--listen", listen, "--log-dir", str(tmp_path / "logs")])
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(emulator: Running, tmp_path: Path) -> None:
    """An emulator does not start where another one listens, and says so."""
    config = tmp_path / "functions.json"
    config.write_text('{"functions": {"f": {"handler": "a.b"}}}')
    address = emulator.endpoint.removeprefix("http://")
    done = subprocess.run(
        [*COMMAND, "--config", config, "--listen", address, "--log-dir", tmp_path / "logs"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert address in done.stderr
    assert done.stderr.count("\n") == 1
