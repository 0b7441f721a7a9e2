"""A state in a store: what is lost is put there again, and nothing stays that nobody needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from fault.errors import StoreError, StoreUnavailable
from p2p.aggregate.bulk import BulkConnection
from p2p.aggregate.storing import check_store
from tests.p2p.aggregate.training import averaging, built, mean_of, step

pytestmark = pytest.mark.timeout(300)


def keys(store: BulkConnection, pattern: str) -> list[str]:
    return sorted(key.decode() for key in store.items("KEYS", pattern))


@contextmanager
def configured(url: str, name: str, value: str) -> Iterator[None]:
    with BulkConnection(url) as store:
        _, before = store.items("CONFIG", "GET", name)
        store.execute("CONFIG", "SET", name, value)
        try:
            yield
        finally:
            store.execute("CONFIG", "SET", name, before)


def test_leads_that_die_leave_nothing_behind(urls: list[str]) -> None:
    """Each goes on from the last one's state and dies after two steps: two places are left."""
    one = built("momentum")
    with BulkConnection(urls[0]) as store:
        for _ in range(3):
            lead, _ = averaging(one, 0, urls[:1])
            for _ in range(2):
                step(one, lead)
            # what a lead leaves that dies between two commands
            place = keys(store, "r:*:ready")[-1].removesuffix(":ready")
            for rest in ("part:0", "shard:1", "mean"):
                store.push(f"{place}:{rest}", np.zeros(3, np.float32))
        last, _ = averaging(one, 0, urls[:1])
        for _ in range(2):
            step(one, last)
        assert len(keys(store, "r:*:ready")) == 2
        assert keys(store, "*:part:*") + keys(store, "*:mean") + keys(store, "*:shard:*") == []


@pytest.mark.parametrize("lost", ["parameters", "optimizer:*", "rest", "ready", "*"])
@pytest.mark.parametrize("which", ["newest", "all"])
def test_a_part_that_is_gone_is_put_there_again(lost: str, which: str, urls: list[str]) -> None:
    """Whatever of its state was removed, a step comes to the same bits, and does not wait long."""
    one, other = built("adam"), built("adam")
    lead, warnings = averaging(one, 0, urls[:1])
    untouched, _ = averaging(other, 0, urls[1:])
    for _ in range(3):
        step(one, lead)
        step(other, untouched)
        with BulkConnection(urls[0]) as store:
            newest = keys(store, "r:*:ready")[-1].removesuffix(":ready")
            gone = keys(store, f"{newest if which == 'newest' else 'r:*'}:{lost}")
            assert gone
            store.execute("DEL", *gone)
    step(one, lead)
    step(other, untouched)
    assert one.state.digest() == other.state.digest()
    assert warnings == []


def test_what_was_made_and_is_gone_is_made_again(urls: list[str]) -> None:
    """Another one made the step's state, and a part of it was removed before this one took it."""
    one, other = built("adam"), built("adam")
    first, _ = averaging(one, 0, urls[:1])
    second, warnings = averaging(other, 1, urls[:1])
    step(one, first)
    with BulkConnection(urls[0]) as store:
        made = keys(store, "r:*after*:ready")[-1].removesuffix(":ready")
        store.execute("DEL", f"{made}:parameters")
    step(other, second)
    assert one.state.digest() == other.state.digest() and warnings == []


class Cut:
    """A connection to a store that breaks once, before it sends or receives for the nth time."""

    def __init__(self, store: BulkConnection, number: int, patch: pytest.MonkeyPatch) -> None:
        self._store, self._left, self._guarded = store, number, store._guarded
        patch.setattr(store, "_guarded", self)

    def __call__(self, action: Callable[[], Any]) -> Any:
        self._left -= 1
        if self._left == 0:
            self._store.close()
            raise StoreUnavailable("it was cut")
        return self._guarded(action)

    @property
    def was_cut(self) -> bool:
        return self._left <= 0


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_store_that_goes_away_at_any_moment_of_a_step_changes_nothing(
    optimizer: str, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean is applied once, even if the store goes when all is done but the tidying up."""
    monkeypatch.setattr("p2p.aggregate.averaging.RETRY_S", 0.01)
    monkeypatch.setattr("p2p.aggregate.stored_state.MAKING_MS", 50)
    found, cuts, was_cut = set(), 0, True
    while was_cut:
        one = built(optimizer)
        lead, _ = averaging(one, 0, urls[:1])
        lead._store.execute("FLUSHALL")
        step(one, lead)
        mean = mean_of(one)
        with monkeypatch.context() as patch:
            cut = Cut(lead._store, cuts + 1, patch)
            lead.apply(mean)
        found.add((one.state.step, one.state.digest()))
        was_cut = cut.was_cut
        cuts += was_cut
    assert len(found) == 1 and cuts > 20


def test_a_full_store_is_an_error_and_the_step_can_be_made_later(urls: list[str]) -> None:
    one = built("momentum")
    lead, _ = averaging(one, 0, urls[:1])
    step(one, lead)
    before = one.state.digest()
    mean = mean_of(one)
    with configured(urls[0], "maxmemory", "1mb"):
        with pytest.raises(StoreError, match="OOM"):
            lead.apply(mean)
        with pytest.raises(StoreError, match="OOM"):
            lead.contribution(0, lambda: None)
    assert one.state.digest() == before
    lead.apply(mean)
    assert one.state.digest() != before


def test_a_store_that_removes_what_is_in_use_is_refused(urls: list[str]) -> None:
    check_store(urls[0])
    with configured(urls[0], "maxmemory", "1gb"):
        check_store(urls[0])
        with (
            configured(urls[0], "maxmemory-policy", "allkeys-lru"),
            pytest.raises(StoreUnavailable, match="noeviction"),
        ):
            check_store(urls[0])
