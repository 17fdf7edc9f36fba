"""Order of arrival never matters; what is missing is fetched, from its author or from anyone who has it."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.apps import kv
from replica.core.entries import PrePrepare
from replica.core.envelope import OperationsReply
from replica.core.events import Executed, Fetch, GroupReceived, Send, Tick
from replica.core.genesis import Genesis, Ordering
from replica.core.group import VerifiedGroup
from replica.core.inbox import EARLY_GROUPS_MAX
from tests.replica.core.harness import Cluster, FakeClient, FakeLog, make_core, make_genesis, opened
from tests.replica.core.support import Lone, examples, junk_batch

CLUSTERS = [(f, ordering) for f in (1, 2) for ordering in Ordering]
in_every_cluster = pytest.mark.parametrize(("f", "ordering"), CLUSTERS, ids=str)


def work(cluster: Cluster, slots: int, clients: int = 2, shuffle: bool = False) -> list[FakeClient]:
    """Open sessions and order about `slots` batches."""
    users = [opened(cluster, FakeClient(cluster.genesis, 100 + i)) for i in range(clients)]
    for number in range(slots):
        for user in users[: 1 + number % clients]:
            cluster.request(user.operations(kv.incr(b"n"), kv.put(b"k%d" % number, b"v")))
        cluster.run(shuffle)
    cluster.settle(2, shuffle)
    return users


@functools.cache
def fixed_run(f: int, ordering: Ordering) -> tuple[Genesis, list[VerifiedGroup], list[tuple[int, bytes]]]:
    """Every group of a run in which the last replica was silent, and what was executed."""
    genesis = make_genesis(f, ordering)
    cluster = Cluster(genesis, faulty=(genesis.n - 1,))
    work(cluster, 9)
    cluster.check()
    groups = [group for log in cluster.logs for group in log.groups]
    assert max(len(log.groups) for log in cluster.logs) < EARLY_GROUPS_MAX
    return genesis, groups, cluster.history(0)


def outcome(genesis: Genesis, deliveries: list[VerifiedGroup], rng: random.Random) -> tuple:
    """What the last replica makes of these deliveries: handed in by chance sizes, its own appends late by chance."""
    lone = Lone(make_core(genesis, genesis.n - 1))
    rest = [GroupReceived(group) for group in deliveries]
    while rest:
        size = rng.choice((1, 1, 1, 2, 5, 40))
        lone.hold = rng.random() < 0.3
        lone.handle(*rest[:size])
        del rest[:size]
        if rng.random() < 0.2:
            lone.tick(rng.choice((1, 100, 1000)))
        if lone.held and rng.random() < 0.5:
            lone.release()
    lone.hold = False
    while lone.held:
        lone.release()
    core = lone.core
    assert core.halted is None
    assert not core.exposed
    for state in (*core._known.states, core._pen.state):
        state.check()
    return (
        [(e.slot, e.batch.digest) for e in lone.of(Executed)],
        [(e.client, e.reply) for e in lone.of(Send)],
        core.executor.digest(),
        core.stable,
        [(core.read(log), core.received(log), core.head(log)) for log in range(genesis.n - 1)],
        lone.log.last > 0,
    )


@in_every_cluster
@examples(20)
@given(rng=st.randoms(use_true_random=False))
def test_any_order_and_any_duplicates_give_the_same(f: int, ordering: Ordering, rng: random.Random):
    genesis, groups, history = fixed_run(f, ordering)
    reference = outcome(genesis, groups, random.Random(0))
    deliveries = groups + rng.choices(groups, k=rng.randrange(len(groups)))
    rng.shuffle(deliveries)
    result = outcome(genesis, deliveries, rng)
    assert result == reference
    assert result[0] == history
    assert len(history) >= 9


@in_every_cluster
@pytest.mark.parametrize("seed", range(4))
def test_a_whole_cluster_under_shuffled_and_doubled_deliveries(f: int, ordering: Ordering, seed: int):
    cluster = Cluster(make_genesis(f, ordering), seed=seed)
    cluster.duplicate = 0.2
    work(cluster, 10, clients=3, shuffle=True)
    cluster.check()
    digests = {core.executor.digest() for core in cluster.cores.values()}
    assert len(digests) == 1
    assert len(cluster.history(0)) >= 10
    # A request that comes after its execution is answered again: the same answer each time, and everywhere.
    answers: dict[tuple, set[OperationsReply]] = {}
    for replica in cluster.cores:
        for reply in cluster.replies(replica):
            if isinstance(reply, OperationsReply):
                answers.setdefault((reply.session, reply.first), set()).add(reply)
    assert all(len(different) == 1 for different in answers.values())
    assert len(answers) > 10
    assert all(core.requests_waiting == 0 for core in cluster.cores.values())


def proposals(count: int, genesis: Genesis) -> tuple[FakeLog, list[VerifiedGroup]]:
    """A primary's log of `count` groups, one proposal each."""
    log = FakeLog(0)
    k = genesis.limits.checkpoint_interval
    return log, [
        log.say(PrePrepare(0, slot, junk_batch(slot, (0,) * genesis.n if slot % k == 0 else ())))
        for slot in range(1, count + 1)
    ]


def test_a_gap_is_waited_for_asked_for_and_then_read():
    genesis = make_genesis()
    lone = Lone(make_core(genesis, 1))
    _, groups = proposals(3, genesis)
    lone.handle(GroupReceived(groups[0]), GroupReceived(groups[2]))
    assert (lone.core.received(0), lone.core.read(0)) == (1, 1)
    asked = [effect for _ in range(4) for effect in lone.tick() if isinstance(effect, Fetch)]
    assert all((fetch.log, fetch.first) == (0, 2) for fetch in asked)
    assert asked[0].ask == 0, "the author first"
    assert {fetch.ask for fetch in asked} == {0, 2}, "then whoever else may have it"
    lone.handle(GroupReceived(groups[1]))
    assert lone.core.read(0) == 3
    assert not [e for e in lone.tick() if isinstance(e, Fetch)]


def test_a_gap_is_not_closed_by_arithmetic():
    """ATTACKS 3: entries 1, 2, 2, 4 of a log, four groups in all, and entry 3 never seen."""
    genesis = make_genesis()
    lone = Lone(make_core(genesis, 1))
    _, groups = proposals(4, genesis)
    for group in (groups[0], groups[1], groups[1], groups[3]):
        lone.handle(GroupReceived(group))
    assert lone.core.read(0) == 2
    assert lone.core._pen.state.last_vote == 2


def test_a_cause_that_is_missing_is_asked_of_whoever_named_it():
    genesis = make_genesis(2)
    lone = Lone(make_core(genesis, 4))
    _, groups = proposals(1, genesis)
    voter = Lone(make_core(genesis, 3))
    voter.handle(GroupReceived(groups[0]))
    lone.handle(GroupReceived(voter.log.groups[0]))
    assert lone.core.read(3) == 0
    assert lone.core.waiting_for(3) == "the proposal for slot 1 in view 0"
    assert not [e for e in lone.tick(100) if isinstance(e, Fetch)], "it may still be on its way"
    asked = [(lone.now, e) for _ in range(120) for e in lone.tick(50) if isinstance(e, Fetch)]
    assert asked[0] == (150, Fetch(log=0, first=1, ask=3)), "its voter has it"
    assert [fetch.ask for _, fetch in asked[:8]] == [3, 0, 1, 2] * 2, "all others in turn, itself never"
    pauses = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(asked)]
    assert pauses == [150] * 4 + [300] * 4 + [600] * 4 + [1200], "all were asked: then half as often"
    lone.handle(GroupReceived(groups[0]))
    assert lone.core.waiting_for(3) is None
    assert lone.core.read(3) == 1


@in_every_cluster
@pytest.mark.parametrize("whose", [0, 1])
def test_a_log_withheld_from_one_replica_is_fetched_from_others(f: int, ordering: Ordering, whose: int):
    genesis = make_genesis(f, ordering)
    cluster = Cluster(genesis)
    last = genesis.n - 1
    cluster.cut_off = {(whose, last)}
    # The author itself gives nothing either.
    true_handle = cluster.handle

    def handle(replica: int, event) -> None:
        if replica == last and isinstance(event, Tick):
            for effect in cluster.cores[replica].handle(event):
                cluster.effects[replica].append(effect)
                if isinstance(effect, Fetch) and effect.ask != whose:
                    for group in cluster.logs[effect.log].groups:
                        if effect.first <= group.last <= cluster.cores[effect.ask].received(effect.log):
                            cluster.in_flight.append((replica, GroupReceived(group)))
        else:
            true_handle(replica, event)

    cluster.handle = handle  # type: ignore[method-assign]
    users = [FakeClient(genesis)]
    cluster.request(users[0].open())
    cluster.settle(12)
    users[0].session = cluster.replies(0)[0].session
    for number in range(8):
        cluster.request(users[0].operations(kv.put(b"%d" % number, b"v")))
        cluster.run()
    cluster.settle(40)
    cluster.check()
    assert len(cluster.history(last)) == 9
    assert cluster.cores[last].received(whose) > 0
    assert any(e.log == whose and e.ask != whose for e in cluster.of(last, Fetch))


@pytest.mark.parametrize("ordering", Ordering)
def test_a_proposal_shown_to_one_correct_replica_only_is_executed_by_all(ordering: Ordering):
    """ATTACKS 9: else that one executes alone, and its client waits for ever for f + 1 replies."""
    genesis = make_genesis(1, ordering)
    cluster = Cluster(genesis, faulty=(0,))
    client = FakeClient(genesis)
    batch = PrePrepare(0, 1, junk_batch(1))
    cluster.publish(cluster.logs[0].say(batch), to=(1,))
    cluster.settle(4)
    cluster.check()
    assert cluster.history(1) == cluster.history(2) == [(1, batch.batch.digest)]
    assert client.next == 1


def test_more_early_groups_than_fit_are_read_in_the_end():
    """ATTACKS 6: a reorder buffer that drops future messages must not wedge its peer."""
    genesis = make_genesis(interval=128)
    count = EARLY_GROUPS_MAX + 40
    lone = Lone(make_core(genesis, 1))
    _, groups = proposals(count, genesis)
    for group in reversed(groups[1:]):
        lone.handle(GroupReceived(group))
    assert lone.core.refusals["group-dropped"] == 39
    lone.handle(GroupReceived(groups[0]))
    for _ in range(3):
        for fetch in [e for e in lone.tick() if isinstance(e, Fetch)]:
            lone.handle(*[GroupReceived(g) for g in groups if g.last >= fetch.first])
    assert lone.core.read(0) == count
    assert lone.core._pen.state.last_vote == count


def test_what_was_dropped_early_is_asked_for_although_nothing_else_arrives():
    genesis = make_genesis(interval=128)
    lone = Lone(make_core(genesis, 1))
    _, groups = proposals(EARLY_GROUPS_MAX + 5, genesis)
    for group in (*groups[1:], groups[0]):
        lone.handle(GroupReceived(group))
    assert lone.core.received(0) == EARLY_GROUPS_MAX + 1
    assert lone.tick() == [Fetch(0, EARLY_GROUPS_MAX + 2, 0)]


@in_every_cluster
def test_f_silent_replicas_stop_nothing(f: int, ordering: Ordering):
    genesis = make_genesis(f, ordering)
    for silent in itertools.combinations(range(1, genesis.n), f):
        cluster = Cluster(genesis, faulty=silent)
        users = work(cluster, 9)
        cluster.check()
        for replica in cluster.cores:
            assert len(cluster.history(replica)) >= 9
            assert cluster.cores[replica].stable >= 8
        assert users[0].next > 9


@in_every_cluster
def test_f_plus_one_silent_replicas_stop_everything_and_hurt_nothing(f: int, ordering: Ordering):
    genesis = make_genesis(f, ordering)
    cluster = Cluster(genesis, faulty=tuple(range(f, genesis.n))[: f + 1])
    cluster.request(FakeClient(genesis).open())
    cluster.settle(5)
    cluster.check()
    assert all(cluster.history(replica) == [] for replica in cluster.cores)


@in_every_cluster
def test_much_at_once_is_worked_off_in_portions_and_comes_to_the_same(f: int, ordering: Ordering):
    genesis, groups, history = fixed_run(f, ordering)
    core, whole = make_core(genesis, genesis.n - 1, live=False), make_core(genesis, genesis.n - 1, live=False)
    core.work_max = 3
    effects = core.handle(*map(GroupReceived, groups))
    calls = 0
    while core.has_more:
        read, executed = sum(map(core.read, range(genesis.n))), core.executed
        effects += core.handle()
        calls += 1
        # An entry, or the operations of one batch, may go beyond what is left.
        assert sum(map(core.read, range(genesis.n))) - read <= 3
        assert core.executed - executed <= 3
    assert calls > 10
    expected = whole.handle(*map(GroupReceived, groups))
    assert [(e.slot, e.batch.digest) for e in effects if isinstance(e, Executed)] == history
    assert [e for e in effects if isinstance(e, Executed)] == [e for e in expected if isinstance(e, Executed)]
    assert core.executor.roots() == whole.executor.roots()
    assert [*map(core.read, range(genesis.n))] == [*map(whole.read, range(genesis.n))]
