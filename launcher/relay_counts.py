"""What a run's relays have counted: they are asked like any peer asks them something."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import msgpack
import zmq

from p2p.transport.keys import PEER_FILE, PeerKeys
from p2p.transport.link import Link
from p2p.transport.relay import RELAY, STATS

WAIT_S = 2.0
"""To a relay across an ocean it is four round trips: TCP's, two of CURVE's, and the question."""
GLANCE_S = 0.005


def relay_counts(endpoints: Sequence[str], keys: Path) -> list[dict[str, int]]:
    """One relay's after the other, empty for one that does not answer.

    `keys` is the folder with a run's keys. Raises InputError if there are none for relays over TCP.
    """
    is_on_tcp = any(endpoint.startswith("tcp:") for endpoint in endpoints)
    own = PeerKeys.read(keys / PEER_FILE) if is_on_tcp else None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # a process number would be another launcher's as well, in a container of its own
    name = b"launcher-" + secrets.token_hex(8).encode()
    links = [Link(name, [endpoint], context, keys=own) for endpoint in endpoints]
    counts: list[dict[str, int]] = [{} for _ in links]
    asked = [False for _ in links]
    until = time.monotonic() + WAIT_S
    try:
        while not all(counts) and time.monotonic() < until:
            for number, link in enumerate(links):
                asked[number] = asked[number] or link.send(RELAY, [STATS])
                answer = link.receive()
                if answer is not None and answer[0] == RELAY:
                    counts[number] = msgpack.unpackb(answer[1][0])
            time.sleep(GLANCE_S)
    finally:
        for link in links:
            link.close()
        context.term()
    return counts
