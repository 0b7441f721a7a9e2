"""The registry: a run's small records in a Redis-protocol server (Redis 6.2 or newer, Valkey).

`Registry` has the operations of `fault.ledger.Ledger`, one to one, each a single call of one
server-side script (`fault/scripts`), so each happens whole or not at all. Time is the server's
own. What cannot be reached raises `RegistryUnavailable` at once: whether and when to try again is
the caller's decision, and after a timeout the caller does not know whether the call took effect;
it reads again and compares view ids and tokens.

Not for tensors, and not for deciding anything: the rules are the Ledger's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
import tenacity
from redis import exceptions as server_errors

from fault import codec
from fault.errors import InputError, RegistryUnavailable
from fault.passwords import with_password, without_password
from fault.records import Contact, Outcome, Peer, Proposal, Snapshot, Timing

RECORDS = (
    "head",
    "spec",
    "members",
    "leases",
    "ready",
    "doing",
    "departed",
    "grants",
    "accusations",
    "suspects",
    "events",
    "seen",
)
"""Names of a run's keys, in the order in which the scripts expect them."""

# what a server answers that is there but cannot serve now
_PASSING = (server_errors.ReadOnlyError, server_errors.OutOfMemoryError)
_PASSING_WORDS = ("MISCONF", "BUSY", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a run's history; `time` is the server's clock in seconds."""

    id: str
    time: float
    kind: str
    key: str
    fields: dict[str, Any]


@cache
def script() -> tuple[str, str]:
    """The operations' source, and the name (SHA-1) under which a server remembers it."""
    folder = files("fault") / "scripts"
    parts = ("records.lua", "views.lua", "operations.lua")
    source = "\n".join((folder / part).read_text("utf-8") for part in parts)
    return source, sha1(source.encode(), usedforsecurity=False).hexdigest()


class Registry:
    """One run's records at a server; one connection, so for one thread at a time.

    `server` is `unix:///path/of/socket`, a bare path, `redis://[:password@]host:port/db` or
    `rediss://…`, the latter two with `?password_file=FILE` instead of the password. `timeout_s`
    bounds the connecting and every wait for an answer. `clock` replaces
    the server's time in every rule; only the simulator's tests have a use for it.
    """

    def __init__(
        self,
        server: str | Path,
        run: str,
        timing: Timing,
        timeout_s: float = 1.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", run):
            raise InputError(f"{run!r} cannot name a run: use letters, digits, '.', '_' and '-'")
        url = (
            str(server) if "://" in str(server) else f"unix://{quote(str(Path(server).absolute()))}"
        )
        self.where = without_password(url)
        self.run = run
        self._timeout_s = timeout_s
        self._clock = clock
        self._timing = codec.timing_to_bytes(timing)
        # the braces keep a run's keys on one node of a cluster
        self._keys = tuple([f"mayfly:{{{run}}}:{name}" for name in RECORDS])
        self._life = ""
        try:
            pool = redis.ConnectionPool.from_url(
                with_password(url), socket_timeout=timeout_s, socket_connect_timeout=timeout_s
            )
            self._connection = pool.make_connection()
        except (ValueError, TypeError):
            # without the cause's words, in which there may be a piece of a password
            raise InputError(f"{self.where} is no address of a registry") from None
        self._connection.redis_connect_func = self._greet

    # --- the connection ---------------------------------------------------------------------

    def close(self) -> None:
        self._connection.disconnect()

    def ping(self) -> None:
        """Returns when the server answers and has its data loaded."""
        self._ask("PING")

    def wait_until_up(self, seconds: float) -> None:
        """Waits for a server that is starting.

        Raises RegistryUnavailable when it still does not answer after `seconds`.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RegistryUnavailable),
            wait=tenacity.wait_exponential(multiplier=0.01, max=0.25),
            stop=tenacity.stop_after_delay(seconds),
            reraise=True,
        )
        retrying(self.ping)

    def delete_run(self) -> None:
        """Removes every record of the run; the run must have ended."""
        self._ask("UNLINK", *self._keys)

    def _greet(self, connection: Any) -> None:
        """Every new connection asks which life the server is in: it draws an id at each start."""
        connection.on_connect()
        connection.send_command("INFO", "server")
        answer: bytes = connection.read_response(disable_decoding=True)
        found = re.search(rb"run_id:(\w+)", answer)
        if found is None:
            raise server_errors.ConnectionError("the server does not say its run_id")
        self._life = found[1].decode()

    def _connect(self) -> None:
        connection = self._connection
        connection.connect()
        try:
            broken = connection.can_read(0)  # nothing is owed to us: it can only be the end
        except server_errors.RedisError:
            broken = True
        if broken:
            connection.disconnect()
            connection.connect()

    def _exchange(self, *command: Any, wait_s: float = 0.0) -> Any:
        """One command and its answer; `wait_s` is how long the server may hold it back."""
        connection = self._connection
        # as text: redis-py's C part crashes where a signal arrives while it writes out a number
        words = [repr(word) if type(word) in (int, float) else word for word in command]
        connection.send_command(*words)
        if wait_s > 0 and not connection.can_read(wait_s + self._timeout_s):
            raise server_errors.TimeoutError("no answer")
        return connection.read_response(disable_decoding=True)

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        """An answer that is still on its way must not be taken for that of a later call."""
        try:
            yield
        except server_errors.AuthenticationError as error:
            self._connection.disconnect()
            raise InputError(f"the registry at {self.where} refuses the login: {error}") from None
        except (server_errors.RedisError, OSError) as error:
            if isinstance(error, server_errors.ResponseError) and not (
                isinstance(error, _PASSING) or str(error).startswith(_PASSING_WORDS)
            ):
                raise  # the scripts are at fault, and that is a bug
            self._connection.disconnect()
            raise RegistryUnavailable(
                f"the registry at {self.where} does not answer: {error}"
            ) from error
        except BaseException:  # a Ctrl-C, for one
            self._connection.disconnect()
            raise

    def _ask(self, *command: Any, wait_s: float = 0.0) -> Any:
        with self._failing_clearly():
            self._connect()
            return self._exchange(*command, wait_s=wait_s)

    def _operate(self, operation: str, *arguments: Any) -> Any:
        source, name = script()
        now = "" if self._clock is None else repr(self._clock())
        packed = codec.pack(arguments)
        with self._failing_clearly():
            self._connect()  # first: `life` must be that of the server which is asked
            tail = (operation, now, self._life, self._timing, packed)
            try:
                return self._exchange("EVALSHA", name, len(RECORDS), *self._keys, *tail)
            except server_errors.NoScriptError:
                # a server forgets scripts when it restarts; EVAL teaches it anew
                return self._exchange("EVAL", source, len(RECORDS), *self._keys, *tail)

    # --- the launcher -----------------------------------------------------------------------

    def create(self, spec: str, slots: int) -> bool:
        """Makes the run, once; False when it is there already."""
        return bool(self._operate("create", spec, slots, codec.pack({"slots": slots})))

    def spec(self) -> str:
        """The text that the run was created with; empty when there is no such run."""
        return codec.text(self._ask("GET", self._keys[RECORDS.index("spec")]) or b"")

    def scale(self, slots: int) -> bool:
        """Sets how many slots the run should have; False when it ended or is not there."""
        return bool(self._operate("scale", slots, codec.pack({"slots": slots})))

    def reopen(self) -> bool:
        """Lets a run go on of which no process lives; False if it is finished or not there."""
        return bool(self._operate("reopen", codec.pack({})))

    # --- leases -----------------------------------------------------------------------------

    def contact(self, contact: Contact) -> Snapshot:
        """Renews the caller's lease, if it may hold one, and answers with everything."""
        answer = self._operate("contact", *codec.contact_arguments(contact))
        return codec.snapshot_from_bytes(answer, self._life)

    def read(self) -> Snapshot:
        return codec.snapshot_from_bytes(self._operate("read"), self._life)

    # --- grants -----------------------------------------------------------------------------

    def grant(self, slot: int, generation: int, token: str, by: Peer) -> bool:
        """Gives out a slot's next generation. A member may also grant its own slot's successor."""
        event = codec.pack({"slot": slot, "generation": generation, "by": by})
        return bool(self._operate("grant", slot, generation, token, by, event))

    def claim(self, slot: int, generation: int, token: str, peer: Peer) -> bool:
        """Takes a grant for this process: same generation and token, unclaimed, in time."""
        event = codec.pack({"slot": slot, "peer": peer})
        return bool(self._operate("claim", slot, generation, token, peer, event))

    def admit_hardware(self, probe: str) -> str:
        """The first candidate's probe becomes the run's; returns the run's."""
        return codec.text(self._operate("admit_hardware", probe))

    # --- views ------------------------------------------------------------------------------

    def propose(self, proposal: Proposal) -> bool:
        """Replaces the view if everything the proposal rests on still holds."""
        return bool(self._operate("propose", *codec.proposal_arguments(proposal)))

    def restore(self, spec: str, slots: int, proposal: Proposal) -> bool:
        """Members write back what a registry lost: the spec, if it has none, and their view."""
        arguments = codec.proposal_arguments(proposal)
        return bool(self._operate("restore", spec, slots, arguments))

    # --- deaths -----------------------------------------------------------------------------

    def leave(self, peer: Peer, cause: str = "") -> None:
        """A peer says that it goes, and of what; it holds no lease from here on."""
        self._operate("leave", peer, cause, codec.pack({"peer": peer, "cause": cause}))

    def blame(self, peer: Peer, cause: str) -> None:
        """The platform's word on what a peer died of ("out of memory", …)."""
        self._operate("blame", peer, cause)

    # --- the end ----------------------------------------------------------------------------

    def checkpointed(self, step: int) -> None:
        self._operate("checkpointed", step, codec.pack({"step": step}))

    def finish(self, outcome: Outcome) -> Outcome:
        """Sets how the run ended; the first word stands and is returned."""
        event = codec.pack(asdict(outcome))
        answer = self._operate("finish", codec.outcome_to_bytes(outcome), event)
        return codec.outcome_from_bytes(answer)

    # --- history ----------------------------------------------------------------------------

    def event(self, kind: str, key: str, fields: Mapping[str, Any]) -> bool:
        """Appends an event, once per (kind, key); False when it is there already.

        Fields are plain data: None, numbers, text, and lists and dictionaries of these.
        """
        return bool(self._operate("event", kind, key, codec.pack(fields)))

    def read_events(
        self, after_id: str = "0-0", block_ms: int = 0, count: int = 1000
    ) -> list[Event]:
        """The oldest `count` events after one; waits up to `block_ms` for the first (0: no wait).

        The stream keeps the newest 100,000 or so.
        """
        block = ("BLOCK", block_ms) if block_ms > 0 else ()
        stream = self._keys[RECORDS.index("events")]
        answer = self._ask(
            "XREAD", "COUNT", count, *block, "STREAMS", stream, after_id, wait_s=block_ms / 1000
        )
        return [_event(identity, flat) for identity, flat in answer[0][1]] if answer else []


def _event(identity: bytes, flat: list[bytes]) -> Event:
    entry = dict(zip(flat[::2], flat[1::2], strict=True))
    return Event(
        id=codec.text(identity),
        time=float(entry[b"time"]),
        kind=codec.text(entry[b"kind"]),
        key=codec.text(entry[b"key"]),
        fields=codec.unpack(entry[b"fields"]),
    )
