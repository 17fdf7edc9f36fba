"""What is expected of a primary: when it falls, when it rises, and whom it calls slow or unfair."""

from __future__ import annotations

import pytest

from replica.apps import kv
from replica.core import expectation as module
from replica.core.batch import Batch, make_batch
from replica.core.entries import SUSPECT
from replica.core.envelope import Envelope
from replica.core.events import Append, Relay, RequestReceived
from replica.core.expectation import BEGIN_TIMES, END_TIMES, MISS, MISSES_MAX, OVERTAKEN_MAX, Expectation
from replica.core.patience import Patience
from replica.core.requests import RequestQueue
from tests.replica.core.harness import FakeClient, make_core, make_genesis
from tests.replica.core.support import Lone

G = make_genesis()
FIRST = 1000
ENOUGH = 250
MISSED = MISSES_MAX // MISS


class Watched:
    """A backup's requests and what it expects; time goes on in steps of 10 ms, and every step it is asked."""

    def __init__(self, f: int = 1, first_ms: int = FIRST) -> None:
        self.patience = Patience(first_ms)
        self.expectation = Expectation(self.patience, f)
        self.requests = RequestQueue(G.limits)
        self.clients = [FakeClient(G, 100 + i) for i in range(5)]
        self.now = 0
        self.view = 0
        self.n = 2 * f + 1
        self.suspected: int | None = None

    def ask(self, client: int = 0, operations: int = 1) -> Envelope:
        envelope = self.clients[client].operations(*[kv.get(b"k")] * operations)
        waiting = self.requests.add(envelope, self.now)
        assert waiting is not None
        waiting.relayed_ms = self.now
        return envelope

    def execute(self, *envelopes: Envelope) -> None:
        batch: Batch = make_batch(0, (), list(envelopes))
        self.expectation.executed(batch, self.requests, self.now)
        for envelope in envelopes:
            self.requests.executed(envelope)
        self.look()

    def wait(self, ms: int) -> None:
        for _ in range(ms // 10):
            self.now += 10
            self.look()

    def look(self) -> None:
        if self.suspected is None and self.expectation.is_disappointed(self.requests, self.now):
            self.suspected = self.now

    def serve(self, wait_ms: int, count: int) -> int:
        """Serve one request after the other, each after so long; return how many there were before it was too slow."""
        for done in range(count):
            envelope = self.ask()
            self.wait(wait_ms)
            self.execute(envelope)
            if self.suspected is not None:
                return done + 1
        return count

    def leave(self) -> None:
        self.view += 1
        self.suspected = None
        self.patience.enter_view(self.now)
        self.expectation.enter_view(self.view % self.n, self.now)
        self.requests.begin_view(())


def test_a_primary_that_stays_just_under_patience_is_left_soon():
    watched = Watched()
    assert watched.serve(990, 100) <= 8
    assert watched.suspected is not None


def test_the_nearer_to_enough_the_later_it_is_left_and_who_is_quick_enough_never_is():
    turns = [Watched().serve(wait_ms, 200) for wait_ms in (990, 700, 500, 300)]
    assert turns == sorted(turns)
    assert turns[-1] <= 60
    watched = Watched()
    assert watched.serve(ENOUGH, 500) == 500
    assert watched.suspected is None


def test_where_nothing_waits_nothing_is_expected():
    watched = Watched()
    for _ in range(50):
        watched.serve(20, 1)
        watched.wait(20_000)
    assert watched.suspected is None
    # Nor does more than one period end with one request, however long nobody asks for another.
    idle = Watched()
    idle.serve(20, 1)
    idle.wait(60_000)
    assert idle.expectation.expected_ms == FIRST - FIRST // module.RAISE_PART


def test_a_view_that_executed_nothing_is_the_business_of_patience():
    watched = Watched()
    watched.ask()
    watched.wait(60_000)
    assert watched.suspected is None
    watched.execute(watched.ask(1))
    watched.wait(MISSED * FIRST + 10)
    assert watched.suspected is not None, "afterwards it is not, if the oldest goes on to wait"


def test_one_bad_moment_is_no_slowness():
    watched = Watched()
    watched.serve(50, 40)
    begin = watched.expectation.expected_ms
    assert begin == ENOUGH or begin < FIRST
    watched.serve(900, 3)
    assert watched.suspected is None
    watched.serve(50, 40)
    watched.serve(900, 3)
    assert watched.suspected is None
    assert watched.serve(900, 20) <= MISSED


def test_a_slow_network_has_f_primaries_left_and_then_no_more():
    for f in (1, 2, 3):
        watched, left = Watched(f), 0
        for _ in range(600):
            watched.serve(600, 1)
            if watched.suspected is not None:
                left += 1
                watched.leave()
        assert left == f, f"f = {f}"


def test_with_something_to_compare_with_the_expectation_begins_and_ends_as_so_many_times_the_best():
    watched = Watched()
    watched.serve(300, 10)
    watched.leave()
    assert (watched.expectation.expected_ms, watched.expectation.floor_ms) == (BEGIN_TIMES * 300, END_TIMES * 300)
    watched.serve(300, 200)
    assert watched.expectation.expected_ms == END_TIMES * 300
    assert watched.suspected is None


def test_a_slow_primary_is_left_sooner_when_a_quick_one_was_seen():
    watched = Watched()
    watched.serve(50, 10)
    watched.leave()
    assert watched.expectation.expected_ms == ENOUGH
    assert watched.serve(990, 100) <= MISSED + 1


def test_the_own_record_is_nothing_to_compare_with():
    watched = Watched()
    watched.serve(800, 5)
    for _ in range(3):
        watched.leave()
    assert watched.view % 3 == 0
    assert watched.expectation.best is None


def test_a_view_of_few_requests_is_compared_with_nothing():
    watched = Watched()
    watched.serve(10, module.MEASURED_MIN - 1)
    watched.leave()
    assert watched.expectation.best is None


def test_what_waited_before_the_view_is_not_its_primarys_doing():
    watched = Watched()
    watched.serve(100, 5)
    old = [watched.ask(client) for client in range(4)]
    watched.wait(3000)
    watched.leave()
    watched.wait(100)
    for envelope in old:
        watched.execute(envelope)
    assert watched.expectation._all.late == 0


def test_whoever_is_behind_itself_judges_nobody():
    watched = Watched()
    watched.serve(50, 30)
    envelope = watched.ask()
    for _ in range(600):
        watched.now += 10
        watched.expectation.excuse(watched.now, watched.requests.work)
        watched.look()
    watched.execute(envelope)
    assert watched.suspected is None
    assert watched.expectation._all.misses == 0


def overloaded(watched: Watched, seconds: int, wait_ms: int, per_100_ms: int) -> None:
    """Let so many clients wait that each request is executed only after `wait_ms`, others all the time."""
    line: list[tuple[int, Envelope]] = []
    for _ in range(seconds * 10):
        watched.wait(100)
        line += [(watched.now, watched.ask(i % 5)) for i in range(per_100_ms)]
        due = [envelope for at, envelope in line if watched.now - at >= wait_ms]
        line = [(at, envelope) for at, envelope in line if watched.now - at < wait_ms]
        if due:
            watched.execute(*due)


def test_a_primary_with_much_to_do_is_not_slow():
    watched = Watched()
    overloaded(watched, 20, 100, 8)
    watched.leave()
    best = watched.expectation.best
    assert best is not None
    assert best.wait_ms <= 110
    # As much is executed as in the best view, but everything waits eight times as long.
    overloaded(watched, 60, 900, 8)
    assert watched.suspected is None


def test_who_executes_little_while_much_waits_is_slow():
    watched = Watched()
    overloaded(watched, 20, 100, 8)
    watched.leave()
    overloaded(watched, 60, 900, 1)
    assert watched.suspected is not None


def test_when_more_than_f_views_in_a_row_failed_less_is_expected_until_it_is_met():
    watched, left = Watched(), []
    watched.serve(20, 20)
    watched.leave()
    # The network has become 100 times slower for everybody.
    for _ in range(500):
        watched.serve(2000, 1)
        if watched.suspected is not None:
            left.append(watched.now)
            watched.leave()
    assert 2 <= len(left) <= 6
    assert watched.now - left[-1] > 400_000


@pytest.mark.parametrize("f", [1, 2, 3])
def test_faulty_views_that_take_failures_back_do_not_make_it_change_views_for_ever(f: int):
    """The faulty primaries serve their friends at once, so that nobody can be as quick, and end their views."""
    watched, left_at, rounds = Watched(f), 0, 0
    while rounds < 200 and watched.now - left_at < 400_000:
        rounds += 1
        for _ in range(f):
            watched.serve(10, 40)
            watched.leave()
        for _ in range(f + 1):
            watched.serve(2000, 200)
            if watched.suspected is None:
                return
            watched.leave()
            left_at = watched.now
    pytest.fail(f"view {watched.view} was left")


def test_a_view_left_as_slow_is_a_failure_and_a_good_one_takes_one_back():
    watched = Watched()
    failures = []
    for wait_ms in (990, 990, 20, 20, 20):
        watched.serve(wait_ms, 40)
        watched.leave()
        failures.append(watched.expectation._failures)
    assert failures[0] == 1
    assert failures[-1] == 0
    watched.expectation._failures = 3
    watched.serve(20, 20)
    watched.leave()
    assert watched.expectation._failures == 2, "one view takes back one, however much was met in it"


# Unfair.


def relayed_and_overtaken(watched: Watched, batches: int, known: bool = True) -> None:
    for _ in range(batches):
        envelope = watched.ask(1) if known else watched.clients[1].operations(kv.get(b"k"))
        watched.wait(10)
        watched.execute(envelope)


def test_a_primary_that_lets_others_overtake_is_unfair():
    watched = Watched()
    watched.patience.present_ms = 64_000
    watched = watched_with(watched.patience)
    watched.ask(0)
    watched.wait(FIRST)
    relayed_and_overtaken(watched, OVERTAKEN_MAX - 1)
    assert watched.suspected is None
    relayed_and_overtaken(watched, 1)
    assert watched.suspected is not None


def watched_with(patience: Patience) -> Watched:
    watched = Watched()
    watched.patience = patience
    watched.expectation = Expectation(patience, 1)
    return watched


def impatient_of_nothing() -> Watched:
    """A backup whose patience has grown, so that waiting alone says nothing for a long time."""
    patience = Patience(FIRST)
    patience.present_ms = 64_000
    return watched_with(patience)


def test_what_never_came_here_may_have_come_first():
    watched = impatient_of_nothing()
    watched.ask(0)
    watched.wait(FIRST)
    relayed_and_overtaken(watched, 3 * OVERTAKEN_MAX, known=False)
    assert watched.suspected is None


def test_its_own_clients_other_requests_do_not_count_nor_what_it_is_executed_with():
    watched = impatient_of_nothing()
    watched.ask(0)
    watched.wait(FIRST)
    for _ in range(2 * OVERTAKEN_MAX):
        others = [watched.ask(1), watched.ask(0)]
        watched.wait(10)
        watched.execute(*others)
    assert watched.suspected is None


def test_a_request_that_the_primary_was_not_handed_is_overtaken_by_nobody():
    watched = impatient_of_nothing()
    waiting = watched.requests.find(watched.ask(0))
    assert waiting is not None
    waiting.relayed_ms = None
    watched.wait(FIRST)
    relayed_and_overtaken(watched, 2 * OVERTAKEN_MAX)
    assert watched.suspected is None


def test_what_was_under_way_when_it_came_counts_for_nothing():
    watched = impatient_of_nothing()
    watched.ask(0)
    relayed_and_overtaken(watched, ENOUGH // 10)
    waiting = watched.requests.oldest()
    assert waiting is not None
    assert waiting.overtaken == 0
    relayed_and_overtaken(watched, 3)
    assert waiting.overtaken == 3


def test_no_view_is_left_sooner_than_after_a_first_patience():
    watched = impatient_of_nothing()
    watched.ask(0)
    watched.wait(ENOUGH)
    relayed_and_overtaken(watched, 70)
    assert watched.suspected is None
    relayed_and_overtaken(watched, 10)
    assert watched.suspected == FIRST
    # The same for slowness: the shortest periods there are.
    watched = Watched()
    watched.serve(20, 10)
    watched.leave()
    began = watched.now
    watched.execute(watched.ask(1))
    watched.ask(0)
    watched.wait(3000)
    assert watched.suspected is not None
    assert watched.suspected - began >= FIRST


def test_a_new_view_counts_anew():
    watched = impatient_of_nothing()
    watched.ask(0)
    watched.wait(FIRST)
    relayed_and_overtaken(watched, OVERTAKEN_MAX - 1)
    watched.leave()
    waiting = watched.requests.oldest()
    assert waiting is not None
    assert (waiting.overtaken, waiting.relayed_ms) == (0, None)


# The core: who asks, of whom, and when not.


def test_a_backup_says_suspect_of_a_primary_that_disappoints_and_says_it_once(monkeypatch: pytest.MonkeyPatch):
    lone = Lone(make_core(G, 2))
    monkeypatch.setattr(Expectation, "is_disappointed", lambda *_: True)
    lone.tick(50)
    lone.tick(50)
    assert [payload[0] for effect in lone.of(Append) for payload in effect.payloads] == [SUSPECT]


def test_a_primary_does_not_judge_itself(monkeypatch: pytest.MonkeyPatch):
    lone = Lone(make_core(G, 0))
    monkeypatch.setattr(Expectation, "is_disappointed", lambda *_: True)
    lone.tick(50)
    assert not lone.of(Append)


def test_a_request_counts_from_when_it_was_handed_to_the_primary_first():
    lone = Lone(make_core(G, 2))
    lone.tick(50)
    envelope = FakeClient(G).operations(kv.get(b"k"))
    lone.handle(RequestReceived(envelope, relayed=False))
    waiting = lone.core._known.requests.find(envelope)
    assert waiting is not None
    assert waiting.relayed_ms == 50
    lone.tick(400)
    assert len(lone.of(Relay)) == 2
    assert waiting.relayed_ms == 50


def test_what_is_executed_is_noted_before_it_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    monkeypatch.setattr(Expectation, "executed", lambda _, batch, requests, now_ms, again: seen.append(len(requests)))
    core = make_core(G, 2)
    envelope = FakeClient(G).operations(kv.get(b"k"))
    core._known.requests.add(envelope, 0)
    core._execute(1, make_batch(0, (), [envelope]))
    assert seen == [1]
    assert len(core._known.requests) == 0
    assert core._known.requests.work == 1


def test_during_a_transfer_and_with_more_to_read_nobody_is_judged(monkeypatch: pytest.MonkeyPatch):
    excused: list[int] = []
    monkeypatch.setattr(Expectation, "excuse", lambda _, now_ms, work: excused.append((now_ms, work)))
    lone = Lone(make_core(G, 2))
    lone.tick(50)
    lone.core.handle()
    assert excused == []
    monkeypatch.setattr(lone.core._catch_up, "transfer", object())
    lone.core.handle()
    assert excused == [(50, lone.core._known.requests.work)]


def test_a_core_that_begins_in_a_later_view_knows_whom_it_judges():
    core = make_core(G, 2)
    core._known.states[2].view = 4
    core._pen.resume()
    assert core._pen.expectation.primary == 4 % 3
