"""A core made from a snapshot goes on exactly like one that read every log from the beginning."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from replica.apps import kv
from replica.core.checkpoint import batches_in_flight, distinct_digests
from replica.core.events import (
    Executed,
    Exposed,
    GroupReceived,
    Lied,
    Persist,
    Recovered,
    ViewOpened,
)
from replica.core.genesis import Ordering
from replica.core.group import VerifiedGroup
from replica.core.machine import ReplicaCore
from replica.core.snapshot import Fetched, Milestone
from tests.replica.core.harness import Cluster, FakeClient, come_home, make_core, opened
from tests.replica.core.test_cut import CLUSTERS
from tests.replica.core.traffic import (
    EVERY_CHECKPOINT,
    all_groups,
    feed,
    milestones,
    note_headers,
    one_by_one,
    publish_all,
    random_run,
    snapshot_of,
)

in_every_run = pytest.mark.parametrize("run", CLUSTERS.values(), ids=CLUSTERS)


def beyond(cut: tuple[int, ...], cluster: Cluster) -> list[VerifiedGroup]:
    return [group for group in all_groups(cluster) if group.first > cut[group.author]]


def agreed(effects: list, slot: int) -> list[tuple]:
    """What a replica does because of the logs, after `slot`; in whatever order it read them."""
    found: list[tuple] = []
    for effect in effects:
        if isinstance(effect, Executed) and effect.slot > slot:
            found.append(("executed", effect.slot, effect.batch.digest))
        elif isinstance(effect, Exposed | Lied):
            found.append((type(effect).__name__, effect.log, effect.index))
    return sorted(found, key=lambda one: one[:2])


def resumed(cluster: Cluster, until: list[Milestone], number: int) -> ReplicaCore:
    snapshot = snapshot_of(cluster.genesis, until)
    return make_core(cluster.genesis, number, live=False, snapshot=snapshot, milestones=EVERY_CHECKPOINT)


def all_of(core: ReplicaCore) -> dict[str, object]:
    """Everything that later judgements and answers depend on."""
    stable = core.stable
    states = [state.copy() for state in core._known.states]
    for state in states:
        # Which views are dropped when depends on how far the cut was when a checkpoint became stable here.
        state.drop_views(core._cut.lowest_view)
    return {
        "states": states,
        "cut": (core.cut, core._cut.heads, core._cut.states),
        "beyond the cut": len(core._cut),
        "ends": core._cut.ends_of_groups(),
        "stable": (stable, core.stable_digest),
        "executed": core.executed,
        "roots": core.executor.roots(),
        "own digests": {slot: d for slot, d in core._known.own_digests.items() if slot >= stable},
        "tallies": {
            slot: (entry.views, sorted(entry.batches), entry.decided)
            for slot, entry in core._known.slots._slots.items()
        },
        "heads": [(core.received(log), core.head(log)) for log in range(core.genesis.n)],
        "read": [core.read(log) for log in range(core.genesis.n)],
    }


def check_milestones(cluster: Cluster, before: list[Milestone], effects: list, headers: dict) -> None:
    """What was made durable amounts to the state at each milestone, also if one in between was passed over."""
    until = list(before)
    for milestone in (effect.milestone for effect in effects if isinstance(effect, Persist)):
        until.append(milestone)
        header, states = headers[milestone.slot]
        snapshot = snapshot_of(cluster.genesis, until)
        assert snapshot.header == header
        assert snapshot.executor.roots() == (header.application, header.table)
        assert list(snapshot.states) == states
        named = distinct_digests(batches_in_flight(snapshot.states))
        assert [batch.digest for batch in snapshot.batches] == named
        application, table = (one.frozen() for one in (snapshot.executor.state, snapshot.executor.table.records))
        parts = (snapshot.certificate, snapshot.states, snapshot.batches)
        whole = Fetched(snapshot.header, *parts, application, table).milestone()
        assert whole.is_whole
        assert snapshot_of(cluster.genesis, [whole]).executor.roots() == snapshot.executor.roots()


@in_every_run
def test_every_milestone_is_a_place_to_begin(run: Callable[[], Cluster]):
    cluster = run()
    saved = milestones(cluster, 0)
    assert len(saved) >= 2
    original = make_core(cluster.genesis, 0, live=False, milestones=EVERY_CHECKPOINT)
    headers = note_headers(original)
    effects = feed(original, all_groups(cluster), random.Random(1))
    for count in range(1, len(saved) + 1, 3):
        core = resumed(cluster, saved[:count], 0)
        slot = saved[count - 1].slot
        assert (core.executed, core.stable, core.stable_digest) == (slot, slot, headers[slot][0].digest)
        found = note_headers(core)
        rest = beyond(core.cut, cluster)
        assert len(rest) < len(all_groups(cluster))
        after = feed(core, rest, random.Random(count))
        assert agreed(after, slot) == agreed(effects, slot)
        assert found == {s: header for s, header in headers.items() if s > slot}
        assert all_of(core) == all_of(original)
        check_milestones(cluster, saved[:count], after, headers)
        come_home(core, cluster.logs[0])
        assert core.is_live
        assert core._pen.state == core._known.states[0]


def test_the_same_groups_in_the_same_order_have_the_same_effects():
    """Not only the same outcome: view openings, and what becomes stable when, too."""
    cluster = random_run(1, Ordering.THREE_PHASE, 2)
    saved = milestones(cluster, 0)
    middle = saved[len(saved) // 2]
    original = make_core(cluster.genesis, 0, live=False, milestones=EVERY_CHECKPOINT)
    core = resumed(cluster, saved[: len(saved) // 2 + 1], 0)
    rest = beyond(core.cut, cluster)
    known = [group for group in all_groups(cluster) if group not in rest]
    feed(original, known, random.Random(1))
    assert original.executed < middle.slot, "it needs what is above the cut to execute the slot of the cut"
    openings = [
        [e for group in rest for e in core_.handle(GroupReceived(group)) if isinstance(e, ViewOpened)]
        for core_ in (original, core)
    ]
    assert openings[0] == openings[1]
    assert all_of(core) == all_of(original)


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("seed", range(3))
def test_a_replica_that_begins_with_a_snapshot_takes_its_place(ordering: Ordering, seed: int):
    """It votes again, its log breaks no rule, and it says the checkpoints that come."""
    cluster = Cluster(one_by_one(random_run(1, ordering, 0).genesis), seed=seed, milestones=EVERY_CHECKPOINT)
    client = opened(cluster, FakeClient(cluster.genesis))
    for _ in range(9):
        cluster.request(client.operations(kv.incr(b"n")))
        cluster.run(shuffle=True)
    back = 1 + seed % 2
    old = cluster.cores[back]
    core = resumed(cluster, milestones(cluster, 0)[: 1 + seed], back)
    cluster.in_flight.clear()
    cluster.appending.clear()
    slot = core.executed
    cluster.effects[back] = [e for e in cluster.effects[back] if isinstance(e, Executed) and e.slot <= slot]
    cluster.cores[back] = core
    assert 0 < slot < old.executed
    cluster.handle(back, recovered(cluster, back))
    publish_all(cluster)
    for log in cluster.logs[back].groups:
        cluster.in_flight.append((back, GroupReceived(log)))
    cluster.settle(3, shuffle=True)
    assert core.is_live
    said = cluster.logs[back].last
    for _ in range(9):
        cluster.request(client.operations(kv.incr(b"n")))
        cluster.run(shuffle=True)
    cluster.settle(3)
    cluster.check()
    assert cluster.logs[back].last > said + 9
    assert {c.executor.state.get(b"n") for c in cluster.cores.values()} == {b"18"}
    assert len({c.stable_digest for c in cluster.cores.values()}) == 1
    assert core._pen.state.last_checkpoint == cluster.cores[0].stable


def recovered(cluster: Cluster, number: int) -> Recovered:
    return Recovered(cluster.logs[number].last, cluster.logs[number].head)
