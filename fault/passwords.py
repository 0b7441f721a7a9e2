"""Passwords of servers: in files that URLs name, so that neither arguments nor records hold one.

redis://192.0.2.7:6379/0?password_file=/etc/mayfly/password
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

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
    """The URL with the password of the file that it names, if it does. Raises InputError."""
    parts = urlsplit(url)
    named = parse_qs(parts.query).get(PARAMETER, [])
    if not named:
        return url
    password = read_password(Path(named[0]), f"{PARAMETER}=")
    user, _, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:{quote(password, safe='')}@{host}"
    query = "&".join(each for each in parts.query.split("&") if not each.startswith(PARAMETER))
    return urlunsplit(parts._replace(netloc=netloc, query=query))


def without_password(url: str) -> str:
    """To be shown, even if it is no URL: without user, password and the file of one."""
    scheme, separator, rest = url.partition("://")
    place = rest.partition("?")[0]
    return scheme + separator + (place if scheme == "unix" else place.rpartition("@")[2])


def checked(option: str, url: str) -> str:
    """As it can be passed on and kept, from any folder. Raises InputError if it has a password."""
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None or "password=" in parts.query
    except ValueError:
        return url  # whoever uses it says what is wrong with it
    if has_password:
        raise InputError(
            f"{option} {without_password(url)}: a password would be seen by all who list processes "
            f"or read records; put it into a file, and ?{PARAMETER}=FILE at the end of the URL"
        )
    named = parse_qs(parts.query).get(PARAMETER, [])
    if not named:
        return url
    read_password(Path(named[0]), f"{option} …?{PARAMETER}=")
    query = f"{PARAMETER}={quote(str(Path(named[0]).absolute()))}"
    return urlunsplit(parts._replace(query=query))
