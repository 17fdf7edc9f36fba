"""One slot behind when a list of members ends: what is missing was said by a log that the others have dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from replica.core.catchup import OFFERS_PAUSE_MS
from replica.core.checkpoint import Header
from replica.core.events import (
    Append,
    Appended,
    AskCheckpoint,
    AskPart,
    CheckpointOffered,
    Effect,
    Fetch,
    GroupReceived,
    Install,
    PartReceived,
    PeerHolds,
    Tick,
)
from replica.core.machine import ReplicaCore
from replica.core.snapshot import Snapshot
from tests.replica.core.harness import Cluster, FakeClient, make_core
from tests.replica.core.test_members import G, envelope, listed, replaced
from tests.replica.core.test_transfer import answer
from tests.replica.core.traffic import EVERY_CHECKPOINT, milestones, snapshot_of

FORGOTTEN = 1 << 62


class OneBehind:
    """Replica 0, the primary, is to be replaced. It shows the proposal of the last slot to replica 1 only, and is gone.

    Replica 1 has gone over, so of log 0 it has nothing more; it offers its last state. Replica 2 reads it.
    stands: the primary is faulty, and the last slot does not move the cut.
    """

    def __init__(self, *, stands: bool) -> None:
        self.cluster = cluster = Cluster(G, milestones=EVERY_CHECKPOINT)
        client = FakeClient(G)
        cluster.request(envelope(listed(G, m0=replaced(0)).encode()))
        cluster.settle(2)
        ends = cluster.cores[1].ends
        assert ends is not None
        self.ends = ends
        for slot in range(1, ends):
            if cluster.cores[1].executed < ends - 1:
                cluster.request(client.open(nonce=slot.to_bytes(16, "big"), void_after=slot + 8))
                cluster.settle(2)
        if stands:
            cluster.cores[0]._known.cut_offered = lambda: (0, 0, 0)
        self.late = cluster.cores.pop(2)
        cluster.request(client.open(nonce=b"last".ljust(16), void_after=ends + 8))
        cluster.settle(2)
        assert [core.executed for core in cluster.cores.values()] == [ends, ends]
        assert self.late.executed == ends - 1
        self.truth: Snapshot = snapshot_of(G, milestones(cluster, 1))
        assert self.header.slot == ends
        self.fetches: list[int] = []
        self.parts = 0
        self.installed: Install | None = None
        for group in cluster.logs[1].groups:
            if group.last > self.late.received(1):
                self.take(self.late.handle(GroupReceived(group)))

    @property
    def header(self) -> Header:
        return self.truth.header

    def take(self, effects: list[Effect]) -> None:
        """Do what replica 2 wants, as replica 1 does; nobody else is there."""
        for effect in effects:
            if isinstance(effect, Append):
                self.take(self.late.handle(Appended(self.cluster.logs[2].append(effect.payloads))))
            elif isinstance(effect, Install):
                self.installed = effect
            elif getattr(effect, "ask", None) == 1:
                self.answer(effect)

    def answer(self, question: Effect) -> None:
        if isinstance(question, Fetch) and question.log == 0:
            self.fetches.append(question.first)
            self.take(self.late.handle(PeerHolds(1, 0, FORGOTTEN, FORGOTTEN - 1)))
        elif isinstance(question, AskCheckpoint):
            self.take(self.late.handle(CheckpointOffered(1, self.header, self.truth.certificate)))
        elif isinstance(question, AskPart):
            self.parts += 1
            data = answer(self.truth, question.want)
            self.take(self.late.handle(PartReceived(1, question.slot, question.want, data)))

    def until(self, reached: Callable[[], bool], deadline_ms: int = 10_000) -> None:
        now = self.cluster.now
        while not reached():
            now += 50
            assert now < self.cluster.now + deadline_ms, self.late._catch_up.fetcher.waits
            self.take(self.late.handle(Tick(now, 0)))


@pytest.mark.parametrize("stands", [False, True])
def test_a_log_that_the_others_dropped_is_waited_for_no_more(stands: bool):
    behind = OneBehind(stands=stands)
    at = [behind.late.received(log) for log in range(3)]
    assert all(cut <= end for cut, end in zip(behind.header.cut, at, strict=True)), "the state skips nothing"
    assert stands == (behind.header.cut[0] < at[0])
    behind.until(lambda: behind.installed is not None)
    assert behind.installed is not None
    assert behind.fetches
    fetched = behind.installed.fetched
    assert fetched.header == behind.header
    core: ReplicaCore = make_core(G, 2, snapshot=behind.truth, live=False)
    for log in behind.cluster.logs:
        for group in log.groups:
            if core.received(log.author) < group.last <= at[log.author]:
                core.handle(GroupReceived(group))
    assert (core.executed, core.ends) == (behind.ends, behind.ends), "it can go over to the next list"


def test_a_word_that_a_log_is_gone_does_nothing_unless_it_is_missed():
    """A liar may say so of any log, at any time; it is no reason to leave what is read for a state."""
    behind = OneBehind(stands=False)
    late, now = behind.late, behind.cluster.now
    offer = CheckpointOffered(1, behind.header, behind.truth.certificate)
    late.handle(PeerHolds(1, 0, FORGOTTEN, FORGOTTEN - 1))
    assert late.handle(offer) == [], "nothing was asked of anybody yet"
    late.handle(Tick(now + OFFERS_PAUSE_MS, 0))
    assert late._catch_up.fetcher.asks_for(0)
    asked = late.handle(PeerHolds(1, 2, FORGOTTEN, FORGOTTEN - 1))
    assert any(isinstance(effect, AskCheckpoint) for effect in asked)
    assert late.handle(offer) == [], "nothing waits for that log"
    late.handle(PeerHolds(1, 0, FORGOTTEN, FORGOTTEN - 1))
    fetcher = late._catch_up.fetcher
    fetcher.arrived(0)  # as when nothing waits for it any more
    late._catch_up._asked_offers[1] = 1
    assert late.handle(offer) == [], "it is missed no more"
    group = next(group for group in behind.cluster.logs[0].groups if group.last > late.received(0))
    late.handle(GroupReceived(group))
    late._catch_up._asked_offers[1] = 1
    fetcher._asked[0] = 1  # as when yet more of it is missing
    assert late.handle(offer) == [], "it came after all"
    assert (late.executed, late.transfer) == (behind.ends - 1, None)


def test_no_state_is_gone_back_to():
    behind = OneBehind(stands=False)
    behind.truth = snapshot_of(G, milestones(behind.cluster, 1)[:-1])
    assert behind.header.slot < behind.ends - 1
    with pytest.raises(AssertionError, match="the proposal for slot"):
        behind.until(lambda: behind.installed is not None)
    assert len(behind.fetches) > 3
    assert behind.parts == 0
