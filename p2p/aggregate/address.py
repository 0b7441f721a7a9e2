"""Where a store is, and who asks there: what its URL says."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from fault.errors import InputError
from fault.passwords import with_password, without_password

DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """`redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE][?password_file=FILE]` or `unix:///PATH`."""

    endpoint: str | tuple[str, int]
    """The path of a Unix socket, or host and port."""
    user: str = ""
    password: str = field(default="", repr=False)
    database: int = 0

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """Raises InputError, whose text has no password."""
        with contextlib.suppress(ValueError):
            parts = urlsplit(with_password(url))
            if parts.scheme == "unix" and parts.path:
                return cls(unquote(parts.path), parts.username or "", unquote(parts.password or ""))
            if parts.scheme == "redis" and parts.hostname and not parts.query:
                return cls(
                    (parts.hostname, parts.port or DEFAULT_PORT),
                    unquote(parts.username or ""),
                    unquote(parts.password or ""),
                    int(parts.path.removeprefix("/") or 0),
                )
        raise InputError(
            f"{without_password(url)} is no store: write redis://HOST:PORT or unix:///PATH"
        )

    def __str__(self) -> str:
        """Without the password."""
        if isinstance(self.endpoint, str):
            return self.endpoint
        host, port = self.endpoint
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
