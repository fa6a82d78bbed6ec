"""How long and how often a request is tried, and what is told in the end."""

from __future__ import annotations

import pytest

from feature_store.stores.online.redis import patience as module
from feature_store.stores.online.redis.failures import Lost, NotNow, Overdue, Redo, Refused
from feature_store.stores.online.redis.patience import Patience

LOADING, MOVED, LATE = NotNow("LOADING wait"), Redo("MOVED 1 h:1"), Overdue("late")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_pauses_grow_up_to_a_longest_one_and_end_before_the_deadline(clock: Clock) -> None:
    patience = Patience(1.0)
    pauses = []
    while (pause := patience.pause(Lost())) is not None:
        pauses.append(pause)
        clock.now += pause
    assert pauses[:6] == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08, 0.16])
    assert set(pauses[6:]) == {0.2}
    assert 0.8 < clock.now - 100.0 < 1.0


def test_what_does_not_pass_is_not_tried_again(clock: Clock) -> None:
    assert Patience(1.0).pause(Refused("ERR no")) is None


def test_a_redirection_is_followed_at_once_and_not_for_ever(clock: Clock) -> None:
    patience = Patience(1.0)
    assert [patience.pause(MOVED) for _ in range(6)] == [0, 0, 0, 0, 0, 0.005]


def test_after_the_deadline_there_is_no_try(clock: Clock) -> None:
    patience = Patience(1.0)
    clock.now += 1.0
    assert (patience.left, patience.pause(MOVED), patience.pause(LOADING)) == (0.0, None, None)


#   seconds     0 ............. 1
#   hurried     LOADING      x--|   the last try had no time: LOADING is told
#   waited      LOADING x-------|   it had time enough: that nothing came is told
@pytest.mark.parametrize(("at", "told"), [(0.9, LOADING), (0.2, LATE)])
def test_why_a_try_was_made_is_told_where_it_had_no_time_itself(clock: Clock, at: float, told: Exception) -> None:
    patience = Patience(1.0)
    clock.now += at
    assert patience.pause(LOADING) is not None
    clock.now = 101.0
    assert patience.reason(LATE) is told
    assert patience.reason(MOVED) is MOVED


def test_a_first_try_that_is_late_is_told_so(clock: Clock) -> None:
    assert Patience(1.0).reason(LATE) is LATE
