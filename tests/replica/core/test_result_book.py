"""The book of results for receipts, by itself: what it keeps, of whom, how much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replica.apps import kv
from replica.core import results
from replica.core.batch import make_batch
from replica.core.entries import SlotResult
from replica.core.envelope import Status
from replica.core.events import (
    ResultAsked,
    ResultRefused,
)
from replica.core.execution import Executor
from replica.core.logstate import LogState
from replica.core.results import BUSY, GONE, LATER, ResultBook
from tests.replica.core.harness import FakeClient, make_core, make_genesis
from trustlog.receipts import Outcome

GENESIS = make_genesis()


def book(genesis=GENESIS) -> ResultBook:
    return ResultBook(genesis)


def fill(kept: ResultBook, slots: range, client: FakeClient, executor: Executor) -> None:
    for slot in slots:
        batch = make_batch(0, (), [client.operations(kv.put(b"k", b"v%d" % slot))])
        kept.executed(slot, batch, executor.execute(slot, batch))


def prepared() -> tuple[FakeClient, Executor]:
    client = FakeClient(GENESIS)
    executor = Executor(make_core(GENESIS, 0).executor._application, GENESIS)
    executor.execute(1, make_batch(0, (), [client.open()]))
    client.session = replace(client.session, slot=1)
    return client, executor


def leaf(client: FakeClient, slot: int) -> bytes:
    status = b"\0" if slot == 2 else b"\1"
    return Outcome(client.key, (1, 0), slot - 1, kv.put(b"k", b"v%d" % slot), slot, Status.OK, status).leaf


def test_only_the_newest_slots_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "RESULT_SLOTS_MAX", 5)
    client, executor = prepared()
    kept, own = book(), LogState(0, last_checkpoint=4)
    fill(kept, range(2, 8), client, executor)
    assert len(kept) == 5
    asked = ResultAsked(client.key, 3, leaf(client, 3), "me")
    assert kept.ask(asked, own, 7, live=True) == []
    assert list(kept.due) == [3]
    batch = make_batch(0, (), [client.operations(kv.put(b"k", b"v8"))])
    # Who waits for a slot that is dropped is told; nothing is said for it any more.
    assert kept.executed(8, batch, executor.execute(8, batch)) == [ResultRefused("me", GONE)]
    assert not kept.due
    assert kept.ask(asked, own, 8, live=True) == [ResultRefused("me", GONE)]
    assert kept.said(SlotResult(3, 1, bytes(32)), 1, None) == []  # type: ignore[arg-type]
    assert kept.agrees(SlotResult(3, 1, bytes(32))), "what is kept no more cannot be judged"
    kept.check()


def test_what_is_kept_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "RESULT_BYTES_MAX", 40_000)
    client, executor = prepared()
    kept = book()
    fill(kept, range(2, 30), client, executor)
    kept.check()
    assert 1 <= len(kept) < 28
    big = make_batch(0, (), [client.operations(kv.put(b"k", bytes(50_000)))])
    kept.executed(30, big, executor.execute(30, big))
    assert len(kept) == 0, "a slot that is larger than all is not kept"
    kept.check()


def test_who_waits_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "ASKING_PER_CLIENT_MAX", 3)
    monkeypatch.setattr(results, "ASKING_MAX", 5)
    client, executor = prepared()
    kept, own = book(), LogState(0)
    fill(kept, range(2, 4), client, executor)
    told = [
        kept.ask(ResultAsked(key, 2, leaf(client, 2), at), own, 3, live=True)
        for key in (b"a", b"b", b"c")
        for at in range(4)
    ]
    assert [bool(one) for one in told] == [False] * 3 + [True] + [False] * 2 + [True] * 6
    assert {one[0].code for one in told if one} == {BUSY}  # type: ignore[union-attr]
    kept.check()


def test_a_mute_replica_says_nothing_and_shows_what_it_said():
    client, executor = prepared()
    kept, own = book(), LogState(0)
    fill(kept, range(2, 4), client, executor)
    asked = ResultAsked(client.key, 2, leaf(client, 2), "me")
    assert kept.ask(asked, own, 3, live=False) == [ResultRefused("me", LATER)]
    assert not kept.due


def test_nothing_is_said_beyond_the_pens_room():
    client, executor = prepared()
    own = LogState(0, last_checkpoint=8, results=GENESIS.limits.window)
    kept = book()
    fill(kept, range(2, 12), client, executor)
    asked = ResultAsked(client.key, 11, leaf(client, 11), "me")
    assert kept.ask(asked, own, 11, live=True) == [ResultRefused("me", BUSY)]
    # After a state was transferred the own last CHECKPOINT may be far back: then it must be said first.
    assert kept.ask(asked, LogState(0, last_checkpoint=0), 11, live=True) == [ResultRefused("me", BUSY)]
    assert kept.ask(asked, LogState(0, last_checkpoint=4), 11, live=True) == []
