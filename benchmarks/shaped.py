"""A slow link on one machine: a network namespace behind a pair of virtual interfaces, and `tc`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from types import TracebackType

NAMESPACE = "mayfly-far"
NEAR, FAR = "mayfly-near", "mayfly-farside"
NEAR_HOST, FAR_HOST = "10.254.77.1", "10.254.77.2"
BURST_KB = 256


def why_not() -> str:
    """Why there can be no such link here; empty when there can."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"there is no {' and no '.join(missing)} here (package iproute2)" if missing else ""


class Shaped:
    """Both directions of the link carry so many megabits per second."""

    namespace = NAMESPACE
    far_host = FAR_HOST

    def __init__(self, megabit: int) -> None:
        self._megabit = megabit

    def __enter__(self) -> Shaped:
        self._remove()  # of a benchmark that was killed
        inside = f"ip -n {NAMESPACE}"
        shape = f"root tbf rate {self._megabit}mbit burst {BURST_KB}kb latency 50ms"
        try:
            for command in (
                f"ip netns add {NAMESPACE}",
                f"ip link add {NEAR} type veth peer name {FAR} netns {NAMESPACE}",
                f"ip addr add {NEAR_HOST}/30 dev {NEAR}",
                f"ip link set {NEAR} up",
                f"{inside} addr add {FAR_HOST}/30 dev {FAR}",
                f"{inside} link set {FAR} up",
                f"{inside} link set lo up",
                f"tc qdisc add dev {NEAR} {shape}",
                f"ip netns exec {NAMESPACE} tc qdisc add dev {FAR} {shape}",
            ):
                subprocess.run(command.split(), check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            self._remove()
            raise RuntimeError(f"{error.cmd}: {error.stderr.decode().strip()}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for command in (f"ip link del {NEAR}", f"ip netns del {NAMESPACE}"):
            with contextlib.suppress(OSError):
                subprocess.run(command.split(), capture_output=True, check=False)
