"""RESULT on demand: said once, shown again, counted in nobody's order; lies convince nobody; everything is bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replica.apps import kv
from replica.core import results
from replica.core.batch import make_batch
from replica.core.entries import SlotResult, decode_entry
from replica.core.envelope import Open, OperationsReply, Status
from replica.core.events import (
    Append,
    Exposed,
    GroupReceived,
    Lied,
    ResultAsked,
    ResultRefused,
    ResultShown,
)
from replica.core.execution import Executor
from replica.core.results import ABSENT, BUSY, GONE, LATER, leaves_of
from tests.replica.core.harness import Cluster, FakeClient, come_home, make_core, make_genesis, opened
from tests.replica.core.traffic import EVERY_CHECKPOINT, all_groups, feed, milestones, snapshot_of
from trustlog import entry_digest
from trustlog.merkle import MerkleTree, root_of_path
from trustlog.receipts import Outcome, read_result

GENESIS = make_genesis()


class Asked(Cluster):
    """A cluster with a client that wants receipts."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.client = opened(self, FakeClient(self.genesis))

    def put(self, *values: bytes) -> list[Outcome]:
        """Have operations executed, in one envelope; return their outcomes."""
        operations = [kv.put(b"k", value) for value in values]
        first = self.client.next
        envelope = self.client.operations(*operations, acknowledged=first)
        self.request(envelope)
        self.settle(2)
        replies = [r for core in self.cores for r in self.replies(core) if isinstance(r, OperationsReply)]
        found = next(reply.results for reply in replies if reply.first == first)
        session = self.client.session.slot, self.client.session.place
        return [
            Outcome(self.client.key, session, first + at, operation, result.slot, result.status, result.value)
            for at, (operation, result) in enumerate(zip(operations, found, strict=True))
        ]

    def ask(self, said: Outcome, *replicas: int, source: object = "me", client: bytes | None = None) -> None:
        for replica in replicas or self.cores:
            self.handle(replica, ResultAsked(client or self.client.key, said.slot, said.leaf, source))
        self.run()

    def shown(self, replica: int) -> list[ResultShown]:
        return self.of(replica, ResultShown)

    def results(self, log: int) -> list[SlotResult]:
        payloads = [payload for group in self.logs[log].groups for payload in group.payloads]
        return [SlotResult(*found) for payload in payloads if (found := read_result(payload))]

    def check(self) -> None:
        super().check()
        for core in self.cores.values():
            core._known.results.check()


def leads_to(shown: ResultShown, said: Outcome) -> bool:
    """Say whether what was shown is of this outcome, as the receipt's verifier does."""
    found = read_result(shown.proof.payload)
    root = root_of_path(said.leaf, shown.place, shown.size, shown.path)
    in_group = shown.proof.digests[shown.proof.place] == entry_digest(shown.proof.payload)
    return in_group and found == (said.slot, shown.size, root)


@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_replica_shows_its_result(f: int, count: int):
    c = Asked(make_genesis(f))
    for said in c.put(*[b"%d" % number for number in range(count)]):
        c.ask(said)
        for replica in c.cores:
            assert leads_to(c.shown(replica)[-1], said)
    c.settle(3)
    c.check()
    assert [len(c.results(replica)) for replica in c.cores] == [1] * len(c.cores), "once for all operations of a slot"
    assert len({(r.root, r.size) for replica in c.cores for r in c.results(replica)}) == 1


def test_asked_again_the_same_entry_is_shown_and_nothing_is_said():
    c = Asked(GENESIS)
    (said,) = c.put(b"v")
    c.ask(said)
    last = [log.last for log in c.logs]
    c.ask(said, source="again")
    assert [log.last for log in c.logs] == last
    for replica in c.cores:
        first, again = c.shown(replica)
        assert (first.source, again.source) == ("me", "again")
        assert first.proof is again.proof
    c.check()


def test_those_who_ask_while_it_is_being_said_are_all_answered():
    c = Asked(GENESIS)
    one, other = c.put(b"1", b"2")
    for source in "ab":
        c.handle(0, ResultAsked(c.client.key, one.slot, one.leaf, source))
    c.handle(0, ResultAsked(b"another key", other.slot, other.leaf, "c"))
    assert c.shown(0) == []
    c.run()
    assert [shown.source for shown in c.shown(0)] == ["a", "b", "c"]
    assert len(c.results(0)) == 1
    c.check()


def test_results_change_nothing_that_is_agreed_on():
    """The same requests, with receipts and without: the same slots, replies, states and digests of checkpoints."""

    def run(*, ask: bool) -> tuple[object, ...]:
        c = Asked(GENESIS)
        for number in range(10):
            (said,) = c.put(b"%d" % number)
            if ask:
                c.ask(said)
        c.settle(2)
        c.check()
        core = c.cores[0]
        assert bool(c.results(0)) is ask
        replies = [c.replies(replica) for replica in c.cores]
        return core.executed, core.executor.roots(), core.stable, replies

    assert run(ask=True) == run(ask=False)


def test_no_receipt_of_what_was_not_executed_so():
    c = Asked(GENESIS)
    (said,) = c.put(b"v")
    others = [
        (replace(said, result=b"\x01"), ABSENT),
        (replace(said, operation=kv.put(b"k", b"w")), ABSENT),
        (replace(said, number=said.number + 1), ABSENT),
        (replace(said, slot=1), ABSENT),  # the opening of the session is no operation
        (replace(said, slot=c.cores[0].executed + 1), LATER),
        (replace(said, slot=0), GONE),
    ]
    for other, _ in others:
        c.ask(other, 0)
    assert [refused.code for refused in c.of(0, ResultRefused)] == [code for _, code in others]
    assert not c.shown(0)
    assert not c.results(0)


def test_a_number_used_twice_in_one_slot_gives_no_receipt_to_the_second_operation():
    """A faulty client signs two envelopes with one number; the second is answered with the first one's result."""
    client = FakeClient(GENESIS)
    executor = Executor(make_core(GENESIS, 0).executor._application, GENESIS)
    executor.execute(1, make_batch(0, (), [client.open()]))
    client.session = replace(client.session, slot=1)
    one = client.operations(kv.incr(b"n", 1), first=1)
    two = client.operations(kv.incr(b"n", 5), first=1)
    batch = make_batch(0, (), [one, two])
    replies = [reply.raw for reply in executor.execute(2, batch)]
    leaves = leaves_of(2, batch.envelopes, replies, GENESIS.limits)
    said = Outcome(client.key, (1, 0), 1, kv.incr(b"n", 1), 2, Status.OK, kv.I64.pack(1))
    assert leaves == [said.leaf]
    # In a later slot it is only answered once more.
    later = make_batch(0, (), [two])
    assert leaves_of(3, later.envelopes, [r.raw for r in executor.execute(3, later)], GENESIS.limits) == []


def test_leaves_are_of_what_was_executed_only():
    limits = replace(GENESIS.limits, session_window=4, envelope_operations_max=4)
    genesis = replace(GENESIS, limits=limits)
    client = FakeClient(genesis)
    executor = Executor(make_core(genesis, 0).executor._application, genesis)
    opening = make_batch(0, (), [client.open()])
    assert isinstance(opening.envelopes[0].content, Open)
    assert leaves_of(1, opening.envelopes, [r.raw for r in executor.execute(1, opening)], limits) == []
    unknown = client.operations(b"x", first=1)
    client.session = replace(client.session, slot=1)
    good = client.operations(kv.put(b"k", b"v"), b"refused", first=1)
    far = client.operations(kv.put(b"k", b"v"), first=9)
    batch = make_batch(0, (), [unknown, good, far])
    leaves = leaves_of(2, batch.envelopes, [r.raw for r in executor.execute(2, batch)], limits)
    refusal = b"not an operation of the key-value store"
    assert len(leaves) == 2
    assert Outcome(client.key, (1, 0), 1, kv.put(b"k", b"v"), 2, Status.OK, b"\0").leaf == leaves[0]
    assert leaves[1] in {
        Outcome(client.key, (1, 0), 2, b"refused", 2, Status.ERROR, text).leaf
        for text in (refusal, b"a key must have 1 to 4096 bytes")
    }


# Lies


def test_a_wrong_root_convinces_nobody_and_is_reported():
    """Replica 2 is faulty: it attests another result. The two correct ones show theirs; nobody shows the lie."""
    c = Asked(GENESIS, faulty=(2,))
    (said,) = c.put(b"v")
    lie = replace(said, result=b"\x01")
    c.ask(said)
    c.publish(c.logs[2].say(SlotResult(said.slot, 1, MerkleTree([lie.leaf]).root)))
    c.run()
    for replica in (0, 1):
        assert leads_to(c.shown(replica)[-1], said)
        assert not leads_to(replace(c.shown(replica)[-1], size=1, path=()), lie)
        (report,) = c.of(replica, Lied)
        assert (report.log, report.index) == (2, 1)
        assert not c.of(replica, Exposed), "it breaks no rule: who did not execute the slot could not tell"
    c.ask(lie)
    assert {refused.code for replica in c.cores for refused in c.of(replica, ResultRefused)} == {ABSENT}
    c.check()
    c.put(b"w")
    c.check()


def test_a_wrong_count_is_a_lie_too_and_the_right_one_is_none():
    c = Asked(GENESIS, faulty=(2,))
    (said,) = c.put(b"v")
    root = MerkleTree([said.leaf]).root
    c.publish(c.logs[2].say(SlotResult(said.slot, 2, root), SlotResult(said.slot, 1, root)))
    c.run()
    assert [report.index for report in c.of(0, Lied)] == [1]
    # A RESULT of a slot in which nothing was executed.
    c.publish(c.logs[2].say(SlotResult(1, 1, root)))
    c.run()
    assert [report.index for report in c.of(0, Lied)] == [1, 3]


def test_a_result_of_a_slot_that_was_never_executed_stops_its_authors_log_alone():
    c = Asked(GENESIS, faulty=(2,))
    executed = c.cores[0].executed
    c.publish(c.logs[2].say(SlotResult(executed + 3, 1, bytes(32))))
    c.run()
    for core in c.cores.values():
        assert core.read(2) == 0
        assert core.waiting_for(2) == f"slot {executed + 3} executed here"
        assert 2 not in core.exposed
    c.put(b"1")
    c.put(b"2")
    assert c.cores[0].read(2) == 0
    c.put(b"3")
    assert c.cores[0].read(2) == 1, "its slot came"
    assert len(c.of(0, Lied)) == 1


def test_a_result_that_is_too_far_ahead_exposes_its_author():
    c = Asked(GENESIS, faulty=(2,))
    c.publish(c.logs[2].say(SlotResult(1000, 1, bytes(32))))
    c.run()
    for core in c.cores:
        (exposed,) = c.of(core, Exposed)
        assert exposed.violation.rule == "result-beyond-window"
    c.put(b"v")
    c.check()


def test_a_flood_of_results_exposes_its_author():
    c = Asked(GENESIS, faulty=(2,))
    (said,) = c.put(b"v")
    root = MerkleTree([said.leaf]).root
    window = GENESIS.limits.window
    c.publish(c.logs[2].say(*[SlotResult(said.slot, 1, root)] * window))
    c.run()
    assert not c.of(0, Exposed)
    c.publish(c.logs[2].say(SlotResult(said.slot, 1, root)))
    c.run()
    for core in c.cores:
        assert [e.violation.rule for e in c.of(core, Exposed)] == ["too-many-results"]
    c.put(b"w")
    c.check()


# Bounds


@pytest.mark.parametrize("shuffle", [False, True])
def test_receipts_of_everything_for_ever_keep_to_the_rules(shuffle: bool):
    """One client that wants a receipt of each operation always gets it; nobody is exposed; logs are truncated."""
    c = Asked(GENESIS, seed=3)
    for number in range(40):
        (said,) = c.put(b"%d" % number)
        c.ask(said)
        c.settle(1, shuffle)
        assert all(leads_to(c.shown(replica)[-1], said) for replica in c.cores)
    c.settle(3)
    c.check()
    assert not any(c.of(replica, ResultRefused) for replica in c.cores)
    assert c.cores[0].stable >= 36
    assert c.cores[0].cut != (0, 0, 0)
    assert [len(c.results(replica)) for replica in c.cores] == [40] * 3


def test_old_slots_leave_room_for_new_ones():
    """A client that comes with all its old slots at once is refused beyond its share; others' new ones are said."""
    c = Asked(make_genesis(interval=8))
    old = [c.put(b"%d" % number)[0] for number in range(20)]
    for said in old[:12]:
        c.ask(said)
    assert len(c.shown(0)) == 2, "a quarter of what is for older slots"
    assert {refused.code for refused in c.of(0, ResultRefused)} == {BUSY}
    for key in (b"b", b"c", b"d", b"e", b"f"):
        for said in old[:14]:
            c.ask(said, client=key)
    assert len(c.results(0)) == 8, "all that is for older slots"
    for number in range(12):
        (said,) = c.put(b"new %d" % number)
        c.ask(said)
        assert leads_to(c.shown(0)[-1], said)
    c.settle(2)
    c.check()


def test_the_pen_keeps_to_the_rules_whatever_is_due():
    """What became due before is said when a CHECKPOINT has made room for it, in its author's window."""
    c = Asked(GENESIS)
    c.put(b"v")
    core = c.cores[0]
    known, pen = core._known, core._pen
    known.results.due[2] = SlotResult(2, 1, bytes(32))
    pen.state.results = GENESIS.limits.window
    assert pen.write(tick=True) == ()
    pen.state.results -= 1
    assert pen.write(tick=True) == (SlotResult(2, 1, bytes(32)).encode(),)
    assert not known.results.due
    assert pen.state.results == GENESIS.limits.window
    pen.state.results = 0
    end = pen.state.last_checkpoint + GENESIS.limits.window
    known.results.due |= {slot: SlotResult(slot, 1, bytes(32)) for slot in (end + 1, end)}
    assert pen.write(tick=True) == (SlotResult(end, 1, bytes(32)).encode(),)
    assert list(known.results.due) == [end + 1]


# Restart and transfer


def restarted(c: Cluster, replica: int):
    """A core that reads all logs again, as after a restart."""
    core = make_core(c.genesis, replica, live=False)
    groups = [GroupReceived(group) for log in c.logs for group in log.groups]
    effects = core.handle(*groups)
    effects += come_home(core, c.logs[replica])
    return core, effects


def test_after_a_restart_the_same_entry_is_shown():
    c = Asked(GENESIS)
    (said,) = c.put(b"v")
    c.ask(said)
    core, _ = restarted(c, 0)
    assert core.executed == c.cores[0].executed
    effects = core.handle(ResultAsked(c.client.key, said.slot, said.leaf, "after"))
    assert not [effect for effect in effects if isinstance(effect, Append)]
    (shown,) = [effect for effect in effects if isinstance(effect, ResultShown)]
    assert shown.proof == c.shown(0)[0].proof
    assert leads_to(shown, said)


def test_after_a_restart_a_slot_that_was_executed_again_is_said():
    c = Asked(GENESIS)
    (said,) = c.put(b"v")
    core, _ = restarted(c, 0)
    effects = core.handle(ResultAsked(c.client.key, said.slot, said.leaf, "after"))
    (append,) = [effect for effect in effects if isinstance(effect, Append)]
    (entry,) = [decode_entry(payload, GENESIS, GENESIS.cluster_id()) for payload in append.payloads]
    assert entry == SlotResult(said.slot, 1, MerkleTree([said.leaf]).root)


def test_limits_are_what_the_documents_say():
    assert (results.RESULT_SLOTS_MAX, results.RESULT_BYTES_MAX) == (1024, 32 * 1024 * 1024)
    assert (results.ASKING_MAX, results.ASKING_PER_CLIENT_MAX) == (4096, 64)


def test_whoever_begins_with_a_state_counts_on_and_shows_nothing_of_what_it_skipped():
    """From every milestone on: the same states of all logs, RESULTs since the last CHECKPOINT included."""
    c = Asked(GENESIS, milestones=EVERY_CHECKPOINT)
    said = []
    for number in range(22):
        said += c.put(b"%d" % number)
        c.ask(said[-1])
    c.settle(3)
    counted = 0
    every = milestones(c, 0)
    assert len(every) >= 4
    for place in range(1, len(every) + 1):
        snapshot = snapshot_of(GENESIS, every[:place])
        counted += sum(state.results for state in snapshot.states)
        core = make_core(GENESIS, 0, live=False, snapshot=snapshot, milestones=EVERY_CHECKPOINT)
        cut = snapshot.header.cut
        rest = [g for g in all_groups(c) if g.first > cut[g.author]]
        effects = feed(core, rest, c.random) + come_home(core, c.logs[0])
        assert not [effect for effect in effects if isinstance(effect, Exposed | Lied)]
        assert core.executed == c.cores[0].executed
        assert [s.results for s in core._known.states] == [s.results for s in c.cores[0]._known.states]
        for one in said:
            told = core.handle(ResultAsked(c.client.key, one.slot, one.leaf, "me"))
            if one.slot <= snapshot.header.slot:
                assert told == [ResultRefused("me", GONE)]
            else:
                (shown,) = told
                assert leads_to(shown, one), "its own RESULT was read again"
    assert counted, "some cut has RESULTs before it that count"


def test_a_flood_is_seen_alike_from_the_beginning_and_from_a_cut():
    """What is counted before the cut stands in the reduced state: the same entry exposes its author everywhere."""
    c = Asked(GENESIS, faulty=(2,), milestones=EVERY_CHECKPOINT)
    (first,) = c.put(b"first")
    root = MerkleTree([first.leaf]).root
    c.publish(c.logs[2].say(*[SlotResult(first.slot, 1, root)] * 5))
    for number in range(12):
        c.put(b"%d" % number)
    c.settle(2)
    every = milestones(c, 0)
    snapshot = snapshot_of(GENESIS, every)
    assert [state.results for state in snapshot.states][2] == 5
    group = c.logs[2].say(*[SlotResult(first.slot, 1, root)] * 4)
    core = make_core(GENESIS, 1, live=False, snapshot=snapshot, milestones=EVERY_CHECKPOINT)
    effects = core.handle(*[GroupReceived(g) for g in all_groups(c) if g.first > snapshot.header.cut[g.author]])
    effects += core.handle(GroupReceived(group))
    c.publish(group)
    c.run()
    found = [(e.index, e.violation.rule) for e in effects if isinstance(e, Exposed)]
    assert found == [(e.index, e.violation.rule) for e in c.of(0, Exposed)] == [(9, "too-many-results")]
