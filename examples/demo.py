"""The promise in one command: kill a peer while it trains, and the weights do not differ in a bit.

Runs `digits.py` twice with `p2p-launch`, once with a peer killed on the way and once without, and
compares the final weights byte by byte. Exits with 0 only if they are the same and the model is
good. The comparison looks at the files alone, and not at what the runs say of themselves.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from digits import task
from safetensors.torch import load_file

JOB = Path(__file__).with_name("digits.py")
ACCURACY_WANTED = 0.95


def train(home: Path, run: str, *options: str) -> Path:
    """Runs the job to its end, its progress shown, and returns its final weights' file."""
    command = ["p2p-launch", "run", str(JOB), "--peers", "4", "--home", str(home)]
    command += ["--run-id", run, *options]
    print(f"\n$ {' '.join(command)}", flush=True)
    ended = subprocess.run(command)
    if ended.returncode:
        raise SystemExit(ended.returncode)
    return home / "runs" / run / "final.safetensors"


def fingerprint(weights: Path) -> str:
    """SHA-256 over the name, type, shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(weights).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def accuracy(weights: Path) -> float:
    """Held-out accuracy of the plain model with these weights loaded."""
    digits = task()
    digits.model.load_state_dict(load_file(weights))
    digits.model.eval()
    assert digits.evaluate is not None
    return digits.evaluate(digits.model)["accuracy"]


def main() -> int:
    home = Path(tempfile.mkdtemp(prefix="mayfly-demo-"))
    killed = train(home, "killed", "--kill", "2@60")
    reference = train(home, "reference")
    held_out = accuracy(killed)
    prints = {run: fingerprint(run) for run in (killed, reference)}
    same = prints[killed] == prints[reference]
    print(f"\nheld-out accuracy          {held_out:.4f} (wanted: {ACCURACY_WANTED} or more)")
    print(f"weights, one peer killed   {prints[killed]}")
    print(f"weights, nothing failed    {prints[reference]}")
    print(f"weights are                {'identical' if same else 'DIFFERENT'}")
    if not same or held_out < ACCURACY_WANTED:
        print(f"the runs are kept in {home}", file=sys.stderr)
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
