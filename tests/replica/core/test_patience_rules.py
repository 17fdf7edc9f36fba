"""When a replica loses patience, and what restores it: rule by rule, and over rounds of spoiled views."""

from __future__ import annotations

import pytest

from replica.apps import kv
from replica.core.entries import SUSPECT, VIEW_CHANGE, Suspect, ViewChange
from replica.core.events import Append, GroupReceived, Relay, RequestReceived
from replica.core.patience import PATIENCE_FIRST_MS, Patience
from replica.core.requests import RequestQueue
from tests.replica.core.harness import FakeClient, FakeLog, make_core, make_genesis
from tests.replica.core.support import Lone

G = make_genesis()
FIRST = 100


def patience(present_ms: int = FIRST, view_began_ms: int = 1000) -> Patience:
    """Patience in the middle of its life: in a view that began at 1000."""
    found = Patience(FIRST)
    found.enter_view(view_began_ms)
    found.present_ms = present_ms
    return found


def test_it_doubles_with_each_view_that_executed_nothing_and_without_end():
    found = Patience(FIRST)
    for view in range(1, 40):
        found.enter_view(view * 1000)
        assert found.present_ms == FIRST << view


def test_a_view_that_executed_something_does_not_double_it():
    found = patience(800)
    found.executed(None)
    found.enter_view(2000)
    assert found.present_ms == 800
    found.enter_view(3000)
    assert found.present_ms == 1600, "what an earlier view executed does not count for this one"


def test_an_old_request_halves_it_and_does_not_reset_it():
    found = patience(1600)
    found.executed(999)
    assert found.present_ms == 800


def test_a_request_that_came_in_this_view_or_never_waited_here_restores_nothing():
    found = patience(1600)
    for since in (1000, 1500, None):
        found.executed(since)
    assert found.present_ms == 1600


def test_it_is_halved_once_per_view():
    found = patience(1600)
    for since in (1, 2, 999):
        found.executed(since)
    assert found.present_ms == 800
    found.enter_view(3000)
    for since in (1, 1500):
        found.executed(since)
    assert found.present_ms == 400


def test_it_doubles_with_each_view_in_which_it_ended_whatever_that_executed():
    found = patience(400)
    found.executed(None)
    assert found.has_ended(1000, 1400)
    found.executed(1000)
    found.enter_view(1500)
    assert found.present_ms == 800
    found.executed(None)
    found.enter_view(9000)
    assert found.present_ms == 800, "and in no later one"


def test_a_view_in_which_it_ended_has_not_halved_it():
    found = patience(400)
    found.executed(500)
    assert found.present_ms == 200
    assert found.has_ended(700, 1200)
    found.enter_view(5000)
    assert found.present_ms == 800


@pytest.mark.parametrize(("lasted", "after"), [(399, 400), (400, 200)])
def test_a_view_that_was_shorter_than_it_has_not_halved_it(lasted, after):
    found = patience(400)
    found.executed(500)
    found.enter_view(1000 + lasted)
    assert found.present_ms == after


def test_a_correct_primary_that_serves_everybody_but_not_soon_enough_is_not_left_for_ever():
    # In each view many old requests are executed, and the oldest claim of each of two replicas waits for long.
    needed_ms, now, left = 20 * FIRST, 1000, 0
    replicas = [patience(), patience()]
    while any(not one.present_ms > needed_ms for one in replicas):
        left += 1
        assert left <= 12
        victim, other = replicas if left % 2 else reversed(replicas)
        for one in replicas:
            one.executed(now - 1)
        now += victim.present_ms
        assert victim.has_ended(0, now)
        other.executed(now - 1)
        for one in replicas:
            one.enter_view(now)


def test_it_never_becomes_shorter_than_the_first():
    found = patience(FIRST + 1)
    found.executed(0)
    assert found.present_ms == FIRST
    assert Patience().present_ms == PATIENCE_FIRST_MS


@pytest.mark.parametrize(("oldest", "ends"), [(500, 1000 + FIRST), (1000, 1000 + FIRST), (1030, 1030 + FIRST)])
def test_it_runs_from_when_the_request_came_or_the_view_began(oldest, ends):
    found = patience()
    assert not found.has_ended(oldest, ends - 1)
    assert found.has_ended(oldest, ends)


def test_it_has_no_end_while_nothing_waits():
    assert not patience().has_ended(None, 10**9)


@pytest.mark.parametrize("f", [1, 2, 3])
@pytest.mark.parametrize("old_requests", [1, 5])
def test_f_spoiled_views_in_each_round_do_not_keep_it_short(f, old_requests):
    # The f faulty primaries let a few old requests through in each of their views; the f + 1 honest views are too short
    # for anything, until one is as long as the network needs.
    needed_ms = 64 * FIRST
    found, now, rounds = Patience(FIRST), 0, 0
    while found.present_ms < needed_ms:
        rounds += 1
        assert rounds <= 6, "it doubles at least once per round"
        for view in range(2 * f + 1):
            now += found.present_ms
            found.enter_view(now)
            if view < f:
                for _ in range(old_requests):
                    found.executed(now - 1)
    assert now <= 2**f * 4 * needed_ms


# Requests.


def test_a_request_that_is_sent_again_has_waited_since_the_first_time():
    queue = RequestQueue(G.limits)
    envelope = FakeClient(G).operations(kv.put(b"k", b"v"))
    queue.add(envelope, 10)
    waiting = queue.find(envelope)
    assert waiting is not None
    waiting.relay_at_ms, waiting.relay_pause_ms = 900, 600
    assert queue.add(envelope, 500) is None
    assert (waiting.since_ms, waiting.relay_at_ms, waiting.relay_pause_ms) == (10, 900, 600)
    assert queue.executed(envelope) == 10


def test_the_oldest_is_the_one_that_came_first_whatever_was_sent_again_proposed_or_carried():
    queue = RequestQueue(G.limits)
    first, second = (FakeClient(G, number).operations(kv.put(b"k", b"v")) for number in (100, 101))
    queue.add(first, 10)
    queue.add(second, 20)
    queue.add(first, 30)
    queue.take_batch()
    queue.begin_view([first])
    oldest = queue.oldest()
    assert oldest is not None
    assert (oldest.envelope, oldest.since_ms) == (first, 10)
    queue.executed(first)
    assert queue.oldest() is queue.find(second)


# The pen: a backup of view 0 that is alone with what it is told.


def backup(number: int = 2) -> Lone:
    return Lone(make_core(G, number))


def said(lone: Lone) -> list[int]:
    return [payload[0] for effect in lone.of(Append) for payload in effect.payloads]


def suspected_at(lone: Lone, until_ms: int, again: object = None) -> int | None:
    """Let time pass; return when it says SUSPECT. `again` is handed in before every tick."""
    while lone.now < until_ms:
        if again is not None:
            lone.handle(again)
        lone.tick(50)
        if SUSPECT in said(lone):
            return lone.now
    return None


def test_sending_a_request_again_does_not_prolong_patience():
    lone = backup()
    request = RequestReceived(FakeClient(G).operations(kv.put(b"k", b"v")), relayed=False)
    lone.tick(50)
    lone.handle(request)
    assert suspected_at(lone, 3 * PATIENCE_FIRST_MS, request) == 50 + PATIENCE_FIRST_MS


def test_a_primary_that_broke_a_rule_is_suspected_at_once():
    lone, primary = backup(), FakeLog(0)
    lone.tick(50)
    lone.handle(GroupReceived(primary.say(b"no entry")))
    assert lone.core.exposed.keys() == {0}
    assert said(lone) == [SUSPECT]
    assert lone.now == 50


def test_another_replica_that_broke_a_rule_is_not_the_views_fault():
    lone, other = backup(), FakeLog(1)
    lone.handle(GroupReceived(other.say(b"no entry")))
    lone.tick(2 * PATIENCE_FIRST_MS)
    assert lone.core.exposed.keys() == {1}
    assert said(lone) == []


def test_a_view_whose_primary_broke_a_rule_before_is_left_at_once():
    lone, first, second = backup(), FakeLog(0), FakeLog(1)
    lone.handle(GroupReceived(second.say(Suspect(0), b"no entry")))
    lone.handle(GroupReceived(first.say(Suspect(0))))
    # Replicas 0 and 1 leave view 0, whose next primary is exposed already.
    assert said(lone) == [VIEW_CHANGE, SUSPECT]


def test_in_a_new_view_requests_are_handed_to_its_primary_at_once():
    lone, first, second = backup(), FakeLog(0), FakeLog(1)
    lone.handle(RequestReceived(FakeClient(G).operations(kv.put(b"k", b"v")), relayed=False))
    lone.tick(350)
    assert [relay.to for relay in lone.of(Relay)] == [0, 0]
    # The next time would be when twice the pause is over, 600 ms later.
    lone.handle(GroupReceived(first.say(Suspect(0))), GroupReceived(second.say(Suspect(0), ViewChange(1))))
    assert lone.core.view == 1
    lone.tick(50)
    assert [relay.to for relay in lone.of(Relay)] == [0, 0, 1]
    # And its pauses begin anew.
    lone.tick(250)
    assert [relay.to for relay in lone.of(Relay)] == [0, 0, 1]
    lone.tick(50)
    assert [relay.to for relay in lone.of(Relay)] == [0, 0, 1, 1]


def test_patience_with_a_view_begins_when_it_is_entered_and_is_doubled_then():
    lone, first, second = backup(), FakeLog(0), FakeLog(1)
    lone.handle(RequestReceived(FakeClient(G).operations(kv.put(b"k", b"v")), relayed=False))
    lone.tick(900)
    lone.handle(GroupReceived(first.say(Suspect(0))), GroupReceived(second.say(Suspect(0), ViewChange(1))))
    assert said(lone) == [VIEW_CHANGE]
    assert lone.core.patience.present_ms == 2 * PATIENCE_FIRST_MS
    assert suspected_at(lone, 9000) == 900 + 2 * PATIENCE_FIRST_MS
