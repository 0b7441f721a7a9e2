"""`python -m chaos simulate`: random faults against the real core, in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from chaos.campaign import Findings, minimise, play, simulate
from chaos.faults import KINDS, draw_schedule


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every invariant held in every run, else 1; 2 for a wrong command line."""
    kinds = "\n".join([f"  {name:<18}{told}" for name, told in KINDS.items()])
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    simulation = commands.add_parser(
        "simulate",
        help="play seeds",
        epilog=f"faults:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulation.add_argument("--seeds", type=int, default=1000, help="how many seeds to play")
    simulation.add_argument("--start", type=int, default=0, help="the first of them")
    simulation.add_argument("--seed", type=int, help="play this one alone and print its trace")
    simulation.add_argument(
        "--minimise", action="store_true", help="with --seed: take away faults that do not matter"
    )
    simulation.add_argument("--json", action="store_true", help="one JSON line on stdout")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _one(options.seed, options.minimise)
    if options.seeds < 1:
        parser.error("--seeds must be 1 at least")

    def show(runs: int, failures: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{runs} runs, {failures} failed", end="", file=sys.stderr, flush=True)

    findings = simulate(range(options.start, options.start + options.seeds), show)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _report(findings, options.json)
    return 1 if findings.failures else 0


def _one(seed: int, smallest: bool) -> int:
    schedule = draw_schedule(seed)
    if smallest and play(schedule):
        schedule = minimise(schedule)
    trace: list[str] = []
    wrong = play(schedule, trace)
    print(schedule)
    print("\n".join(trace))
    print(wrong or "every invariant held")
    return 1 if wrong else 0


def _report(findings: Findings, as_json: bool) -> None:
    for failure in findings.failures:
        print(f"{failure.schedule}\n  broke: {failure.what}", file=sys.stderr)
        print(
            f"  replay: python -m chaos simulate --seed {failure.seed} --minimise\n",
            file=sys.stderr,
        )
    if as_json:
        report = {
            "runs": findings.runs,
            "failed": [failure.seed for failure in findings.failures],
            "wall_s": round(findings.wall_s, 1),
            "runs_per_minute": round(findings.runs_per_minute),
        }
        print(json.dumps(report))
    else:
        print(
            f"{findings.runs} runs in {findings.wall_s:.0f} s "
            f"({findings.runs_per_minute:.0f} a minute), {len(findings.failures)} failed"
        )


if __name__ == "__main__":
    sys.exit(main())
