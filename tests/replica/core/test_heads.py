"""Heads: replicas that were shown two histories of a log notice it by comparing, and a liar's heads cost a question."""

from __future__ import annotations

import pytest

from replica.core import inbox
from replica.core.entries import Checkpoint
from replica.core.events import Append, Appended, Fetch, Forked, GroupReceived, HeadsReceived, KnownBroken, Recovered
from replica.core.heads import ASK_PAUSE_MS, decode_heads, encode_heads
from replica.core.layout import LayoutError
from tests.replica.core.harness import Cluster, FakeClient, FakeLog, make_core, make_genesis, opened
from tests.replica.core.support import Lone

G = make_genesis(f=2)


def fetches(effects) -> list[tuple[int, int, int]]:
    return [(e.log, e.first, e.ask) for e in effects if isinstance(e, Fetch)]


def two_histories(sizes_a=(1, 1, 1), sizes_b=(1, 1, 1), same=1):
    """Two logs of author 0 with one key: their first `same` groups are equal."""
    logs = FakeLog(0), FakeLog(0)
    for log, sizes, word in ((logs[0], sizes_a, 1), (logs[1], sizes_b, 2)):
        for number, size in enumerate(sizes):
            said = 0 if number < same else word
            log.say(*(Checkpoint(4 * (number * 10 + place + 1), bytes([said]) * 32) for place in range(size)))
    return logs


def reader(number: int, log: FakeLog, count: int = 99) -> Lone:
    lone = Lone(make_core(G, number))
    for group in log.groups[:count]:
        lone.handle(GroupReceived(group))
    return lone


def compare(asker: Lone, told: Lone) -> list[tuple[int, int, int]]:
    return fetches(asker.handle(HeadsReceived(told.core.number, told.core.heads())))


def serve(asker: Lone, log: FakeLog, first: int) -> None:
    for group in log.groups:
        if group.last >= first:
            asker.handle(GroupReceived(group))


@pytest.mark.parametrize(
    ("sizes_b", "count_a"),
    [((1, 1, 1), 3), ((1, 1, 1), 2), ((1, 3), 3), ((1, 2, 1), 2), ((1, 1, 5), 3)],
    ids=["as long", "shorter", "a group across", "a group across the end", "longer"],
)
def test_two_histories_shown_to_different_replicas_are_noticed(sizes_b, count_a):
    a, b = two_histories(sizes_b=sizes_b)
    one, other = reader(1, a, count_a), reader(2, b)
    asked = compare(other, one)
    assert asked == [(0, one.core.received(0), 1)]
    serve(other, a, asked[0][1])
    assert [e.log for e in other.of(Forked)] == [0]
    assert other.core.exposed[0].rule == "forked"


def test_equal_logs_of_different_length_are_not_asked_for():
    a, _ = two_histories(same=3)
    for mine, theirs in ((3, 3), (3, 1), (1, 3), (0, 3), (3, 0)):
        assert compare(reader(1, a, mine), reader(2, a, theirs)) == []


def test_a_liar_costs_a_question_now_and_then():
    a, _ = two_histories()
    lone = reader(1, a)
    heads = [(0, bytes(32))] * G.n
    heads[0] = (2, b"\1" * 32)
    lie = HeadsReceived(3, tuple(heads))
    assert fetches(lone.handle(lie)) == [(0, 2, 3)]
    assert fetches(lone.handle(lie, lie)) == []
    assert fetches(lone.handle(HeadsReceived(4, tuple(heads)))) == [(0, 2, 4)], "another peer is asked all the same"
    lone.tick(ASK_PAUSE_MS - 200)
    assert (0, 2, 3) not in fetches(lone.handle(lie))
    lone.tick(200)
    assert (0, 2, 3) in fetches(lone.handle(lie))
    for group in a.groups:
        lone.handle(GroupReceived(group))
    assert not lone.of(Forked), "the true groups again change nothing"


def test_nothing_is_asked_about_the_own_log_or_a_blind_one():
    a, b = two_histories()
    lone = reader(1, a)
    own = [(0, bytes(32))] * G.n
    own[1] = (1, b"\1" * 32)
    lone.core._inboxes[1].arrive(FakeLog(1).say(Checkpoint(4, bytes(32))))
    assert lone.core._inboxes[1].differs(*own[1])
    assert fetches(lone.handle(HeadsReceived(2, tuple(own)))) == []
    lone = reader(1, a)
    lone.handle(GroupReceived(b.groups[1]))
    assert lone.of(Forked)
    assert lone.core.halted is None
    assert compare(lone, reader(2, b)) == []


def test_what_is_too_old_to_be_remembered_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(inbox, "REMEMBERED_GROUPS_MAX", 2)
    a, b = two_histories((1, 1, 1, 1, 1), (1, 1, 1, 1, 1))
    lone = reader(1, a)
    assert compare(lone, reader(2, b, 2)) == []
    assert compare(lone, reader(3, b, 4)) == [(0, 4, 3)]


def test_both_halves_of_a_fork_that_waited_are_handed_out_to_be_kept():
    a, b = two_histories()
    c = Lone(make_core(G, 1))
    c.handle(GroupReceived(b.groups[2]), GroupReceived(a.groups[0]))
    effects = c.handle(GroupReceived(a.groups[1]))
    kinds = [type(e).__name__ for e in effects]
    assert kinds[:2] == ["Taken", "Forked"], "the group before the contradiction is the other half of the evidence"


def test_a_log_known_to_be_broken_is_read_no_further():
    a, _ = two_histories()
    lone = reader(1, a, 1)
    lone.handle(KnownBroken(0))
    assert lone.core.exposed[0].rule == "forked"
    serve(lone, a, 1)
    assert lone.core.received(0) == 1


def test_a_replica_whose_own_log_is_known_to_be_broken_does_not_speak():
    core = make_core(G, 1, live=False)
    effects = core.handle(KnownBroken(1), Recovered(0, core.head(1)))
    assert core.halted is not None
    assert "replace the replica with a new log" in core.halted
    assert not [e for e in effects if isinstance(e, Append | Appended)]


def test_layout():
    heads = tuple((number, bytes([number]) * 32) for number in range(3))
    raw = encode_heads(heads)
    assert len(raw) == 2 + 3 * 40
    assert decode_heads(raw, 3) == heads
    for bad in (raw[:-1], raw + b"\0", b"", encode_heads(heads[:2])):
        with pytest.raises(LayoutError):
            decode_heads(bad, 3)


def test_correct_replicas_never_ask():
    genesis = make_genesis()
    cluster = Cluster(genesis, seed=1)
    client = opened(cluster, FakeClient(genesis))
    for number in range(12):
        cluster.request(client.operations(b"\1" + b"\0\1k" + bytes([number])))
        for _ in range(40):
            if cluster.in_flight:
                cluster.handle(*cluster.in_flight.popleft())
        for core in cluster.cores.values():
            for other in cluster.cores.values():
                if core is not other:
                    assert fetches(core.handle(HeadsReceived(other.number, other.heads()))) == []
    cluster.settle(3)
    cluster.check()


@pytest.mark.parametrize("f", [1, 2])
def test_a_log_that_is_hidden_from_the_primary_alone_is_fetched_from_others(f):
    """Else the primary leaves it out of the cut, and is suspected for that: one liar would depose every primary."""
    genesis = make_genesis(f)
    cluster = Cluster(genesis)
    client = opened(cluster, FakeClient(genesis))
    cluster.cut_off = {(genesis.n - 1, 0)}
    for number in range(30):
        cluster.request(client.operations(b"put k %d" % number, acknowledged=client.next - 1 or 1))
        for _ in range(3):
            cluster.run()
            for core in cluster.cores.values():
                for other in cluster.cores.values():
                    if core is not other:
                        cluster.in_flight.append((core.number, HeadsReceived(other.number, other.heads())))
            cluster.run()
            cluster.tick(100)
    assert cluster.cores[0].executed >= 6 * genesis.limits.checkpoint_interval
    assert {core.view for core in cluster.cores.values()} == {0}
    cluster.check()


def test_what_a_peer_says_it_has_is_asked_of_it_once_it_had_time_to_come():
    log = FakeLog(0)
    for number in range(3):
        log.say(Checkpoint(4 * (number + 1), bytes(32)))
    lone = reader(1, log, 1)
    ahead = HeadsReceived(2, ((3, log.groups[2].head_after), *((0, bytes(32)),) * 4))
    assert fetches(lone.handle(ahead)) == [], "it may be on its way"
    assert fetches(lone.handle(ahead)) == [(0, 2, 2)]
    for group in log.groups:
        lone.handle(GroupReceived(group))
    assert fetches(lone.handle(ahead)) == []
