"""Patience: whose request it belongs to, when it doubles, and when it is halved."""

from __future__ import annotations

import pytest

from replica.core.patience import PATIENCE_FIRST_MS, Patience


def test_patience_belongs_to_the_oldest_request():
    patience = Patience(100)
    assert not patience.has_ended(None, 10_000), "nobody waits"
    assert not patience.has_ended(50, 149)
    assert patience.has_ended(50, 150)


def test_a_view_has_its_time_from_its_beginning():
    patience = Patience(100)
    patience.executed(None)
    patience.enter_view(1000)
    assert patience.present_ms == 100
    assert not patience.has_ended(0, 1099)
    assert patience.has_ended(0, 1100)
    assert not patience.has_ended(1050, 1149), "a request that came later has its own"


def test_it_doubles_with_each_view_that_executed_nothing():
    patience = Patience(100)
    found = []
    for view in range(1, 8):
        patience.enter_view(view * 1000)
        found.append(patience.present_ms)
    assert found == [200, 400, 800, 1600, 3200, 6400, 12800], "without an upper bound"


@pytest.mark.parametrize("since", [None, 0, 999, 1000, 1001])
def test_a_view_that_executed_anything_does_not_double_it(since: int | None):
    patience = Patience(100)
    patience.enter_view(1000)
    patience.executed(since)
    present = patience.present_ms
    patience.enter_view(2000)
    assert patience.present_ms == present


@pytest.mark.parametrize(("since", "after"), [(None, 400), (999, 200), (1000, 400), (1500, 400)])
def test_only_a_request_older_than_the_view_halves_it(since: int | None, after: int):
    patience = Patience(100)
    patience.enter_view(0)
    patience.enter_view(1000)
    assert patience.present_ms == 400
    patience.executed(since)
    assert patience.present_ms == after


def test_it_is_halved_once_per_view_and_never_below_the_first():
    patience = Patience(100)
    for view in range(4):
        patience.enter_view(view)
    assert patience.present_ms == 1600
    found = []
    for view in range(1, 8):
        patience.enter_view(view * 4000)
        for _ in range(5):
            patience.executed(0)
        found.append(patience.present_ms)
    assert found == [1600, 800, 400, 200, 100, 100, 100], "the first of these views ended one that executed nothing"


def test_young_requests_before_an_old_one_change_nothing():
    patience = Patience(100)
    patience.enter_view(1000)
    patience.executed(2000)
    patience.executed(None)
    patience.executed(500)
    assert patience.present_ms == 100


def test_junk_in_f_of_2f_plus_1_views_cannot_keep_it_small():
    """At most f views of a round are spoiled by an old request; the rest double it: it grows all the same."""
    for f in (1, 2, 3):
        patience = Patience(100)
        for view in range(10 * (2 * f + 1)):
            patience.enter_view(1000 * view)
            if view % (2 * f + 1) < f:
                patience.executed(0)
        assert patience.present_ms > 100 * 2**9


def test_the_usual_patience():
    assert Patience().present_ms == Patience().first_ms == PATIENCE_FIRST_MS
