"""Slow links on one machine: network namespaces behind pairs of virtual interfaces, and `tc`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from types import TracebackType
from typing import Self

NAMESPACE = "mayfly-far"
NEAR, FAR = "mayfly-near", "mayfly-farside"
NEAR_HOST, FAR_HOST = "10.254.77.1", "10.254.77.2"
SWITCH = "mayfly-switch"
BURST_KB = 256


def why_not() -> str:
    """Why there can be no such link here; empty when there can."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"there is no {' and no '.join(missing)} here (package iproute2)" if missing else ""


class _Network:
    """Laid when entered, removed when left; what a killed benchmark left is removed first."""

    def __enter__(self) -> Self:
        self._remove()
        try:
            self._lay()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _lay(self) -> None:
        raise NotImplementedError

    def _remove(self) -> None:
        raise NotImplementedError


class Shaped(_Network):
    """Both directions of the link carry so many megabits per second."""

    namespace = NAMESPACE
    far_host = FAR_HOST

    def __init__(self, megabit: int) -> None:
        self._megabit = megabit

    def _lay(self) -> None:
        inside, shape = f"ip -n {NAMESPACE}", _shape(self._megabit)
        _run(
            f"ip netns add {NAMESPACE}",
            f"ip link add {NEAR} type veth peer name {FAR} netns {NAMESPACE}",
            f"ip addr add {NEAR_HOST}/30 dev {NEAR}",
            f"ip link set {NEAR} up",
            f"{inside} addr add {FAR_HOST}/30 dev {FAR}",
            f"{inside} link set {FAR} up",
            f"{inside} link set lo up",
            f"tc qdisc add dev {NEAR} {shape}",
            f"ip netns exec {NAMESPACE} tc qdisc add dev {FAR} {shape}",
        )

    def _remove(self) -> None:
        _try(f"ip link del {NEAR}", f"ip netns del {NAMESPACE}")


class Star(_Network):
    """So many machines, each with a link to one switch that carries so much in each direction.

    At the switch, where `hub` is, links end that nothing shapes. `congestion` is TCP's control of
    it there, whatever it is elsewhere on this machine.
    """

    network, hub = "10.254.78.0/24", "10.254.78.254"

    def __init__(self, machines: int, megabit: int, congestion: str) -> None:
        self._congestion = congestion
        self.namespaces = [f"mayfly-star-{number}" for number in range(machines)]
        self.hosts = [f"10.254.78.{1 + number}" for number in range(machines)]
        self.megabit = megabit

    def _lay(self) -> None:
        shape = _shape(self.megabit)
        route = f"route replace {self.network} scope link congctl {self._congestion}"
        _run(
            f"ip link add {SWITCH} type bridge",
            f"ip addr add {self.hub}/24 dev {SWITCH} noprefixroute",
            f"ip link set {SWITCH} up",
            f"ip {route} dev {SWITCH} src {self.hub}",
        )
        for number, (namespace, host) in enumerate(zip(self.namespaces, self.hosts, strict=True)):
            inside, port = f"ip -n {namespace}", f"mayfly-port-{number}"
            _run(
                f"ip netns add {namespace}",
                f"ip link add {port} type veth peer name uplink netns {namespace}",
                f"ip link set {port} master {SWITCH}",
                f"ip link set {port} up",
                f"{inside} addr add {host}/24 dev uplink noprefixroute",
                f"{inside} link set uplink up",
                f"{inside} {route} dev uplink src {host}",
                f"{inside} link set lo up",
                f"tc qdisc add dev {port} {shape}",
                f"ip netns exec {namespace} tc qdisc add dev uplink {shape}",
            )

    def _remove(self) -> None:
        _try(*[f"ip netns del {namespace}" for namespace in self.namespaces])
        _try(f"ip link del {SWITCH}")


def _shape(megabit: int) -> str:
    return f"root tbf rate {megabit}mbit burst {BURST_KB}kb latency 50ms"


def _run(*commands: str) -> None:
    for command in commands:
        try:
            subprocess.run(command.split(), check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{command}: {error.stderr.decode().strip()}") from None


def _try(*commands: str) -> None:
    for command in commands:
        with contextlib.suppress(OSError):
            subprocess.run(command.split(), capture_output=True, check=False)
