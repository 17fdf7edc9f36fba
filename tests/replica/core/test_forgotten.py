"""A replica that restarted has forgotten what the others remember: nobody loses patience over that for long."""

from __future__ import annotations

from dataclasses import replace

from replica.apps import kv
from replica.apps.kv import KeyValue
from replica.core.envelope import Administer, Envelope, decode_envelope, encode_administer
from replica.core.events import RequestReceived
from replica.core.requests import EXECUTED_DOUBLES_MAX, EXECUTED_PAUSE_MS, RequestQueue
from replica.core.sessions import SessionId
from replica.core.versions import encode_activation
from tests.replica.core.harness import GOOD_SIGNATURE, Cluster, FakeClient, make_core, make_genesis, public_key

G = make_genesis()


def test_what_was_executed_often_is_left_alone_for_seconds_only():
    queue = RequestQueue(G.limits)
    envelope = FakeClient(G).operations(kv.get(b"k"))
    for _ in range(40):
        queue.executed(envelope, 1000)
    longest = EXECUTED_PAUSE_MS << EXECUTED_DOUBLES_MAX
    assert longest == 2000
    assert queue.was_executed(envelope, 1000 + longest - 1)
    assert not queue.was_executed(envelope, 1000 + longest)
    assert queue.was_executed(envelope, 1000 + longest, pauses=2)


def test_an_envelope_without_effect_that_two_backups_forgot_replaces_nobody():
    cluster = Cluster(G)
    cluster.settle(1)
    stranger = FakeClient(G, 100)
    stranger.session = SessionId(7, 7)  # no such session: every envelope is ordered, and answered that it expired
    envelope = stranger.operations(kv.put(b"a", b"1"))
    for _ in range(17):
        cluster.request(envelope, to=0)
        cluster.run()
    assert cluster.cores[0].executed >= 17
    cluster.tick(60_000)
    cluster.run()
    for number in (1, 2):
        cluster.cores[number]._known.requests._executed.clear()
        cluster.request(envelope, to=number)
    cluster.run()
    for _ in range(40):
        cluster.tick(100)
        cluster.run()
    assert {core.view for core in cluster.cores.values()} == {0}
    assert not any(len(core._known.requests) for core in cluster.cores.values())


def test_what_was_executed_just_now_is_counted_where_it_is_left_alone():
    cluster = Cluster(G)
    cluster.settle(1)
    stranger = FakeClient(G, 100)
    stranger.session = SessionId(7, 7)
    envelope = stranger.operations(kv.put(b"a", b"1"))
    cluster.request(envelope, to=0)
    cluster.run()
    assert cluster.cores[0].handle(RequestReceived(envelope, relayed=True, peer=1)) == []
    assert cluster.cores[0].refusals["executed-lately"] == 1


class Newer(KeyValue):
    """An application with a version to activate."""

    version = 3


def test_a_command_that_another_operators_equal_one_answered_is_forgotten():
    operators = public_key(200), public_key(201)
    genesis = replace(make_genesis(), operators=operators)

    def command(key: bytes) -> Envelope:
        raw = encode_administer(genesis.cluster_id(), key, Administer(1000, encode_activation(1))) + GOOD_SIGNATURE
        return decode_envelope(raw, genesis.cluster_id(), genesis.limits)

    cluster = Cluster(genesis)
    cluster.cores = {number: make_core(genesis, number, Newer()) for number in range(3)}
    cluster.settle(1)
    cluster.handle(0, RequestReceived(command(operators[1]), relayed=False))
    cluster.handle(1, RequestReceived(command(operators[0]), relayed=False))
    relays = [sent for sent in cluster.in_flight if isinstance(sent[1], RequestReceived)]
    assert len(relays) == 1
    cluster.in_flight.remove(relays[0])
    cluster.run()
    assert {core.executor.versions.present for core in cluster.cores.values()} == {1}
    assert [len(core._known.requests) for core in cluster.cores.values()] == [0, 0, 0]
    for _ in range(40):
        cluster.tick(200)
        cluster.run()
    assert not any(core._pen.state.suspected for core in cluster.cores.values())
