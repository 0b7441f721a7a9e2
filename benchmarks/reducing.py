"""One process of an allreduce that is measured: ours, or Gloo's. Started by `collectives.py`.

It reads lines of JSON from its standard input and answers each with one. `{"length": n}` makes
ready for vectors of n float32; `{"repeat": k}` sums k of them, one after another, and answers with
the seconds that it took, after one more that is not counted, in which the processes meet; and with
how many segments were sent again meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import zmq

from fault.records import Timing, View
from p2p.actions import Apply, Compute, Send
from p2p.messages import KINDS, Ask, Hello, Message, NotYet, Segment, Total
from p2p.spec import SEGMENT_BYTES
from p2p.steps import Shape, Steps
from p2p.traffic import Traffic
from p2p.transport.allocation import keep_large_blocks
from p2p.transport.direct import DirectLinks
from p2p.transport.framing import Target
from p2p.transport.keys import PeerKeys
from p2p.transport.link import ControlAndBulk, relay_bulk, relayed
from p2p.transport.shared import Pool
from p2p.transport.underway import LinksUnderway
from p2p.transport.watch import Watch
from p2p.transport.wire import WireFormat

BATCH_STEPS = 1_000_000
KEPT = 3
"""Vectors in turn: the last step's is still referred to by what is being sent."""
BEAT_S = Timing().beat_s
GLANCE_MS = int(1000 * BEAT_S)


class Reducer(Protocol):
    again: int
    """Segments that were sent again, for they were asked for."""

    def prepare(self, length: int) -> None: ...
    def reduce(self, repeat: int) -> None: ...
    def lines(self) -> Iterator[bytes]: ...


class Mayfly:
    """The step cycle of a peer and the way of its bytes, of which only the sums are made."""

    def __init__(
        self,
        rank: int,
        size: int,
        relays: list[str],
        direct: str,
        collective: str,
        compress: str,
        keys: PeerKeys | None,
    ) -> None:
        members = tuple([f"{each}.1.benchmark" for each in range(size)])
        self.me = members[rank]
        self._view = View(0, "benchmark", members, members, size)
        self._collective = collective
        self._compress = compress
        self._within_host = direct.startswith("ipc:")
        if compress != "none":
            import torch

            torch.set_num_threads(1)  # as in a run
        self._link = ControlAndBulk(self.me.encode(), relays, keys=keys)
        self._wire: WireFormat[Message] = WireFormat(KINDS)
        self._watch = Watch()
        self._watch.register(0, zmq.POLLIN)
        self._pool = Pool()
        binds = [direct.format(rank)] if direct else []
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._direct = DirectLinks(
            self.me,
            binds,
            context,
            self._watch,
            self._wire,
            self._pool,
            Traffic(),
            keys,
            self._place,
        )
        self._link.stream(self._watch, self._wire, self._place)
        self.again = 0
        self._out: list[object] = []
        self._batch = 0
        self._next_tick = 0.0
        self._steps: Steps | None = None

    def prepare(self, length: int) -> None:
        size = len(self._view.members)
        shape = Shape.of(
            self._collective,
            self._compress,
            size,
            1 << 60,
            length,
            length,
            SEGMENT_BYTES,
            seed=0,
            within_host=self._within_host,
        )
        self._batch += 1
        self._vectors = [self._pool.take(length) for _ in range(KEPT)]
        for vector in self._vectors:
            vector[:] = 0
        self._left = 0
        nothing: Any = lambda *_: None  # noqa: E731
        steps = Steps(self.me, shape, Timing(), self._out, nothing, nothing, self._pool)
        steps.underway = LinksUnderway(self._direct, self._link)
        steps.stand_at(self._batch * BATCH_STEPS, f"batch {self._batch}", None)
        self._steps = steps

    def reduce(self, repeat: int) -> None:
        steps, now = self._steps, time.monotonic()
        assert steps is not None
        self._left = repeat
        if steps.view is None:
            steps.enter(self._view, now)
        else:
            steps.begin(now)
        self._carry_out(steps)
        while self._left:
            self._serve(steps)

    def lines(self) -> Iterator[bytes]:
        """While none comes, the others get what they lack."""
        while True:
            if dict(self._watch.poll(GLANCE_MS)).get(0):
                line = os.read(0, 4096)
                if not line:
                    return
                yield line
            elif self._steps is not None:
                self._serve(self._steps, 0)

    def _serve(self, steps: Steps, timeout_ms: int = GLANCE_MS) -> None:
        """As a peer does: nothing is looked for where nothing was found, and ticks are beats."""
        self._watch.poll(timeout_ms)
        now = time.monotonic()
        self._direct.flush()
        if not self._watch.is_exhausted or self._direct.has_come:
            if not self._direct.has_all:
                self._hear_relays(steps, now)
            while (direct := self._direct.receive()) is not None:
                self._take(steps, *direct)
        if now >= self._next_tick:
            self._next_tick = now + BEAT_S
            self._link.tick(now)
            self._direct.tick(now)
            steps.tick(now)
            self._carry_out(steps)

    def _hear_relays(self, steps: Steps, now: float) -> None:
        while (came := relayed(self._link, self._wire)) is not None:
            peer, message = came
            if isinstance(message, Hello):
                self._direct.on_hello(peer, message, now)
            elif isinstance(message, Segment) and (hello := self._direct.hello(peer, now)):
                self._link.send_control(peer.encode(), self._wire.encode(hello))
            self._take(steps, peer, message)

    def _place(self, segment: Segment) -> Target | None:
        return self._steps.place(segment) if self._steps is not None else None

    def _take(self, steps: Steps, peer: str, message: Message) -> None:
        steps.heard_at = now = time.monotonic()
        match message:
            case Segment():
                steps.on_segment(peer, message, now)
            case Total():
                steps.on_total(peer, message, now)
            case Ask():
                steps.on_ask(peer, message, now)
            case NotYet():
                steps.on_not_yet(peer, message, now)
        self._carry_out(steps)

    def _carry_out(self, steps: Steps) -> None:
        index = 0
        while index < len(self._out):
            action = self._out[index]
            index += 1
            match action:
                case Send():
                    self.again += action.again
                    if action.again or not self._direct.send(action.to, action.message):
                        relay_bulk(self._link, self._wire, action.to, action.message)
                case Compute():
                    vector = self._vectors[action.step % KEPT]
                    steps.on_contribution(action.step, action.shard, vector, time.monotonic())
                case Apply():
                    steps.stand_at(action.step + 1, steps.digest, action.mean)
                    self._left -= 1
                    if self._left:
                        steps.begin(time.monotonic())
        self._out.clear()


class Gloo:
    """`torch.distributed.all_reduce`, in place."""

    again = 0

    def __init__(self, rank: int, size: int, store: str) -> None:
        import torch
        from torch import distributed

        self._distributed = distributed
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
        self._zeros = torch.zeros

    def prepare(self, length: int) -> None:
        self._vector = self._zeros(length)

    def reduce(self, repeat: int) -> None:
        for _ in range(repeat):
            self._distributed.all_reduce(self._vector)

    def lines(self) -> Iterator[bytes]:
        while line := os.read(0, 4096):
            yield line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--gloo", metavar="FILE")
    parser.add_argument("--relay", action="append")
    parser.add_argument("--direct", default="", help="where it listens itself; {} is its rank")
    parser.add_argument("--collective", default="ring")
    parser.add_argument("--compress", default="none")
    parser.add_argument("--keys", type=Path)
    options = parser.parse_args()
    reducer: Reducer
    if options.gloo:
        reducer = Gloo(options.rank, options.size, options.gloo)
    else:
        keep_large_blocks()
        reducer = Mayfly(
            *(options.rank, options.size, options.relay, options.direct, options.collective),
            options.compress,
            PeerKeys.read(options.keys) if options.keys is not None else None,
        )
    for line in reducer.lines():
        wanted: dict[str, Any] = json.loads(line)
        seconds, again = 0.0, reducer.again
        if "length" in wanted:
            reducer.prepare(wanted["length"])
        else:
            reducer.reduce(1)
            began = time.perf_counter()
            reducer.reduce(wanted["repeat"])
            seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "again": reducer.again - again}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
