"""What the engine stores outlives the server; what runs in it harms neither it nor its users."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

import pytest

from tests.p2p.aggregate.stores import Command, Error, Reply, Simple, Store, Wire, function, storing

NewStore = Callable[[str], Store]

OK = Simple("OK")
ADD = storing("s", function("return tensors[0] + 1, torch.zeros([0, 2])"))
RUN = "AI.SCRIPTEXECUTE s f INPUTS 1 x OUTPUTS 2 o empty"
FILL: list[Command] = [
    "AI.TENSORSET x INT32 2 2 VALUES 1 2 3 -4",
    ["AI.TENSORSET", "\0binary\r\n", "STRING", 2, "VALUES", "one", ""],
    "AI.TENSORSET scalar DOUBLE VALUES 0.1",
    ["AI.TENSORSET", "large", "UINT8", 3_000_000, "BLOB", b"\7" * 3_000_000],
    ADD,
    RUN,
    "SET plain text",
]
SHOWN: list[Command] = [
    "AI.TENSORGET x",
    ["AI.TENSORGET", "\0binary\r\n"],
    "AI.TENSORGET scalar",
    "AI.TENSORGET large",
    "AI.TENSORGET o",
    "AI.TENSORGET empty",
    "AI.SCRIPTGET s",
    "GET plain",
]
FOREVER = storing("slow", function("while True:", "    pass", "return tensors"))
SLOW = "AI.SCRIPTEXECUTE slow f INPUTS 0"


def fill(wire: Wire) -> list[Reply]:
    """Stores one of everything; what is then to be seen."""
    for command in FILL:
        assert wire(command) == OK
    shown = [wire(command) for command in SHOWN]
    assert not any(isinstance(each, Error) for each in shown)
    return shown


def awaited(wire: Wire, command: Command, wanted: Callable[[Reply], bool]) -> Reply:
    """Asks until it is answered so: for what the server has no other way to tell."""
    until = time.monotonic() + 10
    while not wanted(reply := wire(command)):
        assert time.monotonic() < until, f"{command!r} is still answered {reply!r}"
    return reply


def field(name: str) -> Callable[[Reply], str]:
    """Of an INFO."""

    def look_up(reply: Reply) -> str:
        assert isinstance(reply, bytes)
        found = re.search(rf"^{name}:(.*?)\r$", reply.decode(), re.MULTILINE)
        return found[1] if found else ""

    return look_up


def used_memory(wire: Wire) -> int:
    return int(field("used_memory")(wire("INFO memory")))


def test_a_saved_file_brings_all_back(new_store: NewStore) -> None:
    """After SAVE and a restart, tensors and scripts are the same, and scripts run."""
    store = new_store("a").start()
    shown = fill(store.connect())
    assert store.connect()("SAVE") == OK
    store.kill()
    wire = store.start().connect()
    assert [wire(command) for command in SHOWN] == shown
    assert wire(RUN) == OK and [wire(command) for command in SHOWN] == shown
    assert wire("AI._SCRIPTSCAN") == [[b"s", b"t"]]


@pytest.mark.parametrize("preamble", ["yes", "no"])
def test_a_log_brings_all_back(new_store: NewStore, preamble: str) -> None:
    """After SIGKILL the log brings all back, as written and as rewritten, with or without RDB."""
    options = ["--appendonly", "yes", "--appendfsync", "always", "--aof-use-rdb-preamble", preamble]
    store = new_store("a").start(*options)
    shown = fill(store.connect())
    store.kill()
    wire = store.start(*options).connect()
    assert [wire(command) for command in SHOWN] == shown
    assert isinstance(wire("BGREWRITEAOF"), Simple)
    state = field("aof_rewrite_in_progress"), field("aof_rewrite_scheduled")
    awaited(wire, "INFO persistence", lambda reply: all(each(reply) == "0" for each in state))
    assert field("aof_last_bgrewrite_status")(wire("INFO persistence")) == "ok"
    store.kill()
    wire = store.start(*options).connect()
    assert [wire(command) for command in SHOWN] == shown
    assert wire(RUN) == OK


def start_master(new_store: NewStore, *options: str) -> tuple[Store, int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    listening = ["--port", str(port), "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0"]
    return new_store("master").start(*listening, *options), port


def follow(new_store: NewStore, port: int) -> Wire:
    follower = new_store("replica").start().connect()
    assert follower(f"REPLICAOF 127.0.0.1 {port}") == OK
    awaited(follower, "INFO replication", lambda reply: field("master_link_status")(reply) == "up")
    return follower


def test_a_replica_gets_what_was_stored(new_store: NewStore) -> None:
    """A replica has what was there before it and what came after, but runs nothing itself."""
    master, port = start_master(new_store)
    wire = master.connect()
    assert wire("AI.TENSORSET before INT8 1 VALUES 5") == OK
    follower = follow(new_store, port)
    shown = fill(wire)
    counter = storing("counter", function("return torch.rand([4]), torch.rand([4])"))
    assert wire(counter) == OK
    assert wire("AI.SCRIPTEXECUTE counter f INPUTS 0 OUTPUTS 2 r1 r2") == OK
    dag = "AI.DAGEXECUTE PERSIST 1 r3 |> AI.SCRIPTEXECUTE counter f INPUTS 0 OUTPUTS 2 r4 r3"
    assert wire(dag) == [OK]
    own = storing("own", function("redis.execute('SET', 'by', 'script')", "return tensors"))
    assert wire(own) == OK and wire("AI.SCRIPTEXECUTE own f INPUTS 0") == OK
    assert wire("AI.SCRIPTDEL own") == OK
    assert wire("WAIT 1 10000") == 1
    assert [follower(command) for command in SHOWN] == shown
    for command in ("r1", "r2", "r3"):
        assert follower(f"AI.TENSORGET {command}") == wire(f"AI.TENSORGET {command}")
    assert follower("AI.TENSORGET before VALUES") == [5] and follower("GET by") == b"script"
    assert follower("EXISTS own r4") == 0
    refused = follower(RUN)
    assert isinstance(refused, Error) and refused.text.startswith("READONLY")
    follower("REPLICAOF NO ONE")


def test_commands_of_scripts_are_passed_on_among_many(new_store: NewStore) -> None:
    """Scripts that write, in several connections, beside plain writes: all of it arrives."""
    options = ["--appendonly", "yes", "--appendfsync", "always"]
    master, port = start_master(new_store, *options)
    wires = [master.connect() for _ in range(4)]
    follower = follow(new_store, port)
    counting = ["for i in range(50):", "    redis.execute('INCR', keys)", "return tensors"]
    assert wires[0](storing("counting", function(*counting))) == OK
    for _ in range(10):
        for index, wire in enumerate(wires):
            wire.send(f"AI.SCRIPTEXECUTE counting f KEYS 1 k{index % 2}")
            wire.send(f"INCR k{index % 2}")
        for wire in wires:
            assert wire.receive() == OK and isinstance(wire.receive(), int)
    assert wires[0]("WAIT 1 10000") == 1
    assert [follower(f"GET k{index}") for index in range(2)] == [b"1020"] * 2
    master.kill()
    wire = master.start(*options).connect()
    assert [wire(f"GET k{index}") for index in range(2)] == [b"1020"] * 2


def test_a_server_forgets_lua_scripts_that_scripts_ran(wire: Wire) -> None:
    """More EVALs within one execution than a server keeps compiled, which makes it drop some."""
    lines = ["for i in range(1500):", "    redis.execute('EVAL', ['return ' + str(i), '0'])"]
    assert wire(storing("evals", function(*lines, "return tensors"))) == OK
    assert wire("AI.SCRIPTEXECUTE evals f INPUTS 0") == OK
    assert wire("PING") == Simple("PONG")


def test_memory_of_tensors_is_the_servers(wire: Wire) -> None:
    """A tensor's bytes are in MEMORY USAGE and in used_memory, and no longer when it is gone."""
    wire("CONFIG SET lazyfree-lazy-user-del no")
    count = 600_000  # below what is kept for later
    before = used_memory(wire)
    wire(["AI.TENSORSET", "x", "UINT8", count])
    usage = wire("MEMORY USAGE x")
    assert isinstance(usage, int) and count <= usage < count + 1000
    assert count <= used_memory(wire) - before < 2 * count
    wire("DEL x")
    assert abs(used_memory(wire) - before) < count / 2


def test_a_script_may_do_what_its_user_may(wire: Wire, store: Store) -> None:
    """A user without rights on a key or a command has none in a script or in a DAG either."""
    if store.is_old:
        pytest.skip("before version 7 a module cannot ask what a user may do")
    lines = ["redis.execute(keys[0], args)", "return [torch.zeros([1])]"]
    assert wire(storing("mine:s", function(*lines))) == OK
    assert wire(storing("theirs:s", function(*lines))) == OK
    rights = "on >pw ~mine:* +@all -@dangerous +ai.scriptexecute +ai.dagexecute -incr"
    assert wire(f"ACL SETUSER guest {rights}") == OK
    guest = store.connect()
    assert guest("AUTH guest pw") == OK

    def run(command: str, *words: str) -> Reply:
        head = f"AI.SCRIPTEXECUTE mine:s f KEYS 1 mine:{command}"
        return guest(f"{head} INPUTS 0 ARGS {len(words)} {' '.join(words)}")

    named = storing("mine:s", function("redis.execute(args[0], args[1:])", "return tensors"))
    assert wire(named) == OK
    assert run("k", "SET", "mine:a", "1") == OK and wire("GET mine:a") == b"1"
    for words in (["SET", "theirs:a", "1"], ["INCR", "mine:a"], ["CONFIG", "GET", "port"]):
        reply = run("k", *words)
        assert isinstance(reply, Error) and "NOPERM" in reply.text
    for command in (
        "AI.SCRIPTEXECUTE theirs:s f INPUTS 0",
        "AI.SCRIPTEXECUTE mine:s f INPUTS 0 OUTPUTS 1 theirs:o",
        "AI.SCRIPTEXECUTE mine:s f INPUTS 1 theirs:o",
        "AI.TENSORSET theirs:x INT8 1",
        "AI.DAGEXECUTE ROUTING mine:r |> AI.SCRIPTEXECUTE theirs:s f INPUTS 0",
        "AI.DAGEXECUTE PERSIST 1 theirs:x |> AI.TENSORSET theirs:x INT8 1",
        "AI.DAGEXECUTE ROUTING mine:r |> AI.TENSORSET x STRING 1 VALUES LOAD "
        "|> AI.SCRIPTEXECUTE theirs:s f INPUTS 0",
    ):
        reply = guest(command)
        assert isinstance(reply, Error) and reply.text.startswith("NOPERM"), command
    assert wire("EXISTS theirs:a theirs:o theirs:x") == 0
    assert wire("ACL DELUSER guest") == 1
    guest.close()


def test_slow_scripts_stop_no_push(wire: Wire, store: Store) -> None:
    """While two scripts run, tensors are set and got; both scripts are then answered."""
    assert wire(FOREVER) == OK
    slow = [store.connect(), store.connect()]
    for each in slow:
        each.send(f"{SLOW} TIMEOUT 300")
    for _ in range(20):
        assert wire("AI.TENSORSET x INT8 1 VALUES 1") == OK
        assert wire("AI.TENSORGET x VALUES") == [1]
    awaited(wire, "INFO clients", lambda reply: field("blocked_clients")(reply) == "2")
    for each in slow:
        assert each.receive() == Simple("TIMEDOUT")
        each.close()


def test_a_client_that_leaves_stores_nothing(wire: Wire, store: Store) -> None:
    """Of a client that is gone before its script ends, the outputs are not stored."""
    lines = ["while int(str(redis.execute('EXISTS', 'go'))) == 0:", "    pass"]
    assert wire(storing("slow", function(*lines, "return [torch.zeros([1])]"))) == OK
    assert wire(storing("s", function("return [torch.zeros([1])]"))) == OK
    leaving = store.connect()
    leaving.send("AI.SCRIPTEXECUTE slow f INPUTS 0 OUTPUTS 1 o")
    awaited(wire, "INFO clients", lambda reply: field("blocked_clients")(reply) == "1")
    leaving.close()
    awaited(wire, "INFO clients", lambda reply: field("blocked_clients")(reply) == "0")
    assert wire("SET go 1") == OK
    called = awaited(wire, "AI.INFO slow", lambda reply: isinstance(reply, list) and reply[15] == 1)
    assert isinstance(called, list) and wire("AI.SCRIPTEXECUTE s f INPUTS 0") == OK
    assert wire("EXISTS o") == 0


def test_a_killed_client_is_no_trouble(wire: Wire, store: Store) -> None:
    """A client that is killed, or told to be unblocked, while its script runs: others go on."""
    assert wire(FOREVER) == OK
    victim = store.connect()
    name = victim("CLIENT ID")
    victim.send(f"{SLOW} TIMEOUT 200")
    awaited(wire, "INFO clients", lambda reply: field("blocked_clients")(reply) == "1")
    assert wire(f"CLIENT UNBLOCK {name}") == 0
    assert wire(f"CLIENT KILL ID {name}") == 1
    assert wire(f"{SLOW} TIMEOUT 250") == Simple("TIMEDOUT")
    assert wire("PING") == Simple("PONG")
    victim.close()


def test_the_keys_may_go_while_a_script_runs(wire: Wire, store: Store) -> None:
    """FLUSHALL takes the script and its inputs; the run still ends, and is answered."""
    lines = ["while int(str(redis.execute('EXISTS', 'go'))) == 0:", "    pass"]
    assert wire(storing("slow", function(*lines, "return tensors[0] + 1"))) == OK
    assert wire("AI.TENSORSET x INT8 1 VALUES 1") == OK
    other = store.connect()
    other.send("AI.SCRIPTEXECUTE slow f INPUTS 1 x OUTPUTS 1 o")
    awaited(wire, "INFO clients", lambda reply: field("blocked_clients")(reply) == "1")
    assert wire("FLUSHALL") == OK
    assert wire("SET go 1") == OK
    assert other.receive() == OK and wire("AI.TENSORGET o VALUES") == [2]
    other.close()


def test_the_server_ends_while_scripts_run(new_store: NewStore) -> None:
    """SHUTDOWN ends it with status 0, whatever its scripts are at.

    They meet what an exit takes apart at one of many moments, so it is tried some times.
    """
    lines = [
        "x = torch.rand([99, 99])",
        "while True:",
        "    x = x.mm(torch.rand([99, 99]))",
        "return x",
    ]
    for i in range(5):
        store = new_store(f"s{i}").start()
        wire = store.connect()
        assert wire(storing("slow", function(*lines))) == OK
        asking = function("while True:", "    redis.execute('PING', args)")
        assert wire(storing("asks", asking)) == OK
        clients = [store.connect(), store.connect(), store.connect()]
        clients[0].send("AI.SCRIPTEXECUTE slow f INPUTS 0")
        clients[1].send("AI.SCRIPTEXECUTE asks f INPUTS 0")
        clients[2].send("AI.SCRIPTEXECUTE slow f INPUTS 0")
        awaited(wire, "INFO clients", lambda reply: field("blocked_clients")(reply) == "3")
        wire.send("SHUTDOWN NOSAVE")
        assert store.wait() == 0, store.log()
        assert "REPORT" not in store.log()


def test_many_clients_are_each_answered_their_own(wire: Wire, store: Store) -> None:
    """40 clients that run scripts at once each get their own result."""
    assert wire(storing("s", function("return tensors[0] + int(args[0])"))) == OK
    assert wire("AI.TENSORSET x INT32 1 VALUES 1000") == OK
    clients = [store.connect() for _ in range(40)]
    for _ in range(5):
        for i, each in enumerate(clients):
            each.send(f"AI.SCRIPTEXECUTE s f INPUTS 1 x ARGS 1 {i} OUTPUTS 1 o{i}")
        for i, each in enumerate(clients):
            assert each.receive() == OK and each(f"AI.TENSORGET o{i} VALUES") == [1000 + i]
    for each in clients:
        each.close()
