"""Writes a run's report: `report.png` and `report.html`, out of what its folder holds."""

from __future__ import annotations

import io
import re
from pathlib import Path

from fault.errors import InputError
from launcher.home import RunFolder, writing_to
from launcher.report.history import History
from launcher.report.page import page
from launcher.report.telling import history_of, parse

NO_METADATA = ("Creator", "Date", "Format", "Type")


def write(folder: RunFolder, out: Path | None = None) -> tuple[Path, Path]:
    """Returns the paths of both, in `out` or the run's folder; what was there is replaced.

    Raises InputError when nothing is recorded of the run, StorageUnavailable or StorageFull when
    they cannot be written.
    """
    history = _read(folder)
    job = Path((folder.read(folder.plan) or {}).get("job", "")).name
    title = job or f"run {folder.id}"
    png, svg = _pictures(history, title)
    target = folder.path if out is None else out
    paths = (target / "report.png", target / "report.html")
    with writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        paths[0].write_bytes(png)
        paths[1].write_text(page(history, f"{title}, run {folder.id}", svg), "utf-8")
    return paths


def _read(folder: RunFolder) -> History:
    alive = folder.alive()
    summary = None if alive else folder.read(folder.summary)
    state = "running" if alive else "broken off"
    if summary is not None:
        state = summary["state"]
    history = None
    if folder.events.exists():
        with (
            writing_to(folder.path),
            folder.events.open(encoding="utf-8", errors="replace") as lines,
        ):
            history = history_of(parse(lines), state, (summary or {}).get("reason", ""))
    if history is None:
        raise InputError(
            f"nothing is recorded of run {folder.id} "
            f"{'yet: try again when it has begun' if alive else 'in ' + str(folder.events)}"
        )
    return history


def _pictures(history: History, title: str) -> tuple[bytes, str]:
    """The same figure as PNG, and as an <svg> element for a page."""
    import matplotlib

    from launcher.report.figure import PIXELS_PER_INCH, draw

    # letters as outlines, so that the picture needs no font; the same picture, the same bytes
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure = draw(history, title)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(NO_METADATA))
    element = svg.getvalue()
    element = element[element.index("<svg") :]
    return png.getvalue(), re.sub(r' (?:width|height)="[\d.]+pt"', "", element, count=2)
