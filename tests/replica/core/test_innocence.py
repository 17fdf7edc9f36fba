"""A correct replica is never exposed: not while it runs, and not by anything that its and others' true groups can show."""

from __future__ import annotations

import random

import pytest

from replica.core.entries import Prepare
from replica.core.events import Exposed, Forked, HeadsReceived, Lied
from replica.core.evidence import Basis
from replica.core.genesis import Ordering
from replica.core.group import VerifiedGroup
from replica.core.proof import EntryProof
from replica.core.proving import Replay, UnprovenError, collect_replay
from tests.replica.core.harness import Cluster, FakeLog, heads, make_core
from tests.replica.core.traffic import (
    EVERY_CHECKPOINT,
    all_groups,
    feed,
    milestones,
    random_run,
    run_with_votes_in_flight,
    snapshot_of,
)

RUNS = [(1, ordering, seed) for ordering in Ordering for seed in range(4)] + [(2, Ordering.THREE_PHASE, 7)]
IDS = [f"f{f}-{ordering.label}-{seed}" for f, ordering, seed in RUNS]
TRIES = 60


class Believed:
    """Keys of the harness' logs, which sign nothing."""

    def __init__(self, cluster: Cluster) -> None:
        self._heads = heads(cluster.genesis)

    def initial_heads(self) -> list[bytes]:
        return list(self._heads)

    def verify(self, log: int, raw: bytes) -> VerifiedGroup:
        raise NotImplementedError

    def entry(self, log: int, proof: EntryProof) -> bool:
        return True


def bases(cluster: Cluster) -> list[Basis | None]:
    found = [Basis(m.header, m.certificate, m.logs) for m in milestones(cluster, 0)]
    return [None, *random.Random(1).sample(found, min(3, len(found)))]


def replay_of(cluster: Cluster, basis: Basis | None, upto: list[int]) -> Replay:
    """All logs from the basis on, each as far as `upto` says, in any order."""
    replay = Replay(cluster.genesis, Believed(cluster), basis, lambda _: True)
    for log, last in enumerate(upto):
        for group in cluster.logs[log].groups:
            if replay.end(log) < group.first and group.last <= last:
                replay.add(group)
    return replay


@pytest.mark.parametrize("which", RUNS, ids=IDS)
def test_no_entry_of_a_correct_log_is_evidence(which):
    """Whatever part of the true logs is shown, with whatever certified basis, no entry can be shown to break a rule."""
    cluster, chance = random_run(*which), random.Random(which[2])
    judged = 0
    for basis in bases(cluster):
        for number in range(TRIES):
            upto = [log.last if chance.random() < 0.5 else chance.randint(0, log.last) for log in cluster.logs]
            log = chance.randrange(cluster.genesis.n)
            index = chance.randint(1, cluster.logs[log].last) if number else cluster.logs[log].last
            try:
                assert replay_of(cluster, basis, upto).run(log, index) is None
            except UnprovenError as error:
                assert "breaks no rule" in str(error)  # noqa: PT017 - either is right
                judged += 1
    assert judged > TRIES // 4


@pytest.mark.parametrize("ordering", list(Ordering))
def test_every_entry_around_votes_in_flight(ordering):
    cluster = run_with_votes_in_flight(ordering)
    for basis in bases(cluster):
        for log in range(3):
            for index in range(1, cluster.logs[log].last + 1):
                replay = replay_of(cluster, basis, [one.last for one in cluster.logs])
                begins = replay.states[log].position
                if index > begins:
                    with pytest.raises(UnprovenError, match="breaks no rule"):
                        replay.run(log, index)
                else:
                    assert replay.run(log, index) is None


@pytest.mark.parametrize("which", RUNS, ids=IDS)
def test_readers_from_the_beginning_and_from_a_transfer_find_nothing(which):
    cluster, chance = random_run(*which), random.Random(which[2])
    kept = milestones(cluster, 0)
    snapshots = [None, snapshot_of(cluster.genesis, kept[: chance.randrange(1, len(kept))])]
    for snapshot in snapshots:
        reader = make_core(cluster.genesis, 0, live=False, snapshot=snapshot, milestones=EVERY_CHECKPOINT)
        effects = feed(reader, all_groups(cluster), chance)
        for core in cluster.cores.values():
            effects += reader.handle(HeadsReceived(1 + core.number % 2, core.heads()))
        assert not [effect for effect in effects if isinstance(effect, Exposed | Lied | Forked)]
        assert reader.executed == cluster.cores[0].executed


@pytest.mark.parametrize("which", RUNS, ids=IDS)
def test_the_same_replay_finds_what_is_wrong(which):
    """The counterpart: one wrong entry after such a run is found, across views and from every basis."""
    cluster = random_run(*which)
    genesis = cluster.genesis
    view = max(core.view for core in cluster.cores.values())
    assert view > 0
    guilty = next(log for log in range(genesis.n) if log != view % genesis.n)
    state = cluster.cores[0]._known.states[guilty]
    copy = FakeLog(guilty)
    copy.groups, copy.head, copy.last = list(cluster.logs[guilty].groups), cluster.logs[guilty].head, state.position
    bad = copy.say(Prepare(state.view, state.top + 1000, bytes(32)))

    def source(log: int, first: int):
        groups = copy.groups if log == guilty else cluster.logs[log].groups
        return iter([group for group in groups if group.last >= first])

    for basis in bases(cluster):
        evidence = collect_replay(guilty, bad.first, genesis, Believed(cluster), basis, source)
        assert evidence is not None
        assert evidence.claim.rule == "slot-skipped"
        assert len(evidence.groups[guilty]) >= 1
