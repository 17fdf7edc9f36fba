"""Every wait: what it is for, whom to ask, and that it ends when its cause was read; and a log that is good."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from replica.core.entries import Checkpoint, Entry, NewView, Reference, Suspect, ViewChange
from replica.core.logstate import Departure
from replica.core.rules import Wait
from tests.replica.core.rules_world import LATER, D, World

WAITS: list[tuple[str, Callable[[World], tuple[int, Entry, tuple[int, ...], Callable[[], object]]]]] = []


def wait(name: str):
    def register(case):
        WAITS.append((name, case))
        return case

    return register


@wait("PREPARE until it was proposed")
def _(w: World):
    slot = w.due
    w.say(w.backup, *(w.prepare(s) for s in range(w.base + 1, slot)))
    return w.backup, w.prepare(slot), (w.primary,), lambda: w.proposed(1)


@wait("PREPARE until its slot is stable here")
def _(w: World):
    slot = w.due
    w.say(w.backup, *(w.prepare(s) for s in range(w.base + 1, slot)))
    return w.backup, w.prepare(slot), (w.primary,), lambda: setattr(w, "stable", 8)


@wait("a cut until every position was read")
def _(w: World):
    w.proposed(3 if w.view == 0 else 1)
    ahead = w.states[w.backup].position + 1
    entry = w.proposal(w.base + 4, cut=tuple(ahead if log != w.primary else 0 for log in range(3)))
    others = tuple(log for log in range(3) if log != w.primary)

    def come() -> None:
        for log in others:
            w.states[log].position += 1

    return w.primary, entry, others, come


@wait("CHECKPOINT until its slot is executed here")
def _(w: World):
    others = tuple(log for log in range(3) if log != w.backup)
    return w.backup, Checkpoint(8, D), others, lambda: setattr(w, "executed", 8)


@wait("VIEW-CHANGE until q replicas want the view")
def _(w: World):
    w.say(w.backup, Suspect(w.view))
    others = tuple(log for log in range(3) if log != w.backup)
    return w.backup, ViewChange(w.view + 1), others, lambda: w.say(w.primary, Suspect(w.view))


@wait("VIEW-CHANGE that skips views")
def _(w: World):
    others = tuple(log for log in range(3) if log != w.backup)

    def come() -> None:
        for log in others:
            w.states[log].view = w.view + 5

    return w.backup, ViewChange(w.view + 5), others, come


@wait("PREPARE until NEW-VIEW")
def _(w: World):
    opening = w.states[w.primary].opened.pop(w.view)
    entry = w.prepare(w.base + 1)

    def come() -> None:
        w.states[w.primary].opened[w.view] = opening
        w.states[w.primary].vote(w.view, w.base + 1, D)

    return w.backup, entry, (w.primary,), come


@wait("COMMIT until NEW-VIEW")
def _(w: World):
    opening = w.states[w.primary].opened.pop(w.view)
    w.states[w.backup].last_vote = w.base + 1
    return (
        w.backup,
        w.commit(w.base + 1),
        (w.primary,),
        lambda: w.states[w.primary].opened.__setitem__(w.view, opening),
    )


@wait("NEW-VIEW until every entry that it names was read")
def _(w: World):
    del w.states[w.primary].opened[w.view]
    for state in w.states:
        state.view_change_at[w.view] = Departure(15, 4, 6)
        state.position = 15
    w.states[w.backup].position = 14
    entry = NewView(w.view, (Reference(w.primary, 15), Reference(w.backup, 15)))
    return w.primary, entry, (w.backup,), lambda: setattr(w.states[w.backup], "position", 15)


@pytest.mark.parametrize("view", [0, LATER])
@pytest.mark.parametrize(("name", "case"), WAITS, ids=[name for name, _ in WAITS])
def test_an_entry_waits_for_its_causes(name: str, case, view: int):
    world = World(view)
    author, entry, logs, come = case(world)
    verdict = world.judge(author, entry)
    assert isinstance(verdict, Wait), f"{name}: {verdict}"
    assert verdict.logs == logs
    assert verdict.why
    come()
    assert world.judge(author, entry) is None


@pytest.mark.parametrize("view", [0, LATER])
def test_a_good_log_from_the_first_vote_to_the_next_checkpoint(view: int):
    w = World(view)
    w.proposed(8 if view == 0 else 6).voted(8)
    w.say(w.primary, *(w.commit(slot) for slot in range(w.base + 1, w.base + 9)))
    w.say(w.backup, *(w.commit(slot) for slot in range(w.base + 1, w.base + 9)))
    w.executed = w.base + 8
    for author in (w.primary, w.backup):
        w.say(author, Checkpoint(w.base + 4, D), Checkpoint(w.base + 8, D))
    w.say(w.primary, w.proposal(w.base + 9))
    w.say(w.backup, w.prepare(w.base + 9), w.commit(w.base + 9), Suspect(view))
    assert w.states[w.backup].wants == view + 1
