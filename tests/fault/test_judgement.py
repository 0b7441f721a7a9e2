"""Who must leave a view, rule by rule; each test is a schedule that breaks without the rule."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from fault.judgement import dissenters, highest_degree, removals
from fault.records import Accusation, AccusationKind, Doing, Peer, Snapshot, View, peer_name

PEERS = tuple([peer_name(slot, 1, "n") for slot in range(9)])
P0, P1, P2, P3, P4 = PEERS[:5]


def view_of(count: int) -> View:
    members = PEERS[:count]
    return View(3, "id", members, members, count)


def accused(kind: AccusationKind, accuser: Peer, *others: Peer) -> list[Accusation]:
    return [Accusation(accuser, other, kind) for other in others]


def snapshot_of(
    view: View,
    accusations: Collection[Accusation] = (),
    unleased: Collection[Peer] = (),
    departed: Collection[Peer] = (),
    doing: dict[Peer, Doing] | None = None,
    target_slots: int | None = None,
) -> Snapshot:
    return Snapshot(
        life="life",
        born="life",
        now=100.0,
        view=view,
        leased=frozenset(view.members) - frozenset(unleased) - frozenset(departed),
        ready={},
        accusations=tuple(accusations),
        grants={},
        doing=doing or {},
        departed=frozenset(departed),
        suspects=(),
        outcome=None,
        checkpoint=-1,
        target_slots=view.slots if target_slots is None else target_slots,
        highest_view=view.number,
    )


def judged(
    snapshot: Snapshot, me: Peer = P0, lease_unbroken: bool = True, stalled: bool = False
) -> dict[Peer, str]:
    assert snapshot.view is not None
    found = removals(snapshot.view, snapshot, me, lease_unbroken, stalled)
    assert [each.peer for each in found] == [
        peer for peer in snapshot.view.members if peer in {each.peer for each in found}
    ]
    return {each.peer: each.kind for each in found}


@pytest.mark.parametrize("stalled", [False, True])
def test_nobody_leaves_a_healthy_view(stalled: bool) -> None:
    """Without accusations, and with every lease, nobody is judged, stalled or not."""
    assert judged(snapshot_of(view_of(5)), stalled=stalled) == {}


def test_silence_takes_more_than_half_of_the_watchers() -> None:
    """Of four watchers two are not enough, three are."""
    view = view_of(5)
    two = accused("silent", P0, P2) + accused("silent", P1, P2)
    assert judged(snapshot_of(view, two)) == {}
    three = two + accused("silent", P3, P2)
    assert judged(snapshot_of(view, three)) == {P2: "silent"}


def test_a_repeated_accusation_counts_once() -> None:
    """One watcher that says it three times is still one of four."""
    assert judged(snapshot_of(view_of(5), accused("silent", P1, P2, P2, P2))) == {}


def test_only_watchers_are_believed_about_silence() -> None:
    """In a view of nine, those who are no watchers of a peer cannot have it removed."""
    view = view_of(9)
    far = [PEERS[slot] for slot in (4, 5, 6)]  # watchers of 0 are 1, 8, 2, 7, 3
    near = [PEERS[slot] for slot in (1, 8, 2)]
    by_far = [each for peer in far for each in accused("silent", peer, P0)]
    assert judged(snapshot_of(view, by_far), me=P4) == {}
    by_near = [each for peer in near for each in accused("silent", peer, P0)]
    assert judged(snapshot_of(view, by_near), me=P4) == {P0: "silent"}


def test_majorities_count_only_watchers_that_hold_a_lease() -> None:
    """Three die at once: the two that are left, half of the watchers, are a majority of the living;

    and the word of a watcher without a lease is worth nothing.
    """
    view = view_of(5)
    living = [each for accuser in (P0, P1) for each in accused("silent", accuser, P2, P3, P4)]
    dead = (P2, P3, P4)
    assert judged(snapshot_of(view, living, unleased=dead)) == dict.fromkeys(dead, "silent")
    ghosts = [each for accuser in dead for each in accused("silent", accuser, P1)]
    assert judged(snapshot_of(view, ghosts, unleased=dead), lease_unbroken=False) == {}


def test_an_outage_of_the_registry_removes_nobody() -> None:
    """All leases are gone after an outage; without a watcher's word that means nothing."""
    view = view_of(5)
    everyone_else = PEERS[1:5]
    assert judged(snapshot_of(view, unleased=everyone_else)) == {}
    accusation = accused("silent", P1, P2)
    assert judged(snapshot_of(view, accusation, unleased=[P2]), lease_unbroken=False) == {}
    assert judged(snapshot_of(view, accusation, unleased=[P2])) == {P2: "lease"}


def test_a_missing_lease_needs_a_watcher_in_agreement() -> None:
    """Any kind of accusation by a watcher will do, and none by anybody else."""
    view = view_of(9)
    by_watcher = accused("unreachable", P1, P0)
    by_other = accused("unreachable", P4, P0)
    assert judged(snapshot_of(view, by_watcher, unleased=[P0]), me=P4) == {P0: "lease"}
    assert judged(snapshot_of(view, by_other, unleased=[P0]), me=P4) == {}


def test_who_has_no_leased_watcher_left_goes_by_its_lease_alone() -> None:
    """A peer dies together with all its watchers: nobody else could ever accuse it."""
    view = view_of(9)
    dead = [PEERS[slot] for slot in (0, 1, 8, 2, 7, 3)]
    found = judged(snapshot_of(view, unleased=dead), me=PEERS[5])
    assert found[P0] == "lease"
    assert not {P4, PEERS[5], PEERS[6]}.intersection(found)


def test_the_only_watcher_left_does_not_remove_what_it_still_hears() -> None:
    """Of two, one without a lease: only the other's own accusation counts."""
    view = view_of(2)
    assert judged(snapshot_of(view, unleased=[P1])) == {}
    assert judged(snapshot_of(view, accused("silent", P0, P1), unleased=[P1])) != {}


@pytest.mark.parametrize("kind", ["hung", "corrupt"])
def test_one_word_is_enough_for_a_hung_or_corrupt_peer(kind: AccusationKind) -> None:
    """The accused goes, and only the accused: degree would remove those who accuse it."""
    view = view_of(4)
    words = [each for accuser in (P0, P1, P3) for each in accused(kind, accuser, P2)]
    words += accused("unreachable", P0, P3)
    assert judged(snapshot_of(view, words[:1])) == {P2: kind}
    assert judged(snapshot_of(view, words), stalled=True) == {P2: kind}


def test_accusations_of_strangers_name_nobody() -> None:
    """Who is in no view cannot be removed from it, nor become the scapegoat."""
    view = view_of(3)
    stranger = PEERS[7]
    words = accused("hung", P1, stranger) + accused("unreachable", P1, stranger)
    assert judged(snapshot_of(view, words), stalled=True) == {}
    assert highest_degree(view, snapshot_of(view, words)) is None


def test_who_said_goodbye_leaves_whatever_else_is_said() -> None:
    """A departure is the ground even for a peer that was accused as well."""
    view = view_of(3)
    words = accused("hung", P0, P2) + accused("silent", P1, P2)
    assert judged(snapshot_of(view, words, departed=[P2])) == {P2: "left"}


def test_nobody_removes_itself() -> None:
    """Whatever is said about the caller, its own proposal does not remove it."""
    view = view_of(4)
    words = [each for accuser in (P1, P2, P3) for each in accused("silent", accuser, P0)]
    words += accused("hung", P1, P0)
    assert judged(snapshot_of(view, words, unleased=[P0]), stalled=True) == {}
    assert judged(snapshot_of(view, departed=[P0])) == {}
    assert judged(snapshot_of(view, target_slots=0)) == {}
    assert judged(snapshot_of(view, words), me=P1) == {P0: "hung"}


def test_unreachable_peers_stay_while_steps_finish() -> None:
    """A dead link matters to nobody until a step does not finish."""
    view = view_of(4)
    words = accused("unreachable", P0, P3) + accused("unreachable", P1, P3)
    assert judged(snapshot_of(view, words)) == {}
    assert judged(snapshot_of(view, words), stalled=True) == {P3: "unreachable"}


def test_one_scapegoat_goes_at_a_time_and_only_without_other_grounds() -> None:
    """Where somebody has to leave anyway, dead links are judged again in the next view."""
    view = view_of(5)
    words = accused("unreachable", P0, P3) + accused("unreachable", P1, P3, P4)
    assert judged(snapshot_of(view, words), stalled=True) == {P3: "unreachable"}
    assert judged(snapshot_of(view, words, departed=[P2]), stalled=True) == {P2: "left"}


def test_the_peer_with_the_most_dead_links_is_at_fault() -> None:
    """Made or received: a peer that is cut off accuses all, or is accused by all."""
    view = view_of(4)
    made = accused("unreachable", P1, P0, P2, P3)
    received = [each for accuser in (P0, P2, P3) for each in accused("unreachable", accuser, P1)]
    assert highest_degree(view, snapshot_of(view, made)) == P1
    assert highest_degree(view, snapshot_of(view, received)) == P1


def test_ties_go_to_the_highest_slot() -> None:
    """One dead link has two ends; everyone names the same, in whatever order accusations come."""
    view = view_of(4)
    words = accused("unreachable", P2, P1) + accused("unreachable", P1, P2)
    assert highest_degree(view, snapshot_of(view, words)) == P2
    assert highest_degree(view, snapshot_of(view, words[::-1])) == P2
    assert judged(snapshot_of(view, words), stalled=True) == {P2: "unreachable"}
    # the one that is named leaves it to the others
    assert judged(snapshot_of(view, words), me=P2, stalled=True) == {}


def test_a_smaller_run_loses_the_slots_above() -> None:
    """Scaled to two slots, the members of the others leave, once somebody below is there."""
    view = view_of(4)
    doing = dict.fromkeys(view.members, Doing(5, "digest"))
    assert judged(snapshot_of(view, doing=doing, target_slots=2)) == {P2: "scaled", P3: "scaled"}
    none_below = snapshot_of(view, doing=doing, departed=[P0], target_slots=1)
    assert judged(none_below, me=P1) == {P0: "left"}


DIGESTS = {"a": "aaaa", "b": "bbbb", "c": "cccc"}


def states(letters: str, step: int = 5) -> dict[Peer, Doing]:
    return {
        peer: Doing(step, DIGESTS[letter]) for peer, letter in zip(PEERS, letters, strict=False)
    }


@pytest.mark.parametrize(
    ("letters", "minority", "majority"),
    [
        ("aaaa", [], True),
        ("aaba", [P2], True),
        ("baaac", [P0, P4], True),
        ("aaabb", [P3, P4], True),
    ],
)
def test_the_minority_dissents(letters: str, minority: list[Peer], majority: bool) -> None:
    """Unequal digests at one step name those who are not with more than half."""
    view = view_of(len(letters))
    named, has_majority = dissenters(view, snapshot_of(view, doing=states(letters)), 5)
    assert (sorted(named), has_majority) == (minority, majority)


@pytest.mark.parametrize("letters", ["ab", "aabb", "abc", "aabc"])
def test_without_a_majority_nobody_is_right(letters: str) -> None:
    """Half is no majority, and neither is the largest of several small groups."""
    view = view_of(len(letters))
    assert not dissenters(view, snapshot_of(view, doing=states(letters)), 5)[1]


def test_nobody_is_judged_before_all_stand_at_the_step() -> None:
    """A member that is behind, or not heard yet, may turn the majority; one without a lease not."""
    view = view_of(3)
    behind = states("aab") | {P1: Doing(4, "before")}
    assert dissenters(view, snapshot_of(view, doing=behind), 5) == ([], True)
    unheard = {peer: doing for peer, doing in states("aab").items() if peer != P1}
    assert dissenters(view, snapshot_of(view, doing=unheard), 5) == ([], True)
    without_lease = snapshot_of(view, doing=behind, unleased=[P1])
    assert not dissenters(view, without_lease, 5)[1]
