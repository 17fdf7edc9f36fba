"""Which checkpoints are milestones, what is kept until they are stable, and when the cut lags."""

from __future__ import annotations

import pytest

from replica.apps.kv import KeyValue
from replica.core.batch import make_batch
from replica.core.checkpoint import Header, check_certificate, decode_header
from replica.core.checkpoints import CUT_LAG_INTERVALS, Checkpoints
from replica.core.cut import AgreedCut
from replica.core.entries import Checkpoint, Commit, Prepare, PrePrepare, Suspect, decode_entry
from replica.core.envelope import Envelope
from replica.core.events import GroupReceived, Persist, Stable
from replica.core.execution import Executor
from replica.core.logstate import initial_states
from replica.core.patience import Patience
from replica.core.slots import SlotBook
from replica.core.snapshot import Milestone, MilestoneRule
from replica.core.tree import with_values
from tests.replica.core.harness import FakeClient, FakeLog, heads, make_core, make_genesis
from tests.replica.core.support import Lone, header_at_zero, junk_batch

G = make_genesis(2)
K = G.limits.checkpoint_interval
BATCH_BYTES = len(junk_batch(1).raw)
CUT_BYTES = len(junk_batch(4, (0,) * 5).raw)
INTERVAL_BYTES = (K - 1) * BATCH_BYTES + CUT_BYTES


class Executing:
    """Executes slots whose batches hold nothing; what they change is put into the state by the test."""

    def __init__(self, **rule: int) -> None:
        self.own: dict[int, bytes] = {}
        self.cut = AgreedCut(initial_states(5), heads(G))
        self.checkpoints = Checkpoints(G, MilestoneRule(**rule), self.cut, self.own)
        self.executor = Executor(KeyValue(), G)
        self.logs = [FakeLog(author) for author in range(5)]
        self.headers: dict[int, Header] = {}
        self.envelopes: list[Envelope] = []  # of the next batch

    def until(self, slot: int) -> None:
        for number in range(self.executor.slot + 1, slot + 1):
            batch = make_batch(number, (0,) * 5 if number % K == 0 else (), self.envelopes)
            self.envelopes.clear()
            self.executor.execute(number, batch)
            header = self.checkpoints.executed(number, batch, self.executor, SlotBook(G.ordering, G.f))
            assert (header is not None) == (number % K == 0)
            if header is not None:
                self.headers[number] = header

    def put(self, **changes: bytes | None) -> None:
        for key, value in changes.items():
            if value is None:
                self.executor.state.delete(key.encode())
            else:
                self.executor.state.put(key.encode(), value)
        self.executor.state.commit()

    def say(self, slot: int, *logs: int, digest: bytes | None = None) -> list[bool]:
        entry = Checkpoint(slot, digest or self.headers[slot].digest)
        found = []
        for log in logs:
            group = self.logs[log].say(b"something before", entry)
            found.append(self.checkpoints.say(log, group.last, entry, group))
        return found

    def stable(self, slot: int) -> Milestone | None:
        assert self.say(slot, 0, 1, 2) == [False, False, True]
        _, milestone = self.checkpoints.stable(slot, self.headers[slot].digest)
        if milestone is not None:
            header = decode_header(milestone.header, 5)
            assert header == self.headers[slot]
            check_certificate(milestone.certificate, header, G, lambda log, proof: log < 3)
        return milestone

    def milestones(self, until: int) -> list[int]:
        self.until(until)
        return sorted(self.checkpoints._kept)


def test_the_header_names_the_state_after_the_slot():
    e = Executing()
    e.put(a=b"1")
    e.until(K)
    assert e.headers[K] == header_at_zero(G, e.executor)
    assert e.own == {K: e.headers[K].digest}
    e.put(a=b"2")
    e.until(2 * K)
    assert e.headers[2 * K].application != e.headers[K].application
    assert e.headers[2 * K].digest != e.headers[K].digest


def test_milestones_by_intervals():
    assert Executing(intervals=1).milestones(16) == [4, 8, 12, 16]
    assert Executing(intervals=3).milestones(40) == [12, 24, 36]
    assert Executing().milestones(16 * K) == [8 * K, 16 * K]


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (1, [4, 8, 12, 16, 20, 24]),
        (INTERVAL_BYTES, [4, 8, 12, 16, 20, 24]),
        (INTERVAL_BYTES + 1, [8, 16, 24]),
        (3 * INTERVAL_BYTES, [12, 24]),
        (100 * INTERVAL_BYTES, []),
    ],
)
def test_milestones_by_bytes(size: int, found: list[int]):
    assert Executing(intervals=100, batch_bytes=size).milestones(24) == found


def test_either_makes_a_milestone_and_bytes_count_anew_from_it():
    assert Executing(intervals=2, batch_bytes=3 * INTERVAL_BYTES).milestones(24) == [8, 16, 24]
    assert Executing(intervals=5, batch_bytes=3 * INTERVAL_BYTES).milestones(32) == [12, 20, 32]


def test_milestones_are_the_same_whichever_was_begun_with():
    e = Executing(intervals=3)
    e.checkpoints.begin(8, b"d" * 32)
    assert e.own == {8: b"d" * 32}
    e.executor.slot = 8
    assert e.milestones(32) == [12, 24]


def test_after_a_milestone_that_was_passed_over_the_next_stable_checkpoint_takes_its_place():
    e = Executing(intervals=4)
    e.put(a=b"1", c=b"1")
    e.until(16)
    for slot in (20, 24, 28, 32, 36):
        e.put(a=b"%d" % slot, **{f"b{slot}": b"1"})
        e.until(slot)
        assert slot == 20 or slot in e.checkpoints._kept, "every one is kept once one was passed over"
        if slot == 20:
            assert e.stable(20) is None, "the one at 16 was passed over"
            assert not e.checkpoints._kept
    milestone = e.stable(28)
    assert milestone is not None
    changed = {b"a": b"28", b"c": b"1", b"b20": b"1", b"b24": b"1", b"b28": b"1"}
    assert dict(with_values(milestone.application)) == changed
    after = e.stable(36)
    assert after is not None, "kept while it was not known that 28 would do"
    assert dict(with_values(after.application)) == {b"a": b"36", b"b32": b"1", b"b36": b"1"}
    e.until(48)
    assert sorted(e.checkpoints._kept) == [48], "as usual again"


def test_milestones_that_are_passed_over_again_and_again_do_not_pile_up():
    e = Executing(intervals=1)
    for slot in range(4, 400, 4):
        e.put(a=b"%d" % slot)
        e.until(slot)
        if slot > 4:
            e.checkpoints._hand_out(slot - 1, {})  # a stable one between them
    assert len(e.checkpoints) <= 2 + len(e.own)
    assert len(e.checkpoints._kept) == 1
    assert [len(part) for part in e.checkpoints._passed or ()] == [1, 0]


def test_a_milestone_is_handed_out_when_it_is_stable_and_once():
    e = Executing(intervals=1)
    e.put(a=b"1", b=b"1")
    e.until(4)
    milestone = e.stable(4)
    assert milestone is not None
    assert (milestone.slot, milestone.is_whole) == (4, False)
    assert list(with_values(milestone.application)) == [(b"a", b"1"), (b"b", b"1")]
    assert [sorted(with_values(one.items())) for one in milestone.maps] == [[(b"a", b"1"), (b"b", b"1")], []]
    assert milestone.logs == tuple(state.encode() for state in initial_states(5))
    assert (milestone.batches, milestone.table) == ((), [])
    e.put(a=b"2", b=None)
    e.until(8)
    milestone = e.stable(8)
    assert milestone is not None
    assert list(with_values(milestone.application)) == [(b"a", b"2"), (b"b", None)], "what changed since the one before"


def test_a_checkpoint_that_is_no_milestone_hands_out_nothing():
    e = Executing(intervals=2)
    e.put(a=b"1")
    e.until(4)
    assert e.stable(4) is None
    e.put(b=b"1")
    e.until(8)
    milestone = e.stable(8)
    assert milestone is not None
    assert list(with_values(milestone.application)) == [(b"a", b"1"), (b"b", b"1")]


def test_what_a_milestone_held_that_was_passed_over_is_not_lost():
    e = Executing(intervals=1)
    e.put(a=b"1", b=b"1", c=b"1", d=b"1")
    e.envelopes.append(FakeClient(G, 100).open(void_after=20))
    e.until(4)
    e.envelopes.append(FakeClient(G, 101).open(void_after=20))
    e.put(a=b"2", b=None, e=b"2")
    e.until(8)
    e.put(b=b"3", e=None)
    e.until(12)
    e.put(f=b"later")
    e.until(16)
    records = list(e.executor.table.records.scan())
    assert len(records) == 2 * 2
    milestone = e.stable(12)
    assert milestone is not None
    assert milestone.slot == 12
    assert dict(with_values(milestone.application)) == {b"a": b"2", b"b": b"3", b"c": b"1", b"d": b"1", b"e": None}
    assert sorted(with_values(milestone.table)) == records, "sessions that were opened before, too"
    maps = [dict(with_values(one.items())) for one in milestone.maps]
    assert maps == [{b"a": b"2", b"b": b"3", b"c": b"1", b"d": b"1"}, dict(records)], "as they were then"
    after = e.stable(16)
    assert after is not None
    assert list(with_values(after.application)) == [(b"f", b"later")]


def test_a_milestone_that_a_mere_checkpoint_passed_over_is_in_the_next():
    e = Executing(intervals=2)
    e.put(a=b"1")
    e.until(8)
    e.until(12)
    assert e.stable(12) is None
    e.put(b=b"1")
    e.until(16)
    milestone = e.stable(16)
    assert milestone is not None
    assert dict(with_values(milestone.application)) == {b"a": b"1", b"b": b"1"}


def test_q_different_logs_must_say_the_same():
    e = Executing(intervals=1)
    e.until(4)
    assert e.say(4, 3, 4, digest=b"lie" + bytes(29)) == [False, False]
    assert e.say(4, 0, 0, 0, 1) == [False] * 4
    assert e.say(4, 2) == [True]
    liars, milestone = e.checkpoints.stable(4, e.headers[4].digest)
    assert liars == [(3, 2), (4, 2)], "by log, with the index of what they said"
    assert milestone is not None
    header = decode_header(milestone.header, 5)
    shown: list[int] = []
    check_certificate(milestone.certificate, header, G, lambda log, proof: shown.append(log) is None)
    assert shown == [0, 1, 2], "only those who said it"


def test_what_is_older_than_the_stable_one_is_forgotten():
    e = Executing(intervals=1)
    e.until(16)
    for slot in (4, 8, 16):
        e.say(slot, 4)
    assert len(e.checkpoints) == 4
    e.stable(12)
    assert sorted(e.own) == [12, 16], "the own word for the stable one may still be owed"
    assert sorted(e.checkpoints._said) == [16]
    assert sorted(e.checkpoints._kept) == [16]
    assert len(e.checkpoints) == 2


# The cut


def ends(at: int) -> tuple[int, ...]:
    return (at,) * 5


def test_a_cut_that_never_moves_lags_after_some_checkpoints():
    checkpoints = Executing().checkpoints
    assert [checkpoints.cut_lags(ends(10), 0) for _ in range(CUT_LAG_INTERVALS)] == [False] * CUT_LAG_INTERVALS
    assert checkpoints.cut_lags(ends(10), 0)
    checkpoints.begin_view()
    assert [checkpoints.cut_lags(ends(10), 0) for _ in range(CUT_LAG_INTERVALS)] == [False] * CUT_LAG_INTERVALS
    assert checkpoints.cut_lags(ends(10), 0), "a new primary has as much time"


def test_a_cut_may_lag_for_a_while_but_not_for_ever():
    e = Executing()
    e.checkpoints = Checkpoints(G, MilestoneRule(), e.cut, {}, cut_ms=100)
    first = e.logs[0].say(Suspect(0))
    e.cut.read(0, Suspect(0), None, first.head_after)
    had = e.cut.ends_of_groups()
    assert not any(e.checkpoints.cut_lags(had, 0) for _ in range(CUT_LAG_INTERVALS))
    assert [e.checkpoints.cut_lags(had, now) for now in (1000, 1099, 1100)] == [False, False, True]
    e.cut.execute(4, had)
    assert not e.checkpoints.cut_lags(had, 1200), "it has caught up"
    second = e.logs[0].say(Suspect(0))
    e.cut.read(0, Suspect(0), None, second.head_after)
    had = e.cut.ends_of_groups()
    assert not any(e.checkpoints.cut_lags(had, 2000) for _ in range(CUT_LAG_INTERVALS))
    assert [e.checkpoints.cut_lags(had, now) for now in (2000, 2099)] == [False, False], "and has as much time again"
    assert e.checkpoints.cut_lags(had, 2100)
    e.checkpoints.begin_view()
    assert not any(e.checkpoints.cut_lags(had, 3000) for _ in range(CUT_LAG_INTERVALS))
    assert [e.checkpoints.cut_lags(had, now) for now in (3000, 3100)] == [False, True]


def test_a_cut_that_lags_with_too_much_beyond_it_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch):
    e = Executing()
    e.checkpoints = Checkpoints(G, MilestoneRule(), e.cut, {}, cut_ms=100)
    monkeypatch.setattr("replica.core.checkpoints.BEYOND_CUT_MAX", 2)
    for had, expected in ((2, False), (3, True)):
        while len(e.cut) < had:
            group = e.logs[0].say(Suspect(0))
            e.cut.read(0, Suspect(0), None, group.head_after)
        e.checkpoints.begin_view()
        assert not any(e.checkpoints.cut_lags(e.cut.ends_of_groups(), 0) for _ in range(CUT_LAG_INTERVALS))
        assert e.checkpoints.cut_lags(e.cut.ends_of_groups(), 0) is expected


def test_a_cut_that_reaches_what_was_read_some_checkpoints_ago_does_not_lag():
    e = Executing()
    for number in range(1, 20):
        group = e.logs[0].say(Suspect(0))
        e.cut.read(0, Suspect(0), None, group.head_after)
        if number > CUT_LAG_INTERVALS:
            e.cut.execute(4, (number - CUT_LAG_INTERVALS, 0, 0, 0, 0))
        assert not e.checkpoints.cut_lags(e.cut.ends_of_groups(), 0), number
    assert e.checkpoints.cut_lags(e.cut.ends_of_groups(), 0), "one checkpoint too far behind, in one log"


def speaking_to_a_primary_with(cuts: bool) -> tuple[Lone, list[Suspect]]:
    """A backup whose primary offers, or never offers, a cut that moves; ten checkpoints of it."""
    genesis = make_genesis()
    lone, primary = Lone(make_core(genesis, 1, patience=Patience(cut_patiences=0))), FakeLog(0)
    for slot in range(1, 10 * K + 1):
        cut = (primary.last if cuts else 0, lone.log.last if cuts else 0, 0)
        batch = junk_batch(slot, cut if slot % K == 0 else ())
        lone.handle(GroupReceived(primary.say(PrePrepare(0, slot, batch))))
        lone.handle(GroupReceived(primary.say(Commit(0, slot, batch.digest))))
        if slot % K == 0 and lone.core.executed == slot:
            lone.handle(GroupReceived(primary.say(Checkpoint(slot, lone.core._known.own_digests[slot]))))
    entries = [decode_entry(p, genesis, genesis.cluster_id()) for g in lone.log.groups for p in g.payloads]
    return lone, [entry for entry in entries if isinstance(entry, Suspect)]


def test_a_primary_that_never_moves_the_cut_is_suspected():
    lone, suspected = speaking_to_a_primary_with(cuts=False)
    assert suspected == [Suspect(0)]
    assert lone.core.cut == (0, 0, 0)
    assert len(lone.of(Stable)) >= CUT_LAG_INTERVALS


def test_the_next_views_primary_has_as_much_time():
    lone, _ = speaking_to_a_primary_with(cuts=False)
    known, checkpoints = lone.core._known, lone.core._checkpoints
    assert known.cut_lags
    assert len(checkpoints._ends) == CUT_LAG_INTERVALS
    lone.handle(GroupReceived(FakeLog(2).say(Suspect(0))))
    assert lone.core.view == 1
    said = [decode_entry(p, G, lone.core.cluster_id) for p in lone.log.groups[-1].payloads]
    assert not any(isinstance(entry, Suspect) for entry in said), "not in the same breath"
    assert not known.cut_lags
    assert len(checkpoints._ends) == 0


def test_a_primary_that_moves_the_cut_is_not():
    lone, suspected = speaking_to_a_primary_with(cuts=True)
    assert suspected == []
    assert min(lone.core.cut[:2]) > 50
    assert [effect.milestone.slot for effect in lone.of(Persist)] == [8 * K]
    assert any(isinstance(decode_entry(p, G, G.cluster_id()), Prepare) for p in lone.log.groups[0].payloads)
