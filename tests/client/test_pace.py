"""The client's learned patience: by itself, and what it keeps a busy cluster from, in virtual time."""

import pytest

from client.events import Settings
from client.pace import GROWTH, Pace, Window
from tests.client.harness import Harness, reply_to


def test_it_begins_with_the_floor_and_quick_answers_leave_it_there():
    pace = Pace(500, 2000)
    assert pace.patience_ms == 500
    for _ in range(20):
        pace.answered(3)
    assert pace.patience_ms == 500


def test_the_first_answer_counts_half_its_time_as_deviation():
    pace = Pace(10, 100_000)
    pace.answered(100)
    assert pace.patience_ms == 100 + 4 * 50
    pace.answered(180)  # deviation 50 + (80 - 50) / 4, smoothed 100 + 80 / 8
    assert pace.patience_ms == round(110 + 4 * 57.5)


def test_steady_answers_bring_it_near_to_their_time():
    pace = Pace(10, 100_000)
    for _ in range(200):
        pace.answered(700)
    assert 700 <= pace.patience_ms <= 702


@pytest.mark.parametrize(("ended", "then"), [((500,), 1000), ((500, 1000), 2000), ((500, 1000, 2000, 4000), 2000)])
def test_patience_that_ended_in_vain_doubles_up_to_the_ceiling(ended, then):
    pace = Pace(500, 2000)
    for patience in ended:
        pace.ended(patience)
    assert pace.patience_ms == then


def test_many_attempts_that_end_at_once_double_it_once():
    pace = Pace(500, 4000)
    for _ in range(16):
        pace.ended(500)
    assert pace.patience_ms == 1000


def test_one_answer_in_time_ends_what_was_doubled():
    pace = Pace(500, 2000)
    pace.ended(500)
    pace.answered(20)
    assert pace.patience_ms == 500


def test_no_time_carries_it_beyond_floor_and_ceiling():
    pace = Pace(500, 2000)
    pace.answered(10**9)
    assert pace.patience_ms == 2000
    assert Pace(500, 100).patience_ms == 500
    low = Pace(500, 100)
    low.ended(500)
    assert low.patience_ms == 500


def broadcasts_of(h: Harness, took: int, count: int) -> list[int]:
    """Have operations done one after the other, each answered so long after it was sent; how often each went to all."""
    found = []
    for _ in range(count):
        h.submit("operation", deadline=h.now + 60_000)
        ((primary, envelope),) = h.decoded()
        assert primary == (0,)
        h.advance(took)
        found.append(len(h.decoded()))
        for replica in range(h.genesis.quorum):
            h.reply(replica, reply_to(envelope))
        assert h.outcomes.pop("operation").value
    return found


def test_a_busy_cluster_is_not_asked_three_times_for_ever():
    h = Harness().ready()
    assert broadcasts_of(h, 900, 20) == [1] + [0] * 19
    assert broadcasts_of(h, 5, 5) == [0] * 5
    # It became quick again, so that a silent primary is noticed as soon as before.
    assert broadcasts_of(h, 5, 40)[-1] == 0
    assert broadcasts_of(h, 501, 1) == [1]


def test_what_everybody_was_asked_says_nothing_of_the_time_answers_take():
    h = Harness().ready()
    broadcasts_of(h, 1900, 1)  # as long as a view change: asked after 500 and 1,500 ms
    assert broadcasts_of(h, 5, 1) == [0]
    assert broadcasts_of(h, 501, 1) == [1]


def test_a_primary_that_slows_down_bit_by_bit_gains_no_more_than_the_ceiling():
    h = Harness().ready()
    for took in range(100, 1950, 50):
        broadcasts_of(h, took, 3)
    assert broadcasts_of(h, 1999, 1) == [0]
    assert broadcasts_of(h, 2000, 1) == [1]


def test_nothing_is_learned_where_it_is_not_wanted():
    h = Harness(settings=Settings(patience_ms=300, patience_learned_ms_max=300)).ready()
    assert broadcasts_of(h, 290, 5) == [0] * 5
    assert broadcasts_of(h, 310, 5) == [1] * 5


def test_the_window_is_halved_and_grows_back_one_by_one():
    window = Window(5)
    sizes = []
    for _ in range(4):
        window.refused()
        sizes.append(window.size)
    assert sizes == [2, 1, 1, 1]
    for _ in range(GROWTH - 1):
        window.answered()
    assert window.size == 1
    window.answered()
    assert window.size == 2
    for _ in range(GROWTH - 1):
        window.answered()
    window.refused()
    for _ in range(GROWTH * 10):
        window.answered()
    assert window.size == 5
