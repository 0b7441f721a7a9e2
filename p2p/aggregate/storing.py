"""Scripts in a store: stored once for each life of it, under a name that tells their version."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.scripts import source


def ensure_stored(store: BulkConnection, name: str) -> str:
    """The key of the script `name`, which is also its entry point; stores it if it is not there."""
    text = source(name)
    key = f"mayfly:{name}:{sha256(text.encode()).hexdigest()[:12]}"
    if not store.execute("EXISTS", key):
        store.execute(
            "AI.SCRIPTSTORE", key, "CPU", "TAG", "mayfly", "ENTRY_POINTS", 1, name, "SOURCE", text
        )
    return key


def execution(
    key: str,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    arguments: Sequence[str] = (),
) -> list[str]:
    """The command that runs a stored script."""
    return [
        *("AI.SCRIPTEXECUTE", key, name),
        *("INPUTS", str(len(inputs)), *inputs),
        *("ARGS", str(len(arguments)), *arguments),
        *("OUTPUTS", str(len(outputs)), *outputs),
    ]
