"""Every rule of a log, each broken once: in view 0, and in a later view that carries votes over."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable

import pytest

from replica.core import rules
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    EpochMark,
    NewView,
    Prepare,
    PrePrepare,
    Reference,
    Skipped,
    SlotResult,
    Suspect,
    ViewChange,
    decode_entry,
)
from replica.core.layout import LayoutError
from replica.core.logstate import Departure, initial_states
from replica.core.rules import Reading, Violation, Wait, judge
from tests.replica.core.harness import make_genesis
from tests.replica.core.rules_world import LATER, D, World
from trustlog.statements import CLOSE_PAYLOAD, open_payload

GENESIS = make_genesis()

BREACHES: list[tuple[str, str, Callable[[World], tuple[int, Entry]]]] = []


def breach(rule: str, name: str) -> Callable[[Callable[[World], tuple[int, Entry]]], object]:
    """Register a case: it prepares the world and returns the author and the entry that breaks `rule`."""

    def register(case: Callable[[World], tuple[int, Entry]]) -> object:
        BREACHES.append((rule, name, case))
        return case

    return register


for _kind, _make in {
    "PRE-PREPARE": lambda w, view: (w.primary, w.proposal(w.due, view)),
    "PREPARE": lambda w, view: (w.backup, Prepare(view, w.base + 1, D)),
    "COMMIT": lambda w, view: (w.backup, Commit(view, w.base + 1, D)),
    "SUSPECT": lambda w, view: (w.backup, Suspect(view)),
    "NEW-VIEW": lambda w, view: (w.primary, NewView(view, (Reference(0, 1), Reference(1, 1)))),
}.items():
    # One view on, one full turn on (the same primary), and one back.
    for _step in (1, 3, -1):
        breach("wrong-view", f"{_kind} {_step:+}")(
            lambda w, make=_make, step=_step: make(w, w.view + step if w.view + step >= 0 else 7)
        )


@breach("not-primary", "a backup proposes")
def _(w: World):
    return w.backup, w.proposal(w.due)


@breach("not-primary", "a backup opens the view")
def _(w: World):
    return w.backup, NewView(w.view, (Reference(0, 15), Reference(1, 15)))


@breach("view-not-open", "a proposal before NEW-VIEW")
def _(w: World):
    del w.states[w.primary].opened[w.view]
    return w.primary, w.proposal(w.due)


@breach("proposed-twice", "a second proposal for a slot")
def _(w: World):
    w.proposed(2)
    return w.primary, w.proposal(w.due + 1)


@breach("proposed-twice", "the slot below the first one due")
def _(w: World):
    return w.primary, w.proposal(w.due - 1)


@breach("proposed-twice", "a slot that its own checkpoint covers")
def _(w: World):
    w.executed = 8
    w.say(w.primary, Checkpoint(8, D))
    return w.primary, w.proposal(8)


@breach("slot-skipped", "a proposal leaves a slot out")
def _(w: World):
    return w.primary, w.proposal(w.due + 1)


@breach("slot-skipped", "a vote leaves a slot out")
def _(w: World):
    w.proposed(3)
    return w.backup, w.prepare(w.base + 2)


@breach("slot-skipped", "a commit leaves a slot out")
def _(w: World):
    w.proposed(3).voted(3)
    return w.backup, w.commit(w.base + 2)


@breach("beyond-window", "a proposal")
def _(w: World):
    w.proposed(8 if w.view == 0 else 6)  # up to last_checkpoint + 8
    return w.primary, w.proposal(w.base + 9)


@breach("beyond-window", "a vote")
def _(w: World):
    w.proposed(8 if w.view == 0 else 6).voted(8)
    return w.backup, w.prepare(w.base + 9)


@breach("beyond-list", "a proposal")
def _(w: World):
    w.ends = w.due - 1
    return w.primary, w.proposal(w.due)


@breach("beyond-list", "a vote")
def _(w: World):
    w.proposed(1)
    w.ends = w.base
    return w.backup, w.prepare(w.base + 1)


@breach("cut-ahead", "a cut beyond the proposer's own log")
def _(w: World):
    w.proposed(3 if w.view == 0 else 1)
    own = w.states[w.primary].position + 1
    return w.primary, w.proposal(w.base + 4, cut=tuple(own if log == w.primary else 0 for log in range(3)))


@breach("primary-prepared", "the primary votes by PREPARE")
def _(w: World):
    w.proposed(1)
    return w.primary, w.prepare(w.due)


@breach("voted-twice", "a second vote for a slot")
def _(w: World):
    w.proposed(2).voted(2)
    return w.backup, w.prepare(w.base + 2)


@breach("voted-twice", "a vote for what its own checkpoint covers")
def _(w: World):
    w.executed = w.base + 4
    w.proposed(4).say(w.backup, Checkpoint(w.base + 4, D))
    return w.backup, w.prepare(w.base + 4)


@breach("committed-twice", "a second commit for a slot")
def _(w: World):
    w.proposed(2).voted(2).say(w.backup, w.commit(w.base + 1), w.commit(w.base + 2))
    return w.backup, w.commit(w.base + 2)


@breach("committed-twice", "a commit for what its own checkpoint covers")
def _(w: World):
    w.executed = w.base + 4
    w.proposed(4).voted(4).say(w.backup, Checkpoint(w.base + 4, D))
    return w.backup, w.commit(w.base + 4)


@breach("commit-without-vote", "a backup")
def _(w: World):
    w.proposed(2).voted(1).say(w.backup, w.commit(w.base + 1))
    return w.backup, w.commit(w.base + 2)


@breach("commit-without-vote", "a backup that never voted in the view")
def _(w: World):
    w.proposed(1)
    return w.backup, w.commit(w.base + 1)


@breach("commit-without-vote", "a primary beyond its proposals and what it carried")
def _(w: World):
    w.say(w.primary, *(w.commit(slot) for slot in range(w.base + 1, w.due)))
    return w.primary, w.commit(w.due)


@breach("checkpoint-misplaced", "not a multiple of the interval")
def _(w: World):
    w.executed = 6
    return w.backup, Checkpoint(6, D)


@breach("result-beyond-window", "of a slot that its author cannot have executed yet")
def _(w: World):
    w.executed = w.base + 9
    return w.backup, SlotResult(w.base + 9, 1, D)


@breach("too-many-results", "more than a window of them without a checkpoint")
def _(w: World):
    w.executed = w.base + 8
    w.say(w.backup, *[SlotResult(w.base + 1, 1, D)] * 8)
    return w.backup, SlotResult(w.base + 2, 1, D)


@breach("checkpoint-backwards", "the same checkpoint twice")
def _(w: World):
    w.executed = 8
    w.say(w.backup, Checkpoint(8, D))
    return w.backup, Checkpoint(8, D)


@breach("checkpoint-backwards", "an earlier checkpoint")
def _(w: World):
    w.executed = 12
    w.say(w.backup, Checkpoint(12, D))
    return w.backup, Checkpoint(8, D)


@breach("suspected-twice", "a second SUSPECT of a view")
def _(w: World):
    w.say(w.backup, Suspect(w.view))
    return w.backup, Suspect(w.view)


@breach("view-backwards", "VIEW-CHANGE to the own view")
def _(w: World):
    return w.backup, ViewChange(w.view)


@breach("view-backwards", "VIEW-CHANGE to view 0")
def _(w: World):
    return w.backup, ViewChange(0)


@breach("opened-twice", "a second NEW-VIEW")
def _(w: World):
    return w.primary, NewView(w.view, (Reference(0, 15), Reference(1, 15)))


@breach("reference-ahead", "a reference beyond its author's own log")
def _(w: World):
    del w.states[w.primary].opened[w.view]
    return w.primary, NewView(w.view, (Reference(w.primary, w.states[w.primary].position + 1), Reference(2, 15)))


@breach("wrong-reference", "an entry that is no VIEW-CHANGE")
def _(w: World):
    del w.states[w.primary].opened[w.view]
    for state in w.states:
        state.position = 20
        state.view_change_at[w.view] = Departure(15, 0, 0)
    return w.primary, NewView(w.view, (Reference(0, 15), Reference(1, 14)))


@breach("wrong-reference", "a VIEW-CHANGE to another view")
def _(w: World):
    del w.states[w.primary].opened[w.view]
    for state in w.states:
        state.position = 20
        state.view_change_at = {w.view + 1: Departure(15, 0, 0)}
    return w.primary, NewView(w.view, (Reference(0, 15), Reference(2, 15)))


@pytest.mark.parametrize("view", [0, LATER])
@pytest.mark.parametrize(("rule", "name", "case"), BREACHES, ids=[f"{rule}: {name}" for rule, name, _ in BREACHES])
def test_a_broken_rule_is_named(rule: str, name: str, case: Callable[[World], tuple[int, Entry]], view: int):
    world = World(view)
    author, entry = case(world)
    verdict = world.judge(author, entry)
    assert isinstance(verdict, Violation), f"{name}: {verdict}"
    assert verdict.rule == rule
    assert verdict.text


@pytest.mark.parametrize(("rule", "name", "case"), BREACHES, ids=[f"{rule}: {name}" for rule, name, _ in BREACHES])
def test_no_knowledge_of_other_logs_excuses_a_breach(rule: str, name: str, case: Callable[[World], tuple[int, Entry]]):
    """Second principle: what other replicas said, executed or forgot changes no violation into something good."""
    world = World(0)
    author, entry = case(world)
    if rule == "wrong-reference":
        return  # NEW-VIEW's rule alone reads the entries that it names
    for executed, stable in ((0, 0), (100, 0), (100, 100)):
        for other in world.states:
            if other.author != author:
                other.position += 5
                other.suspected = True
                other.vote(0, 1, b"x" * 32)
        # Where a list ends is known to all who can judge a vote above it: they executed what decided it.
        reading = Reading(world.genesis, world.states, executed, stable, world.ends)
        verdict = judge(world.states[author], entry, reading)
        assert isinstance(verdict, Violation)
        assert verdict.rule == rule


def test_every_rule_has_a_case():
    tree = ast.parse(inspect.getsource(rules))
    named = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.replace("-", "").isalpha()
        and node.value.islower()
        and "-" in node.value
    }
    assert named == {rule for rule, _, _ in BREACHES}
    assert len(named) > 15


def test_every_kind_of_entry_is_judged():
    kinds = {PrePrepare, Prepare, Commit, Checkpoint, Suspect, ViewChange, NewView, SlotResult, EpochMark, Skipped}
    assert rules._JUDGES.keys() == kinds


def test_results_order_nothing_and_wait_for_their_slots():
    w = World(0)
    entry = SlotResult(5, 2, D)
    assert isinstance(w.judge(w.backup, entry), Wait), "its slot is not executed here"
    w.executed = 5
    before = w.states[w.backup].copy()
    w.say(w.backup, entry, entry)
    after = w.states[w.backup]
    assert (after.position, after.results) == (before.position + 2, 2)
    before.position, before.results = after.position, after.results
    assert after == before
    w.executed = 8
    w.say(w.backup, *[entry] * 6, Checkpoint(4, D), *[SlotResult(8, 1, D)] * 8)
    assert after.results == 8


def test_marks_of_a_trusted_logs_epochs_order_nothing():
    """CLOSE and OPEN: read, counted as entries, and nothing else; where they may stand is judged with the heads."""
    for payload in (CLOSE_PAYLOAD, open_payload(7, bytes(32))):
        entry = decode_entry(payload, GENESIS, GENESIS.cluster_id())
        assert entry == EpochMark(payload)
        assert entry.encode() == payload
        state = initial_states(3)[1]
        before = state.copy()
        assert judge(state, entry, Reading(GENESIS, initial_states(3), 0, 0)) is None
        rules.apply_entry(state, entry)
        before.position += 1
        assert state == before
    for payload in (b"\x08", CLOSE_PAYLOAD + b"x", b"\x09" + bytes(56)):
        with pytest.raises(LayoutError):
            decode_entry(payload, GENESIS, GENESIS.cluster_id())
