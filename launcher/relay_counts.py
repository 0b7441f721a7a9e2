"""What a run's relays have counted: they are asked like any peer asks them something."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgpack
import zmq

from p2p.transport.keys import PEER_FILE, PeerKeys
from p2p.transport.link import Link
from p2p.transport.relay import RELAY, STATS

WAIT_S = 0.5


def relay_counts(endpoints: Sequence[str], keys: Path) -> list[dict[str, int]]:
    """One relay's after the other, empty for one that does not answer.

    `keys` is the folder with a run's keys. Raises InputError if there are none for relays over TCP.
    """
    is_on_tcp = any(endpoint.startswith("tcp:") for endpoint in endpoints)
    own = PeerKeys.read(keys / PEER_FILE) if is_on_tcp else None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    name = f"launcher-{os.getpid()}".encode()
    links = [Link(name, [endpoint], context, keys=own) for endpoint in endpoints]
    until = time.monotonic() + WAIT_S
    try:
        return [_asked(link, until) for link in links]
    finally:
        for link in links:
            link.close()
        context.term()


def _asked(link: Link, until: float) -> dict[str, int]:
    while not link.send(RELAY, [STATS]):
        if time.monotonic() > until:
            return {}
        time.sleep(0.01)
    while (left := until - time.monotonic()) > 0:
        link.wait(int(1000 * left) + 1)
        message = link.receive()
        if message is not None and message[0] == RELAY:
            counts: dict[str, int] = msgpack.unpackb(message[1][0])
            return counts
    return {}
