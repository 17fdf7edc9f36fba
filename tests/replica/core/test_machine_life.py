"""Durable before said; recovery; requests at the door."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from replica.apps import kv
from replica.core import claims, replays, rooms
from replica.core.entries import Commit, Entry, Prepare, PrePrepare, Suspect, ViewChange, decode_entry
from replica.core.envelope import Status, decode_reply
from replica.core.events import (
    Append,
    Appended,
    Executed,
    Exposed,
    Fetch,
    Forked,
    GroupReceived,
    Halt,
    PeerHolds,
    Recovered,
    Refuse,
    Relay,
    RequestReceived,
    Send,
    Taken,
    Tick,
)
from replica.core.genesis import Ordering
from replica.core.machine import ReplicaCore
from replica.core.requests import RELAY_PAUSE_MS
from tests.replica.core.harness import Cluster, FakeClient, FakeLog, come_home, make_core, make_genesis, opened
from tests.replica.core.support import Lone, junk_batch

G = make_genesis()


def kinds(effects: list) -> list[type]:
    return [type(effect) for effect in effects]


@pytest.mark.parametrize("ordering", Ordering)
def test_own_entries_decide_nothing_before_they_are_durable(ordering: Ordering):
    genesis = make_genesis(1, ordering)
    lone = Lone(make_core(genesis, 1))
    lone.hold = True
    batch = junk_batch(1)
    batch = PrePrepare(0, 1, batch).batch
    client = FakeClient(genesis)
    proposal = Lone(make_core(genesis, 0))
    proposal.handle(RequestReceived(client.open(), relayed=False))
    primary = proposal.log
    taken, *vote = lone.handle(GroupReceived(primary.groups[0]))
    assert taken == Taken(primary.groups[0]), "durable before the vote that depends on it"
    assert kinds(vote) == [Append]
    digest = decode_entry(primary.groups[0].payloads[0], genesis, genesis.cluster_id()).batch.digest  # type: ignore[union-attr]
    if ordering is Ordering.THREE_PHASE:
        assert [p[0] for p in vote[0].payloads] == [2, 3], "PREPARE and COMMIT, as one group"
        primary.say(Commit(0, 1, digest))
        assert kinds(lone.handle(GroupReceived(primary.groups[1]))) == [Taken]
    assert lone.tick() == []
    assert kinds(lone.release()) == [Executed, Send]


def test_an_append_is_never_asked_for_while_one_is_under_way():
    lone = Lone(make_core(G, 1))
    lone.hold = True
    primary = FakeLog(0)
    for slot in range(1, 9):
        cut = (0, 0, 0) if slot % 4 == 0 else ()
        lone.handle(GroupReceived(primary.say(PrePrepare(0, slot, junk_batch(slot, cut)))))
        lone.tick()
        lone.handle(RequestReceived(FakeClient(G).open(), relayed=False))
    assert len(lone.of(Append)) == 1
    assert lone.core.is_appending
    effects = lone.release()
    assert kinds(effects).count(Append) == 1, "what came up meanwhile is said at once"
    assert len(effects[-1].payloads) > 5
    while lone.held:
        lone.release()
    assert not lone.core.is_appending


def test_nothing_is_said_before_the_store_was_read():
    core = make_core(G, 1, live=False)
    primary = FakeLog(0)
    effects = core.handle(GroupReceived(primary.say(PrePrepare(0, 1, junk_batch(1)))))
    effects += core.handle(RequestReceived(FakeClient(G).open(), relayed=False), Tick(500, 500))
    assert Append not in kinds(effects)
    assert Send not in kinds(effects)
    assert kinds(come_home(core)) == [Append]


def test_recovery_sends_no_replies_again():
    cluster = Cluster(G)
    opened(cluster, FakeClient(G))
    core = make_core(G, 0, live=False)
    effects = [e for log in (1, 0, 2) for g in cluster.logs[log].groups for e in core.handle(GroupReceived(g))]
    assert Executed in kinds(effects)
    assert Send not in kinds(effects)


def recover(cluster: Cluster, number: int, rng: random.Random) -> ReplicaCore:
    """A new core from what the store of replica `number` holds: all of its own log, of others what it received."""
    old = cluster.cores[number]
    groups = [
        group
        for log in cluster.logs
        for group in log.groups
        if log.author == number or group.last <= old.received(log.author)
    ]
    rng.shuffle(groups)
    core = make_core(cluster.genesis, number, live=False)
    executed = [e for g in groups for e in core.handle(GroupReceived(g)) if isinstance(e, Executed)]
    assert [(e.slot, e.batch.digest) for e in executed][: old.executed] == cluster.history(number)
    core.handle(Tick(cluster.now, cluster.now))
    cluster.effects[number] = list(executed)
    cluster.in_flight = type(cluster.in_flight)(
        (who, event) for who, event in cluster.in_flight if not (who == number and isinstance(event, Appended))
    )
    cluster.appending.discard(number)
    cluster.cores[number] = core
    log = cluster.logs[number]
    cluster.handle(number, Recovered(log.last, log.head))
    return core


@pytest.mark.parametrize("ordering", Ordering)
def test_reading_the_same_logs_again_gives_the_same_replica(ordering: Ordering):
    genesis = make_genesis(2, ordering)
    cluster = Cluster(genesis)
    client = opened(cluster, FakeClient(genesis))
    for number in range(10):
        cluster.request(client.operations(kv.put(b"%d" % number, b"v")))
        cluster.run()
    for number in range(genesis.n):
        old = cluster.cores[number]
        new = recover(cluster, number, random.Random(number))
        assert not new.is_live
        cluster.run()
        assert (new.halted, new.is_live) == (None, True)
        assert new.executor.digest() == old.executor.digest()
        assert (new.view, new.stable, new.executed, new.stable_digest) == (
            old.view,
            old.stable,
            old.executed,
            old.stable_digest,
        )
        for log in range(genesis.n):
            assert (new.read(log), new.received(log), new.head(log)) == (
                old.read(log),
                old.received(log),
                old.head(log),
            )
        assert new._known.states == old._known.states
        assert new._pen.state == old._pen.state
    cluster.request(client.operations(kv.put(b"last", b"v")))
    cluster.settle(3)
    cluster.check()
    assert {len(cluster.history(number)) for number in cluster.cores} == {12}


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("seed", range(10))
def test_replicas_that_restart_at_any_moment_break_no_rule(ordering: Ordering, seed: int):
    """Its log may hold a group whose Appended never came; whatever was under way in it is lost."""
    genesis = make_genesis(1 + seed % 2, ordering)
    cluster = Cluster(genesis, seed=seed)
    rng = cluster.random
    client = opened(cluster, FakeClient(genesis))
    restarts = 0
    for number in range(12):
        cluster.request(client.operations(kv.incr(b"n")))
        for _ in range(rng.randrange(40)):
            if cluster.in_flight:
                cluster.in_flight.rotate(rng.randrange(len(cluster.in_flight)))
                cluster.handle(*cluster.in_flight.popleft())
        if rng.random() < 0.6:
            recover(cluster, rng.randrange(genesis.n), rng)
            restarts += 1
        assert number < 12
    # What was in flight to a restarted replica was lost with it; clients and streams bring it again.
    for log in cluster.logs:
        for group in log.groups:
            cluster.publish(group)
    for first in range(1, client.next):
        cluster.request(client.operations(kv.incr(b"n"), first=first))
    cluster.settle(30, shuffle=True)
    cluster.check()
    assert restarts > 3
    assert {core.executor.state.get(b"n") for core in cluster.cores.values()} == {b"12"}
    assert len({core.executor.digest() for core in cluster.cores.values()}) == 1


def own_log(*entries: Entry) -> FakeLog:
    log = FakeLog(1)
    for entry in entries:
        log.say(entry)
    return log


def restarted(log: FakeLog, *others) -> tuple[ReplicaCore, list]:
    core = make_core(G, 1, live=False)
    for group in (*log.groups, *others):
        core.handle(GroupReceived(group))
    return core, come_home(core, log)


def test_an_own_entry_whose_cause_was_lost_keeps_it_mute_until_the_cause_comes():
    batch = junk_batch(1)
    core, effects = restarted(own_log(Prepare(0, 1, batch.digest)))
    assert effects == []
    assert (core.halted, core.is_live) == (None, False)
    assert core.why_mute == "entry 1 of its own log cannot be read again yet"
    assert core.waiting_for(1) == "the proposal for slot 1 in view 0"
    assert Fetch(0, 1, 2) in core.handle(Tick(1000, 1000)), "whoever has it is asked, itself never"
    effects = core.handle(GroupReceived(FakeLog(0).say(PrePrepare(0, 1, batch))))
    assert kinds(effects) == [Taken, Append]
    assert (core.is_live, core.why_mute) == (True, None)
    assert decode_entry(effects[1].payloads[0], G, G.cluster_id()) == Commit(0, 1, batch.digest)


def test_an_own_entry_that_breaks_a_rule_halts():
    core, effects = restarted(own_log(Commit(0, 1, bytes(32))))
    assert effects == [], "it halted when the entry was read"
    assert "this replica's own log breaks a rule (a commit for slot 1, voted up to 0)" in str(core.halted)


def test_what_is_missing_in_the_own_log_is_fetched_before_anything_is_said():
    """Else it would write what the hole hides a second time, and be exposed for it."""
    batches = [junk_batch(n) for n in (1, 2, 3)]
    own = own_log(*(Prepare(0, n, batch.digest) for n, batch in enumerate(batches, 1)))
    primary = FakeLog(0)
    core = make_core(G, 1, live=False)
    for n, batch in enumerate(batches, 1):
        core.handle(GroupReceived(primary.say(PrePrepare(0, n, batch))))
    core.handle(GroupReceived(own.groups[0]), GroupReceived(own.groups[2]))
    assert core.handle(Recovered(own.last, own.head)) == [Fetch(1, 2, 0), Fetch(1, 2, 2)]
    assert core.handle(PeerHolds(2, 1, 1, 3)) == [Fetch(1, 2, 2)], "it holds more than is here: it must show it"
    assert core.why_mute == "entries 2 to 3 of its own log are not here; peers are asked for them"
    effects = core.handle(GroupReceived(own.groups[1]))
    assert kinds(effects) == [Taken, Taken, Append], "made durable again, what waited behind the gap too"
    assert [e.group for e in effects[:2]] == own.groups[1:]
    said = [decode_entry(payload, G, G.cluster_id()) for payload in effects[2].payloads]
    assert said == [Commit(0, n, batch.digest) for n, batch in enumerate(batches, 1)]


def ahead_of(core: ReplicaCore, effects: list) -> tuple[Appended, GroupReceived]:
    """The answer to the Append under way, and a group that lies beyond it."""
    log = FakeLog(1)
    appended = Appended(log.append(effects[-1].payloads))
    return appended, GroupReceived(log.say(b"said before the disk was restored"))


def mute_at_first() -> tuple[ReplicaCore, list]:
    core, effects = restarted(FakeLog(1), FakeLog(0).say(PrePrepare(0, 1, junk_batch(1))))
    assert kinds(effects) == [Append]
    return core, effects


def test_a_peer_that_knows_more_of_the_own_log_halts_it():
    core, effects = mute_at_first()
    appended, ahead = ahead_of(core, effects)
    assert core.handle(GroupReceived(appended.group)) == [], "what it just said may come back before it is told"
    core.handle(appended)
    assert core.halted is None
    assert kinds(core.handle(ahead)) == [Halt]
    assert "a peer holds entry 3 of this replica's own log, which ends at 2 here" in str(core.halted)
    assert "its trusted state was rolled back" in str(core.halted)


def test_a_rollback_that_shows_while_something_is_appended_is_not_missed():
    core, effects = mute_at_first()
    appended, ahead = ahead_of(core, effects)
    assert core.handle(ahead) == [], "it cannot tell yet"
    assert kinds(core.handle(appended)) == [Halt]
    assert "rolled back" in str(core.halted)


def test_a_rollback_that_shows_before_the_first_word_forbids_it():
    log = own_log(Suspect(0))
    core = make_core(G, 1, live=False)
    core.handle(GroupReceived(log.groups[0]))
    core.handle(Recovered(log.last, log.head))
    effects = core.handle(GroupReceived(log.say(ViewChange(1))), PeerHolds(0, 1, 1, 1))
    assert kinds(effects) == [Taken, Halt]
    assert "entry 2 of this replica's own log exists, and its trusted log ends at 1" in str(core.halted)
    assert not core.is_live


def test_a_trusted_log_that_does_not_fit_the_store_halts():
    core, effects = restarted(own_log(Suspect(0)))
    assert kinds(effects) == []
    assert core.is_live
    stored, trusted = own_log(Suspect(0)), own_log(ViewChange(1))
    core = make_core(G, 1, live=False)
    core.handle(GroupReceived(stored.groups[0]))
    assert kinds(come_home(core, trusted)) == [Halt]
    assert "differ at entry 1" in str(core.halted)


def test_two_histories_of_the_own_log_halt():
    """The disk was restored, and something else was said since then."""
    core = make_core(G, 1, live=False)
    core.handle(GroupReceived(own_log(Suspect(0)).groups[0]))
    effects = core.handle(GroupReceived(own_log(ViewChange(1)).groups[0]))
    assert kinds(effects) == [Forked, Halt]
    assert "two attestations contradict each other" in str(core.halted)


def test_own_groups_from_peers_are_no_news_otherwise():
    cluster = Cluster(G)
    opened(cluster, FakeClient(G))
    core = cluster.cores[1]
    for group in cluster.logs[1].groups:
        assert core.handle(GroupReceived(group)) == []
    assert core.halted is None


def test_an_attestation_that_does_not_continue_the_own_log_halts():
    lone = Lone(make_core(G, 1))
    lone.hold = True
    lone.handle(GroupReceived(FakeLog(0).say(PrePrepare(0, 1, junk_batch(1)))))
    elsewhere = FakeLog(1)
    elsewhere.say(b"something that this replica never wrote")
    effects = lone.core.handle(Appended(elsewhere.append(lone.held[0].group.payloads)))
    assert kinds(effects) == [Halt]
    assert "does not continue" in str(lone.core.halted)
    assert lone.core.handle(Tick(1000, 1000)) == []


def test_an_own_entry_that_breaks_a_rule_after_all_is_the_last_one():
    lone = Lone(make_core(G, 1))
    lone.hold = True
    lone.handle(GroupReceived(FakeLog(0).say(PrePrepare(0, 1, junk_batch(1)))))
    effects = lone.core.handle(Appended(FakeLog(1).say(Commit(0, 1, bytes(32)))))
    assert kinds(effects) == [Exposed, Halt]
    assert "entry 1 of this replica's own log breaks a rule" in str(lone.core.halted)


def test_a_backup_relays_a_request_and_again_until_it_is_executed():
    core = make_core(G, 2)
    envelope = FakeClient(G).open()
    assert core.handle(RequestReceived(envelope, relayed=False)) == [Relay(0, envelope)]
    assert core.handle(RequestReceived(envelope, relayed=False)) == [], "it waits already"
    assert core.handle(Tick(RELAY_PAUSE_MS - 1, 0)) == []
    assert core.handle(Tick(RELAY_PAUSE_MS, 0)) == [Relay(0, envelope)]
    assert core.handle(Tick(RELAY_PAUSE_MS + 1, 0)) == []
    assert core.requests_waiting == 1


def test_what_another_backup_relayed_here_by_mistake_is_handed_on_to_the_primary():
    core = make_core(G, 2)
    envelope = FakeClient(G).open()
    assert core.handle(RequestReceived(envelope, relayed=True)) == []
    assert core.handle(Tick(50, 0)) == [Relay(0, envelope)]


def test_an_executed_request_is_answered_at_once_with_the_same_bytes():
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    envelope = client.operations(kv.incr(b"n"))
    cluster.request(envelope)
    cluster.settle(1)
    for core in cluster.cores.values():
        sent = [e.reply for e in cluster.of(core.number, Send)][-1]
        asked = RequestReceived(envelope, relayed=False, source="its connection")
        assert core.handle(asked) == [Send(client.key, sent, "its connection", again=True)]
        assert core.handle(RequestReceived(envelope, relayed=True)) == [], "its client does not wait for this replica"
        assert core.refusals["relay-answered"] == 1
    assert len(cluster.history(0)) == 2


def test_a_fresh_reply_goes_where_its_request_came_from():
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    envelope = client.operations(kv.incr(b"n"))
    cluster.handle(0, RequestReceived(envelope, relayed=False, source="its connection"))
    cluster.handle(1, RequestReceived(envelope, relayed=True, peer=2, source="a link"))
    cluster.run()
    sources = [cluster.of(number, Send)[-1].source for number in cluster.cores]
    assert sources == ["its connection", None, None], (
        "of what a replica handed over, or proposed, no connection is known"
    )
    assert not any(cluster.of(number, Send)[-1].again for number in cluster.cores)


def test_a_reply_is_given_again_once_in_a_call_however_often_it_is_asked_for():
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    envelopes = [client.operations(kv.get(b"k%d" % i), first=1) for i in range(3)]
    cluster.request(envelopes[0])
    cluster.settle(1)
    core = cluster.cores[0]
    asked = [RequestReceived(one, relayed=False, source=source) for source in "ab" for one in envelopes]
    assert [effect.source for effect in core.handle(*asked, *asked)] == ["a", "b"]
    assert core.refusals["replay-again"] == 10
    assert [effect.source for effect in core.handle(*asked)] == ["a", "b"], "in the next call again"


def test_replies_given_again_are_bounded_in_a_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replays, "REPLAY_BYTES_MAX", 100_000)
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    cluster.request(client.operations(kv.put(b"k", bytes(1000)), first=1))
    envelopes = [client.operations(kv.get(b"k"), first=2 + i) for i in range(200)]
    for envelope in envelopes:
        cluster.request(envelope)
    cluster.settle(1)
    core = cluster.cores[0]
    given = core.handle(*(RequestReceived(one, relayed=False) for one in envelopes))
    assert 100_000 <= sum(len(effect.reply) for effect in given) < 102_000
    assert len(given) + core.refusals["replay-again"] == 200


def test_waiting_requests_with_the_same_numbers_are_answered_once_when_one_of_them_is_executed():
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    envelopes = [client.operations(kv.get(b"k%d" % i), first=1) for i in range(5)]
    lagging = cluster.cores[2]
    for envelope in envelopes[1:]:
        lagging.handle(RequestReceived(envelope, relayed=False))
    cluster.request(envelopes[0], to=0)
    before = len(cluster.replies(2))
    cluster.settle(1)
    assert len(cluster.replies(2)) - before == 2, "the one executed, and one for all that waited"
    assert lagging.requests_waiting == 0


def test_one_number_with_two_operations_runs_one_of_them_the_same_everywhere():
    for seed in range(6):
        cluster = Cluster(G, seed=seed)
        client = opened(cluster, FakeClient(G))
        one, two = (client.operations(kv.put(b"k", value), first=1) for value in (b"one", b"two"))
        for replica in cluster.cores:
            for envelope in cluster.random.sample((one, two), 2):
                cluster.request(envelope, to=replica)
        cluster.settle(3, shuffle=True)
        cluster.check()
        assert len({core.executor.state.get(b"k") for core in cluster.cores.values()}) == 1
        replies = {r for i in cluster.cores for r in cluster.replies(i)[1:]}
        assert len(replies) == 1
        assert cluster.cores[0].executor.operations == 1


def test_a_full_queue_is_said_to_the_sender_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_MAX", 1)
    core = make_core(G, 1)
    core.handle(RequestReceived(FakeClient(G, 100).open(), relayed=False))
    effects = core.handle(RequestReceived(FakeClient(G, 101).open(), relayed=False, source="somebody"))
    assert [(type(e), e.source, e.code) for e in effects] == [(Refuse, "somebody", "busy")]
    assert core.refusals["request-queue-full"] == 1


def test_a_relay_that_finds_the_queue_full_is_counted_and_not_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_MAX", 1)
    core = make_core(G, 0)
    core.handle(RequestReceived(FakeClient(G, 100).open(), relayed=True))
    effects = core.handle(RequestReceived(FakeClient(G, 101).open(), relayed=True, source="a backup"))
    assert Refuse not in kinds(effects)
    assert core.refusals["relay-queue-full"] == 1


def test_whose_request_gave_way_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_MAX", 3)
    monkeypatch.setattr(claims, "CLAIMS_PER_CLIENT_MAX", 1)
    core, flood = make_core(G, 1), FakeClient(G, 100)
    sent = [flood.operations(kv.get(b"k")) for _ in range(3)]
    for envelope in sent:
        core.handle(RequestReceived(envelope, relayed=False, source="flood"))
    quiet = FakeClient(G, 101).open()
    effects = core.handle(RequestReceived(quiet, relayed=False, source="quiet"))
    assert [(e.source, e.code) for e in effects if isinstance(e, Refuse)] == [("flood", "busy")]
    assert core.refusals["request-gave-way"] == 1
    assert core._known.requests.find(quiet) is not None
    assert core._known.requests.find(sent[2]) is None


def test_an_operators_command_is_taken_when_the_queue_is_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_MAX", 1)
    operator, *others = (FakeClient(G, number) for number in (100, 101, 102))
    core = make_core(replace(G, operators=(operator.key,)), 1)
    found = [core.handle(RequestReceived(one.open(), relayed=False, source=1)) for one in (*others, operator)]
    assert [[type(effect) for effect in effects] for effects in found] == [[Relay], [Refuse], [Relay]]


def test_an_expired_session_is_ordered_and_answered_alike_by_all():
    cluster = Cluster(G)
    client = FakeClient(G)
    cluster.request(client.operations(kv.put(b"k", b"v")))
    cluster.settle(2)
    cluster.check()
    for replica, core in cluster.cores.items():
        (reply,) = (decode_reply(e.reply, G.limits) for e in cluster.of(replica, Send))
        assert [r.status for r in reply.results] == [Status.EXPIRED]  # type: ignore[union-attr]
        assert len(core.executor.state) == 0
