"""Passwords of servers: in files that URLs name, so that neither arguments nor records hold one.

redis://192.0.2.7:6379/0?password_file=/etc/mayfly/password
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from fault.errors import InputError

PARAMETER = "password_file"


def read_password(file: Path, option: str) -> str:
    """The first line of the file. Raises InputError if there is none, naming the option."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{option} {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InputError(f"{option} {file}: it is no text") from None
    if not lines or not lines[0].strip():
        raise InputError(f"{option} {file}: its first line is empty")
    return lines[0].strip()


def with_password(url: str) -> str:
    """The URL with the password of the file that it names, if it does.

    Raises InputError for a file without one, ValueError for what is no URL.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    file = query.pop(PARAMETER, "")
    if not file:
        return url
    password = quote(read_password(Path(file), f"{PARAMETER}="), safe="")
    user, _, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:{password}@{host}"
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(query)))


def without_password(url: str) -> str:
    """To be shown, even if it is no URL: without user, password and what follows the place."""
    scheme, _, place = _taken_apart(url)
    return scheme + place.partition("?")[0]


def checked(option: str, url: str) -> str:
    """As it can be passed on and kept, from any folder. Raises InputError if it has a password."""
    _, credentials, place = _taken_apart(url)
    if ":" in credentials or "password=" in place:
        raise InputError(
            f"{option} {without_password(url)}: a password would be seen by all who list processes "
            f"or read records; put it into a file, and ?{PARAMETER}=FILE at the end of the URL"
        )
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # whoever uses it says what is wrong with it
    query = dict(parse_qsl(parts.query))
    if PARAMETER not in query:
        return url
    file = Path(query[PARAMETER])
    read_password(file, f"{option} …?{PARAMETER}=")
    query[PARAMETER] = str(file.absolute())
    return urlunsplit(parts._replace(query=urlencode(query, safe="/")))


def _taken_apart(url: str) -> tuple[str, str, str]:
    """Scheme, user with password, and the rest; a password may have any character."""
    body = re.split(rf"[?&]{PARAMETER}=", url)[0]
    scheme, separator, rest = body.partition("://") if "://" in body else ("", "", body)
    if scheme == "unix":  # the path may have any character as well
        netloc, slash, path = rest.partition("/")
        credentials, _, host = netloc.rpartition("@")
        return scheme + separator, credentials, host + slash + path
    credentials, _, place = rest.rpartition("@")
    return scheme + separator, credentials, place
