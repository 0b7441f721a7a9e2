"""Scripts in a store: stored once for each life of it, under a name that tells their version."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from fault.errors import StoreUnavailable
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.scripts import source

SIGNATURE = "tensors: List[Tensor], keys: List[str], args: List[str]"


def composed(name: str, rule: str = "") -> str:
    """The text of a script, with those that it calls: of `rule`, by that name."""
    if not rule:
        return source(name)
    call = f"def rule({SIGNATURE}):\n    return {rule}(tensors, keys, args)\n"
    return "\n\n".join([source("total"), source(rule), call, source(name)])


def ensure_stored(store: BulkConnection, name: str, rule: str = "") -> str:
    """The key of the script `name`, which is also its entry point; stores it if it is not there."""
    text = composed(name, rule)
    key = f"mayfly:{name}:{sha256(text.encode()).hexdigest()[:12]}"
    if not store.execute("EXISTS", key):
        store.execute(
            "AI.SCRIPTSTORE", key, "CPU", "TAG", "mayfly", "ENTRY_POINTS", 1, name, "SOURCE", text
        )
    return key


def check_store(url: str) -> None:
    """Raises StoreError, and StoreUnavailable for one that is away, or not fit to serve a run."""
    with BulkConnection(url, timeout_s=5.0) as store:
        known = store.items("COMMAND", "INFO", "AI.SCRIPTEXECUTE")
        if known == [None] or not known:
            raise StoreUnavailable(
                f"the store at {store.where} has none of RedisAI's commands: load RedisAI there, "
                "or start a store with 'p2p-launch store'"
            )
        memory = store.execute("INFO", "memory")
        lines = memory.split() if isinstance(memory, bytes) else []
        if b"maxmemory:0" not in lines and b"maxmemory_policy:noeviction" not in lines:
            raise StoreUnavailable(
                f"the store at {store.where} removes tensors that are in use when its memory is "
                "full: set its maxmemory-policy to noeviction"
            )


def forget_run(url: str, prefix: str) -> None:
    """Removes all keys of a run from a store that stays. Raises StoreUnavailable and StoreError."""
    with BulkConnection(url, timeout_s=5.0) as store:
        cursor = b"0"
        while True:
            cursor, keys = store.items("SCAN", cursor, "MATCH", f"{prefix}:*", "COUNT", 1000)
            if keys:
                store.execute("UNLINK", *keys)
            if cursor == b"0":
                return


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
