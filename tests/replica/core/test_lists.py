"""Logs at the border of two lists of members: what is still said under the old one, and what first under the new."""

from __future__ import annotations

import pytest

from replica.core.chain import found
from replica.core.entries import (
    Checkpoint,
    Prepare,
    PrePrepare,
    Skipped,
    Suspect,
    ViewChange,
    decode_entry,
    decode_joining,
)
from replica.core.events import (
    Append,
    AskCheckpoint,
    CheckpointOffered,
    Executed,
    Exposed,
    Install,
    ListEnded,
    PartReceived,
    PeerHolds,
    Persist,
    Recovered,
    RequestReceived,
    Tick,
)
from replica.core.genesis import Genesis
from replica.core.logstate import LogState, founding_states
from replica.core.rules import Reading, Violation, Wait, apply_entry, judge
from replica.core.snapshot import Snapshot
from tests.replica.core.harness import Cluster, FakeClient, FakeLog, heads, make_core
from tests.replica.core.support import Lone
from tests.replica.core.test_chain import E, ended
from tests.replica.core.test_members import G, envelope, listed, replaced

D = b"d" * 32


def after() -> tuple[Snapshot, Genesis]:
    last = ended(G)
    return last, last.executor.membership.genesis


def states() -> list[LogState]:
    made = founding_states((10, 11, 0), E)
    for state in made:
        state.joined = True
    return made


def reading(known: list[LogState], ends: int | None, executed: int = E) -> Reading:
    return Reading(G, known, executed, executed, ends)


@pytest.mark.parametrize("kind", ["proposal", "vote"])
def test_nobody_votes_above_the_last_slot_of_a_list(kind):
    known = states()
    for state in known:
        state.last_checkpoint = 8
        state.last_vote = E
    author = 0 if kind == "proposal" else 1
    batch = decode_proposal(E + 1)
    entry = batch if kind == "proposal" else Prepare(0, E + 1, batch.batch.digest)
    apply_entry(known[0], batch)
    known[0].last_vote = E
    state = known[author]
    verdict = judge(state, entry, reading(known, ends=E))
    assert isinstance(verdict, Violation)
    assert verdict.rule == "beyond-list"
    assert not isinstance(judge(state, entry, reading(known, ends=E + 4)), Violation)
    assert not isinstance(judge(state, entry, reading(known, ends=None)), Violation)


def decode_proposal(slot: int) -> PrePrepare:
    from replica.core.batch import make_batch

    return PrePrepare(0, slot, make_batch(0, (), [FakeClient(G).open()]))


def test_what_a_log_said_before_it_joined_is_skipped_whatever_it_is():
    _, genesis = after()
    for payload in (b"", b"rubbish", Suspect(7).encode(), Prepare(0, 13, D).encode(), Checkpoint(8, D).encode()):
        assert decode_joining(payload, genesis) == Skipped(payload)
    assert decode_joining(Checkpoint(14, D).encode(), genesis) == Skipped(Checkpoint(14, D).encode()), (
        "no multiple of K"
    )
    known = founding_states((10, 11, 0), E)
    state = known[1]
    assert judge(state, Skipped(b"x"), reading(known, None)) is None
    apply_entry(state, Skipped(b"x"))
    assert (state.position, state.joined, state.votes, state.view) == (12, False, {}, 0)
    for slot in (E, E + 8):
        joining = decode_joining(Checkpoint(slot, D).encode(), genesis)
        assert joining == Checkpoint(slot, D)
        verdict = judge(state, joining, reading(known, None))
        assert verdict is None if slot == E else isinstance(verdict, Wait)
    apply_entry(state, Checkpoint(E, D))
    assert (state.position, state.joined, state.last_checkpoint) == (13, True, E)
    again = judge(state, Checkpoint(E, D), reading(known, None))
    assert isinstance(again, Violation)
    assert again.rule == "checkpoint-backwards"


def test_the_first_word_under_a_new_list_is_its_checkpoint():
    """Not a VIEW-CHANGE, not a vote: before it has joined, a log counts for nothing, and says nothing else."""
    last, genesis = after()
    log = FakeLog(2)
    log.head = heads(genesis)[2]
    first = found(last, genesis, heads(genesis))
    lone = Lone(make_core(genesis, 2, snapshot=first, live=False), log)
    lone.tick()
    assert not lone.of(Append)
    for state in lone.core._known.states[:2]:
        state.view, state.joined = 1, True  # a quorum has left view 0: this replica owes a VIEW-CHANGE, but not yet
    lone.handle(Recovered(0, log.head), PeerHolds(0, 2, 1, 0))
    said = [decode_entry(p, genesis, genesis.cluster_id()) for append in lone.of(Append) for p in append.payloads]
    assert said == [Checkpoint(E, last.header.digest), ViewChange(1)]
    assert lone.core._known.states[2].joined
    assert (lone.core.executed, lone.core.stable, lone.core.view, lone.core.ends) == (E, E, 1, None)


def test_without_a_state_nothing_is_read_or_said_but_a_state_is_asked_for():
    _, genesis = after()
    core = make_core(genesis, 2)
    log = FakeLog(0)
    log.head = bytes(32)
    effects = core.handle(Tick(1000, 0), RequestReceived(envelope(b"x"), relayed=False))
    assert {effect.ask for effect in effects if isinstance(effect, AskCheckpoint)} == {0, 1}
    assert not core.is_live
    assert not [effect for effect in core.handle(Tick(9000, 0)) if isinstance(effect, Append)]


def test_the_last_state_of_the_list_before_is_what_it_takes():
    last, genesis = after()
    core = make_core(genesis, 2)
    core.handle(Tick(1000, 0))
    effects = core.handle(CheckpointOffered(0, last.header, last.certificate, before=G))
    assert [effect.slot for effect in effects if hasattr(effect, "slot")], "it asks for its parts"
    other = make_core(G, 1)
    other.handle(Tick(1000, 0))
    asked = other.handle(PeerHolds(0, 2, 50, 60))
    assert {effect.ask for effect in asked if isinstance(effect, AskCheckpoint)} == {0, 2}
    assert not other.handle(CheckpointOffered(0, last.header, last.certificate, before=G)), "nobody else takes it"
    assert not [effect for effect in effects if isinstance(effect, Install | PartReceived)]


def test_a_list_ends_when_its_last_slot_is_stable_and_its_milestone_is_kept():
    """Whole cores: the operator's command, then requests up to the last slot; nothing is said after that CHECKPOINT."""
    cluster = Cluster(G)
    client = FakeClient(G)
    command = listed(G, m2=replaced()).encode()
    cluster.request(envelope(command))
    cluster.run()
    slot = 1
    while any(core.ends is None or core.executed < core.ends for core in cluster.cores.values()):
        cluster.request(client.open(nonce=slot.to_bytes(16, "big"), void_after=slot + 8))
        cluster.run()
        slot += 1
        assert slot < 40
    ends = {core.ends for core in cluster.cores.values()}
    assert len(ends) == 1
    (last,) = ends
    assert last is not None
    assert [core.executed for core in cluster.cores.values()] == [last] * 3
    for number in range(3):
        effects = cluster.effects[number]
        assert [effect.slot for effect in effects if isinstance(effect, ListEnded)] == [last]
        assert [effect.milestone.slot for effect in effects if isinstance(effect, Persist)][-1] == last
    before = [core.received(core.number) for core in cluster.cores.values()]
    cluster.request(client.open(nonce=bytes(15) + b"z", void_after=900))
    cluster.run()
    cluster.tick(900_000)
    cluster.run()
    assert [core.received(core.number) for core in cluster.cores.values()] == before
    read = cluster.cores[1].read(0)
    cluster.publish(cluster.logs[0].append((Suspect(0).encode(),)))
    cluster.run()
    assert cluster.cores[1].read(0) == read, "what follows is of the next list"
    for number in range(3):
        assert not [effect for effect in cluster.effects[number] if isinstance(effect, Exposed)]
        assert len([effect for effect in cluster.effects[number] if isinstance(effect, Executed)]) == last
