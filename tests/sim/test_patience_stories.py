"""What patience is worth to a client, in virtual time: each bound is missed without its rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from replica.core.entries import PRE_PREPARE
from replica.core.genesis import Ordering
from replica.core.pen import Pen
from replica.core.requests import RequestQueue
from replica.sim.controls import patched
from replica.sim.host import TICK_MS
from replica.sim.planted import Patch
from replica.sim.stage import CLIENT_PATIENCE_MS, PATIENCE_MS, Rewrite, Stage, Story

A, B = 0, 1
# Messages and appends of a view change and of one request, with room.
WORK_MS = 60
ORDERINGS = (Ordering.THREE_PHASE, Ordering.TWO_PHASE)


def breaks_a_rule(stage: Stage) -> None:
    """Let the primary say what is no entry, instead of proposing what a client waits for."""
    stage.ask(A, 10, 200)
    nonsense = Rewrite(lambda payload: b"?" if payload[0] == PRE_PREPARE else payload)
    stage.at(190, "replica 0, the primary, will propose nonsense", lambda: stage.trick(0, nonsense))


def only_by_relay(stage: Stage) -> None:
    """Let the primary stop, and let nothing of client A reach the next one: only replica 2 can hand its request on."""
    stage.ask(A, 10, 200)
    stage.ask(B, 10, 200)
    client = stage.clients[A].number
    stage.at(150, "replica 0, the primary, stops for ever", lambda: stage.stop(0))
    stage.at(150, "nothing of client A reaches replica 1", lambda: stage.cut((client, 1)))


def exposed_is_not_suspected() -> list[Patch]:
    """Wait for the end of patience even with a primary that can do nothing more."""
    right = Pen._owed_suspicion

    def owed(pen: Pen):
        blind, pen._known.blind = pen._known.blind, set()
        try:
            return right(pen)
        finally:
            pen._known.blind = blind

    return [(Pen, "_owed_suspicion", owed)]


def relays_go_on_as_before() -> list[Patch]:
    """Do not begin anew to hand requests to the primary when a view is entered."""
    right = RequestQueue.begin_view

    def begin(queue: RequestQueue, carried):
        plans = {waiting.digest: (waiting.relay_at_ms, waiting.relay_pause_ms) for waiting in queue}
        right(queue, carried)
        for waiting in queue:
            waiting.relay_at_ms, waiting.relay_pause_ms = plans[waiting.digest]

    return [(RequestQueue, "begin_view", begin)]


def staged(script: Callable[[Stage], None], ordering: Ordering, broken: list[Patch]) -> Stage:
    with patched(*broken):
        stage = Stage(Story("patience", "", script, (0,)), ordering)
        assert stage.play().violations == ()
    return stage


def suspected_after(stage: Stage) -> int:
    """Return how long after 200 ms the first correct replica was in the next view."""
    return min(views[1] for number, views in stage.facts.entered.items() if number in stage.correct) - 200


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_an_exposed_primary_costs_no_patience(ordering):
    stage = staged(breaks_a_rule, ordering, [])
    assert {log for _, log in stage.facts.exposed} == {0}
    assert suspected_after(stage) <= WORK_MS
    assert suspected_after(stage) < PATIENCE_MS
    # The client asks the backups when its own patience ends, and view 1 is open by then.
    assert stage.facts.asked["A2"].answered_ms <= 200 + CLIENT_PATIENCE_MS + TICK_MS + WORK_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_otherwise_it_would_cost_one(ordering):
    assert suspected_after(staged(breaks_a_rule, ordering, exposed_is_not_suspected())) >= PATIENCE_MS


def answered_after_change(stage: Stage) -> int:
    return stage.facts.asked["A2"].answered_ms - max(views[1] for views in stage.facts.entered.values())


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_new_primary_is_handed_what_waits_with_the_next_tick(ordering):
    stage = staged(only_by_relay, ordering, [])
    assert ("A2", 1) in stage.facts.relayed
    assert answered_after_change(stage) <= TICK_MS + WORK_MS
    assert stage.facts.asked["A2"].answered_ms - 200 <= CLIENT_PATIENCE_MS + PATIENCE_MS + 2 * TICK_MS + WORK_MS


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_otherwise_it_would_be_handed_that_some_time_later(ordering):
    assert answered_after_change(staged(only_by_relay, ordering, relays_go_on_as_before())) > 2 * (TICK_MS + WORK_MS)
