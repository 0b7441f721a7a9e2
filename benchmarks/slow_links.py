"""Allreduce between machines with slow links, beside what a link carries.

    python -m benchmarks.slow_links --json

Four processes sum a vector of 47 MB, each in a network namespace whose link carries 600 Mbit/s in
each direction, as a function's does; their bytes go over TCP from process to process, encrypted as
in a run, or (`relay`) through a relay that has as many such links. Whatever the collective, each
has to send 2 (N - 1) / N of the vector, and to receive as much, so the least time is that at the
rate of one TCP stream over such a link, measured in the same run. `of_link` is this least time's
share in the time that it took; the median of the samples. With compression less has to be sent, so
there it may be more than 1. `again` is how many segments were sent again, in all samples together,
because somebody who waited asked for them. Needs root, `ip` and `tc`.

TCP's congestion control is cubic, the kernel's default as it is published; `--congestion` takes any
other that the kernel has, and the stream that sets the least time has it too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.collectives import SIZES, Group, Relay
from benchmarks.report import finish, say, surroundings, table, unwind_when_terminated
from benchmarks.shaped import Star, why_not
from p2p.spec import COLLECTIVES, COMPRESSIONS
from p2p.transport.keys import PEER_FILE, new_keys, write_keys

MACHINES = 4
MEGABIT = 600
STREAM_S = 2
"""A link's rate is measured by a stream that takes about so long."""
MEGABIT_BYTES = 125_000
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
POUR = """
import socket, sys
with socket.create_server((sys.argv[1], 7777)) as server:
    print(flush=True)
    far, _ = server.accept()
    far.sendall(bytes(int(sys.argv[2])))
    far.close()
"""
DRAIN = """
import socket, sys, time
near = socket.create_connection((sys.argv[1], 7777))
room = bytearray(1 << 20)
taken, began = near.recv_into(room), time.perf_counter()
while count := near.recv_into(room):
    taken += count
print(taken / (time.perf_counter() - began))
"""


def stream(star: Star) -> float:
    """Bytes a second from one machine to another."""

    def inside(machine: int, code: str, *arguments: str) -> list[str]:
        command = ["ip", "netns", "exec", star.namespaces[machine], sys.executable, "-c", code]
        return [*command, star.hosts[0], *arguments]

    pouring = subprocess.Popen(
        inside(0, POUR, str(STREAM_S * star.megabit * MEGABIT_BYTES)), stdout=subprocess.PIPE
    )
    assert pouring.stdout is not None
    pouring.stdout.readline()
    drained = subprocess.run(inside(1, DRAIN), check=True, capture_output=True)
    pouring.communicate()
    return float(drained.stdout)


@dataclass(frozen=True, slots=True)
class Setting:
    collective: str
    compress: str = "none"
    way: str = "direct"

    @property
    def name(self) -> str:
        others = [each for each in (self.compress, self.way) if each not in ("none", "direct")]
        return "_".join([self.collective, *others])


def measure(star: Star, setting: Setting, samples: int) -> tuple[list[float], int]:
    """Seconds of each sum, and how many segments were sent again in all of them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_keys(new_keys(), folder)
        options = ["--collective", setting.collective, "--compress", setting.compress]
        options += ["--keys", str(folder / PEER_FILE)]
        with Relay(folder, star.hub) as relay:
            options += ["--relay", relay.endpoint]
            listens = setting.way == "direct"
            with Group(MACHINES, *options, star=star, listens=listens) as group:
                group.prepare(SIZES["47MB"])
                group.sample(1)
                before = group.again
                return [group.sample(1) for _ in range(samples)], group.again - before


SETTINGS = {
    each.name: each
    for each in (
        *(Setting(collective) for collective in COLLECTIVES),
        *(Setting("ring", compress) for compress in COMPRESSIONS[1:]),
        Setting("ring", way="relay"),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--megabit", type=int, default=MEGABIT, help="of each link, a second")
    parser.add_argument("--congestion", default="cubic", help="TCP's control of it: cubic, bbr, …")
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS], choices=SETTINGS)
    options = parser.parse_args()
    reason = why_not()
    if not reason and options.congestion not in (known := AVAILABLE.read_text().split()):
        parser.error(f"{options.congestion} is none of what is loaded here: {', '.join(known)}")
    unwind_when_terminated()
    found: dict[str, Any] = {"benchmark": "slow_links", **surroundings()}
    found["megabit"], found["congestion"] = options.megabit, options.congestion
    if reason:
        say(f"without slow links: {reason}")
        found["skipped"] = reason
        finish(found, options.json)
        return
    with Star(MACHINES, options.megabit, options.congestion) as star:
        rate = stream(star)
        found["stream_mb_per_s"] = round(rate / 1e6, 2)
        least_s = 4 * SIZES["47MB"] * 2 * (MACHINES - 1) / MACHINES / rate
        found["least_s"] = round(least_s, 3)
        rows = []
        for name in options.settings:
            times, again = measure(star, SETTINGS[name], options.samples)
            seconds = median(times)
            found[name] = {
                "s": round(seconds, 3),
                "of_link": round(least_s / seconds, 3),
                "again": again,
            }
            say(f"{name}: {found[name]}")
            rows.append([name, *found[name].values()])
    table(["", "s", "of_link", "again"], rows)
    finish(found, options.json)


if __name__ == "__main__":
    main()
