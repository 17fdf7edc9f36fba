"""The agreed cut: when it moves, and that the states there are those of a reader that stopped there."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest

from replica.core.carry import Carry
from replica.core.cut import AgreedCut, is_closed
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
from replica.core.genesis import Ordering
from replica.core.logstate import LogState, Opening, initial_states
from replica.core.quorum import primary
from tests.replica.core.harness import Cluster, FakeLog, heads, make_core, make_genesis
from tests.replica.core.support import junk_batch
from tests.replica.core.traffic import all_groups, feed, note_headers, prefixes, random_run, run_with_votes_in_flight

G = make_genesis()
BATCHES = {slot: junk_batch(slot) for slot in range(1, 12)}


def propose(*slots: int) -> list[Entry]:
    return [PrePrepare(0, slot, BATCHES[slot]) for slot in slots]


def prepare(*slots: int) -> list[Entry]:
    return [Prepare(0, slot, BATCHES[slot].digest) for slot in slots]


class Logs:
    """Three logs, and the cut of somebody who reads what they say, a group at a time."""

    def __init__(self) -> None:
        self.logs = [FakeLog(author) for author in range(3)]
        self.cut = AgreedCut(initial_states(3), heads(G))

    def say(self, log: int, *entries: Entry, carried: Carry | None = None) -> bytes:
        """Read a group; return the chain's head at its end."""
        group = self.logs[log].say(*entries)
        for place, entry in enumerate(entries, 1):
            self.cut.read(log, entry, carried, group.head_after if place == len(entries) else None)
        return group.head_after

    def unmoved(self, verdict: str, slot: int, *positions: int) -> None:
        before = self.cut.positions, self.cut.heads, len(self.cut)
        count = self.cut.verdicts[verdict]
        assert not self.cut.execute(slot, positions)
        assert self.cut.verdicts[verdict] == count + 1, self.cut.verdicts
        assert (self.cut.positions, self.cut.heads, len(self.cut)) == before


def test_it_begins_where_the_logs_begin():
    cut = Logs().cut
    assert (cut.positions, cut.heads, len(cut)) == ((0, 0, 0), tuple(heads(G)), 0)
    assert cut.ends_of_groups() == (0, 0, 0)
    assert list(cut.states) == initial_states(3)


def test_it_moves_to_ends_of_groups_that_were_read():
    w = Logs()
    first = w.say(0, *propose(1, 2))
    second = w.say(0, *propose(3, 4))
    voted = w.say(1, *prepare(1), *prepare(2))
    assert w.cut.ends_of_groups() == (4, 2, 0)
    assert w.cut.execute(4, (2, 2, 0))
    assert (w.cut.positions, w.cut.heads) == ((2, 2, 0), (first, voted, heads(G)[2]))
    assert (len(w.cut), w.cut.ends_of_groups()) == (2, (4, 2, 0))
    assert w.cut.execute(4, (4, 2, 0))
    assert (w.cut.heads[0], len(w.cut)) == (second, 0)


def test_a_cut_may_stay_where_it_is():
    w = Logs()
    w.say(0, *propose(1))
    assert w.cut.execute(4, (1, 0, 0))
    w.unmoved("stands", 8, 1, 0, 0)
    assert w.cut.verdicts == {"moved": 1, "stands": 1}


REFUSED = {
    "back in one log": ("back", (0, 3, 0)),
    "back in one log, although ahead in another": ("back", (6, 0, 0)),
    "back, within a group": ("back", (2, 3, 0)),
    "within a group": ("no-end", (5, 3, 0)),
    "beyond what was read": ("no-end", (7, 3, 0)),
    "far beyond what was read": ("no-end", (6, 2**64 - 1, 0)),
    "where only one position is good": ("no-end", (6, 2, 0)),
    "nowhere, as a null batch says": ("none", ()),
    "too few positions": ("none", (6, 3)),
    "too many positions": ("none", (6, 3, 0, 0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_that_does_nothing(name: str):
    w = Logs()
    w.say(0, *propose(1, 2, 3))
    w.say(0, *propose(4, 5, 6))
    w.say(1, *prepare(1))
    assert w.cut.execute(3, (3, 1, 0))
    w.say(1, *prepare(2, 3))
    verdict, positions = REFUSED[name]
    w.unmoved(verdict, 8, *positions)
    assert w.cut.execute(8, (6, 3, 0)), "the next good one moves it"


def test_a_vote_inside_needs_its_proposal_inside():
    w = Logs()
    w.say(0, *propose(1, 2, 3, 4))
    w.say(0, *propose(5))
    w.say(1, *prepare(1, 2, 3, 4))
    w.say(1, *prepare(5))
    w.unmoved("open", 4, 4, 5, 0)
    assert w.cut.execute(4, (5, 5, 0))


def test_a_vote_up_to_the_executed_slot_needs_nothing():
    w = Logs()
    w.say(0, *propose(1))
    w.say(0, *propose(2))
    w.say(1, *prepare(1, 2))
    assert w.cut.execute(2, (1, 2, 0)), "slot 2 is executed: its vote is void"
    assert not any(state.votes for state in w.cut.states)


def test_a_vote_is_closed_by_its_own_views_proposal_only():
    states = [LogState(author) for author in range(3)]
    states[2].votes = {9: {0: b"d" * 32, 4: b"d" * 32}}
    states[0].votes = {9: {0: b"x" * 32}}
    assert not is_closed(states, 8), "nothing proposed in view 4"
    assert is_closed(states, 9)
    states[1].votes = {9: {4: b"x" * 32}}
    assert is_closed(states, 8), "what was proposed is another matter: a lie is not counted"
    states[1].votes = {9: {1: b"d" * 32}}
    assert not is_closed(states, 8)


def test_what_lies_above_the_executed_slot_is_kept_and_the_rest_forgotten():
    w = Logs()
    w.say(0, *propose(1, 2, 3, 4, 5))
    w.say(1, *prepare(1, 2, 3, 4, 5), Commit(0, 1, BATCHES[1].digest))
    assert w.cut.execute(4, (5, 6, 0))
    assert [sorted(state.votes) for state in w.cut.states] == [[5], [5], []]
    assert w.cut.states[0].votes == {5: {0: BATCHES[5].digest}}
    assert w.cut.states[1].commits == {}
    w.unmoved("none", 8)
    assert [sorted(state.votes) for state in w.cut.states] == [[], [], []], "a null batch's slot is executed too"


def test_the_states_that_it_was_made_of_are_not_its_own():
    states = initial_states(3)
    cut = AgreedCut(states, heads(G))
    states[0].position = 7
    assert cut.positions == (0, 0, 0)


def test_views_below_the_lowest_are_dropped_and_carried_votes_counted():
    w = Logs()
    for log in range(3):
        w.say(log, Suspect(0))
    for log in range(3):
        w.say(log, ViewChange(1))
    carried = Carry(Opening(4, 6), ((5, b"d" * 32), (6, b"e" * 32)))
    w.say(1, NewView(1, (Reference(0, 2), Reference(1, 2))), carried=carried)
    assert w.cut.execute(4, (1, 3, 2)), "log 0 is still in view 0"
    assert w.cut.lowest_view == 0
    assert w.cut.states[0].opened == {0: Opening(0, 0)}
    assert w.cut.states[1].votes == {5: {1: b"d" * 32}, 6: {1: b"e" * 32}}
    assert (w.cut.states[1].opened, w.cut.states[1].top) == ({1: Opening(4, 6)}, 6)
    assert w.cut.execute(5, (2, 3, 2))
    assert w.cut.lowest_view == 1
    assert w.cut.states[0].opened == {}
    assert sorted(w.cut.states[1].votes) == [6]


# Random logs

RUNS = [(f, ordering, seed) for f in (1, 2) for ordering in Ordering for seed in range(4)]
CLUSTERS = {
    **{f"random {run}": functools.partial(random_run, *run) for run in RUNS},
    **{f"in flight {ordering}": functools.partial(run_with_votes_in_flight, ordering) for ordering in Ordering},
}
in_every_run = pytest.mark.parametrize("run", CLUSTERS.values(), ids=CLUSTERS)


def cuts_in(cluster: Cluster) -> dict[int, set[tuple[int, ...]]]:
    """Every cut that was proposed, by slot."""
    found: dict[int, set[tuple[int, ...]]] = {}
    genesis = cluster.genesis
    for group in all_groups(cluster):
        for payload in group.payloads:
            entry = decode_entry(payload, genesis, genesis.cluster_id())
            if isinstance(entry, PrePrepare) and entry.batch.cut:
                found.setdefault(entry.slot, set()).add(entry.batch.cut)
    return found


@in_every_run
def test_states_at_the_cut_are_those_of_a_reader_that_stopped_there(run: Callable[[], Cluster]):
    cluster = run()
    reference, proposed = prefixes(cluster), cuts_in(cluster)
    core = make_core(cluster.genesis, 0, live=False)
    found = note_headers(core)
    feed(core, all_groups(cluster), random.Random(1))
    assert len(found) >= 2
    at = (0,) * cluster.genesis.n
    for slot, (header, states) in sorted(found.items()):
        assert header.cut == at or header.cut in proposed[slot]
        at = header.cut
        expected = [reference[log][position].copy() for log, position in enumerate(header.cut)]
        lowest = min(state.view for state in expected)
        for state in expected:
            state.votes = {s: votes for s, votes in state.votes.items() if s > slot}
            state.commits = {s: commits for s, commits in state.commits.items() if s > slot}
            state.opened = {view: o for view, o in state.opened.items() if view >= lowest}
            state.view_change_at = {view: d for view, d in state.view_change_at.items() if view >= lowest}
        assert states == expected
        for voter in states:
            for voted, by_view in voter.votes.items():
                for view in by_view:
                    assert view in states[primary(view, len(states))].votes[voted], "closed"


@in_every_run
def test_all_readers_have_the_same_headers_whatever_they_read_first(run: Callable[[], Cluster]):
    cluster = run()
    found = []
    for number in range(4):
        core = make_core(cluster.genesis, number % 3, live=False)
        if number == 3:
            core._checkpoints.say = lambda *_: False  # type: ignore[method-assign] # nothing is ever stable here
        headers = note_headers(core)
        feed(core, all_groups(cluster), random.Random(number))
        assert core.halted is None
        assert (core.stable > 0) == (number < 3)
        found.append(headers)
    assert found[0] == found[1] == found[2] == found[3]
    said = {
        (entry.slot, entry.digest)
        for group in all_groups(cluster)
        for payload in group.payloads
        if isinstance(entry := decode_entry(payload, cluster.genesis, cluster.genesis.cluster_id()), Checkpoint)
    }
    assert said <= {(slot, header.digest) for slot, (header, _) in found[0].items()}


def test_the_runs_hold_what_they_are_for():
    moved = views = in_flight = departures = 0
    for run in CLUSTERS.values():
        cluster = run()
        core = make_core(cluster.genesis, 0, live=False)
        found = note_headers(core)
        feed(core, all_groups(cluster), random.Random(0))
        for header, states in found.values():
            moved += any(header.cut)
            views += any(state.view for state in states)
            in_flight += any(state.votes for state in states)
            departures += any(state.view_change_at for state in states)
    assert min(moved, views, departures) >= 100
    assert in_flight >= 3
