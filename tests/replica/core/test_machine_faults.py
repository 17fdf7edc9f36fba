"""What faulty replicas say: exposed by their own log, or not counted; never believed, and nobody else is stopped."""

from __future__ import annotations

import itertools
import random

import pytest

from replica.apps import kv
from replica.core.batch import make_batch
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    Suspect,
    ViewChange,
    decode_entry,
)
from replica.core.envelope import OperationsReply
from replica.core.events import Executed, Exposed, Forked, GroupReceived, Lied, ViewOpened
from replica.core.genesis import Ordering
from replica.core.group import VerifiedGroup
from replica.core.machine import ReplicaCore
from tests.replica.core.harness import BAD_SIGNATURE, Cluster, FakeClient, FakeLog, make_core, make_genesis, opened
from tests.replica.core.support import Lone, header_at_zero, junk_batch

G = make_genesis()
BATCHES = {slot: junk_batch(slot, (0, 0, 0) if slot % 4 == 0 else ()) for slot in range(1, 20)}
OTHER = junk_batch(99)


def propose(slot: int) -> PrePrepare:
    return PrePrepare(0, slot, BATCHES[slot])


def prepare(slot: int) -> Prepare:
    return Prepare(0, slot, BATCHES[slot].digest)


def commit(slot: int) -> Commit:
    return Commit(0, slot, BATCHES[slot].digest)


def exposed(lone: Lone) -> list[tuple[int, int, str]]:
    return [(e.log, e.index, e.violation.rule) for e in lone.of(Exposed)]


@pytest.mark.parametrize("ordering", Ordering)
def test_a_second_proposal_exposes_the_primary_at_the_same_index_everywhere(ordering: Ordering):
    genesis = make_genesis(2, ordering)
    for order in itertools.permutations(range(3)):
        cluster = Cluster(genesis, faulty=(0,))
        log = cluster.logs[0]
        groups = [log.say(propose(1)), log.say(PrePrepare(0, 1, OTHER)), log.say(propose(2))]
        for shift, replica in enumerate(cluster.cores):
            for place in order:
                cluster.publish(groups[(place + shift) % 3], to=(replica,))
        cluster.settle(4)
        for replica, core in cluster.cores.items():
            found = cluster.of(replica, Exposed)
            assert [(e.log, e.index, e.violation.rule) for e in found] == [(0, 2, "proposed-twice")]
            assert found[0].group == groups[1], "the evidence is the group that its author signed"
            assert core.read(0) == 1
            assert cluster.history(replica) == [(1, BATCHES[1].digest)], "what came before it stands"
        cluster.check()


def test_two_proposals_in_one_group_expose_at_the_second_of_them():
    lone = Lone(make_core(G, 1))
    lone.handle(GroupReceived(FakeLog(0).say(propose(1), PrePrepare(0, 1, OTHER), propose(2))))
    assert exposed(lone) == [(0, 2, "proposed-twice")]
    assert lone.core.read(0) == 1


def test_nothing_more_is_read_of_an_exposed_log():
    lone = Lone(make_core(G, 1))
    log = FakeLog(0)
    lone.handle(GroupReceived(log.say(propose(1), propose(3))))
    for slot in (2, 3):
        assert lone.handle(GroupReceived(log.say(propose(slot)))) == []
    assert exposed(lone) == [(0, 2, "slot-skipped")]
    assert lone.core.received(0) == 2
    assert lone.tick(1000) == []


MALFORMED = {
    "no entry": b"\xff",
    "empty": b"",
    "a slot too many bytes": prepare(1).encode() + b"\0",
    "a cut that is missing": PrePrepare(0, 4, junk_batch(4)).encode(),
    "an envelope with an invalid signature": PrePrepare(
        0, 1, make_batch(0, (), [FakeClient(G).open(signature=BAD_SIGNATURE)])
    ).encode(),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_entry_that_is_malformed_exposes_its_author(name: str):
    lone = Lone(make_core(G, 1))
    lone.handle(GroupReceived(FakeLog(0).say(MALFORMED[name])))
    assert exposed(lone) == [(0, 1, "malformed")]
    assert not lone.of(Executed)
    said = [decode_entry(payload, G, G.cluster_id()) for group in lone.log.groups for payload in group.payloads]
    assert said == [Suspect(0)], "its log is read no further, so this primary can serve nobody here"


def voting(*entries: Entry | bytes) -> tuple[Lone, FakeLog, FakeLog]:
    """Replica 1 that has read `entries` of replica 2."""
    lone, primary, liar = Lone(make_core(G, 1)), FakeLog(0), FakeLog(2)
    lone.handle(GroupReceived(liar.say(*entries)))
    return lone, primary, liar


def test_a_vote_for_what_is_never_proposed_waits_and_never_counts():
    lone, primary, liar = voting(Prepare(0, 1, OTHER.digest))
    lone.handle(GroupReceived(liar.say(Commit(0, 1, OTHER.digest))))
    for _ in range(50):
        lone.tick()
    assert (lone.core.read(2), lone.core.unread(2)) == (0, 2)
    assert lone.core.waiting_for(2) == "the proposal for slot 1 in view 0"
    assert lone.core._known.slots.decided(1) is None
    assert len(lone.core._known.slots) == 0
    assert exposed(lone) == []
    del primary


def test_a_vote_for_something_else_is_a_lie_and_the_log_goes_on():
    lone, primary, liar = voting(Prepare(0, 1, OTHER.digest), Commit(0, 1, OTHER.digest))
    lone.handle(GroupReceived(primary.say(propose(1))))
    assert [(e.log, e.index) for e in lone.of(Lied)] == [(2, 1), (2, 2)]
    assert lone.core.read(2) == 2
    lone.handle(GroupReceived(liar.say(commit(2))))
    assert exposed(lone) == [(2, 3, "commit-without-vote")], "only its own log's rules stop it"


def test_a_lie_is_not_counted_and_what_follows_it_is():
    lone, primary, liar = voting(Prepare(0, 1, OTHER.digest), Commit(0, 1, OTHER.digest))
    lone.handle(GroupReceived(primary.say(propose(1), propose(2), commit(1))))
    lone.handle(GroupReceived(liar.say(prepare(2), commit(2))))
    # Slot 1: committed by the primary and by this replica. Slot 2: by the liar, truly, and by this replica.
    assert [e.slot for e in lone.of(Executed)] == [1, 2]
    tally = lone.core._known.slots._slots[1].views[0]
    assert (tally.voters, tally.committers) == (0b011, 0b011)
    assert lone.core._known.slots._slots[2].views[0].committers == 0b110


def test_a_commit_that_contradicts_the_own_vote_is_a_lie():
    lone, primary, _ = voting()
    liar = FakeLog(2)
    lone = Lone(make_core(G, 1))
    lone.handle(GroupReceived(primary.say(propose(1))), GroupReceived(liar.say(prepare(1), Commit(0, 1, OTHER.digest))))
    assert [(e.log, e.index) for e in lone.of(Lied)] == [(2, 2)]
    assert lone.core._known.slots._slots[1].views[0].committers == 0b010


def test_a_true_commit_on_a_false_vote_is_not_counted():
    """A commit stands on its author's own vote for the same batch (design 4)."""
    lone, primary, _ = voting(Prepare(0, 1, OTHER.digest), commit(1))
    lone.handle(GroupReceived(primary.say(propose(1))))
    assert [(e.log, e.index) for e in lone.of(Lied)] == [(2, 1), (2, 2)]
    assert lone.core._known.slots._slots[1].views[0].committers == 0b010, "its own, and not the liar's"


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("f", [1, 2])
def test_f_faulty_replicas_alone_decide_nothing(f: int, ordering: Ordering):
    genesis = make_genesis(f, ordering)
    for faulty in ((0, *range(2, f + 1)), tuple(range(2, f + 2))):
        lone = Lone(make_core(genesis, 1))
        lone.hold = True  # what this correct replica says is not yet durable, hence not said
        logs = {number: FakeLog(number) for number in {0, *faulty}}
        lone.handle(GroupReceived(logs[0].say(propose(1), *([commit(1)] if 0 in faulty else []))))
        for number in faulty:
            if number != 0:
                lone.handle(GroupReceived(logs[number].say(prepare(1), commit(1))))
        votes = lone.core._known.slots._slots[1].views[0]
        alone = (votes.committers if ordering is Ordering.THREE_PHASE else votes.voters).bit_count()
        assert alone <= f + (0 not in faulty)
        if alone <= f:
            assert not lone.of(Executed)
            lone.release()
        while lone.held:
            lone.release()
        # With the one correct replica's own word there are q, if it was to commit at all.
        assert [e.slot for e in lone.of(Executed)] == [1]


def test_checkpoints_of_f_faulty_replicas_make_nothing_stable():
    genesis = make_genesis(2)
    lone = Lone(make_core(genesis, 1))
    logs = {n: FakeLog(n) for n in (0, 2, 3)}
    batches = {s: junk_batch(s, (0,) * 5 if s == 4 else ()) for s in range(1, 5)}
    lone.handle(GroupReceived(logs[0].say(*(PrePrepare(0, s, b) for s, b in batches.items()))))
    for log in (logs[2], logs[3]):
        lone.handle(GroupReceived(log.say(*(Prepare(0, s, b.digest) for s, b in batches.items()))))
    for log in logs.values():
        lone.handle(GroupReceived(log.say(*(Commit(0, s, b.digest) for s, b in batches.items()))))
    assert lone.core.executed == 4
    lie = Checkpoint(4, b"lie" + bytes(29))
    lone.handle(GroupReceived(logs[2].say(lie)), GroupReceived(logs[3].say(lie)))
    assert (lone.core.stable, lone.core.halted) == (0, None)
    digest = header_at_zero(genesis, lone.core.executor).digest
    lone.handle(GroupReceived(logs[0].say(Checkpoint(4, digest))))
    assert lone.core.stable == 0, "two of five"
    late = FakeLog(4)
    voted = [Prepare(0, s, b.digest) for s, b in batches.items()]
    lone.handle(GroupReceived(late.say(*voted, Checkpoint(4, digest))))
    assert lone.core.stable == 4


@pytest.mark.parametrize("view", [1, 2, 2**64 - 1])
def test_f_replicas_move_no_view(view: int):
    cluster = Cluster(G, faulty=(2,))
    client = opened(cluster, FakeClient(G))
    cluster.publish(cluster.logs[2].say(Suspect(0)))
    cluster.publish(cluster.logs[2].say(ViewChange(view)))
    cluster.request(client.operations(kv.put(b"k", b"v")))
    cluster.settle(5)
    cluster.check()
    for replica, core in cluster.cores.items():
        assert (core.view, core.read(2), len(cluster.history(replica))) == (0, 1, 2)
        assert core.waiting_for(2) == f"q replicas that want view {view}"


def test_a_new_view_opens_what_its_references_name():
    """Two faulty replicas of three are beyond the model; their logs keep every rule all the same."""
    core = make_core(G, 0)
    logs = {1: FakeLog(1), 2: FakeLog(2)}
    for log in logs.values():
        core.handle(GroupReceived(log.say(Suspect(0))))
    for log in logs.values():
        core.handle(GroupReceived(log.say(ViewChange(1))))
    effects = core.handle(GroupReceived(logs[1].say(NewView(1, (Reference(1, 2), Reference(2, 2))))))
    assert ViewOpened(1, 0, 0) in effects
    assert not core.exposed
    assert core.view == 1


def other_history(count: int) -> list[VerifiedGroup]:
    log = FakeLog(0)
    return [log.say(PrePrepare(0, slot, junk_batch(50 + slot))) for slot in range(1, count + 1)]


@pytest.mark.parametrize("early", [False, True])
def test_a_forked_log_is_shown_and_never_read_again(early: bool):
    lone = Lone(make_core(G, 1))
    log = FakeLog(0)
    first, second = log.say(propose(1)), log.say(propose(2))
    fork = other_history(3)
    if early:
        lone.handle(GroupReceived(fork[1]))
        lone.handle(GroupReceived(first))
    else:
        lone.handle(GroupReceived(first))
        lone.handle(GroupReceived(fork[1]))
    assert [(e.log, e.index, e.group) for e in lone.of(Forked)] == [(0, 2, fork[1])]
    assert lone.core.exposed[0].rule == "forked"
    for group in (second, *fork, log.say(propose(3))):
        assert lone.handle(GroupReceived(group)) == []
    assert lone.core.received(0) == 1
    assert lone.tick(1000) == []


POOL: list[Entry | bytes] = [
    *(prepare(slot) for slot in range(1, 10)),
    *(commit(slot) for slot in range(1, 10)),
    *(Prepare(0, slot, OTHER.digest) for slot in range(1, 5)),
    *(propose(slot) for slot in range(1, 9)),
    *(PrePrepare(0, slot, junk_batch(70 + slot, (0, 0, 0) if slot % 4 == 0 else ())) for slot in range(1, 9)),
    PrePrepare(0, 4, junk_batch(4, (0, 9, 9))),
    Checkpoint(4, bytes(32)),
    Checkpoint(8, bytes(32)),
    Suspect(0),
    ViewChange(1),
    b"junk",
]


def random_log(log: FakeLog, rng: random.Random, core: ReplicaCore) -> VerifiedGroup | None:
    """Say something, now and then something that even obeys the rules."""
    if rng.random() < 0.6 and log.author:
        due = core._known.states[log.author].last_vote or 0
        digest = core._known.slots.proposed(0, due + 1)
        if digest is not None:
            return log.say(Prepare(0, due + 1, digest), *([Commit(0, due + 1, digest)] if rng.random() < 0.7 else []))
    return log.say(*(rng.choice(POOL) for _ in range(rng.choice((1, 1, 1, 2, 4)))))


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("seed", range(8))
def test_a_backup_that_says_anything_neither_splits_nor_stops_the_others(ordering: Ordering, seed: int):
    cluster = Cluster(make_genesis(1, ordering), faulty=(2,), seed=seed)
    client = opened(cluster, FakeClient(cluster.genesis))
    for number in range(12):
        cluster.request(client.operations(kv.put(b"%d" % number, b"v")))
        cluster.run(shuffle=True)
        to = cluster.random.choice([(0,), (1,), (0, 1)])
        cluster.publish(random_log(cluster.logs[2], cluster.random, cluster.cores[0]), to=to)
    cluster.settle(20, shuffle=True)
    cluster.check()
    assert cluster.history(0) == cluster.history(1)
    for replica, core in cluster.cores.items():
        assert core.requests_waiting == 0
        assert core.executor.operations == 12
        assert {r.first for r in cluster.replies(replica) if isinstance(r, OperationsReply)} == set(range(1, 13))
    indexes = {(e.index, e.violation.rule) for i in (0, 1) for e in cluster.of(i, Exposed)}
    assert len(indexes) <= 1


@pytest.mark.parametrize("ordering", Ordering)
@pytest.mark.parametrize("seed", range(12))
def test_a_primary_that_says_anything_splits_nobody(ordering: Ordering, seed: int):
    cluster = Cluster(make_genesis(2, ordering), faulty=(0, 4), seed=seed)
    rng = cluster.random
    slot = 1
    for _ in range(12):
        if rng.random() < 0.8:
            cut = (0,) * 5 if slot % 4 == 0 else ()
            entries: list[Entry | bytes] = [PrePrepare(0, slot, junk_batch(rng.randrange(100, 999), cut))]
            slot += 1
        else:
            entries = [rng.choice(POOL)]
        cluster.publish(cluster.logs[0].say(*entries), to=tuple(rng.sample((1, 2, 3), rng.randrange(4))))
        said = random_log(cluster.logs[4], rng, cluster.cores[1])
        cluster.publish(said, to=tuple(rng.sample((1, 2, 3), rng.randrange(4))))
        cluster.run(shuffle=True)
    # What one correct replica has, all have in the end.
    for log in (0, 4):
        for group in cluster.logs[log].groups:
            cluster.publish(group)
    cluster.settle(20, shuffle=True)
    cluster.check()
    assert len({tuple(cluster.history(i)) for i in cluster.cores}) == 1
    for log in (0, 4):
        assert len({cluster.cores[i].read(log) for i in cluster.cores}) == 1, "all stop at the same entry"
