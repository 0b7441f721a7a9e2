"""The promise in one command: functions that live for seconds, one killed on the way, same weights.

Trains `digits.py` with `p2p-launch`, once undisturbed and once on functions that live for 15 s each
while one of them is killed, and compares the final weights byte by byte. Exits with 0 only if they
are the same, the model is good, and at least four peers handed over before their deadline. The
comparison looks at the files alone, and not at what the runs say of themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from digits import task
from safetensors.torch import load_file

JOB = Path(__file__).with_name("digits.py")
REPORT = Path("demo-report")
ACCURACY_WANTED = 0.95
HANDOVERS_WANTED = 4
LIFE_S = 15
LENGTH_S = 26.0
"""A run must take so long for its functions to come near their deadlines."""


def train(home: Path, run: str, steps: int, *options: str) -> dict[str, Any]:
    """Runs the job to its end, its progress shown, and returns its summary."""
    command = ["p2p-launch", "run", str(JOB), "--peers", "4", "--home", str(home)]
    command += ["--run-id", run, "--set", f"steps={steps}", "--json", *options]
    print(f"\n$ {' '.join(command)}", file=sys.stderr, flush=True)
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(ended.returncode)
    summary: dict[str, Any] = json.loads(ended.stdout)
    return summary


def undisturbed(home: Path) -> dict[str, Any]:
    """A run without faults that takes `LENGTH_S`, however fast this machine is."""
    steps, wall_s = 1000, 0.0
    for number in range(4):
        summary = train(home, f"undisturbed-{number}", steps)
        wall_s = summary["wall_s"]
        if wall_s >= LENGTH_S:
            break
        steps = math.ceil(1.2 * steps * LENGTH_S / wall_s)
    return summary


def weights(summary: dict[str, Any]) -> Path:
    return Path(summary["folder"]) / "final.safetensors"


def fingerprint(file: Path) -> str:
    """SHA-256 over the name, type, shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def accuracy(file: Path) -> float:
    """Held-out accuracy of the plain model with these weights loaded."""
    digits = task()
    digits.model.load_state_dict(load_file(file))
    digits.model.eval()
    assert digits.evaluate is not None
    return digits.evaluate(digits.model)["accuracy"]


def main() -> int:
    home = Path(tempfile.mkdtemp(prefix="mayfly-demo-"))
    reference = undisturbed(home)
    run = train(
        home, "short-lived", reference["steps"], "--time-limit", str(LIFE_S), "--kill", "2@60"
    )
    report = ["p2p-launch", "report", "short-lived", "--home", str(home), "--out", str(REPORT)]
    subprocess.run(report, check=True, stdout=subprocess.DEVNULL)
    held_out = accuracy(weights(run))
    prints = fingerprint(weights(run)), fingerprint(weights(reference))
    same = prints[0] == prints[1]
    stalls = ", ".join(f"{stall:.0f}" for stall in run["stall_ms"]["handover"])
    print(f"\nfunctions started          {run['invocations']['total']}")
    print(f"hand-overs                 {run['handovers']}, stalls in ms: {stalls or 'none'}")
    print(f"killed on the way          {run['deaths']}; steps lost: 0")
    print(f"held-out accuracy          {held_out:.4f} (wanted: {ACCURACY_WANTED} or more)")
    print(f"weights, lives of {LIFE_S} s     {prints[0]}")
    print(f"weights, undisturbed       {prints[1]}")
    print(f"weights are                {'identical' if same else 'DIFFERENT'}")
    print(f"picture                    {REPORT / 'report.png'}, {REPORT / 'report.html'}")
    enough = run["handovers"] >= HANDOVERS_WANTED and run["deaths"] == 1
    if not same or held_out < ACCURACY_WANTED or not enough:
        print(f"this is not what was promised; the runs are kept in {home}", file=sys.stderr)
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
