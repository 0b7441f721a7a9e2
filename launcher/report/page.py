"""A history as one page of HTML that needs nothing else: no script, no font, no link. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite
from string import Template

from fault.records import Peer, generation_of, slot_of
from launcher.report.history import History, Incident, Invocation
from launcher.report.wording import clock, count, headline, milliseconds, numbers, seconds, subtitle

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --ink: #22272e; --faint: #5d6672; --line: #dde1e6; --ground: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe4ea; --faint: #98a2ae; --line: #363d46; --ground: #15191e; }
}
body { margin: 2rem auto; max-width: 66rem; padding: 0 1.2rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
figure { margin: 0 0 2rem; background: #fff; border-radius: 6px; overflow: hidden; }
figure svg { display: block; width: 100%; height: auto; }
h2 { margin: 2rem 0 .5rem; font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
td { white-space: nowrap; }
td.wide { white-space: normal; min-width: 14rem; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; }
</style>
</head>
<body>
<figure role="img" aria-label="$label">
$picture
</figure>
$sections
</body>
</html>
""")

Row = Sequence[str]
NUMERIC = frozenset({"from", "to", "start took", "at", "stall", "step"})
WIDE = frozenset({"how it ended", "note", "text", "value"})


INVOCATIONS = (
    "slot",
    "generation",
    "start",
    "from",
    "start took",
    "to",
    "how it ended",
    "shards",
    "adopted",
)
INCIDENTS = ("at", "slot", "generation", "what", "shards", "then played by", "stall", "note")


def page(history: History, title: str, picture: str) -> str:
    """`picture` is an <svg> element, taken as it is. A table without rows is left out."""
    evaluations = [
        (clock(each.at_s), str(each.step), name, f"{value:.6g}")
        for each in history.evaluations
        for name, value in each.values
    ]
    scalings = [(clock(each.at_s), str(each.slots)) for each in history.scalings]
    notices = [(clock(each.at_s), each.text) for each in history.notices]
    sections = [
        _table("Summary", ("", "value"), _summary(history)),
        _table("Hand-overs and deaths", INCIDENTS, map(_incident, history.incidents)),
        _table("Invocations", INVOCATIONS, map(_invocation, history.invocations)),
        _table("Changes of scale", ("at", "slots"), scalings),
        _table("Evaluations", ("at", "step", "metric", "value"), evaluations),
        _table("Warnings", ("at", "text"), notices),
    ]
    return PAGE.substitute(
        title=escape(title),
        label=escape(f"{headline(history, title)}. {subtitle(history)}"),
        picture=picture,
        sections="\n".join(filter(None, sections)),
    )


def _table(title: str, names: Row, rows: Iterable[Row]) -> str:
    lines = [_row("td", names, row) for row in rows]
    if not lines:
        return ""
    body = "\n".join(lines)
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<div class="scroll"><table>\n'
        f"<thead>{_row('th', names, names)}</thead>\n<tbody>\n{body}\n</tbody>\n"
        "</table></div>\n</section>"
    )


def _row(tag: str, names: Row, cells: Row) -> str:
    """`names` are those of the columns, and say how each is set."""
    told = ""
    for name, cell in zip(names, cells, strict=True):
        kind = "number" if name in NUMERIC else "wide" if name in WIDE else ""
        told += f'<{tag} class="{kind}">' if kind else f"<{tag}>"
        told += f"{escape(cell)}</{tag}>"
    return f"<tr>{told}</tr>"


def _summary(history: History) -> list[Row]:
    kinds = [each.start for each in history.invocations if each.peer]
    starts = ", ".join(
        [f"{kinds.count(kind)} {kind}" for kind in ("cold", "warm", "restored") if kind in kinds]
    )
    lost = "0 steps lost"
    if history.repeated_steps:
        lost = f"{count(history.repeated_steps, 'step')} computed again from the checkpoint"
    rows = [
        ("state", f"{history.state}: {history.reason}" if history.reason else history.state),
        ("weights", history.digest),
        ("steps", f"{history.step}; {lost}"),
        ("time of a step", f"{history.step_s * 1000:.1f} ms" if isfinite(history.step_s) else ""),
        ("last loss", f"{history.losses[-1].loss:.6g}" if history.losses else ""),
        ("whole time", seconds(history.end_s)),
        ("slots, shards", f"{history.lanes}, {history.shards}"),
        ("invocations", f"{len(kinds)}: {starts}" if starts else str(len(kinds))),
        ("hand-overs", _with_stalls(history, death=False)),
        ("deaths", _with_stalls(history, death=True)),
        ("views", str(history.views)),
        ("checkpoints", str(history.checkpoints)),
    ]
    return [row for row in rows if row[1]]


def _with_stalls(history: History, death: bool) -> str:
    found = [each.stall_ms for each in history.incidents if each.death == death]
    stalls = sorted([stall for stall in found if stall is not None])
    if not stalls:
        return str(len(found))
    middle = stalls[len(stalls) // 2]
    return (
        f"{len(found)}; stalls {milliseconds(middle)} (median), {milliseconds(stalls[-1])} (most)"
    )


def _incident(incident: Incident) -> Row:
    return (
        clock(incident.at_s),
        f"slot {slot_of(incident.peer)}",
        str(generation_of(incident.peer)),
        f"death: {incident.kind}" if incident.death else incident.kind,
        numbers(incident.shards),
        ", ".join([_told(peer) for peer in incident.heirs]),
        milliseconds(incident.stall_ms),
        incident.note,
    )


def _told(peer: Peer) -> str:
    return f"slot {slot_of(peer)} ({generation_of(peer)})"


def _invocation(invocation: Invocation) -> Row:
    return (
        f"slot {invocation.slot}",
        str(invocation.generation),
        invocation.start,
        clock(invocation.granted_s),
        "" if invocation.boot_s is None else seconds(invocation.boot_s),
        clock(invocation.ended_s),
        invocation.ending,
        numbers(invocation.shards),
        numbers(invocation.adopted),
    )
