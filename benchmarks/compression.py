"""What compression saves on the wire, and what it does to the loss, for both examples.

    python -m benchmarks.compression --json

Each example is trained with each `--compress` and the same collective, the relays carrying all
bytes so that they are counted where they go out. `bytes` are those of payloads per peer and step,
beside those without compression; `loss` is that of the last step, `metrics` what the job's own
`evaluate` finds at the end. Faults would change none of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import finish, say, surroundings, table, unwind_when_terminated
from p2p.spec import COMPRESSIONS

EXAMPLES = {"digits": 1500, "charlm": 600}
PEERS = 4


def train(example: str, steps: int, compress: str, home: Path) -> dict[str, Any]:
    """The run's summary."""
    job = Path(__file__).parents[1] / "examples" / f"{example}.py"
    command = ["p2p-launch", "run", str(job), "--json", "--quiet", "--home", str(home)]
    command += ["--peers", str(PEERS), "--links", "relay", "--compress", compress]
    command += ["--collective", "direct"]  # the ring's short vectors go another way, uncompressed
    command += ["--set", f"steps={steps}"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    summary: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--steps", type=int, default=0, help="other than each example's own")
    parser.add_argument("--examples", nargs="*", default=[*EXAMPLES], choices=[*EXAMPLES])
    options = parser.parse_args()
    unwind_when_terminated()
    found: dict[str, Any] = {"benchmark": "compression", **surroundings(), "peers": PEERS}
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for example in options.examples:
            steps = options.steps or EXAMPLES[example]
            found[example] = {"steps": steps}
            for compress in COMPRESSIONS:
                summary = train(example, steps, compress, Path(home))
                sent = summary["traffic"]["relayed_bytes"] / steps / PEERS
                row = found[example][compress] = {
                    "bytes": round(sent),
                    "share": round(sent / found[example].get("none", {}).get("bytes", sent), 3),
                    "loss": round(summary["loss"], 4),
                    "metrics": {name: round(v, 4) for name, v in summary["metrics"].items()},
                }
                say(f"{example}, {compress}: {row}")
                rows.append([example, compress, *row.values()])
    table(["example", "compress", "bytes", "share", "loss", "metrics"], rows)
    finish(found, options.json)


if __name__ == "__main__":
    main()
