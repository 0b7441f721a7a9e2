"""How a report says things: numbers, times, its headline. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.history import History

DIGEST_SHOWN = 12


def count(number: int, one: str) -> str:
    """Like "1 death", "1,200 deaths"."""
    return f"{number:,} {one if number == 1 else one + 's'}"


def numbers(shards: Sequence[int]) -> str:
    """Like "0–3, 7": three or more in a row become a range."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and shard == runs[-1][-1] + 1:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    told = [
        f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run))  # noqa: RUF001
        for run in runs
    ]
    return ", ".join(told)


def seconds(length_s: float) -> str:
    """Like "0.46 s", "9.3 s", "34 s", "5 min 20 s", "2 h 4 min"."""
    if length_s < 0.995:
        return f"{length_s:.2f} s"
    if length_s < 9.95:
        return f"{length_s:.1f} s"
    whole = round(length_s)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(length_s / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def clock(at_s: float) -> str:
    """When something happened, like "0:09.31" or "1:53:54.20"."""
    hundredths = round(at_s * 100)
    minutes, rest = divmod(hundredths, 6000)
    told = f"{rest // 100:02}.{rest % 100:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{told}" if minutes >= 60 else f"{minutes}:{told}"


def milliseconds(stall_ms: float | None) -> str:
    return "" if stall_ms is None else f"{stall_ms:.0f} ms"


def headline(history: History, title: str) -> str:
    """Like "digits.py: 1,500 steps on 4 slots"."""
    return f"{title}: {count(history.step, 'step')} on {count(history.lanes, 'slot')}"


def subtitle(history: History) -> str:
    """How it ended, what it went through, and what that cost."""
    how = {"running": "Running for", "finished": "Finished in", "failed": "Failed after"}
    began = how.get(history.state, f"{history.state.capitalize()} after")
    lost = f"{count(history.repeated_steps, 'step')} computed again"
    told = [
        count(history.handovers, "hand-over"),
        count(history.deaths, "death"),
        lost if history.repeated_steps else "0 steps lost",
    ]
    weights = f"; weights {history.digest[:DIGEST_SHOWN]}…" if history.digest else ""
    return f"{began} {seconds(history.end_s)}: {', '.join(told)}{weights}"
