"""A password is in a file, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault.errors import InputError
from fault.passwords import checked, with_password, without_password


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "pass word"
    made.write_text("p:a/s@s?\nsecond line\n")
    return made


def test_the_file_is_read_where_the_password_is_needed(file: Path) -> None:
    url = f"redis://anna@h:1/2?password_file={file}"
    assert with_password(url) == "redis://anna:p%3Aa%2Fs%40s%3F@h:1/2"
    assert with_password("redis://h:1/2") == "redis://h:1/2"
    assert with_password(f"rediss://h?db=1&password_file={file}").endswith("@h?db=1")
    assert with_password(f"unix:///s?password_file={file}") == "unix://:p%3Aa%2Fs%40s%3F@/s"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:secret@h:1/2?password_file=/f", "redis://h:1/2"),
        ("redis://:sec/ret@h", "redis://h"),
        ("redis://:secret@[", "redis://["),
        ("unix:///a@b/s", "unix:///a@b/s"),
        ("unix://:secret@/s", "unix:///s"),
        ("redis://:se?cret@h", "redis://h"),
        ("redis://h?password_file=/a@b", "redis://h"),
        ("h", "h"),
    ],
)
def test_what_is_shown_has_no_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_password_among_the_arguments_is_refused(file: Path) -> None:
    """The message says what to write instead, and does not repeat the password."""
    for url in (
        *("redis://:secret@h", "redis://u:secret@h:1", "redis://h?password=secret"),
        *("redis://:?secret@h", "redis://:/secret@h", "redis://:#secret@h", "unix://:secret@/s"),
    ):
        with pytest.raises(InputError, match=r"password_file=FILE") as raised:
            checked("--store", url)
        assert "secret" not in str(raised.value)


def test_the_file_is_found_from_any_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    kept = checked("--store", "redis://h?db=3&password_file=pass%20word")
    monkeypatch.chdir("/")
    assert with_password(kept) == "redis://:p%3Aa%2Fs%40s%3F@h?db=3"
    for url in ("redis://anna@h:1/2", "unix:///a:b@c/s", "rediss://h?ssl_ca_certs=/c"):
        assert checked("--store", url) == url


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe"])
def test_a_file_without_a_password_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "f"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=str(file)):
        checked("--registry", f"redis://h?password_file={file}")
