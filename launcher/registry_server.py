"""The registry's server: a Valkey on a Unix socket in the run's folder, with every write synced.

It is the run's supervisor that decides when it runs. What is stored in it is `fault/registry.py`'s
business. There is no TCP port: only the user who owns the folder can connect. A registry for peers
on other machines is a Redis or Valkey that the user runs, and needs `appendonly yes` and
`appendfsync always` there as well.
"""

from __future__ import annotations

from pathlib import Path

import redis

from fault.errors import RegistryUnavailable
from launcher.database_server import DatabaseServer, quoted, short_folder

SOCKET_NAME = "registry.sock"


class RegistryServer(DatabaseServer):
    """One server process over `folder`: socket in it, data in registry/, log in logs/.

    A new one over the same folder takes up the records where the last one, however it ended,
    left them.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self.data = folder / "registry"
        log = folder / "logs" / "registry.log"
        for needed in (self.data, log.parent):
            needed.mkdir(parents=True, exist_ok=True)
        self.socket = short_folder(folder, len(SOCKET_NAME)) / SOCKET_NAME
        """Where clients connect; the same in every life of the server."""
        settings = {
            "port": "0",
            "unixsocket": quoted(self.socket),
            "unixsocketperm": "700",
            "daemonize": "no",
            "dir": quoted(self.data),
            "logfile": quoted(log),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1.0)
        super().__init__("the registry", settings, client, log, RegistryUnavailable)
