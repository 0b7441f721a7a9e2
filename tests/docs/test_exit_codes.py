"""What the documentation promises of exit codes, against the errors themselves."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from fault import errors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"


def codes() -> dict[str, int]:
    return {
        name: value.exit_code
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.MayflyError)
    }


def test_every_error_has_a_number_of_its_own() -> None:
    """A program can tell any two errors apart by the exit code, and success from both."""
    numbers = list(codes().values())
    assert len(set(numbers)) == len(numbers)
    assert 0 not in numbers


def test_every_exit_code_has_its_paragraph() -> None:
    """Each error has one heading with its number and name, and text below; none is left over."""
    sections = re.split(r"^#{2,3} ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    numbered = {}
    for section in sections:
        title, _, text = section.partition("\n")
        if match := re.fullmatch(r"(\d+) (\w+)", title):
            numbered[match[2]] = int(match[1])
            assert len(text.split()) >= 10, f"{title} says nothing"
    assert numbered.pop("Success") == 0
    assert numbered == codes()
