"""The thread that speaks with the registry, to its end: what was asked last is done as well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fault.records import Contact, Doing, Timing, peer_name
from fault.registry import Registry
from launcher.registry_server import RegistryServer
from p2p.registrar import Call, Registrar

ME = peer_name(0, 1, "nonce")
LAST = Contact(ME, Doing(12, "digest", 3))


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    server = RegistryServer(tmp_path_factory.mktemp("run"))
    server.start()
    yield server
    server.stop()


def invited(server: RegistryServer) -> Registry:
    """A run in which this peer has its slot."""
    registry = Registry(server.socket, "r", Timing())
    assert registry.create("the spec", 1)
    assert registry.grant(0, 1, "token", "launcher") and registry.claim(0, 1, "token", ME)
    return registry


def registrar_of(
    server: RegistryServer,
    post: Callable[[Call], None] = lambda call: None,
    invoke: Callable[[dict[str, Any]], None] = lambda payload: None,
) -> Registrar:
    registry = Registry(server.socket, "r", Timing())
    return Registrar(ME, registry, "", Timing(), post, lambda *_: {}, invoke)


def test_what_is_invoked_after_the_goodbye_is_still_handed_over(server: RegistryServer) -> None:
    """A peer that leaves may have a state evaluated at the last moment: that is not lost."""
    registry = invited(server)
    invoked: list[dict[str, Any]] = []
    registrar = registrar_of(server, invoke=invoked.append)
    registrar.start()
    registrar.leave("", 3.0)
    registrar.invoke({"step": 7})
    registrar.close(3.0)
    assert invoked == [{"step": 7}]
    kinds = [event.kind for event in registry.read_events()]
    registry.close()
    assert kinds.count("left") == 1


def test_the_last_word_comes_before_the_goodbye(server: RegistryServer) -> None:
    """Also if the peer leaves while its thread is in the middle of something."""
    registry = invited(server)
    leaving: list[threading.Thread] = []
    is_leaving = threading.Event()

    def leave_in_the_middle(call: object) -> None:
        """Of the answer to the first contact."""
        if not leaving:
            leaving.append(threading.Thread(target=registrar.leave, args=("it raised", 3.0, LAST)))
            leaving[0].start()
            while registrar._departure is None:
                time.sleep(0.001)
            is_leaving.set()

    registrar = registrar_of(server, leave_in_the_middle)
    registrar.start()
    registrar.contact(Contact(ME))
    assert is_leaving.wait(5.0)
    leaving[0].join()
    registrar.close(3.0)
    assert [(each.shard, each.step) for each in registry.read().suspects] == [(3, 12)]
    registry.close()


def test_the_last_word_is_said_again_until_the_registry_hears_it(server: RegistryServer) -> None:
    """The registry is away when it is said first."""
    registry = invited(server)
    is_unheard = threading.Event()
    registrar = registrar_of(server, lambda call: is_unheard.set())
    server.stop()
    registrar.start()
    leaving = threading.Thread(target=registrar.leave, args=("it raised", 20.0, LAST))
    leaving.start()
    assert is_unheard.wait(20.0)
    server.start()
    leaving.join()
    registrar.close(3.0)
    assert [(each.shard, each.step) for each in registry.read().suspects] == [(3, 12)]
    registry.close()
