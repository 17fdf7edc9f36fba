"""Quorum arithmetic, the reduced state of a log, next slots, and counting votes."""

from __future__ import annotations

import pytest

from replica.core import quorum
from replica.core.batch import NULL_BATCH, Batch
from replica.core.entries import (
    Checkpoint,
    Commit,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    SlotResult,
    Suspect,
    ViewChange,
)
from replica.core.genesis import Ordering
from replica.core.logstate import Departure, LogState, Opening, initial_states
from replica.core.rules import apply_entry, highest_own_vote, next_commit, next_vote
from replica.core.slots import SlotBook, ViewTally
from tests.replica.core.support import junk_batch

D = b"d" * 32


@pytest.mark.parametrize("f", range(1, 11))
def test_quorums_meet_and_correct_replicas_make_one(f: int):
    n, q = quorum.replica_count(f), quorum.quorum(f)
    assert 2 * q - n == 1
    assert n - f == q
    assert [quorum.primary(view, n) for view in range(n + 1)] == [*range(n), 0]
    for voters in range(1 << n) if n <= 7 else (0, (1 << f) - 1, (1 << q) - 1, (1 << n) - 1):
        assert quorum.is_quorum(voters, f) == (len([n for n in range(21) if voters >> n & 1]) >= q)


@pytest.mark.parametrize("f", [0, -1, 11])
def test_numbers_of_faults_that_are_not_supported(f: int):
    with pytest.raises(ValueError, match="from 1 to 10"):
        quorum.replica_count(f)


def test_applying_entries_reduces_a_log():
    state = LogState(1)
    batch = junk_batch(1)
    for entry in (
        PrePrepare(0, 1, batch),
        Prepare(0, 2, D),
        Commit(0, 1, batch.digest),
        Checkpoint(4, D),
        SlotResult(1, 3, D),
        SlotResult(4, 1, D),
        Suspect(0),
    ):
        apply_entry(state, entry)
    assert (state.position, state.last_vote, state.last_commit, state.last_checkpoint, state.top) == (7, 2, 1, 4, 2)
    assert (state.votes, state.commits) == ({1: {0: batch.digest}, 2: {0: D}}, {1: {0: batch.digest}})
    assert (state.view, state.suspected, state.wants) == (0, True, 1)
    apply_entry(state, ViewChange(7))
    assert (state.view, state.suspected, state.wants) == (7, False, 7)
    assert (state.last_vote, state.last_commit) == (None, None)
    assert state.view_change_at == {7: Departure(8, 4, 2)}
    apply_entry(state, NewView(7, (Reference(0, 1), Reference(1, 6))))
    assert (state.position, state.results) == (9, 2)
    apply_entry(state, Checkpoint(8, D))
    assert state.results == 0, "they are counted between two checkpoints"
    state.check()


def test_a_copy_is_independent_and_whole():
    state = LogState(2, position=3, view=1, suspected=True, last_vote=5, last_commit=4, last_checkpoint=4, top=6)
    state.results = 3
    state.opened[1] = Opening(4, 6)
    state.view_change_at[1] = Departure(2, 0, 3)
    state.votes = {5: {0: D}}
    state.commits = {4: {0: D}}
    copy = state.copy()
    assert copy == state
    copy.vote(1, 5, b"e" * 32)
    copy.commits[4][1] = D
    copy.opened.clear()
    copy.view_change_at.clear()
    assert state.votes == {5: {0: D}}
    assert state.commits == {4: {0: D}}
    assert state.opened
    assert state.view_change_at


def test_pruning_forgets_up_to_the_stable_slot_and_keeps_what_rules_read():
    state = LogState(0, last_vote=6, last_commit=5, top=6)
    state.votes = {slot: {0: D} for slot in range(1, 7)}
    state.commits = {slot: {0: D} for slot in range(1, 6)}
    state.prune(4)
    assert (sorted(state.votes), sorted(state.commits)) == ([5, 6], [5])
    assert (state.last_vote, state.last_commit, state.top) == (6, 5, 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last_vote": 2, "last_commit": 3}, "invariant 1"),
        ({"votes": {3: {0: D}}, "top": 2}, "invariant 2"),
        ({"view_change_at": {2: Departure(1, 0, 0)}, "view": 1}, "invariant 3"),
    ],
)
def test_broken_invariants_are_named(changes: dict, words: str):
    state = LogState(1)
    for name, value in changes.items():
        setattr(state, name, value)
    with pytest.raises(RuntimeError, match=words):
        state.check()


def test_only_the_first_primary_may_speak_at_once():
    assert [state.opened for state in initial_states(3)] == [{0: Opening(0, 0)}, {}, {}]
    for state in initial_states(3):
        state.check()


@pytest.mark.parametrize(
    ("last", "checkpoint", "base", "due"),
    [(None, 0, 0, 1), (None, 4, 0, 5), (None, 4, 6, 7), (3, 0, 0, 4), (3, 8, 0, 9), (9, 8, 0, 10), (5, 4, 6, 6)],
)
def test_the_next_slot_follows_vote_base_and_checkpoint(last: int | None, checkpoint: int, base: int, due: int):
    state = LogState(0, last_vote=last, last_commit=last, last_checkpoint=checkpoint)
    assert next_vote(state, base) == due
    assert next_commit(state, base) == due


def test_the_highest_own_vote_includes_what_the_primary_carried():
    assert highest_own_vote(LogState(1)) == 0
    assert highest_own_vote(LogState(1, last_vote=3)) == 3
    assert highest_own_vote(LogState(1, view=4, opened={4: Opening(4, 6)})) == 6
    assert highest_own_vote(LogState(1, view=4, last_vote=9, opened={4: Opening(4, 6)})) == 9


def test_three_phases_decide_on_q_commits_that_stand_on_votes():
    book, batch = SlotBook(Ordering.THREE_PHASE, 1), junk_batch(1)
    book.propose(0, 0, 1, batch)
    assert book.vote(1, 0, 1, batch.digest)
    assert book.decided(1) is None
    assert book.commit(0, 0, 1, batch.digest)
    assert book.commit(0, 0, 1, batch.digest)
    assert book.decided(1) is None, "one replica twice is one replica"
    assert not book.commit(2, 0, 1, batch.digest), "a commit without its author's vote"
    assert book.decided(1) is None
    assert book.commit(1, 0, 1, batch.digest)
    assert book.decided(1) == batch


def test_two_phases_decide_on_q_votes_and_never_on_commits():
    book, batch = SlotBook(Ordering.TWO_PHASE, 1), junk_batch(1)
    book.propose(0, 0, 1, batch)
    assert book.commit(0, 0, 1, batch.digest)
    assert book.decided(1) is None
    assert book.vote(0, 0, 1, batch.digest)
    assert book.decided(1) is None, "the proposal and the primary's vote are one"
    assert book.vote(2, 0, 1, batch.digest)
    assert book.decided(1) == batch


def test_a_vote_for_something_else_counts_nothing():
    book, batch = SlotBook(Ordering.THREE_PHASE, 1), junk_batch(1)
    book.propose(0, 0, 1, batch)
    assert not book.vote(1, 0, 1, b"x" * 32)
    assert not book.vote(1, 1, 1, batch.digest), "nothing was proposed in view 1"
    assert not book.commit(0, 0, 1, b"x" * 32)
    assert not book.commit(0, 1, 1, batch.digest)
    assert book.certified(0, 1, also=0) is None
    assert book.certified(0, 1, also=0b10) == batch.digest
    assert book.proposed(0, 1) == batch.digest


def test_votes_of_different_views_are_not_added_up():
    book, batch = SlotBook(Ordering.TWO_PHASE, 2), junk_batch(1)
    book.propose(0, 0, 1, batch)
    book.vote(2, 0, 1, batch.digest)
    book.propose(1, 1, 1, batch)
    book.vote(3, 1, 1, batch.digest)
    assert book.decided(1) is None
    book.vote(4, 1, 1, batch.digest)
    assert book.decided(1) == batch


def test_what_is_not_known_is_neither_counted_nor_a_lie():
    book, batch = SlotBook(Ordering.THREE_PHASE, 1), junk_batch(1)
    assert book.vote(1, 0, 9, D)
    assert book.commit(1, 0, 9, D)
    assert (book.proposed(0, 9), book.certified(0, 9, 0b111), book.decided(9)) == (None, None, None)
    assert len(book) == 0
    for slot in (1, 2, 3):
        book.propose(0, 0, slot, batch)
    assert book.proposed(1, 2) is None
    book.prune(2)
    assert len(book) == 1
    assert book.vote(1, 0, 2, b"x" * 32), "stable: whatever is said of it no longer matters"


def resumed(ordering: Ordering, states: list[LogState], *batches: Batch) -> SlotBook:
    book = SlotBook(ordering, 1)
    book.resume(states, batches)
    return book


def test_a_book_resumes_with_what_the_states_hold():
    first, second = junk_batch(1), junk_batch(2)
    states = [LogState(author) for author in range(3)]
    states[0].votes = {9: {0: first.digest}, 10: {0: second.digest}, 11: {0: NULL_BATCH.digest}}
    states[1].votes = {9: {0: first.digest, 1: first.digest}, 10: {0: D}}
    states[2].votes = {9: {0: first.digest}, 10: {0: second.digest}, 11: {0: NULL_BATCH.digest}}
    for state in states[:2]:
        state.commits = {9: {0: first.digest}, 10: {0: D}}
    book = resumed(Ordering.THREE_PHASE, states, first, second)
    assert book._slots[9].views == {0: ViewTally(first.digest, 0b111, 0b011), 1: ViewTally(first.digest, 0b010)}
    assert book._slots[10].views == {0: ViewTally(second.digest, 0b101)}, "lies are not counted"
    assert (book.decided(9), book.decided(10), len(book)) == (first, None, 3)
    assert book.batch(11, NULL_BATCH.digest) == NULL_BATCH
    two = resumed(Ordering.TWO_PHASE, states, first, second)
    assert (two.decided(9), two.decided(10), two.decided(11)) == (first, second, NULL_BATCH)
