"""Who may speak with a run over TCP: its keys, and the sockets that hold to them.

A run has two CURVE key pairs (RFC 26 of ZeroMQ): the relays', and one that all its peers share.
Relays let in whoever has the peers' secret key; peers know the relays, and each other, by their
public ones. Whatever else connects gets no further than its handshake, and what is sent is
encrypted. Every run has keys of its own, so what speaks for one run cannot for another.

Within a run peers trust each other: whoever has its key can say anything as any of its peers.

Unix sockets need none of this, since they lie in folders that only their user can enter.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.z85 import Z85CHARS

from fault.errors import InputError, Refused

RELAY_FILE, PEER_FILE = "relay.key", "peer.key"
KEYS_VARIABLE = "MAYFLY_KEYS"
"""The environment of a peer has the path of its key file here."""
KEY_LENGTH = 40
"""Characters: 32 bytes in Z85."""
_Z85 = frozenset(Z85CHARS.decode())
DOMAIN = b"mayfly"


@dataclass(frozen=True, slots=True)
class _KeyFile:
    """Keys as text, in Z85."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises InputError for a file that is none of these, or that others can read."""
        try:
            mode = file.stat().st_mode
            values: Any = json.loads(file.read_text("ascii"))
        except OSError as error:
            raise InputError(f"the key file {file}: {error.strerror}") from None
        except ValueError:
            values = None
        if mode & 0o077:
            raise InputError(f"others can read the key file {file}: 'chmod 600 {file}' first")
        names = {each.name for each in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise InputError(f"{file} is no such key file as 'p2p-launch keys' writes")
        if not all(map(_is_key, values.values())):
            raise InputError(f"{file}: a key has {KEY_LENGTH} characters of Z85")
        if zmq.curve_public(values["secret"].encode()) != values["public"].encode():
            raise InputError(f"{file}: its secret key does not belong to its public one")
        return cls(**values)

    def write(self, file: Path) -> None:
        """A new file that only this user can read. Raises InputError if there is one."""
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise InputError(f"the key file {file}: {error.strerror}") from None
        with os.fdopen(descriptor, "w") as out:
            json.dump(asdict(self), out, indent=1)


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and len(value) == KEY_LENGTH and set(value) <= _Z85


@dataclass(frozen=True, slots=True)
class RelayKeys(_KeyFile):
    """What a relay has to know."""

    public: str
    secret: str = field(repr=False)
    peers: str
    """The public key of those that are let in."""


@dataclass(frozen=True, slots=True)
class PeerKeys(_KeyFile):
    """What a peer has to know."""

    public: str
    secret: str = field(repr=False)
    relay: str
    """The relays' public key."""

    @classmethod
    def of_this_process(cls) -> PeerKeys:
        """Those that its environment names. Raises Refused where it names none."""
        file = os.environ.get(KEYS_VARIABLE, "")
        if not file:
            raise Refused(f"this run is closed to strangers: set {KEYS_VARIABLE} to its peer.key")
        return cls.read(Path(file))


Keys = tuple[RelayKeys, PeerKeys]


def new_keys() -> Keys:
    """Of a new run."""
    (relay, relay_secret), (peer, peer_secret) = (
        [key.decode("ascii") for key in zmq.curve_keypair()] for _ in range(2)
    )
    return RelayKeys(relay, relay_secret, peer), PeerKeys(peer, peer_secret, relay)


def read_keys(folder: Path) -> Keys:
    """Raises InputError for files that are not whole, or do not belong together."""
    relay, peer = RelayKeys.read(folder / RELAY_FILE), PeerKeys.read(folder / PEER_FILE)
    if (relay.public, relay.peers) != (peer.relay, peer.public):
        raise InputError(f"the keys in {folder} do not belong together")
    return relay, peer


def write_keys(keys: Keys, folder: Path) -> None:
    """Both files, into a folder that only this user can enter.

    Raises InputError when it has keys already, or when others can enter it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None
    if mode & 0o077:
        raise InputError(f"others can enter {folder}: 'chmod 700 {folder}' first")
    for file, name in zip(keys, (RELAY_FILE, PEER_FILE), strict=True):
        file.write(folder / name)


def dial(socket: zmq.Socket[bytes], keys: PeerKeys, server: str) -> None:
    """Has a socket, before it connects, prove that it is a peer's, and ask the same of `server`."""
    socket.curve_serverkey = server.encode()
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()


class Gate:
    """Lets in whoever has the secret key of `allowed`, at all sockets of `context` that `guard`.

    A thread answers for it; without it nobody is let in. `refused` counts those with another key.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: str) -> None:
        self.refused = 0
        self._allowed = allowed.encode()
        log = logging.getLogger("mayfly.keys")
        log.addHandler(logging.NullHandler())
        log.propagate = False  # whoever is refused is counted, and need not fill a log
        self._authenticator = ThreadAuthenticator(context, log=log)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN.decode(), self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked for every connection that has proved to have the secret of this public key."""
        is_allowed = key == self._allowed
        self.refused += not is_allowed
        return is_allowed

    def guard(self, socket: zmq.Socket[bytes], secret: str) -> None:
        """Has a socket, before it binds, take CURVE connections only."""
        socket.curve_server = True
        socket.curve_secretkey = secret.encode()
        socket.zap_domain = DOMAIN
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def close(self) -> None:
        self._authenticator.stop()
