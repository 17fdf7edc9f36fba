"""A primary cannot hide what it does to one client behind others, or behind what was executed long ago."""

from __future__ import annotations

import random

import pytest

from replica.apps import kv
from replica.core import expectation as expectation_module
from replica.core.batch import make_batch
from replica.core.envelope import Envelope
from replica.core.expectation import MISSES_MAX, OVERTAKEN_MAX, Expectation
from replica.core.genesis import Limits
from replica.core.line import TURN_MAX, cost_of
from replica.core.overtaking import SURELY_LATER
from replica.core.patience import Patience
from replica.core.requests import RequestQueue
from tests.replica.core.harness import Cluster, FakeClient, make_core, make_genesis, opened
from tests.replica.core.test_expectation import (
    FIRST,
    Watched,
    impatient_of_nothing,
    overloaded,
    relayed_and_overtaken,
)

G = make_genesis()


def after_a_good_view() -> Watched:
    watched = Watched()
    watched.serve(20, 200)
    watched.leave()
    assert watched.expectation.best is not None
    return watched


def test_padding_with_what_was_executed_before_is_no_work():
    watched = after_a_good_view()
    old = watched.clients[4].operations(*[b"\0"] * 1024)
    watched.execute(old)
    for _ in range(20):
        envelope = watched.ask()
        for step in range(98):
            watched.wait(10)
            if step % 20 == 0:
                watched.execute(*[old] * 10)
        watched.execute(envelope)
    assert watched.suspected is not None


def test_a_batch_that_holds_an_envelope_twice_did_its_work_once():
    watched = Watched()
    fresh = watched.clients[4].operations(*[b"\0"] * 100)
    watched.ask()
    watched.execute(*[fresh] * 50)
    assert watched.requests.work == watched.expectation._work == 100


@pytest.mark.parametrize("stale", [False, True])
def test_a_stale_envelope_in_each_batch_hides_no_unfairness(stale: bool):
    watched = impatient_of_nothing()
    old = watched.clients[4].operations(kv.get(b"k"))
    watched.execute(old)
    watched.ask(0)
    watched.wait(FIRST)
    for _ in range(OVERTAKEN_MAX):
        assert watched.suspected is None
        friends = watched.ask(1)
        watched.wait(10)
        watched.execute(friends, *[old] * stale)
    assert watched.suspected is not None


def test_nor_does_one_that_never_came_here():
    watched = impatient_of_nothing()
    watched.ask(0)
    watched.wait(FIRST)
    for _ in range(OVERTAKEN_MAX):
        friends = watched.ask(1)
        watched.wait(10)
        watched.execute(friends, watched.clients[2].operations(kv.get(b"k")))
    assert watched.suspected is not None


def test_what_never_came_here_overtakes_when_it_cannot_have_been_under_way():
    watched = impatient_of_nothing()
    watched.ask(0)
    watched.wait(FIRST)
    for _ in range(SURELY_LATER // 1024):
        watched.execute(watched.clients[1].operations(*[b"\0"] * 1024))
    waiting = watched.requests.claims.oldest()
    assert waiting is not None
    old = watched.clients[1].operations(kv.get(b"k"))
    watched.requests.executed(old)
    watched.execute(old)
    assert waiting.overtaken == 0, "what was executed before takes nobody's turn"
    for _ in range(OVERTAKEN_MAX):
        watched.execute(watched.clients[1].operations(kv.get(b"k")))
    assert waiting.overtaken == OVERTAKEN_MAX
    assert watched.suspected is not None


@pytest.mark.parametrize(("cost", "debt"), [(10, 0), (TURN_MAX, 0), (1024, 0), (1, 20), (1, 100)])
def test_others_may_be_ahead_by_what_a_request_costs_and_what_its_client_still_pays_for(cost: int, debt: int):
    watched = impatient_of_nothing()
    if debt:
        watched.execute(watched.clients[0].operations(*[b"\0"] * (TURN_MAX + debt)))
    watched.ask(0, cost)
    watched.wait(FIRST)
    waiting = watched.requests.claims.oldest()
    assert waiting is not None
    allowed, served = 3 * (min(cost, TURN_MAX) - 1 + debt), 0
    while not waiting.overtaken:
        assert served <= allowed
        friends = watched.ask(1)
        watched.wait(10)
        watched.execute(friends)
        served += 1
    assert served == allowed + 1


def test_a_client_that_is_served_late_is_not_outvoted_by_anothers_punctual_requests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expectation_module, "OVERTAKEN_MAX", 10**9)
    watched = Watched()
    overloaded(watched, 20, 100, 8)
    watched.leave()
    for waiting in list(watched.requests):
        watched.requests.drop(waiting)
    for _ in range(30):
        victims = watched.ask(0)
        for _ in range(9):
            friends = watched.ask(1)
            watched.wait(20)
            watched.execute(friends)
            watched.wait(80)
        watched.execute(victims)
    assert watched.expectation._all.misses < MISSES_MAX
    assert watched.suspected is not None


def test_only_so_many_clients_are_judged_by_themselves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expectation_module, "CLIENTS_MAX", 3)
    watched = Watched()
    for client in (0, 1, 2, 3, 4):
        watched.execute(watched.ask(client))
    assert list(watched.expectation._clients) == [watched.clients[client].key for client in (2, 3, 4)]


@pytest.mark.parametrize("seed", range(6))
def test_a_correct_primary_overtakes_nobody_whatever_clients_ask_for(seed: int):
    """Clients of all sorts, some of whom tell the backup of few or late of their requests; what is under way takes time."""
    rng = random.Random(seed)
    limits = Limits(batch_envelopes_max=rng.choice((4, 100)))
    primary, backup = RequestQueue(limits), RequestQueue(limits)
    expectation = Expectation(Patience(FIRST), 1)
    costs = [rng.choice((1, 1, 8, 64, 200, 1024)) for _ in range(8)]
    clients = [FakeClient(G, 100 + i) for i in range(8)]
    under_way: list[list[Envelope]] = []
    untold: list[Envelope] = []
    now, most, rate = 0.0, 0, rng.choice((3, 20))
    for _ in range(400):
        for i, client in enumerate(clients):
            while len(primary.of(client.key)) < (2 if i < 4 else 40):
                envelope = client.operations(*[b"\0"] * costs[i])
                primary.add(envelope, int(now))
                if i % 2:
                    untold.append(envelope)
                else:
                    backup.add(envelope, int(now))
        if rng.random() < 0.3 and untold:
            late = untold.pop(rng.randrange(len(untold)))
            if primary.find(late) is not None:
                backup.add(late, int(now))
        for waiting in backup.claims:
            if waiting.relayed_ms is None:
                waiting.relayed_ms = int(now)
                primary.add(waiting.envelope, int(now), peer=1)
        while taken := primary.take_batch():
            under_way.append(taken)
        batch = under_way.pop(0)
        now += sum(map(cost_of, batch)) / rate
        expectation.executed(make_batch(0, (), batch), backup, int(now))
        for queue in (primary, backup):
            for envelope in batch:
                queue.executed(envelope, int(now))
        most = max([most, *(waiting.overtaken for waiting in backup.claims)])
    assert most < OVERTAKEN_MAX


# What was executed before, as the executor says it.


def test_what_was_executed_before_is_said_of_each_envelope():
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    opening, one = client.open(), client.operations(kv.get(b"k"), kv.get(b"l"))
    overlapping = client.operations(*[kv.get(b"k")] * 4, first=client.next - 1)
    executor = cluster.cores[0].executor
    executor.execute(executor.slot + 1, make_batch(0, (), [opening, one, one, overlapping, opening]))
    assert executor.again == [0, 0, 2, 1, 1]


def test_the_core_counts_as_work_what_was_not_executed_before():
    core, client = make_core(G, 2), FakeClient(G)
    core._execute(1, make_batch(0, (), [client.open()]))
    (session,) = core.executor.table._sessions
    client.session = session
    one = client.operations(*[kv.get(b"k")] * 10)
    core._execute(2, make_batch(0, (), [one, one]))
    overlapping = client.operations(*[kv.get(b"k")] * 10, first=client.next - 5)
    core._execute(3, make_batch(0, (), [overlapping, one]))
    assert core._known.requests.work == 1 + 10 + 5


def test_whoever_is_behind_itself_calls_nobody_unfair():
    """It executes what was decided before the request came: of that nothing has overtaken it."""
    watched = impatient_of_nothing()
    oldest = watched.requests.find(watched.ask(0))
    assert oldest is not None
    watched.wait(FIRST)
    for _ in range(2 * OVERTAKEN_MAX):
        watched.expectation.excuse(watched.now, watched.requests.work)
        watched.now += 10
        watched.execute(*(watched.clients[1].operations(*[kv.get(b"k")] * 1024) for _ in range(SURELY_LATER // 1024)))
    assert (oldest.overtaken, watched.suspected) == (0, None)


def test_nor_soon_afterwards_but_then_it_does():
    watched = impatient_of_nothing()
    oldest = watched.requests.find(watched.ask(0))
    assert oldest is not None
    watched.wait(FIRST)
    relayed_and_overtaken(watched, 3)
    assert oldest.overtaken == 3
    watched.expectation.excuse(watched.now, watched.requests.work)
    assert oldest.overtaken == 0
    relayed_and_overtaken(watched, 1)
    assert oldest.overtaken == 0, "it may have been proposed before"
    watched.wait(FIRST)
    relayed_and_overtaken(watched, OVERTAKEN_MAX)
    assert watched.suspected is not None


def test_a_client_waits_for_what_it_paid_although_nothing_was_executed_for_it():
    """Two envelopes with the same numbers: the second is large, and only answered. The primary's line counts it."""
    watched = impatient_of_nothing()
    large = watched.clients[0].operations(*[kv.get(b"k")] * 1024)
    watched.expectation.executed(make_batch(0, (), [large]), watched.requests, watched.now, [1024])
    watched.requests.executed(large, watched.now, 1024)
    assert watched.requests.work == 0
    oldest = watched.requests.find(watched.ask(0))
    assert oldest is not None
    watched.wait(FIRST)
    relayed_and_overtaken(watched, OVERTAKEN_MAX)
    assert (oldest.overtaken, watched.suspected) == (0, None)


def test_and_for_what_it_pays_while_it_waits():
    watched = impatient_of_nothing()
    oldest = watched.requests.find(watched.ask(0))
    assert oldest is not None
    watched.wait(FIRST)
    answered = watched.clients[0].operations(*[kv.get(b"k")] * 64)
    for _ in range(OVERTAKEN_MAX):
        friends = watched.ask(1)
        watched.wait(10)
        watched.expectation.executed(make_batch(0, (), [answered]), watched.requests, watched.now, [64])
        watched.execute(friends)
    assert (oldest.overtaken, watched.suspected) == (0, None)
