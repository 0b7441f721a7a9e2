"""Events reach functions through boto3, patiently, and with nothing of the user's own account."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fault.errors import InputError, PlatformUnavailable
from launcher.emulator_client import Listener
from launcher.platform import Platform

PATIENCE_S = 30.0

HANDLERS = """
import os, socket, sys

def handle(event, context):
    if "pass_on" in event:
        from launcher.platform import Platform
        successor = Platform(context.function_name)
        loaded = "boto3" in sys.modules
        successor.invoke({"passed_on": event["pass_on"], "loaded": loaded})
    if "port" in event:
        with socket.create_connection(("127.0.0.1", event["port"])) as connection:
            connection.recv(1)
"""


class Running:
    """An emulator's process with the functions `plain` and `single`."""

    def __init__(self, folder: Path, listen: str = "127.0.0.1:0") -> None:
        (folder / "handlers.py").write_text(HANDLERS)
        plain = {
            "handler": "handlers.handle",
            "working_directory": str(folder),
            "timeout_s": 60,
            "memory_mb": 512,
        }
        single = plain | {"concurrency": 1, "queue_limit": 1}
        config = folder / "functions.json"
        config.write_text(json.dumps({"functions": {"plain": plain, "single": single}}))
        ready = folder / "ready.json"
        places = ["--config", config, "--ready-file", ready, "--log-dir", folder / "logs"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher.emulator", "--listen", listen, *places],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "serving" in self.next_line()
        self.endpoint: str = json.loads(ready.read_text())["endpoint"]

    def next_line(self) -> str:
        """Waits for the next line of the emulator's log."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def ended(self, count: int) -> list[dict[str, Any]]:
        """Waits until `count` attempts are over, of all that ever were."""
        while True:
            records = self._look("ended?after=0")
            if len(records) >= count:
                return records
            assert self._look(f"ended?after={len(records)}&wait={PATIENCE_S}"), records

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.stderr is not None
        self.process.stderr.close()
        assert self.process.wait(PATIENCE_S) == 0

    def _look(self, path: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.endpoint}/mayfly/{path}", timeout=60) as answer:
            return list(json.load(answer))


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    yield running
    running.stop()


def test_an_event_reaches_the_function(emulator: Running) -> None:
    """What is invoked is what the function gets, and the caller does not wait for its end."""
    payload = {"run": "r", "slot": 2, "folder": "/ö", "predecessor": None}
    Platform("plain", emulator.endpoint).invoke(payload)
    assert [record["event"] for record in emulator.ended(1)] == [payload]


def _next_word(listener: Listener) -> list[str]:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if found := listener.heard():
            return [record["event"]["word"] for record in found]
        time.sleep(0.01)
    raise TimeoutError("nothing was heard")


def test_who_listens_hears_of_every_end_once(emulator: Running) -> None:
    """Of those before it began too, in their order; and waiting, as soon as there is one."""
    platform = Platform("plain", emulator.endpoint)
    platform.invoke({"word": "early"})
    emulator.ended(1)
    listener = Listener(emulator.endpoint)
    assert _next_word(listener) == ["early"]
    for word in ("second", "third"):
        platform.invoke({"word": word})
        assert _next_word(listener) == [word]
    listener.close()
    assert listener.heard() == []


def test_a_function_invokes_its_successor(emulator: Running) -> None:
    """In a function no endpoint need be given: the platform that runs it is the one it finds; and
    boto3 is loaded no earlier than needed."""
    Platform("plain", emulator.endpoint).invoke({"pass_on": "baton"})
    events = [record["event"] for record in emulator.ended(2)]
    assert {"passed_on": "baton", "loaded": False} in events


def test_an_unknown_function_is_an_error_at_once(emulator: Running) -> None:
    """What patience cannot mend is not retried; the error names function and endpoint."""
    began = time.monotonic()
    with pytest.raises(PlatformUnavailable) as refused:
        Platform("nobody", emulator.endpoint, patience_seconds=60).invoke({})
    assert time.monotonic() - began < 30
    assert "'nobody'" in str(refused.value)
    assert emulator.endpoint in str(refused.value)
    assert "ResourceNotFoundException" in str(refused.value)


def test_throttling_is_waited_for(emulator: Running) -> None:
    """A throttled event is sent again until it is taken; without room, the patience ends."""
    single = Platform("single", emulator.endpoint, patience_seconds=PATIENCE_S)
    with socket.create_server(("127.0.0.1", 0)) as gate:
        single.invoke({"port": gate.getsockname()[1]})
        busy = gate.accept()[0]
    single.invoke({"word": "waiting"})
    sending = threading.Thread(target=single.invoke, args=({"word": "kept"},))
    sending.start()
    assert "TooManyRequestsException" in emulator.next_line()
    with pytest.raises(PlatformUnavailable, match="TooManyRequestsException"):
        Platform("single", emulator.endpoint, patience_seconds=0.2).invoke({"word": "lost"})
    busy.close()
    sending.join(PATIENCE_S)
    assert not sending.is_alive()
    words = [record["event"].get("word") for record in emulator.ended(3)]
    assert words == [None, "waiting", "kept"]


def test_an_emulator_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """While nothing listens, the event is tried again; it arrives when the emulator is back at
    its address. When it stays away, that is an error."""
    first = Running(tmp_path)
    first.stop()
    with pytest.raises(PlatformUnavailable, match="cannot be invoked at http://127"):
        Platform("plain", first.endpoint, patience_seconds=0.2).invoke({})
    patient = Platform("plain", first.endpoint, patience_seconds=PATIENCE_S)
    sending = threading.Thread(target=patient.invoke, args=({"word": "kept"},))
    sending.start()
    second = Running(tmp_path, first.endpoint.removeprefix("http://"))
    try:
        sending.join(PATIENCE_S)
        assert not sending.is_alive()
        assert second.ended(1)[0]["event"] == {"word": "kept"}
    finally:
        second.stop()


def test_an_emulator_never_sees_the_users_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an endpoint, neither the user's keys nor the user's proxy are used, and no
    configuration of AWS is needed."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUSERSOWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "usersowntoken")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    seen: list[str] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(str(self.headers))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: the requests are in `seen`."""

    server = HTTPServer(("127.0.0.1", 0), Recorder)
    serving = threading.Thread(target=server.handle_request)
    serving.start()
    Platform("plain", f"http://127.0.0.1:{server.server_port}").invoke({})
    serving.join()
    server.server_close()
    assert "Credential=emulator/" in seen[0]
    assert "X-Amz-Invocation-Type: Event" in seen[0]
    assert "USERSOWN" not in seen[0].upper()


@pytest.mark.parametrize(
    "endpoint", ["http://192.0.2.1:80", "http://example.com", "https://127.0.0.1:1", "127.0.0.1:1"]
)
def test_an_endpoint_is_on_loopback(endpoint: str) -> None:
    """Anything but an http:// URL on loopback is refused before a byte is sent."""
    with pytest.raises(InputError, match="loopback"):
        Platform("plain", endpoint)
