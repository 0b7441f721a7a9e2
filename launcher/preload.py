"""Which modules a job imports, so that a snapshot can have them in memory already.

Only names are found here, out of the job's text; nothing of it is run.
"""

from __future__ import annotations

import ast
from pathlib import Path


def imports_of(job: Path) -> list[str]:
    """The modules that the file's own imports name, except those that lie beside it.

    Empty for a file that cannot be parsed: looking at the job will say so.
    """
    try:
        tree = ast.parse(job.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module] = None
    return [name for name in names if not _lies_beside(job, name.partition(".")[0])]


def _lies_beside(job: Path, name: str) -> bool:
    # it may change between one start and the next, and a snapshot would keep what it was
    return (job.parent / f"{name}.py").exists() or (job.parent / name).is_dir()
