"""Checkpoints: when one is stable, who must stop, how far anyone runs ahead, and that nothing piles up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replica.apps import kv
from replica.core.entries import Checkpoint, Commit, Entry, Prepare, PrePrepare, decode_entry
from replica.core.events import (
    Append,
    Executed,
    Exposed,
    GroupReceived,
    Halt,
    Lied,
    RequestReceived,
    Stable,
)
from replica.core.execution import Executor
from replica.core.genesis import Ordering
from replica.core.group import VerifiedGroup
from replica.core.machine import ReplicaCore
from replica.core.pen import HELD_TICKS
from tests.replica.core.harness import Cluster, FakeClient, FakeLog, make_core, make_genesis, opened
from tests.replica.core.support import Lone, header_at_zero, junk_batch

G = make_genesis()
BATCHES = {slot: junk_batch(slot, (0, 0, 0) if slot % 4 == 0 else ()) for slot in range(1, 40)}


def propose(*slots: int) -> list[Entry]:
    return [PrePrepare(0, slot, BATCHES[slot]) for slot in slots]


def prepare(*slots: int) -> list[Entry]:
    return [Prepare(0, slot, BATCHES[slot].digest) for slot in slots]


def commit(*slots: int) -> list[Entry]:
    return [Commit(0, slot, BATCHES[slot].digest) for slot in slots]


def digest_after(slot: int) -> bytes:
    executor = Executor(object(), G)  # type: ignore[arg-type]
    for number in range(1, slot + 1):
        executor.execute(number, BATCHES[number])
    return header_at_zero(G, executor).digest


def checkpoint(slot: int) -> Checkpoint:
    return Checkpoint(slot, digest_after(slot))


def entries(groups: list[VerifiedGroup]) -> list[Entry]:
    return [decode_entry(p, G, G.cluster_id()) for group in groups for p in group.payloads]


def test_a_checkpoint_is_stable_when_q_replicas_said_it():
    lone = Lone(make_core(G, 1))
    primary, other = FakeLog(0), FakeLog(2)
    lone.hold = True
    lone.handle(GroupReceived(primary.say(*propose(1, 2, 3, 4))), GroupReceived(other.say(*prepare(1, 2, 3, 4))))
    lone.handle(GroupReceived(primary.say(*commit(1, 2, 3, 4))), GroupReceived(other.say(*commit(1, 2, 3, 4))))
    assert [e.slot for e in lone.of(Executed)] == [1, 2, 3, 4]
    lone.handle(GroupReceived(primary.say(checkpoint(4))))
    assert lone.core.stable == 0, "one replica's word; the own one is not written yet"
    lone.handle(GroupReceived(other.say(checkpoint(4))))
    assert lone.of(Stable) == [Stable(4, digest_after(4))]
    assert (lone.core.stable, len(lone.core._known.slots)) == (4, 0)


def test_the_own_word_counts_once_it_is_durable():
    lone = Lone(make_core(G, 1))
    primary = FakeLog(0)
    lone.handle(GroupReceived(primary.say(*propose(1, 2, 3, 4))))
    lone.hold = True
    lone.handle(GroupReceived(primary.say(*commit(1, 2, 3, 4), checkpoint(4))))
    assert lone.core.executed == 4
    assert [type(e) for e in entries([a.group for a in lone.held])] == [Checkpoint]
    assert lone.core.stable == 0
    lone.release()
    assert lone.core.stable == 4


def test_a_state_that_differs_from_the_stable_one_halts_its_replica():
    cluster = Cluster(G)
    client = opened(cluster, FakeClient(G))
    rotten = cluster.cores[2]
    rotten.executor.state.put(b"rot", b"1")
    rotten.executor.state.commit()
    for number in range(6):
        cluster.request(client.operations(kv.put(b"%d" % number, b"v")))
        cluster.settle(2)
    halts = cluster.of(2, Halt)
    assert len(halts) == 1
    assert rotten.halted == halts[0].reason
    assert "after slot 4 differs" in halts[0].reason
    assert "replace its store" in halts[0].reason
    assert cluster.effects[2][-1] == halts[0], "not a word after it"
    said = cluster.logs[2].last
    for replica in (0, 1):
        assert len(cluster.history(replica)) == 7
        assert cluster.cores[replica].halted is None
        assert [e.log for e in cluster.of(replica, Lied)] in ([], [2])
    cluster.request(client.operations(kv.put(b"x", b"v")))
    cluster.settle(2)
    assert cluster.logs[2].last == said
    assert rotten.handle(RequestReceived(client.open(), relayed=False)) == []


def test_a_checkpoint_that_differs_from_the_stable_one_is_a_lie():
    lone = Lone(make_core(G, 1))
    primary, liar = FakeLog(0), FakeLog(2)
    lone.handle(GroupReceived(primary.say(*propose(1, 2, 3, 4))))
    lone.handle(GroupReceived(primary.say(*commit(1, 2, 3, 4), checkpoint(4))))
    assert lone.core.stable == 4
    lone.handle(GroupReceived(liar.say(Checkpoint(4, bytes(32)))))
    assert [(e.log, e.index) for e in lone.of(Lied)] == [(2, 1)]
    lone.handle(GroupReceived(liar.say(*[Prepare(0, s, BATCHES[s].digest) for s in (5,)])))
    assert lone.core.waiting_for(2) == "the proposal for slot 5 in view 0", "its log goes on"


class Primary:
    """Replica 0 alone with the logs of two backups that say what the test wants."""

    def __init__(self, ordering: Ordering) -> None:
        usual = make_genesis(1, ordering)
        self.genesis = replace(usual, limits=replace(usual.limits, batch_envelopes_max=1))
        self.lone = Lone(make_core(self.genesis, 0))
        self.backup = FakeLog(1)
        self.client = FakeClient(self.genesis)

    def request(self, count: int) -> None:
        for _ in range(count):
            self.lone.handle(RequestReceived(self.client.operations(kv.get(b"k")), relayed=False))

    def proposed(self) -> dict[int, bytes]:
        found = [
            decode_entry(p, self.genesis, self.genesis.cluster_id()) for g in self.lone.log.groups for p in g.payloads
        ]
        return {e.slot: e.batch.digest for e in found if isinstance(e, PrePrepare)}

    def follow(self, *slots: int) -> None:
        """The backup votes for and commits what was proposed."""
        for slot in slots:
            digest = self.proposed()[slot]
            self.lone.handle(GroupReceived(self.backup.say(Prepare(0, slot, digest), Commit(0, slot, digest))))
            for _ in range(HELD_TICKS):  # the other backup is silent
                self.lone.tick(1)


@pytest.mark.parametrize("ordering", Ordering)
def test_the_primary_stops_at_its_window_and_goes_on_after_its_checkpoint(ordering: Ordering):
    p = Primary(ordering)
    p.request(20)
    assert sorted(p.proposed()) == list(range(1, 9)), "last checkpoint 0, window 8"
    assert p.lone.core.requests_waiting == 20
    p.follow(1, 2, 3)
    assert sorted(p.proposed()) == list(range(1, 9)), "executed up to 3: no checkpoint yet"
    p.follow(4)
    assert sorted(p.proposed()) == list(range(1, 13))
    assert p.lone.core._pen.state.last_checkpoint == 4
    assert p.lone.core.stable == 0, "the window moves with the own checkpoint"
    p.follow(*range(5, 9))
    assert sorted(p.proposed()) == list(range(1, 17))
    p.follow(9)
    assert p.lone.of(Exposed)[0].violation.rule == "beyond-window", "the backup never said a checkpoint"


def test_a_backup_votes_within_its_own_window_only():
    lone = Lone(make_core(G, 1))
    primary = FakeLog(0)
    # The primary says that it executed more than this replica could: its entry waits, and so does all after it.
    lone.handle(GroupReceived(primary.say(*propose(*range(1, 9)))))
    assert lone.core._pen.state.last_vote == 8
    assert lone.core._pen._owed_vote(9) is None


@pytest.mark.parametrize("ordering", Ordering)
def test_a_replica_whom_the_others_outran_says_its_checkpoint_and_goes_on(ordering: Ordering):
    """Others make slot 4 stable before this replica could write more than its first vote.

    Its votes for 1 to 4 are pruned, so it can never commit them; a CHECKPOINT that it left out would leave it silent
    for ever.
    """
    genesis = make_genesis(1, ordering)
    lone = Lone(make_core(genesis, 2))
    primary, other = FakeLog(0), FakeLog(1)
    everything = [
        primary.say(*propose(1, 2, 3, 4)),
        other.say(*prepare(1, 2, 3, 4)),
        primary.say(*commit(1, 2, 3, 4)),
        other.say(*commit(1, 2, 3, 4)),
        primary.say(checkpoint(4)),
        other.say(checkpoint(4)),
    ]
    lone.handle(GroupReceived(primary.groups[0]))
    lone.log, lone.hold = FakeLog(2), True
    lone.core = make_core(genesis, 2)
    first = FakeLog(0).say(*propose(1, 2, 3, 4))
    assert first == everything[0]
    lone.handle(GroupReceived(first))
    for group in everything[1:]:
        lone.handle(GroupReceived(group))
    assert (lone.core.stable, lone.core._pen.state.last_checkpoint) == (4, 0)
    lone.hold = False
    while lone.held:
        lone.release()
    assert checkpoint(4) in entries(lone.log.groups)
    lone.handle(GroupReceived(primary.say(*propose(5, 6))))
    lone.handle(GroupReceived(other.say(*prepare(5, 6))))
    said = entries(lone.log.groups)
    assert prepare(5, 6) == [e for e in said if isinstance(e, Prepare) and e.slot > 4]
    if ordering is Ordering.THREE_PHASE:
        assert commit(5, 6) == [e for e in said if isinstance(e, Commit) and e.slot > 4]
    # A reader who knows all logs finds nothing wrong with it.
    reader = make_core(genesis, 0, live=False)
    for log in (primary, other, lone.log):
        for group in log.groups:
            reader.handle(GroupReceived(group))
    assert not reader.exposed
    assert reader.read(2) == lone.log.last


@pytest.mark.parametrize("ordering", Ordering)
def test_a_replica_that_missed_two_stable_checkpoints_says_the_last_and_goes_on(ordering: Ordering):
    genesis = make_genesis(1, ordering)
    lone = Lone(make_core(genesis, 2))
    primary, other = FakeLog(0), FakeLog(1)
    lone.hold = True
    for first in (1, 5):
        slots = range(first, first + 4)
        lone.handle(GroupReceived(primary.say(*propose(*slots))), GroupReceived(other.say(*prepare(*slots))))
        lone.handle(GroupReceived(primary.say(*commit(*slots))), GroupReceived(other.say(*commit(*slots))))
        last = checkpoint(first + 3)
        lone.handle(GroupReceived(primary.say(last)), GroupReceived(other.say(last)))
    assert lone.core.stable == 8
    lone.hold = False
    while lone.held:
        lone.release()
    said = [e.slot for e in entries(lone.log.groups) if isinstance(e, Checkpoint)]
    assert said == ([8] if ordering is Ordering.THREE_PHASE else [4, 8]), "two phases executed 4 before it wrote at all"
    lone.handle(GroupReceived(primary.say(*propose(9))))
    assert prepare(9)[0] in entries(lone.log.groups)


def sizes(core: ReplicaCore) -> dict[str, int]:
    states = [*core._known.states, core._pen.state]
    fetcher = core._catch_up.fetcher
    return {
        "slots": len(core._known.slots),
        "votes": max(len(state.votes) for state in states),
        "commits": max(len(state.commits) for state in states),
        "checkpoints": len(core._checkpoints),
        "own digests": len(core._known.own_digests),
        "requests": core.requests_waiting,
        "unread": sum(core.unread(log) for log in range(core.genesis.n)),
        "waits": len(fetcher.waits) + len(fetcher._since) + len(fetcher._asked) + len(core._heard_entry),
        "beyond the cut": len(core._cut),
        "not collected": sum(len(inbox.fresh) for inbox in core._inboxes),
    }


@pytest.mark.parametrize("ordering", Ordering)
def test_nothing_piles_up_over_500_slots(ordering: Ordering):
    genesis = make_genesis(1, ordering, interval=4)
    cluster = Cluster(genesis)
    client = opened(cluster, FakeClient(genesis))
    peak: dict[str, int] = {}
    for number in range(500):
        cluster.request(client.operations(kv.incr(b"n"), acknowledged=client.next))
        cluster.run()
        cluster.effects.clear()
        if number % 10 == 0:
            cluster.tick()
        for core in cluster.cores.values():
            for name, size in sizes(core).items():
                peak[name] = max(peak.get(name, 0), size)
    assert all(core.executed >= 500 for core in cluster.cores.values())
    window = genesis.limits.window
    assert peak.pop("slots") <= window
    assert peak.pop("votes") <= window
    assert peak.pop("commits") <= window
    assert peak.pop("checkpoints") <= 2
    assert peak.pop("own digests") <= 2
    # At a cut, everything since the proposal of the cut before it: two intervals of votes, commits and checkpoints.
    assert peak.pop("beyond the cut") <= 3 * (2 * window + 4)
    assert peak == {"requests": 0, "unread": 0, "waits": 0, "not collected": 0}
    assert cluster.cores[0].executor.state.get(b"n") == b"500"


def test_an_append_holds_no_more_than_the_agreed_number_of_entries():
    genesis = replace(G, limits=replace(G.limits, group_entries_max=3))
    lone = Lone(make_core(genesis, 1))
    primary = FakeLog(0)
    for slot in range(1, 9):
        lone.hold = True
        lone.handle(GroupReceived(primary.say(*propose(slot))))
    lone.hold = False
    while lone.held:
        lone.release()
    sizes_said = [len(e.payloads) for e in lone.of(Append)]
    assert max(sizes_said) == 3
    assert sum(sizes_said) >= 16


@pytest.mark.parametrize("ordering", Ordering)
def test_lies_in_checkpoints_do_not_let_the_rest_run_away(ordering: Ordering):
    """f replicas vote rightly and lie in every CHECKPOINT, the other correct one is slow: memory stays bounded.

    Without the bound above the stable checkpoint, the primary goes on for as long as it gets votes.
    """
    genesis = make_genesis(1, ordering)
    window = genesis.limits.window
    primary, liar, client = Lone(make_core(genesis, 0)), FakeLog(2), FakeClient(genesis)
    primary.handle(RequestReceived(client.open(void_after=8), relayed=False))
    answered = 0
    for _ in range(40):
        for group in primary.log.groups[answered:]:
            for payload in group.payloads:
                entry = decode_entry(payload, genesis, genesis.cluster_id())
                if isinstance(entry, PrePrepare):
                    vote = [Prepare(0, entry.slot, entry.batch.digest)]
                    commit = [Commit(0, entry.slot, entry.batch.digest)] if ordering is Ordering.THREE_PHASE else []
                    primary.handle(GroupReceived(liar.say(*vote, *commit)))
                elif isinstance(entry, Checkpoint):
                    primary.handle(GroupReceived(liar.say(Checkpoint(entry.slot, b"lie" + bytes(29)))))
            answered += 1
        primary.handle(RequestReceived(client.operations(b"anything"), relayed=False))
    assert primary.core.stable == 0
    assert window < primary.core.executed <= 2 * window
    # The slow one is back: its true checkpoints make things stable, the liar is named, and all goes on.
    true = [
        e
        for g in primary.log.groups
        for p in g.payloads
        if isinstance(e := decode_entry(p, genesis, genesis.cluster_id()), Checkpoint)
    ]
    slow = FakeLog(1)
    lies = [e for c in true for e in primary.handle(GroupReceived(slow.say(c))) if isinstance(e, Lied)]
    assert {lie.log for lie in lies} == {2}
    assert primary.core.stable == true[-1].slot
