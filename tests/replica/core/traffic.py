"""Random runs of a cluster whose primaries are cut off now and then, and what readers of its logs make of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import replace

from replica.apps import kv
from replica.apps.kv import KeyValue
from replica.core.batch import decode_batch
from replica.core.carry import carry
from replica.core.checkpoint import Header, decode_header
from replica.core.entries import Entry, NewView, decode_entry
from replica.core.events import GroupReceived, Persist, Tick
from replica.core.execution import Executor
from replica.core.genesis import Genesis, Ordering
from replica.core.group import VerifiedGroup
from replica.core.logstate import LogState, initial_states
from replica.core.machine import ReplicaCore
from replica.core.rules import Reading, apply_entry, apply_opening, judge
from replica.core.snapshot import Milestone, MilestoneRule, Snapshot
from replica.core.state import BucketedMap
from replica.core.tree import with_values
from tests.replica.core.harness import Cluster, FakeClient, make_genesis, opened

# A milestone at every checkpoint, so that a run has several.
EVERY_CHECKPOINT = MilestoneRule(intervals=1)


def one_by_one(genesis: Genesis) -> Genesis:
    """Every envelope is a batch, so that there are many slots."""
    return replace(genesis, limits=replace(genesis.limits, batch_envelopes_max=1))


def ask(cluster: Cluster, client: FakeClient, rng: random.Random) -> None:
    key = b"k%d" % rng.randrange(30)
    operation = rng.choice([kv.put(key, rng.randbytes(rng.randrange(9))), kv.incr(b"n"), kv.delete(key)])
    cluster.request(client.operations(operation, acknowledged=max(1, client.next - rng.randrange(8))))


def deliver(cluster: Cluster, count: int) -> None:
    """Deliver some of what is in flight, in any order."""
    for _ in range(min(count, len(cluster.in_flight))):
        if cluster.in_flight:
            cluster.in_flight.rotate(cluster.random.randrange(len(cluster.in_flight)))
            cluster.handle(*cluster.in_flight.popleft())


def step(cluster: Cluster, client: FakeClient, rng: random.Random) -> None:
    """Have the client ask for things, and the cluster do some of it; a primary may speak to itself for a while."""
    if rng.random() < 0.3:
        away = max(core.view for core in cluster.cores.values()) % cluster.genesis.n
        cluster.cut_off = {(away, reader) for reader in cluster.cores if rng.random() < 0.9}
    for _ in range(rng.randrange(1, 9)):
        ask(cluster, client, rng)
        deliver(cluster, rng.randrange(40))
    if cluster.cut_off:
        for _ in range(rng.randrange(25)):
            cluster.tick(300)
            deliver(cluster, rng.randrange(80))
            if rng.random() < 0.1:
                cluster.cut_off = set()
                publish_all(cluster)
        cluster.cut_off = set()
        publish_all(cluster)


def publish_all(cluster: Cluster) -> None:
    for log in cluster.logs:
        for group in log.groups:
            cluster.publish(group)


@functools.cache
def random_run(f: int, ordering: Ordering, seed: int, steps: int = 20) -> Cluster:
    """A run after which every replica has executed everything; not to be changed."""
    cluster = Cluster(one_by_one(make_genesis(f, ordering, interval=2)), seed=seed, milestones=EVERY_CHECKPOINT)
    cluster.duplicate = 0.1
    client = opened(cluster, FakeClient(cluster.genesis))
    for _ in range(steps):
        step(cluster, client, cluster.random)
    publish_all(cluster)
    cluster.settle(30, shuffle=True)
    cluster.check()
    assert len({core.executed for core in cluster.cores.values()}) == 1
    return cluster


@functools.cache
def run_with_votes_in_flight(ordering: Ordering) -> Cluster:
    """A run in which the states at the cut of slot 8 hold proposals for slots above it; not to be changed.

    Replica 0 proposes up to slot 13 in view 0, but nobody hears of slot 2 and more until view 1 is open.
    """
    cluster = Cluster(one_by_one(make_genesis(1, ordering, interval=8)), milestones=EVERY_CHECKPOINT)
    client = opened(cluster, FakeClient(cluster.genesis))
    cluster.cut_off = {(0, 1), (0, 2)}
    for number in range(12):
        cluster.request(client.operations(kv.put(b"%d" % number, b"v")), to=None if number < 4 else 0)
    for _ in range(12):
        cluster.run()
        for replica in (1, 2):
            cluster.now += 100
            cluster.handle(replica, Tick(cluster.now, cluster.now))
    assert {core.view for core in cluster.cores.values()} == {1}
    assert cluster.cores[1].executed == 5
    cluster.cut_off = set()
    publish_all(cluster)
    cluster.run()
    for number in range(20):
        cluster.request(client.operations(kv.incr(b"n"), kv.put(b"m%d" % number, b"v")))
        cluster.run()
    cluster.settle()
    cluster.check()
    return cluster


def all_groups(cluster: Cluster) -> list[VerifiedGroup]:
    return [group for log in cluster.logs for group in log.groups]


def milestones(cluster: Cluster, replica: int) -> list[Milestone]:
    return [effect.milestone for effect in cluster.of(replica, Persist)]


def feed(core: ReplicaCore, groups: Iterable[VerifiedGroup], rng: random.Random) -> list:
    """Hand all groups in, in any order; return the effects."""
    rest = list(groups)
    rng.shuffle(rest)
    effects = []
    while rest:  # what did not fit is handed in again
        for group in rest:
            effects += core.handle(GroupReceived(group))
        rest = [group for group in rest if group.last > core.received(group.author)]
    return effects


def note_headers(core: ReplicaCore) -> dict[int, tuple[Header, list[LogState]]]:
    """Return what will hold, per slot, each header that the core makes and the states that it was made of."""
    found: dict[int, tuple[Header, list[LogState]]] = {}
    executed = core._checkpoints.executed

    def noting(slot: int, *rest, **more):
        header = executed(slot, *rest, **more)
        if header is not None:
            found[slot] = header, [state.copy() for state in core._cut.states]
        return header

    core._checkpoints.executed = noting  # type: ignore[method-assign]
    return found


def prefixes(cluster: Cluster) -> list[list[LogState]]:
    """Every log's reduced state at every position, by a reader that never prunes and knows of no checkpoint."""
    genesis: Genesis = cluster.genesis
    states = initial_states(genesis.n)
    found = [[state.copy()] for state in states]
    unread = [[p for group in log.groups for p in group.payloads] for log in cluster.logs]
    moved = True
    while moved:
        moved = False
        for log, payloads in enumerate(unread):
            while payloads:
                entry: Entry = decode_entry(payloads[0], genesis, genesis.cluster_id())
                if judge(states[log], entry, Reading(genesis, states, executed=2**62, stable=0)) is not None:
                    break
                carried = carry(entry, states, 0) if isinstance(entry, NewView) else None
                apply_entry(states[log], entry)
                if carried is not None:
                    apply_opening(states[log], states[log].view, carried)
                found[log].append(states[log].copy())
                payloads.pop(0)
                moved = True
    assert not any(unread), "every log of correct replicas is read to its end"
    return found


def snapshot_of(genesis: Genesis, until: list[Milestone]) -> Snapshot:
    """What a replica makes of the milestones that it made durable, the last one's state."""
    maps: tuple[dict[bytes, bytes], dict[bytes, bytes]] = ({}, {})
    for milestone in until:
        for content, changes in zip(maps, (milestone.application, milestone.table), strict=True):
            if milestone.is_whole:
                content.clear()
            content.update({key: value for key, value in with_values(changes) if value is not None})
            for key in [key for key, item in changes if item is None]:
                content.pop(key, None)
    last = until[-1]
    header = decode_header(last.header, genesis.n)
    state, records = (BucketedMap(content.items()) for content in maps)
    executor = Executor.restored(KeyValue(), genesis, header.slot, header.time_ms, state, records)
    return Snapshot(
        header,
        last.certificate,
        tuple(LogState.decode(raw) for raw in last.logs),
        tuple(decode_batch(raw, genesis.cluster_id(), genesis.limits) for raw in last.batches),
        executor,
    )
