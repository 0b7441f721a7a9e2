"""Whom an address can be reached by."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it: a name or an IP address, IPv6 with or without []."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def is_within_host(endpoint: str) -> bool:
    """Whether what comes to this ZeroMQ endpoint never leaves the machine, so only the kernel
    copies it."""
    transport, _, address = endpoint.partition("://")
    return transport == "ipc" or is_loopback(address.rpartition(":")[0])


def host_of(endpoint: str) -> str:
    """Of tcp://HOST:PORT, without the brackets of IPv6."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
