"""A replica whose client's key is revoked: nobody waits for what is never ordered, and no primary is blamed for it."""

from dataclasses import replace

import pytest

from replica.apps import kv
from replica.core.clients import Allow, Mode, Revoke, SetMode
from replica.core.envelope import (
    Administer,
    AdministerReply,
    OpenReply,
    OperationsReply,
    Status,
    decode_envelope,
    encode_administer,
)
from replica.core.events import RequestReceived, ViewEntered
from replica.core.genesis import Ordering
from replica.core.layout import U64_MAX
from tests.replica.core.harness import GOOD_SIGNATURE, Cluster, FakeClient, make_genesis, opened, public_key

OPERATOR = public_key(200)


def a_cluster(ordering: Ordering = Ordering.THREE_PHASE) -> Cluster:
    return Cluster(replace(make_genesis(ordering=ordering), operators=(OPERATOR,)))


def order(cluster: Cluster, command) -> None:
    """Have a command executed everywhere."""
    signed = encode_administer(cluster.genesis.cluster_id(), OPERATOR, Administer(U64_MAX, command.encode()))
    cluster.request(decode_envelope(signed + GOOD_SIGNATURE, cluster.genesis.cluster_id(), cluster.genesis.limits))
    cluster.settle(3)
    for replica in cluster.cores:
        reply = next(r for r in reversed(cluster.replies(replica)) if isinstance(r, AdministerReply))
        assert reply.status is Status.OK, reply.text


def lost_relay(cluster: Cluster, envelope, backup: int) -> None:
    """Have a backup wait for a request that does not reach the primary."""
    cluster.handle(backup, RequestReceived(envelope, relayed=False))
    cluster.in_flight.clear()
    assert cluster.cores[backup].requests_waiting == 1


def refusals(cluster: Cluster, replica: int) -> list[bytes]:
    found = [r for r in cluster.replies(replica) if isinstance(r, OpenReply | OperationsReply)]
    return [r for r in found if (r.status if isinstance(r, OpenReply) else r.results[0].status) is Status.NOT_ALLOWED]


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("command", [Revoke(1, public_key(100)), SetMode(1, Mode.LISTED)])
@pytest.mark.parametrize("kind", ["operations", "opening"])
def test_what_waits_for_a_key_that_is_refused_is_answered_and_forgotten(ordering: Ordering, command, kind: str):
    cluster = a_cluster(ordering)
    client = opened(cluster, FakeClient(cluster.genesis))
    request = client.operations(kv.incr(b"n")) if kind == "operations" else client.open(b"x" * 16, 30)
    lost_relay(cluster, request, backup=1)
    order(cluster, command)
    assert cluster.cores[1].requests_waiting == 0
    assert len(refusals(cluster, 1)) == 1
    cluster.settle(60)  # 12 s: far more than a patience
    assert all(not cluster.of(replica, ViewEntered) for replica in cluster.cores)
    assert all(core.executor.state.get(b"n") is None for core in cluster.cores.values())
    cluster.check()


def test_who_is_refused_has_nothing_ordered_however_often_it_asks():
    cluster = a_cluster()
    stranger = FakeClient(cluster.genesis)
    order(cluster, SetMode(1, Mode.LISTED))
    executed = cluster.cores[0].executed
    for number in range(20):
        cluster.request(stranger.open(bytes([number]) * 16, 30))
        cluster.request(stranger.operations(kv.incr(b"n")))
    cluster.settle(5)
    assert all(core.executed == executed and core.requests_waiting == 0 for core in cluster.cores.values())
    assert all(len(refusals(cluster, replica)) == 40 for replica in cluster.cores)
    assert len({repr(refusals(cluster, replica)) for replica in cluster.cores}) == 1
    order(cluster, Allow(2, stranger.key))
    opened(cluster, stranger)
    stranger.next = 1
    cluster.request(stranger.operations(kv.incr(b"n")))
    cluster.settle(3)
    assert all(core.executor.state.get(b"n") == b"1" for core in cluster.cores.values())
    cluster.check()
