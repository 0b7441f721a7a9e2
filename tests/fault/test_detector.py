"""Phi accrual: silence is noticed within a bound, and an ordinary rhythm never is."""

from __future__ import annotations

import random
from statistics import NormalDist

import pytest

from fault.detector import PhiAccrual

BEAT_S = 0.1


def noticed_after_s(detector: PhiAccrual, last: float) -> float:
    """How long after its last beat the peer becomes suspicious, to a millisecond."""
    silence = 0.0
    while not detector.suspicious(last + silence):
        silence += 0.001
    return silence


def fed(intervals: list[float], now: float = 50.0) -> tuple[PhiAccrual, float]:
    detector = PhiAccrual(BEAT_S, now)
    for interval in intervals:
        now += interval
        detector.heard(now)
    return detector, now


def test_phi_is_the_tail_of_a_normal_distribution() -> None:
    """A new detector expects a beat after `beat_s`, give or take half of it, as the paper says."""
    detector = PhiAccrual(BEAT_S, 50.0)
    rhythm = NormalDist(BEAT_S, BEAT_S / 2)
    for silence in (0.05, 0.1, 0.2, 0.3, 0.35):
        chance = 10 ** -detector.phi(50.0 + silence)
        assert chance == pytest.approx(1 - rhythm.cdf(silence), rel=1e-4)


def test_suspicion_only_grows_with_silence_and_stays_a_number() -> None:
    """Phi never falls while nothing is heard, even where the chance is below any float."""
    detector, last = fed([BEAT_S] * 30)
    levels = [detector.phi(last + silence / 100) for silence in range(500)]
    assert levels == sorted(levels) and levels[-1] == detector.phi(last + 1e6) == 300.0


@pytest.mark.parametrize("intervals", [[], [BEAT_S] * 3, [BEAT_S] * 200, [0.05, 0.15] * 100])
def test_silence_is_noticed_in_less_than_half_a_second(intervals: list[float]) -> None:
    """With a beat each 100 ms a dead peer is suspected after 250 to 500 ms, the first time too."""
    detector, last = fed(intervals)
    assert 0.25 < noticed_after_s(detector, last) < 0.5


def test_ordinary_jitter_is_never_suspicious() -> None:
    """Beats that come up to one and a half intervals late raise no suspicion in an hour."""
    jitter = random.Random(1)
    detector, now = fed([])
    for _ in range(36_000):
        now += BEAT_S * jitter.uniform(0.5, 2.5)
        assert not detector.suspicious(now)
        detector.heard(now)


def test_a_slower_rhythm_is_learned() -> None:
    """A peer that beats three times slower is trusted for longer, and its death still noticed."""
    slow, last = fed([0.3] * 100)
    assert not slow.suspicious(last + 0.5)
    assert noticed_after_s(slow, last) < 1.0


def test_what_is_no_beat_is_a_sign_of_life_and_no_part_of_the_rhythm() -> None:
    """A burst of it makes nobody impatient; the beat that may be left out after it is forgiven."""
    beats, _ = fed([BEAT_S] * 20)
    detector, now = fed([BEAT_S] * 20)
    for _ in range(100):
        now += BEAT_S / 2
        for _ in range(6):
            now += 0.001
            detector.heard_else(now)
        now += BEAT_S
        assert not detector.suspicious(now)
        detector.heard(now)
    patience = noticed_after_s(beats, 50.0 + 20 * BEAT_S)
    assert noticed_after_s(detector, now) == pytest.approx(patience, abs=0.002)
    detector.heard_else(now + 1.0)
    assert noticed_after_s(detector, now + 1.0) == pytest.approx(patience, abs=0.002)


def test_one_long_silence_spoils_nothing() -> None:
    """After a gap of a minute, twenty beats later, a death is noticed about as fast as before."""
    detector, last = fed([BEAT_S] * 50 + [60.0] + [BEAT_S] * 20)
    assert noticed_after_s(detector, last) < 0.75


def test_a_gap_in_the_observer_is_not_the_peers_silence() -> None:
    """Forgiven seconds count as if they had not passed; never is a beat moved to the future."""
    detector, last = fed([BEAT_S] * 50)
    plain, _ = fed([BEAT_S] * 50)
    detector.forgive(2.0, last + 2.1)
    assert detector.phi(last + 2.1) == pytest.approx(plain.phi(last + 0.1))
    assert not detector.suspicious(last + 2.1) and detector.suspicious(last + 3.0)
    detector.forgive(100.0, last + 3.0)
    assert detector.phi(last + 3.0) == pytest.approx(plain.phi(last))


def test_a_beat_ends_the_suspicion() -> None:
    """Who was silent and is heard again is trusted again at once."""
    detector, last = fed([BEAT_S] * 50)
    assert detector.suspicious(last + 2.0)
    detector.heard(last + 2.0)
    assert not detector.suspicious(last + 2.2)


def test_the_threshold_is_the_callers() -> None:
    """A higher threshold waits longer before it suspects."""
    patient = PhiAccrual(BEAT_S, 0.0, threshold=12.0)
    assert noticed_after_s(patient, 0.0) > noticed_after_s(PhiAccrual(BEAT_S, 0.0), 0.0)
