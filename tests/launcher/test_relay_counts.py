"""Relays are asked what they have counted; one that is gone keeps no other from answering."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fault.errors import InputError
from launcher.relay_counts import relay_counts
from p2p.transport.keys import RELAY_FILE, new_keys, write_keys
from tests.ports import free_port


def test_a_relay_that_is_gone_is_told_apart(tmp_path: Path) -> None:
    """Over TCP, with the run's keys; without them it cannot be asked."""
    keys, ready = tmp_path / "keys", tmp_path / "ready"
    write_keys(new_keys(), keys)
    command = [sys.executable, "-m", "p2p.transport.relay", "--bind", "tcp://127.0.0.1:*"]
    command += ["--keys", str(keys / RELAY_FILE), "--ready-file", str(ready)]
    with subprocess.Popen(command) as relay:
        try:
            until = time.monotonic() + 20
            while not ready.exists():
                assert relay.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            endpoints = [f"tcp://127.0.0.1:{free_port()}", ready.read_text().strip()]
            gone, there = relay_counts(endpoints, keys)
            assert gone == {} and there["refused"] == 0 and there["peers"] == 1
            with pytest.raises(InputError):
                relay_counts(endpoints, tmp_path)
        finally:
            relay.kill()
