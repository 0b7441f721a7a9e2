"""Compiles the engine against the installed torch, once, and keeps it for everyone's next start.

What was compiled is kept in a folder of the user's cache, under a name drawn from the sources, the
compiler and torch, so that it is never older than any of them.

    python -m p2p.aggregate.engine.build

makes it now and prints where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fault.errors import EngineUnavailable

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
SCRATCH = "compiling-"
LIBRARIES = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


def engine_path(say: Callable[[str], None] = lambda line: None) -> Path:
    """The compiled module, for `--loadmodule`; compiles it first if there is none yet.

    `say` is told what takes time. Two that need it at once compile it once.
    Raises EngineUnavailable without a compiler, or with its own words when it fails.
    """
    compiler = find_compiler()
    folder = cache_folder()
    module = folder / f"engine-{fingerprint(compiler)}.so"
    if module.exists():
        return module
    with only_one(folder / "compiling.lock"):
        for left in folder.glob(f"{SCRATCH}*"):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not module.exists():
            say("compiling the store's engine, which is done once for each torch")
            compile_into(module, compiler)
    return module


def find_compiler() -> str:
    """The C++ compiler of the environment variable CXX, or g++ or clang++."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise EngineUnavailable(
        f"there is no C++ compiler {named!r} here, the one that CXX names"
        if named
        else "the store's engine needs a C++ compiler to be made with: install g++ "
        "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX"
    )


def cache_folder() -> Path:
    """`mayfly` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "mayfly"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineUnavailable(
            f"the store's engine cannot be kept in {folder} ({error.strerror}): "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return folder


def fingerprint(compiler: str) -> str:
    """Of everything that the module's bytes depend on."""
    said = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(said)
    for part in (version("torch"), str(torch_folder()), *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def torch_folder() -> Path:
    """Where torch is installed; torch itself takes seconds to import, so it is not."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def torch_flags() -> list[str]:
    """What only a compilation needs to know of torch."""
    import torch

    include = torch_folder() / "include"
    return [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(include)),
        *("-isystem", str(include / "torch" / "csrc" / "api" / "include")),
    ]


def compile_into(module: Path, compiler: str) -> None:
    """Compiles all sources, as many at once as there are processors, and links them."""
    with tempfile.TemporaryDirectory(dir=module.parent, prefix=SCRATCH) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda each: -each.stat().st_size)
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *FLAGS, *torch_flags(), "-c", str(source), "-o", str(to)]
            for source, to in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        linked = Path(scratch) / module.name
        libraries = torch_folder() / "lib"
        command = [compiler, "-shared", "-o", str(linked), *map(str, objects)]
        run([*command, f"-L{libraries}", f"-Wl,-rpath,{libraries}", *LIBRARIES])
        linked.replace(module)


def run(command: list[str]) -> None:
    """Raises EngineUnavailable with what the compiler found wrong first."""
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode == 0:
        return
    lines = ended.stderr.splitlines() or ["it says nothing"]
    first = next((line for line in lines if "error" in line), lines[-1])
    raise EngineUnavailable(
        f"the store's engine cannot be compiled with {command[0]} and torch {version('torch')}: "
        f"{first.strip()}"
    )


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Held by one process at a time, and free again however it ends."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(engine_path(lambda line: print(line, file=sys.stderr, flush=True)))
    except EngineUnavailable as error:
        print(f"p2p.aggregate.engine.build: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
