"""`p2p-launch report`: a run's history out of its events, its picture and its page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from fault.assignment import assign
from fault.errors import InputError, RunUnknown, StorageUnavailable
from launcher import main
from launcher.report.curve import POINTS_LIMIT, thinned, trend
from launcher.report.figure import PIXELS_PER_INCH, WIDTH
from launcher.report.history import Evaluation, History, Loss, Scaling, Stretch
from launcher.report.telling import history_of, parse
from launcher.report.wording import clock, numbers, seconds, subtitle

A, B, C, D, E = "0.1.aa", "1.1.bb", "2.1.cc", "1.2.dd", "0.2.ee"
BEGAN = 1000.0


class Script:
    """Writes down a run's events; times are seconds since it was created."""

    def __init__(self, shards: int = 3) -> None:
        self.lines: list[str] = []
        self._shards = shards

    def event(self, at: float, kind: str, /, **fields: Any) -> None:
        entry = {"id": f"{len(self.lines)}-0", "time": BEGAN + at, "kind": kind, "key": ""}
        self.lines.append(json.dumps(entry | {"fields": fields}) + "\n")

    def boot(self, at: float, peer: str, start: str = "cold") -> None:
        slot, generation = map(int, peer.split(".")[:2])
        self.event(at, "granted", slot=slot, generation=generation, by="launcher")
        self.event(at + 0.5, "claimed", slot=slot, peer=peer)
        self.event(at + 0.5, "started", peer=peer, start=start)

    def view(
        self,
        at: float,
        members: list[str],
        removals: Iterable[tuple[str, str]] = (),
        kind: str = "change",
        slots: int = 3,
    ) -> None:
        players = assign(self._shards, slots, members)
        gone = list(map(list, removals))
        self.event(
            at, "view", kind=kind, members=members, players=players, removals=gone, slots=slots
        )

    def steps(self, first: int, start: float, count: int) -> None:
        """One each tenth of a second."""
        rows = [
            [first + index, BEGAN + start + 0.1 * index, 1 / (first + index)]
            for index in range(count)
        ]
        self.event(start + 0.1 * count, "steps", rows=rows)

    def history(self, state: str = "running", reason: str = "") -> History:
        history = history_of(parse(self.lines), state, reason)
        assert history is not None
        return history


def eventful() -> Script:
    """A death, an adoption, a return, a hand-over and a slot that is taken away."""
    script = Script()
    script.event(0.0, "created", slots=3)
    for peer in (A, B, C):
        script.boot(0.0, peer)
    script.view(10.0, [A, B, C], kind="first")
    script.steps(1, 10.1, 20)
    script.event(12.05, "killed", slot=1, step=21, peer=B)
    script.view(12.5, [A, C], [(B, "silent")])
    script.steps(21, 12.6, 14)
    script.boot(12.6, D, "warm")
    script.view(14.0, [A, D, C])
    script.steps(35, 14.0, 20)
    script.boot(14.5, E)
    script.view(16.0, [E, D, C], [(A, "swap")])
    script.event(16.1, "left", peer=A, cause="")
    script.event(16.2, "warning", text="the relay <is> away")
    script.steps(55, 16.0, 20)
    script.event(18.0, "scaled", slots=2)
    script.view(18.5, [E, D], [(C, "scaled")], slots=2)
    script.event(19.0, "checkpoint", step=75)
    script.event(19.5, "metrics", step=75, values={"accuracy": 0.5})
    outcome = {"state": "finished", "step": 75, "digest": "f00d" * 8, "error": "", "reason": ""}
    script.event(20.0, "outcome", **outcome)
    return script


def endings(history: History) -> dict[str, str]:
    return {each.peer: each.ending for each in history.invocations}


# --- events to history ------------------------------------------------------------------------


def test_invocations_have_their_start_and_their_end() -> None:
    """Of each: slot, generation, kind of start, how long until it was a member, how it ended."""
    history = eventful().history()
    told = [
        (each.peer, each.start, each.boot_s, each.ended_s, each.ending)
        for each in history.invocations
    ]
    assert told == [
        (A, "cold", 10.0, 16.0, "handed over"),
        (E, "cold", 1.5, 20.0, "run finished"),
        (B, "cold", 10.0, pytest.approx(12.05), "death: silent"),
        (D, "warm", pytest.approx(1.4), 20.0, "run finished"),
        (C, "cold", 10.0, 18.5, "scaled away"),
    ]
    assert (history.lanes, history.shards, history.end_s, history.step) == (3, 3, 20.0, 75)


def test_adoptions_are_told_from_home_shards() -> None:
    """What a peer plays beyond its slot's home block is adopted, until it is taken back."""
    history = eventful().history()
    (survivor,) = [each for each in history.invocations if each.peer == C]
    assert survivor.stretches == (
        Stretch(10.0, 12.5, (2,), ()),
        Stretch(12.5, 14.0, (2,), (1,)),
        Stretch(14.0, 18.5, (2,), ()),
    )
    assert (survivor.shards, survivor.adopted) == ((1, 2), (1,))
    (scaled,) = [each for each in history.invocations if each.peer == D]
    assert scaled.stretches[-1] == Stretch(18.5, 20.0, (1, 2), ())


def test_a_death_has_its_kind_its_heir_and_its_stall() -> None:
    """It is told when the peer was killed, not when that was noticed."""
    (death,) = [each for each in eventful().history().incidents if each.death]
    assert (death.peer, death.kind, death.shards, death.heirs) == (B, "silent", (1,), (C,))
    assert death.at_s == pytest.approx(12.05) and death.stall_ms == 500.0
    assert death.gap_s == (pytest.approx(12.0), pytest.approx(12.6))
    assert death.note == "killed at step 21, as asked for"


def test_a_hand_over_has_its_successor_and_its_stall() -> None:
    """A swap is no death, and here nobody waited for it."""
    history = eventful().history()
    (handover,) = [each for each in history.incidents if not each.death]
    assert (handover.peer, handover.heirs, handover.at_s) == (A, (E,), 16.0)
    assert handover.stall_ms == 0.0
    assert (history.handovers, history.deaths) == (1, 1)


def test_what_happens_beside_is_kept() -> None:
    """Changes of scale, warnings, evaluations, checkpoints, losses."""
    history = eventful().history()
    assert history.scalings == (Scaling(18.0, 2),)
    assert [each.text for each in history.notices] == ["the relay <is> away"]
    assert history.evaluations == (Evaluation(19.5, 75, (("accuracy", 0.5),)),)
    assert history.checkpoints == 1 and history.views == 5 and len(history.losses) == 74
    assert history.losses[0] == Loss(pytest.approx(10.1), 1, 1.0)


def test_damaged_lines_are_skipped() -> None:
    """A writer that was killed leaves half a line; one that began again repeats events."""
    whole = eventful()
    torn = Script()
    torn.lines = [*whole.lines[:5], *whole.lines, "17\n", '{"id": 3}\n', whole.lines[-1][:40]]
    assert torn.history() == whole.history()
    assert history_of(parse(["", '{"id": "1-0", "ti']), "running") is None


def test_a_run_that_goes_on_is_told_up_to_now() -> None:
    """What still runs ends where the events end, and says so."""
    script = eventful()
    del script.lines[script.lines.index(next(x for x in script.lines if '"scaled"' in x)) :]
    history = script.history()
    assert (history.state, history.end_s) == ("running", 18.0)
    assert {endings(history)[peer] for peer in (C, D, E)} == {"running"}
    assert subtitle(history) == "Running for 18 s: 1 hand-over, 1 death, 0 steps lost"
    assert script.history("broken off", "why").reason == "why"


def test_functions_that_never_joined_are_told() -> None:
    """A grant that nobody claimed, a claimant that was replaced, one that could not start."""
    script = Script()
    script.event(0.0, "created", slots=1)
    script.event(0.0, "granted", slot=0, generation=1, by="launcher")
    script.boot(30.0, "0.2.bb")
    script.boot(60.0, "0.3.cc")
    script.event(62.0, "boot_failed", peer="0.3.cc", error="NoTask", reason="no task", trace="")
    history = script.history()
    assert endings(history) == {
        "": "never arrived",
        "0.2.bb": "never joined",
        "0.3.cc": "could not start: no task",
    }
    assert [each.ended_s for each in history.invocations] == [30.0, 60.0, 62.0]


def test_who_leaves_with_a_cause_has_raised() -> None:
    """And who leaves without one is no death at all."""
    script = Script()
    script.event(0.0, "created", slots=3)
    script.view(1.0, [A, B, C], kind="first")
    script.event(2.0, "left", peer=B, cause="Traceback …\nValueError: no")
    script.event(2.0, "left", peer=C, cause="")
    script.view(2.5, [A], [(B, "left"), (C, "left")])
    history = script.history()
    (death,) = history.incidents
    assert (death.peer, death.kind, death.note) == (B, "raised", "ValueError: no")
    assert endings(history) == {A: "running", B: "death: raised", C: "left"}
    assert [each.ended_s for each in history.invocations] == [2.5, 2.0, 2.0]


def test_steps_that_a_revived_run_repeats_are_counted() -> None:
    """When all died at once, after their last step, those since the checkpoint come again."""
    script = Script()
    script.event(0.0, "created", slots=3)
    script.view(1.0, [A, B, C], kind="first")
    script.steps(1, 1.1, 10)
    script.view(5.0, [E], kind="revive")
    script.steps(8, 5.1, 10)
    history = script.history("finished")
    assert (history.deaths, history.repeated_steps) == (3, 3)
    assert [each.at_s for each in history.incidents] == [pytest.approx(2.0)] * 3
    assert "3 steps computed again" in subtitle(history)
    assert set(endings(history).values()) == {"death: lease", "run finished"}


# --- how it is said and drawn -----------------------------------------------------------------


def test_numbers_and_times_are_short() -> None:
    """Ranges for shards, two digits for times, hours where there are hours."""
    assert numbers((0, 1, 2, 3, 7, 9, 10)) == "0–3, 7, 9, 10"  # noqa: RUF001
    told = [seconds(each) for each in (0.46, 9.31, 59.2, 320.0, 7440.0)]
    assert told == ["0.46 s", "9.3 s", "59 s", "5 min 20 s", "2 h 4 min"]
    assert [clock(each) for each in (9.314, 59.999, 6834.2)] == ["0:09.31", "1:00.00", "1:53:54.20"]


def test_a_long_curve_is_thinned_and_keeps_its_outlier() -> None:
    """A few thousand points whatever the run, and a line that is broken where nothing happened."""
    losses = [Loss(step * 0.1 + (500 if step > 30_000 else 0), step, 1.0) for step in range(60_000)]
    losses[12_345] = Loss(1234.5, 12_345, 99.0)
    points = thinned(losses)
    assert len(points) <= POINTS_LIMIT and losses[12_345] in points
    times, medians = trend(losses, 6500.0)
    assert len(times) < 200 and medians.count(1.0) == len(times) - 2


class Page(HTMLParser):
    """Counts open elements, and keeps the text outside the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def run_folder(home: Path, lines: Iterable[str]) -> Path:
    folder = home / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run": "a", "job": "/somewhere/a & b.py"}))
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["p2p-launch", *map(str, arguments)])
    return main.main()


def test_the_command_writes_a_picture_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG that decodes, an HTML file that parses and needs nothing else, named on stdout."""
    folder = run_folder(tmp_path, [*eventful().lines, '{"cut'])
    assert call(monkeypatch, "report", "a", "--home", tmp_path) == 0
    png, html = folder / "report.png", folder / "report.html"
    assert capsys.readouterr().out == f"{png}\n{html}\n"
    pixels = matplotlib.image.imread(png)
    assert pixels.shape[1] == WIDTH * PIXELS_PER_INCH and 600 < pixels.shape[0] < 1000
    page = Page()
    page.feed(html.read_text("utf-8"))
    assert page.open == [] and {"svg", "table"} <= page.seen
    assert not page.seen & {"script", "link", "img", "iframe"} and page.targets == []
    assert {"slot 0", "slot 1", "slot 2", "death: silent", "hand-over"} <= set(page.text)
    assert {"500 ms", "scaled away", "the relay <is> away", "f00d" * 8} <= set(page.text)


def test_a_crowded_run_is_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen slots, hundreds of hand-overs, two hours; into a folder that is not there yet."""
    script = Script(shards=16)
    script.event(0.0, "created", slots=16)
    members = [f"{slot}.1.aa" for slot in range(16)]
    script.view(10.0, members, kind="first", slots=16)
    for turn in range(400):
        at, slot = 20.0 + 17 * turn, turn % 16
        old, members[slot] = members[slot], f"{slot}.{2 + turn // 16}.aa"
        script.boot(at - 9, members[slot])
        script.view(at, members, [(old, "swap")], slots=16)
        script.steps(1 + 170 * turn, at, 170)
    run_folder(tmp_path, script.lines)
    out = tmp_path / "there" / "below"
    assert call(monkeypatch, "report", "a", "--home", tmp_path, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"report.png", "report.html"}
    assert script.history().handovers == 400
    assert (out / "report.html").stat().st_size < 2_000_000


def test_a_run_of_which_only_the_beginning_is_known_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No view, no step, no time."""
    script = Script()
    script.event(0.0, "created", slots=4)
    folder = run_folder(tmp_path, script.lines)
    assert call(monkeypatch, "report", "a", "--home", tmp_path) == 0
    assert "broken off" in (folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("run", "lines", "out", "error", "says"),
    [
        ("b", ["x"], "out", RunUnknown, "there is no run b"),
        ("a", [], "out", InputError, "nothing is recorded of run a"),
        ("a", eventful().lines, "file", StorageUnavailable, "file cannot be used"),
        ("a", eventful().lines, "/proc/nowhere", StorageUnavailable, "cannot be used: No such"),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_line(
    run: str,
    lines: list[str],
    out: str,
    error: type[InputError],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An unknown run, one without events, a file in the folder's place, no place at all."""
    run_folder(tmp_path, lines)
    (tmp_path / "file").touch()
    code = call(monkeypatch, "report", run, "--home", tmp_path, "--out", tmp_path / out)
    said = capsys.readouterr()
    assert code == error.exit_code and says in said.err
    assert said.err.count("\n") == 1 and said.out == ""
