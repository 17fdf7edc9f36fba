"""What one client may ask for: the bucket at its exact boundaries, and what a quota refuses, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.apps import kv
from replica.core import quotas as module
from replica.core.clients import Allow, SetQuota
from replica.core.envelope import Administer, decode_envelope, encode_administer
from replica.core.events import Refuse, RequestReceived, ViewEntered
from replica.core.genesis import Limits
from replica.core.layout import U64_MAX
from replica.core.quotas import BYTES_MAX, ENVELOPES_MAX, NO_QUOTA, Buckets, Quota, decode_quota
from replica.core.requests import OverQuotaError, QueueFullError, RequestQueue
from replica.core.rooms import REQUEST_BYTES_PER_CLIENT_MAX, REQUESTS_PER_CLIENT_MAX
from tests.replica.core.harness import GOOD_SIGNATURE, Cluster, FakeClient, make_genesis, opened, public_key
from tests.replica.core.support import examples
from tests.replica.core.test_machine_clients import OPERATOR, a_cluster, order
from tests.replica.core.test_requests import empty

G = make_genesis()
A, B = public_key(1), public_key(2)

# The bucket


def test_the_bucket_at_its_boundaries():
    buckets = Buckets()
    assert buckets.has(A, 5, 5, 100)
    buckets.charge(A, 5, 5, 100)
    assert not buckets.has(A, 1, 5, 299)
    assert buckets.has(A, 1, 5, 300)
    assert not buckets.has(A, 2, 5, 499)
    assert buckets.has(A, 2, 5, 500)
    assert not buckets.has(A, 5, 5, 1099)
    assert buckets.has(A, 5, 5, 1100)
    assert buckets.has(B, 5, 5, 100), "each client has its own"
    # A second's worth is all that is saved up.
    buckets.charge(A, 5, 5, 10_000)
    assert not buckets.has(A, 1, 5, 10_199)


def test_more_than_a_second_s_worth_is_a_debt():
    buckets = Buckets()
    assert buckets.has(A, 12, 5, 0)
    buckets.charge(A, 12, 5, 0)
    assert not buckets.has(A, 1, 5, 1599)
    assert buckets.has(A, 1, 5, 1600)
    assert not buckets.has(A, 12, 5, 2399)
    assert buckets.has(A, 12, 5, 2400)


def test_another_rate_takes_effect_at_once():
    buckets = Buckets()
    buckets.charge(A, 10, 10, 0)
    assert not buckets.has(A, 1, 1, 999)
    assert buckets.has(A, 1, 1, 1000)
    assert buckets.has(A, 100, 100, 1000)


def test_buckets_are_bounded_and_who_has_asked_lately_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BUCKETS_MAX", 2)
    buckets = Buckets()
    for key in (A, B, A, public_key(3)):
        buckets.charge(key, 9, 1, 0)
    assert [buckets.has(key, 1, 1, 0) for key in (A, B, public_key(3))] == [False, True, False]


@examples(200)
@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 700), st.integers(1, 12)), max_size=40))
def test_over_any_time_no_more_than_the_rate_and_one_second(rate: int, asked: list[tuple[int, int]]):
    """What was taken before the last envelope never exceeds the rate's worth and one bucket."""
    buckets = Buckets()
    now, before = 0, 0
    for pause, operations in asked:
        now += pause
        if buckets.has(A, operations, rate, now):
            buckets.charge(A, operations, rate, now)
            assert before * 1000 <= rate * (now + 1000)
            before += operations


def test_a_quota_never_allows_more_than_everybody_may():
    assert (ENVELOPES_MAX, BYTES_MAX) == (REQUESTS_PER_CLIENT_MAX, REQUEST_BYTES_PER_CLIENT_MAX)
    for quota in (NO_QUOTA, Quota(1, 2, 3), Quota(ENVELOPES_MAX, BYTES_MAX, module.OPERATIONS_PER_S_MAX)):
        assert decode_quota(quota.encode()) == quota


# The queue


def test_envelopes_and_bytes_that_wait():
    client = FakeClient(G)
    first, second, third = (client.operations(kv.put(b"k", b"v" * 1000)) for _ in range(3))
    size = len(first.raw)
    queue = RequestQueue(Limits())
    two, small, exact = Quota(envelopes=2), Quota(octets=size - 1), Quota(octets=2 * size)
    queue.add(first, 0, small)  # a client's only envelope is never refused
    with pytest.raises(OverQuotaError, match=rf"quota of {size - 1} bytes of requests"):
        queue.add(second, 0, small)
    with pytest.raises(OverQuotaError, match=r"bytes"):
        queue.add(second, 0, Quota(octets=2 * size - 1))
    assert queue.add(first, 0, small) is None, "it waits already"
    assert queue.add(second, 0, exact) is not None
    with pytest.raises(OverQuotaError, match=r"over its quota of 2 requests waiting at a time, which an operator set"):
        queue.add(third, 0, two)
    assert queue.add(FakeClient(G, 101).open(), 0, two) is not None
    queue.executed(first, 0)
    assert queue.add(third, 0, two) is not None
    assert issubclass(OverQuotaError, QueueFullError)


def test_who_is_refused_is_not_charged():
    client = FakeClient(G)
    queue = RequestQueue(Limits())
    one = Quota(envelopes=1, operations_per_s=2)
    first, second, third = (client.operations(kv.incr(b"n")) for _ in range(3))
    queue.add(first, 0, one)
    for envelope in (second, third, second):
        with pytest.raises(OverQuotaError, match="waiting"):
            queue.add(envelope, 0, one)
    queue.executed(first, 0)
    queue.add(second, 0, one)
    queue.executed(second, 0)
    for _ in range(2):
        with pytest.raises(OverQuotaError, match="2 operations per second"):
            queue.add(third, 499, one)
    assert empty(queue)
    assert queue.add(third, 500, one) is not None


# Replicas


def limited(quota: Quota) -> tuple[Cluster, FakeClient]:
    cluster = a_cluster()
    client = opened(cluster, FakeClient(cluster.genesis))
    order(cluster, Allow(1, client.key))
    order(cluster, SetQuota(2, client.key, quota))
    cluster.settle(10)
    return cluster, client


def refused(cluster: Cluster, replica: int) -> int:
    refusals = cluster.cores[replica].refusals["request-over-quota"]
    assert refusals == len([one for one in cluster.of(replica, Refuse) if "quota" in one.text and one.code == "busy"])
    return refusals


def executed(cluster: Cluster) -> set[bytes | None]:
    return {core.executor.state.get(b"n") for core in cluster.cores.values()}


def test_a_client_over_its_rate_does_not_cause_a_view_change():
    """Sent to all replicas, again and again, for ten patiences: what is over the rate waits nowhere."""
    cluster, client = limited(Quota(operations_per_s=2))
    asked = [client.operations(kv.incr(b"n")) for _ in range(100)]
    begun = cluster.now
    for _ in range(50):
        for envelope in asked:
            cluster.request(envelope)
        cluster.settle(1)
    assert all(refused(cluster, replica) > 1000 for replica in cluster.cores)
    assert all(core.requests_waiting == 0 and core.view == 0 for core in cluster.cores.values())
    assert not any(cluster.of(replica, ViewEntered) for replica in cluster.cores)
    (count,) = executed(cluster)
    assert count is not None
    worth = 2 + 2 * (cluster.now - begun) // 1000
    assert worth - 2 <= int(count) <= worth
    cluster.check()


def test_who_asks_each_replica_for_something_else_is_ahead_once_and_then_waits_for_all_of_it():
    cluster, client = limited(Quota(operations_per_s=2))
    for replica in cluster.cores:
        for _ in range(4):
            cluster.request(client.operations(kv.incr(b"n")), to=replica)
    cluster.run()
    assert executed(cluster) == {b"6"}, "the primary takes what the others took"
    assert [refused(cluster, replica) for replica in cluster.cores] == [2, 2, 2]
    late = client.operations(kv.incr(b"n"))
    cluster.tick(2499)
    for replica in cluster.cores:
        cluster.request(late, to=replica)
        cluster.run()
    assert executed(cluster) == {b"6"}
    cluster.tick(1)
    cluster.request(late, to=1)
    cluster.run()
    assert executed(cluster) == {b"7"}
    assert not any(cluster.of(replica, ViewEntered) for replica in cluster.cores)
    cluster.check()


def test_what_another_replica_took_is_taken():
    cluster, client = limited(Quota(envelopes=1, octets=1, operations_per_s=1))
    core = cluster.cores[0]
    for _ in range(20):
        core.handle(RequestReceived(client.operations(kv.incr(b"n")), relayed=True))
    assert refused(cluster, 0) == 0
    cluster.run()
    assert core.requests_waiting == 20


def test_a_client_s_old_envelopes_cost_it_nothing_when_they_are_ordered_again():
    """Otherwise a faulty primary could use up anybody's quota, and censor whom it likes without being suspected."""
    cluster, client = limited(Quota(operations_per_s=2))
    old = client.operations(kv.incr(b"n"))
    cluster.request(old)
    cluster.settle(10)
    queue = cluster.cores[1]._known.requests
    full = dict(queue._buckets._held)
    slots = len(cluster.history(1))
    for core in cluster.cores.values():
        core._known.requests._executed.clear()
        core._known.requests.add(old, cluster.now)
    cluster.settle(1)
    assert [len(cluster.history(replica)) for replica in cluster.cores] == [slots + 1] * 3, "it was ordered again"
    assert queue._buckets._held == full
    assert executed(cluster) == {b"1"}


def test_an_operator_s_commands_have_no_quota():
    cluster = a_cluster()
    order(cluster, SetQuota(1, b"", Quota(envelopes=1, operations_per_s=1)))
    for number in range(5):
        signed = encode_administer(cluster.genesis.cluster_id(), OPERATOR, Administer(U64_MAX, b"%d" % number))
        cluster.request(decode_envelope(signed + GOOD_SIGNATURE, cluster.genesis.cluster_id(), cluster.genesis.limits))
    cluster.settle(3)
    assert [refused(cluster, replica) for replica in cluster.cores] == [0, 0, 0]


def test_a_quota_that_was_set_later_leaves_what_waits():
    cluster = Cluster(replace(make_genesis(), operators=(OPERATOR,)))
    client = opened(cluster, FakeClient(cluster.genesis))
    for _ in range(5):
        cluster.handle(1, RequestReceived(client.operations(kv.incr(b"n")), relayed=False))
    order(cluster, SetQuota(1, b"", Quota(envelopes=1, operations_per_s=1)))
    cluster.settle(5)
    assert executed(cluster) == {b"5"}
