"""Tells a run's history out of its events. Pure.

What counts as a death, and how long a stall is, is decided by `launcher.summary`, so that a report
and a summary never disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from fault.assignment import home_block
from fault.records import Peer, generation_of, slot_of
from fault.registry import Event
from launcher.report.draft import Draft
from launcher.report.history import (
    HANDOVER,
    Evaluation,
    History,
    Incident,
    Loss,
    Notice,
    Scaling,
)
from launcher.summary import Pace, Story


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """The events of `events.jsonl`, each once. Lines that a killed writer cut off are skipped."""
    seen: set[str] = set()
    for line in lines:
        try:
            event = Event(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if event.id not in seen:
            seen.add(event.id)
            yield event


def history_of(events: Iterable[Event], state: str, reason: str = "") -> History | None:
    """None when there are no events. `state` and `reason` are for a run without an outcome."""
    teller: _Teller | None = None
    for event in events:
        teller = teller or _Teller(event.time)
        teller.take(event)
    return teller.told(state, reason) if teller is not None else None


PEACEFUL = {"swap": "handed over", "scaled": "scaled away"}
"""What a removal that is no death means to the one who is removed."""

FELL_SILENT = frozenset({"silent", "lease"})
"""Grounds on which a peer is removed some time after it died."""


class _Teller:
    """Takes events one by one. What happened is known at once, how long it stalled at the end."""

    def __init__(self, began: float) -> None:
        self.story = Story(created_at=began)
        self._began = began
        self._drafts: dict[tuple[int, int, Peer], Draft] = {}
        """By slot, generation and peer, which is empty until the grant is claimed."""
        self._view: dict[str, Any] = {"members": [], "players": []}
        self._lanes = 0
        self._slots = 0
        self._checkpoints = 0
        self._revived = False
        self._found: list[tuple[Peer, str, float, tuple[int, ...], tuple[Peer, ...]]] = []
        self._notes: dict[Peer, str] = {}
        self._scalings: list[Scaling] = []
        self._notices: list[Notice] = []
        self._evaluations: list[Evaluation] = []
        self._losses: dict[int, Loss] = {}

    def take(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event.fields, event.time - self._began)
        handovers, deaths = len(self.story.handovers), len(self.story.deaths)
        self.story.take([event])
        for peer, at in self.story.handovers[handovers:]:
            self._find(peer, HANDOVER, at, event.fields)
        for peer, kind, at in self.story.deaths[deaths:]:
            self._find(peer, kind, at, event.fields)
        if event.kind == "view":
            self._view = event.fields

    def _find(self, peer: Peer, kind: str, at: float, view: dict[str, Any]) -> None:
        before = self._view["players"]
        shards = tuple(shard for shard, player in enumerate(before) if player == peer)
        heirs = tuple(dict.fromkeys(view["players"][shard] for shard in shards))
        if kind == HANDOVER:
            heirs = tuple(each for each in view["members"] if slot_of(each) == slot_of(peer))
        self._found.append((peer, kind, at, shards, heirs))

    def _draft(self, peer: Peer, now: float) -> Draft:
        slot, generation = slot_of(peer), generation_of(peer)
        key = (slot, generation, peer)
        if key not in self._drafts:
            granted = self._drafts.pop((slot, generation, ""), None)
            self._drafts[key] = granted or Draft(slot, generation, peer, now)
            self._drafts[key].peer = peer
        return self._drafts[key]

    # --- what the events say ----------------------------------------------------------------

    def _on_created(self, fields: dict[str, Any], now: float) -> None:
        self._scale(fields["slots"], now)

    def _on_scaled(self, fields: dict[str, Any], now: float) -> None:
        self._scale(fields.get("slots", self._slots), now)

    def _scale(self, slots: int, now: float) -> None:
        if self._slots and slots != self._slots:
            self._scalings.append(Scaling(now, slots))
        self._slots = slots
        self._lanes = max(self._lanes, slots)

    def _on_granted(self, fields: dict[str, Any], now: float) -> None:
        slot, generation = fields["slot"], fields["generation"]
        self._lanes = max(self._lanes, slot + 1)
        for draft in self._drafts.values():
            if draft.slot == slot and draft.joined_s is None:
                draft.end("never joined" if draft.peer else "never arrived", now)
        self._drafts[slot, generation, ""] = Draft(slot, generation, "", now)

    def _on_claimed(self, fields: dict[str, Any], now: float) -> None:
        self._draft(fields["peer"], now)

    def _on_started(self, fields: dict[str, Any], now: float) -> None:
        self._draft(fields["peer"], now).start = fields["start"]

    def _on_boot_failed(self, fields: dict[str, Any], now: float) -> None:
        self._draft(fields["peer"], now).end(f"could not start: {fields['reason']}", now)

    def _on_killed(self, fields: dict[str, Any], now: float) -> None:
        self._draft(fields["peer"], now).gone_s = now
        self._notes[fields["peer"]] = f"killed at step {fields['step']}, as asked for"

    def _on_left(self, fields: dict[str, Any], now: float) -> None:
        draft = self._draft(fields["peer"], now)
        draft.gone_s = now if draft.gone_s is None else draft.gone_s
        if draft.joined_s is None and not self.story.outcome:
            draft.end("gave up", now)
        if cause := fields["cause"].strip():
            self._notes.setdefault(fields["peer"], cause.splitlines()[-1])

    def _on_view(self, fields: dict[str, Any], now: float) -> None:
        self._scale(fields["slots"], now)
        removals: dict[Peer, str] = dict(fields["removals"])
        for peer in self._view["members"]:
            if peer not in fields["members"]:
                kind = removals.get(peer, "lease")
                peaceful = PEACEFUL if peer in self._notes else PEACEFUL | {"left": "left"}
                ending = peaceful.get(kind, f"death: {_ground(kind)}")
                self._draft(peer, now).end(ending, now)
        shards: dict[Peer, list[int]] = {peer: [] for peer in fields["members"]}
        for shard, peer in enumerate(fields["players"]):
            shards[peer].append(shard)
        for peer, played in shards.items():
            draft, slot = self._draft(peer, now), slot_of(peer)
            if draft.joined_s is None:
                draft.joined_s = now
            # a slot beyond the number of slots is a surplus one, and has no home
            scaled_away = slot >= fields["slots"]
            block = home_block(slot, fields["slots"], len(fields["players"]))
            own = () if scaled_away else tuple(shard for shard in played if shard in block)
            draft.play(own, tuple(shard for shard in played if shard not in own), now)

    def _on_checkpoint(self, fields: dict[str, Any], now: float) -> None:
        self._checkpoints += 1

    def _on_warning(self, fields: dict[str, Any], now: float) -> None:
        self._notices.append(Notice(now, fields["text"]))

    def _on_metrics(self, fields: dict[str, Any], now: float) -> None:
        if fields["values"]:
            values = tuple(sorted(fields["values"].items()))
            self._evaluations.append(Evaluation(now, fields["step"], values))

    def _on_steps(self, fields: dict[str, Any], now: float) -> None:
        for step, time, loss in fields["rows"]:
            if step not in self._losses:
                self._losses[step] = Loss(time - self._began, step, loss)

    # --- the end ----------------------------------------------------------------------------

    def told(self, state: str, reason: str) -> History:
        story = self.story
        state = str(story.outcome.get("state", state))
        end = story.last_at - self._began
        step = story.outcome["step"] if state == "finished" and story.outcome else story.step
        for draft in self._drafts.values():
            killed = draft.peer in story.kills
            alive = "running" if state == "running" else f"run {state}"
            draft.end("killed" if killed else alive, end)
        pace = Pace(story.times)
        for peer, kind, at, _, _ in self._found:
            draft, seen = self._draft(peer, end), pace.last(at)
            # no step can be finished without one of its members, so it did not outlive the last
            if kind in FELL_SILENT and draft.gone_s is None and seen is not None:
                draft.last_seen(seen - self._began)
        drafts = [self._drafts[key] for key in sorted(self._drafts)]
        return History(
            state=state,
            reason=story.outcome.get("reason", reason),
            digest=story.outcome.get("digest", ""),
            lanes=self._lanes,
            shards=len(self._view["players"]),
            end_s=end,
            step=step,
            repeated_steps=story.repeated,
            step_s=pace.step_s,
            checkpoints=self._checkpoints,
            views=story.views,
            invocations=tuple([draft.done() for draft in drafts]),
            incidents=tuple(
                sorted((self._incident(*each, pace) for each in self._found), key=_when)
            ),
            scalings=tuple(self._scalings),
            notices=tuple(self._notices),
            evaluations=tuple(self._evaluations),
            losses=tuple([self._losses[step] for step in sorted(self._losses)]),
        )

    def _incident(
        self,
        peer: Peer,
        kind: str,
        at: float,
        shards: tuple[int, ...],
        heirs: tuple[Peer, ...],
        pace: Pace,
    ) -> Incident:
        gap = pace.gap(at)
        ended = self._draft(peer, at - self._began).ended_s
        return Incident(
            at_s=at - self._began if ended is None else ended,
            kind=_ground(kind),
            peer=peer,
            shards=shards,
            heirs=heirs,
            stall_ms=pace.stall_ms(at),
            gap_s=None if gap is None else (gap[0] - self._began, gap[1] - self._began),
            note=self._notes.get(peer, ""),
        )


def _ground(kind: str) -> str:
    """Of a death; who leaves and says what for, is a function that raised."""
    return "raised" if kind == "left" else kind


def _when(incident: Incident) -> tuple[float, Peer]:
    return incident.at_s, incident.peer
