"""A log's reduced state as bytes: one state, one layout, and nothing else is taken."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.core.layout import LayoutError
from replica.core.logstate import Departure, LogState, Opening, initial_states
from tests.replica.core.support import examples
from tests.replica.core.test_proof import flips

D, E = b"d" * 32, b"e" * 32
numbers = st.integers(0, 5) | st.sampled_from([2**16, 2**63, 2**64 - 1])
slots = st.integers(1, 6) | st.sampled_from([300, 2**64 - 1])
votes = st.dictionaries(slots, st.dictionaries(numbers, st.sampled_from([D, E]), min_size=1, max_size=3), max_size=3)
states = st.builds(
    LogState,
    author=st.sampled_from([0, 1, 20]),
    joined=st.booleans(),
    position=numbers,
    view=numbers,
    suspected=st.booleans(),
    last_vote=st.none() | slots,
    last_commit=st.none() | slots,
    last_checkpoint=numbers,
    top=numbers,
    opened=st.dictionaries(numbers, st.builds(Opening, numbers, numbers), max_size=3),
    view_change_at=st.dictionaries(numbers, st.builds(Departure, numbers, numbers, numbers), max_size=3),
    votes=votes,
    commits=votes,
    results=numbers,
)


@examples(300)
@given(states)
def test_a_state_is_read_as_it_was_written(state: LogState):
    decoded = LogState.decode(state.encode())
    assert decoded == state
    assert decoded.encode() == state.encode()
    assert state.copy().encode() == state.encode()


@examples(100)
@given(states, states)
def test_different_states_have_different_bytes(one: LogState, other: LogState):
    assert (one.encode() == other.encode()) == (one == other)


@examples(15)
@given(states)
def test_every_flipped_bit_is_refused_or_another_state(state: LogState):
    for _, flipped in flips(state.encode()):
        try:
            decoded = LogState.decode(flipped)
        except LayoutError:
            continue
        assert decoded != state
        assert decoded.encode() == flipped


@examples(30)
@given(states)
def test_every_truncation_and_every_addition_is_refused(state: LogState):
    raw = state.encode()
    without = len(raw) - 8 if state.results else None  # the same state before its RESULTs
    for size in range(len(raw)):
        if size == without:
            assert LogState.decode(raw[:size]) == replace(state, results=0)
            continue
        with pytest.raises(LayoutError):
            LogState.decode(raw[:size])
    for added in (b"\0", bytes(8), bytes(9), b"\1" * 9):
        with pytest.raises(LayoutError):
            LogState.decode(raw + added)


FIELDS = struct.pack(">HQQBQQQQ", 1, 7, 2, 1, 9, 8, 4, 9)
NONE = struct.pack(">I", 0)


def listed(*items: bytes) -> bytes:
    return struct.pack(">I", len(items)) + b"".join(items)


def vote(slot: int, view: int, digest: bytes = D) -> bytes:
    return struct.pack(">QQ", slot, view) + digest


OPENED = [struct.pack(">QQQ", view, 4, 6) for view in (1, 4)]
DEPARTED = [struct.pack(">QQQQ", view, 5, 4, 6) for view in (1, 4)]


def test_a_state_laid_out_by_hand():
    raw = (
        FIELDS
        + listed(*OPENED)
        + listed(*DEPARTED)
        + listed(vote(8, 1), vote(8, 2, E), vote(9, 0))
        + listed(vote(8, 1))
    )
    state = LogState(1, 7, 2, True, 9, 8, 4, 9)
    state.opened = {1: Opening(4, 6), 4: Opening(4, 6)}
    state.view_change_at = {1: Departure(5, 4, 6), 4: Departure(5, 4, 6)}
    state.votes = {8: {1: D, 2: E}, 9: {0: D}}
    state.commits = {8: {1: D}}
    assert LogState.decode(raw) == state
    assert state.encode() == raw


@pytest.mark.parametrize(
    "raw",
    [
        FIELDS[:18] + b"\4" + FIELDS[19:] + NONE * 4,
        FIELDS + listed(*reversed(OPENED)) + NONE * 3,
        FIELDS + listed(OPENED[0], OPENED[0]) + NONE * 3,
        FIELDS + NONE + listed(*reversed(DEPARTED)) + NONE * 2,
        FIELDS + NONE + listed(DEPARTED[1], DEPARTED[1]) + NONE * 2,
        FIELDS + NONE * 2 + listed(vote(9, 0), vote(8, 0)) + NONE,
        FIELDS + NONE * 2 + listed(vote(8, 1), vote(8, 0)) + NONE,
        FIELDS + NONE * 2 + listed(vote(8, 1), vote(8, 1, E)) + NONE,
        FIELDS + NONE * 3 + listed(vote(9, 0), vote(8, 0)),
        FIELDS + NONE * 3 + struct.pack(">I", 2**32 - 1) + vote(9, 0),
        FIELDS + struct.pack(">I", 2**32 - 1) + b"".join(OPENED),
    ],
)
def test_states_that_are_not_in_canonical_order(raw: bytes):
    with pytest.raises(LayoutError):
        LogState.decode(raw)


def test_initial_states_are_the_same_everywhere():
    for n in (3, 5):
        assert [LogState.decode(state.encode()) for state in initial_states(n)] == initial_states(n)


def test_views_that_nobody_can_name_any_more_are_dropped():
    state = LogState(1, view=5)
    state.opened = {view: Opening(0, 0) for view in (0, 2, 3, 5)}
    state.view_change_at = {view: Departure(1, 0, 0) for view in (1, 3, 4, 5)}
    state.drop_views(3)
    assert (sorted(state.opened), sorted(state.view_change_at)) == ([3, 5], [3, 4, 5])
    state.drop_views(0)
    assert (sorted(state.opened), sorted(state.view_change_at)) == ([3, 5], [3, 4, 5])
