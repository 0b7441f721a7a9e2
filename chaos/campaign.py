"""Many simulated runs: each by its seed, on all cores; a failing one minimised and told."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from chaos.faults import Schedule, draw_schedule
from chaos.world import World

BATCH_SEEDS = 25


@dataclass(frozen=True, slots=True)
class Failure:
    """A schedule that broke something, with as few faults as it takes."""

    seed: int
    what: str
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Findings:
    runs: int
    failures: tuple[Failure, ...]
    wall_s: float

    @property
    def runs_per_minute(self) -> float:
        return 60.0 * self.runs / self.wall_s if self.wall_s > 0 else 0.0


def play(schedule: Schedule, trace: list[str] | None = None) -> str:
    """What went wrong in this run, or "" when everything held."""
    try:
        World(schedule, trace).run()
    except AssertionError as error:
        return str(error) or "an assertion of the core failed:\n" + traceback.format_exc(limit=-4)
    except Exception:  # a crash of the core is a finding like any other
        return traceback.format_exc(limit=-4)
    return ""


def minimise(schedule: Schedule) -> Schedule:
    """Takes away faults, one at a time, for as long as something still goes wrong."""
    smaller = True
    while smaller:
        smaller = False
        for index in range(len(schedule.faults)):
            faults = schedule.faults[:index] + schedule.faults[index + 1 :]
            candidate = replace(schedule, faults=faults)
            if play(candidate):
                schedule, smaller = candidate, True
                break
    return schedule


def _batch(seeds: range) -> tuple[int, list[int]]:
    return len(seeds), [seed for seed in seeds if play(draw_schedule(seed))]


def simulate(
    seeds: range,
    on_progress: Callable[[int, int], None] = lambda runs, failures: None,
    failures_limit: int = 5,
) -> Findings:
    """Plays all seeds; stops early after `failures_limit` failures, which are then minimised."""
    began = time.monotonic()
    runs, failed = 0, list[int]()
    batches = [
        range(at, min(at + BATCH_SEEDS, seeds.stop))
        for at in range(seeds.start, seeds.stop, BATCH_SEEDS)
    ]
    # not multiprocessing's own Pool, which waits for ever when a worker cannot even start
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        pending = [pool.submit(_batch, batch) for batch in batches]
        for done in as_completed(pending):
            count, bad = done.result()
            runs += count
            failed += bad
            on_progress(runs, len(failed))
            if len(failed) >= failures_limit:
                pool.shutdown(cancel_futures=True)
                break
    wall_s = time.monotonic() - began
    failures = []
    for seed in sorted(failed):
        smallest = minimise(draw_schedule(seed))
        failures.append(Failure(seed, play(smallest), smallest))
    return Findings(runs, tuple(failures), wall_s)
