"""The engine is made once; what keeps it from being made is said in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fault.errors import EngineUnavailable
from p2p.aggregate.engine import build


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mayfly"


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_made_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it is found, unless the compiler is another one; scratch folders are gone."""
    script = "print(1)\nif '-o' in sys.argv: open(sys.argv[sys.argv.index('-o') + 1], 'w')"
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    said: list[str] = []
    (cache / "compiling-left").mkdir(parents=True)
    first = build.engine_path(said.append)
    assert build.engine_path(said.append) == first and len(said) == 1
    monkeypatch.setenv("CXX", compiler(tmp_path, script.replace("print(1)", "print(2)")))
    assert build.engine_path(said.append) != first and len(said) == 2
    assert {each.suffix for each in cache.iterdir()} == {".so", ".lock"}


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first error is in the line, and nothing is left behind."""
    failing = "if '-c' in sys.argv: sys.exit('x.cpp:1: error: no such thing\\nmore')"
    monkeypatch.setenv("CXX", compiler(tmp_path, failing))
    with pytest.raises(EngineUnavailable, match=r"x\.cpp:1: error: no such thing"):
        build.engine_path()


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that CXX names is named."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineUnavailable, match="no-such-compiler"):
        build.engine_path()


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named, and what to set."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(EngineUnavailable, match="XDG_CACHE_HOME"):
        build.engine_path()
