"""A COMMIT that is not needed, or that a primary leaves to its backups, waits for company, or for two ticks."""

import pytest

from replica.apps import kv
from replica.core import requests
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    Prepare,
    PrePrepare,
    SlotResult,
    Suspect,
    ViewChange,
    decode_entry,
)
from replica.core.events import GroupReceived, KnownBroken, RequestReceived
from replica.core.genesis import Genesis, Ordering
from replica.core.reliance import Reliance
from replica.core.slots import SlotBook
from tests.replica.core.harness import Cluster, FakeClient, FakeLog, make_core, make_genesis, opened
from tests.replica.core.support import Lone, junk_batch


class World:
    """One core and the logs of the others, who say what the test lets them say."""

    def __init__(self, number: int, f: int = 1) -> None:
        self.genesis = make_genesis(f)
        self.lone = Lone(make_core(self.genesis, number))
        self.logs = [FakeLog(other) for other in range(self.genesis.n)]
        self.client = FakeClient(self.genesis)
        self.batch = junk_batch(1)

    def ask(self, nonce: int) -> None:
        self.lone.handle(RequestReceived(self.client.open(bytes([nonce]) * 16), relayed=False))

    def hear(self, **said: tuple[Entry, ...]) -> None:
        """Hand in what some logs say, all at once."""
        groups = [self.logs[int(name[1:])].say(*entries) for name, entries in said.items()]
        self.lone.handle(*map(GroupReceived, groups))

    def said(self) -> list[list[Entry]]:
        """Return what the core said, group by group."""
        return [said_in(self.genesis, group.payloads) for group in self.lone.log.groups]

    def digest(self, slot: int) -> bytes:
        proposed = self.lone.core._known.slots.proposed(0, slot)
        assert proposed is not None
        return proposed

    def votes(self, *slots: int) -> tuple[Entry, ...]:
        return tuple(kind(0, slot, self.digest(slot)) for slot in slots for kind in (Prepare, Commit))


def said_in(genesis: Genesis, payloads: tuple[bytes, ...]) -> list[Entry]:
    return [decode_entry(payload, genesis, genesis.cluster_id()) for payload in payloads]


def kinds(groups: list[list[Entry]]) -> list[list[type[Entry]]]:
    return [[type(entry) for entry in group] for group in groups]


@pytest.fixture
def primary() -> World:
    """The primary of three, which has proposed slot 1."""
    world = World(0)
    world.ask(1)
    assert kinds(world.said()) == [[PrePrepare]]
    return world


@pytest.fixture
def held(primary) -> World:
    """The same, after both backups committed: it executed slot 1, and its own COMMIT is held back."""
    votes = primary.votes(1)
    primary.hear(_1=votes, _2=votes)
    assert primary.lone.core.executed == 1
    assert primary.lone.core.holds_back
    assert len(primary.said()) == 1
    return primary


def test_an_idle_one_is_said_at_the_second_tick(held):
    held.lone.tick(1)
    assert held.lone.core.holds_back
    assert len(held.said()) == 1
    held.lone.tick(1)
    assert kinds(held.said()) == [[PrePrepare], [Commit]]
    assert not held.lone.core.holds_back


def test_one_that_decides_is_left_to_the_backups_until_the_second_tick(primary):
    primary.hear(_1=primary.votes(1))
    assert primary.lone.core.holds_back
    primary.lone.tick(1)
    assert primary.lone.core.executed == 0
    primary.lone.tick(1)
    assert kinds(primary.said()) == [[PrePrepare], [Commit]]
    assert primary.lone.core.executed == 1


def test_or_with_the_next_proposal(held):
    held.ask(2)
    assert kinds(held.said()) == [[PrePrepare], [Commit, PrePrepare]]
    assert [entry.slot for entry in held.said()[1]] == [1, 2]
    assert not held.lone.core.holds_back


def test_or_with_a_result(held):
    held.lone.core._known.results.due[1] = SlotResult(1, 1, bytes(32))
    held.lone.handle()
    assert kinds(held.said())[1] == [Commit, SlotResult]


def test_or_never_after_a_checkpoint(held):
    """No vote is at or below the own checkpoint: whoever lacks the slot has the others' COMMITs to ask for."""
    core = held.lone.core
    core._known.own_digests[4] = bytes(32)
    core.executor.slot = core._known.executed = 4
    held.lone.handle()
    assert kinds(held.said())[1] == [Checkpoint]
    held.lone.tick()
    held.lone.tick()
    assert len(held.said()) == 2


def test_no_proposal_beyond_the_window_is_waited_for(held):
    """A request that there is no room for does not make it hurry."""
    held.lone.core._known.ends = 1
    held.ask(2)
    assert len(held.said()) == 1
    assert held.lone.core.holds_back


def test_nor_one_while_enough_is_under_way(held, monkeypatch: pytest.MonkeyPatch):
    """What waits cannot be proposed yet, so the COMMIT has no company to hurry for."""
    monkeypatch.setattr(requests, "UNDER_WAY_MAX", 0)
    held.ask(2)
    assert held.lone.core._known.requests.unproposed
    assert len(held.said()) == 1
    assert held.lone.core.holds_back


def disappointed(primary: World) -> None:
    """Let a slot wait for the own COMMIT, as replica 2 says nothing."""
    slot = primary.lone.core.executed + 1
    primary.hear(_1=primary.votes(slot))
    primary.lone.tick()
    primary.lone.tick()
    assert primary.lone.core.executed == slot


def test_backups_that_were_late_are_not_waited_for(primary):
    disappointed(primary)
    primary.ask(2)
    primary.hear(_1=primary.votes(2))
    assert kinds(primary.said())[1:] == [[Commit], [PrePrepare], [Commit]]
    assert not primary.lone.core.holds_back
    assert primary.lone.core.executed == 2


def test_until_they_gave_enough_for_two_slots(primary):
    disappointed(primary)
    votes = primary.votes(1)
    for slot in (2, 3):
        primary.ask(slot)
        own = primary.votes(slot)
        primary.hear(_1=own)
        assert primary.lone.core.executed == slot
        assert not primary.lone.core.holds_back
        votes += own
    primary.hear(_2=votes)
    primary.ask(4)
    primary.hear(_1=primary.votes(4))
    assert primary.lone.core.holds_back
    assert primary.lone.core.executed == 3


def test_a_slot_that_was_not_committed_by_others_is_not_taken_for_one_that_was(primary):
    disappointed(primary)
    for slot in (2, 3, 4):
        primary.ask(slot)
        primary.hear(_1=primary.votes(slot))
        assert primary.lone.core.executed == slot


def test_trust_takes_twice_as_long_each_time():
    reliance = Reliance()
    assert reliance.is_given
    for probation in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024):
        reliance.satisfied()
        reliance.disappointed()
        for _ in range(probation):
            assert not reliance.is_given
            reliance.satisfied()
        assert reliance.is_given


def test_another_view_begins_with_trust(primary):
    disappointed(primary)
    core = primary.lone.core
    assert not core._pen._reliance.is_given
    primary.hear(_1=(Suspect(0),), _2=(Suspect(0),))
    assert core.view == 1
    assert core._pen._reliance.is_given


def test_too_few_backups_are_not_relied_on(primary):
    primary.lone.handle(KnownBroken(2))
    primary.hear(_1=primary.votes(1))
    assert kinds(primary.said()) == [[PrePrepare], [Commit]]


def test_a_hurried_one_takes_along_those_before_it(primary):
    primary.ask(2)
    primary.lone.core._pen._reliance.disappointed()
    votes = primary.votes(1)
    primary.hear(_2=votes, _1=(*votes, Prepare(0, 2, primary.digest(2))))
    assert kinds(primary.said()) == [[PrePrepare], [PrePrepare], [Commit, Commit]]
    assert primary.lone.core.executed == 1


def test_what_is_stable_is_not_looked_at_again(primary):
    """Slots that went by without the backups' COMMITs do not keep later ones from being counted."""
    disappointed(primary)
    core = primary.lone.core
    core._known.stable = 1
    for slot in (2, 3):
        primary.ask(slot)
        votes = primary.votes(slot)
        primary.hear(_1=votes)
        core._known.slots.vote(2, 0, slot, primary.digest(slot))
        core._known.slots.commit(2, 0, slot, primary.digest(slot))
    core.handle()
    assert core._pen._reliance.is_given


def test_only_ticks_count(held):
    for _ in range(5):
        held.lone.handle()
    assert held.lone.core.holds_back
    held.lone.tick()
    held.lone.handle()
    assert held.lone.core.holds_back


def test_a_change_of_view_is_not_held_up(held):
    held.hear(_1=(Suspect(0),), _2=(Suspect(0),))
    assert kinds(held.said())[1:] == [[ViewChange]]


@pytest.fixture
def backup() -> World:
    """A backup of five, to which everybody else committed slot 1: its own COMMIT is held back."""
    world = World(1, f=2)
    world.hear(_0=(PrePrepare(0, 1, world.batch),))
    assert kinds(world.said()) == [[Prepare]]
    votes = world.votes(1)
    world.hear(_0=(Commit(0, 1, world.batch.digest),), _2=votes, _3=votes)
    assert world.lone.core.executed == 1
    assert len(world.said()) == 1
    assert world.lone.core.holds_back
    return world


def test_a_backups_goes_with_its_next_vote(backup):
    backup.hear(_0=(PrePrepare(0, 2, junk_batch(2)),))
    assert kinds(backup.said()) == [[Prepare], [Commit, Prepare]]


def test_a_backups_goes_with_a_suspicion(backup):
    backup.lone.handle(KnownBroken(0))
    assert kinds(backup.said()) == [[Prepare], [Suspect, Commit]]


def test_a_backups_is_said_at_the_second_tick(backup):
    backup.lone.tick()
    assert len(backup.said()) == 1
    backup.lone.tick()
    assert kinds(backup.said()) == [[Prepare], [Commit]]


def test_a_backup_relies_on_nobody():
    world = World(1, f=2)
    world.hear(_0=(PrePrepare(0, 1, world.batch),))
    votes = world.votes(1)
    world.hear(_2=votes, _3=votes)
    assert kinds(world.said()) == [[Prepare], [Commit]]


def test_commits_of_another_view_do_not_count():
    book = SlotBook(Ordering.THREE_PHASE, f=1)
    batch = junk_batch(1)
    for view in (0, 1):
        book.propose(view, view, 1, batch)
        for author in range(3):
            book.vote(author, view, 1, batch.digest)
    assert not book.is_committed(0, 1, but=2)
    book.commit(0, 0, 1, batch.digest)
    assert not book.is_committed(0, 1, but=2)
    book.commit(1, 0, 1, batch.digest)
    assert book.is_committed(0, 1, but=2)
    assert not book.is_committed(0, 1, but=1)
    assert not book.is_committed(1, 1, but=2)
    assert not book.is_committed(2, 1, but=2)
    assert not book.is_committed(0, 2, but=2)


@pytest.mark.parametrize("ordering", Ordering, ids=str)
def test_a_primary_of_three_says_one_group_for_each_operation(ordering):
    cluster = Cluster(make_genesis(1, ordering, interval=32))
    user = opened(cluster, FakeClient(cluster.genesis))
    before = [len(log.groups) for log in cluster.logs]
    for _ in range(10):
        cluster.request(user.operations(kv.incr(b"n")))
        cluster.run()
    assert cluster.cores[0].executed == 11
    assert [len(log.groups) - was for log, was in zip(cluster.logs, before, strict=True)] == [10, 10, 10]
    assert ordering is Ordering.THREE_PHASE or not cluster.cores[0].holds_back
    cluster.settle(2)
    cluster.check()
