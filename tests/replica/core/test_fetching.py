"""Who is asked for what is missing, in which order, and how much less often as time goes by."""

from __future__ import annotations

import itertools

import pytest

from replica.core import inbox as inbox_module
from replica.core.events import Fetch
from replica.core.fetching import FETCH_AFTER_MS, FETCH_PAUSE_MS_MAX, Fetcher
from replica.core.inbox import Arrival, Inbox
from replica.core.rules import Wait
from tests.replica.core.harness import FakeLog

ME = 4


class Asking:
    """Replica 4 of five, its inboxes, and what it asked when."""

    def __init__(self) -> None:
        self.fetcher = Fetcher(ME, 5)
        self.logs = [FakeLog(author) for author in range(5)]
        self.inboxes = [Inbox(log.head) for log in self.logs]
        self.blind: set[int] = set()
        self.now = 0

    def due(self, ms: int = 0) -> list[Fetch]:
        self.now += ms
        return self.fetcher.due(self.now, self.inboxes, self.blind)

    def until(self, end_ms: int, step: int = 50) -> list[tuple[int, Fetch]]:
        return [(self.now, fetch) for _ in range(self.now, end_ms, step) for fetch in self.due(step)]

    def wait(self, log: int, *missing: int) -> None:
        self.fetcher.waiting(log, Wait("something", missing), self.now)


def test_a_cause_may_still_be_on_its_way():
    a = Asking()
    a.wait(3, 0, 1)
    assert a.due(FETCH_AFTER_MS - 1) == []
    assert a.due(1) == [Fetch(0, 1, 3), Fetch(1, 1, 3)], "its author has both"
    assert a.due() == [], "once"


def test_a_gap_is_asked_for_at_once_and_of_its_author():
    a = Asking()
    a.inboxes[2].seen = 5
    a.inboxes[2].received = 3
    assert a.due() == [Fetch(2, 4, 2)]


def test_pauses_double_per_round_and_not_per_question():
    a = Asking()
    a.wait(3, 0)
    asked = a.until(90_000)
    assert [fetch.ask for _, fetch in asked] == [(3, 0, 1, 2)[place % 4] for place in range(len(asked))]
    times = [when for when, _ in asked]
    pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
    rounds = [min(FETCH_AFTER_MS * 2**i, FETCH_PAUSE_MS_MAX) for i in range(20)]
    expected = [pause for pause in rounds for _ in range(4)]
    assert pauses == expected[: len(pauses)]
    assert len(pauses) > 4 * 6, "the longest pause was reached"


def test_what_comes_has_it_asked_for_soon_again_and_from_the_start():
    a = Asking()
    a.wait(3, 0)
    a.until(10_000)
    a.fetcher.arrived(0)
    assert a.due() == [Fetch(0, 1, 3)]
    assert a.due(FETCH_AFTER_MS) == [Fetch(0, 1, 0)]


def test_a_wait_that_ended_is_not_asked_for():
    a = Asking()
    a.wait(3, 0)
    a.fetcher.moved(3)
    a.fetcher.moved(2)
    assert a.until(1000) == []
    assert a.fetcher.waits == {}
    a.wait(3, 1)
    a.until(10_000)
    a.fetcher.moved(3)
    assert a.due() == []
    a.wait(3, 1)
    assert a.due(FETCH_AFTER_MS) == [Fetch(1, 1, 3)], "a new wait begins anew"


def test_the_same_wait_keeps_its_time():
    a = Asking()
    a.wait(3, 0)
    a.now = FETCH_AFTER_MS - 1
    a.wait(3, 0)
    assert a.due(1) == [Fetch(0, 1, 3)]


def test_nobody_is_asked_for_the_own_log_for_blind_ones_or_without_room(monkeypatch: pytest.MonkeyPatch):
    a = Asking()
    a.blind = {1}
    a.wait(3, ME, 1, 2)
    a.inboxes[1].seen = 7
    monkeypatch.setattr(inbox_module, "WAITING_ENTRIES_MAX", 1)
    assert a.inboxes[2].arrive(a.logs[2].say(b"waits for its cause")) is Arrival.TAKEN
    assert a.until(2000) == []
    a.inboxes[2].pop()
    assert a.due() == [Fetch(2, 2, 3)]


def test_the_author_of_the_entry_that_waited_first_is_asked_first():
    a = Asking()
    a.wait(3, 0)
    a.wait(1, 0)
    a.inboxes[0].seen = 9
    a.now = FETCH_AFTER_MS
    assert a.due() == [Fetch(0, 1, 3)]


def test_an_own_entry_that_waits_is_asked_of_the_others():
    a = Asking()
    a.wait(ME, 0)
    assert [fetch.ask for _, fetch in a.until(900)] == [0, 1, 2, 3, 0]
