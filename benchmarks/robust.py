"""What robust rules are good for: accuracy with one peer of five sending wrong gradients.

    python -m benchmarks.robust --json [--plot docs/robust.png]

examples/digits.py, five peers, aggregated in a store; one shard's gradients are multiplied by -10
before they leave its peer. Beside it the mean with nothing wrong. `accuracy` is that of the end,
`points_below` how much less it is than without anything wrong, in percentage points.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import finish, say, surroundings, table, unwind_when_terminated
from p2p.aggregate.rules import RULES

JOB = Path(__file__).parents[1] / "examples" / "digits.py"
PEERS = 5
WRONG = 2


def train(home: Path, rule: str, sabotaged: bool, steps: int) -> dict[str, Any]:
    """One run; its accuracy after each epoch, and at the end."""
    name = f"{rule}-{'wrong' if sabotaged else 'clean'}"
    command = ["p2p-launch", "run", str(JOB), "--home", str(home), "--run-id", name, "--json"]
    command += ["--quiet", "--peers", str(PEERS), "--aggregate", "database", "--robust", rule]
    command += ["--set", f"steps={steps}"]
    if sabotaged:
        command += ["--sabotage", str(WRONG)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode == 41:  # the loss is no number any more
        return {
            "rule": rule,
            "sabotaged": sabotaged,
            "accuracy": 0.0,
            "curve": [],
            "diverged": True,
        }
    ended.check_returncode()
    summary = json.loads(ended.stdout)
    lines = (home / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()
    curve = sorted((each["step"], each["values"]["accuracy"]) for each in map(json.loads, lines))
    return {
        "rule": rule,
        "sabotaged": sabotaged,
        "accuracy": round(summary["metrics"]["accuracy"], 4),
        "curve": curve,
        "diverged": False,
    }


def plot(runs: list[dict[str, Any]], to: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        if run["curve"]:
            steps, accuracies = zip(*run["curve"], strict=True)
            label = f"{run['rule']}, one of {PEERS} wrong" if run["sabotaged"] else "nothing wrong"
            axes.plot(steps, accuracies, label=label, linewidth=1.6 if run["sabotaged"] else 2.6)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(to, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robust",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--plot", type=Path, help="where to draw it")
    options = parser.parse_args()
    unwind_when_terminated()
    with tempfile.TemporaryDirectory(prefix="mayfly-benchmark-") as folder:
        runs = [train(Path(folder), "mean", False, options.steps)]
        for rule in RULES:
            runs.append(train(Path(folder), rule, True, options.steps))
            say(f"  {rule}: {runs[-1]['accuracy']}")
    clean = runs[0]["accuracy"]
    for run in runs:
        run["points_below"] = round(100 * (clean - run["accuracy"]), 1)
    if options.plot is not None:
        plot(runs, options.plot)
    columns = ("rule", "sabotaged", "accuracy", "points_below", "diverged")
    table(columns, [[run[column] for column in columns] for run in runs])
    finish({**surroundings(), "runs": runs}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
