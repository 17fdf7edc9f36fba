"""Scripted runs about coming back: what must come of each, in both orderings, and that each goes wrong without its rule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest

from replica.core.entries import COMMIT, PREPARE
from replica.core.genesis import Ordering
from replica.core.heads import HeadsComparer
from replica.sim import planted_recovery as planted
from replica.sim import stories_recovery as stories
from replica.sim.control import patched
from replica.sim.faulty import FaultyReplica
from replica.sim.lies import view_and_slot
from replica.sim.run import Outcome
from replica.sim.stage import Stage

STORIES = {story.name: story for story in stories.STORIES}
ORDERINGS = (Ordering.THREE_PHASE, Ordering.TWO_PHASE)


@cache
def play(name: str, ordering: Ordering) -> tuple[Stage, Outcome]:
    stage = Stage(STORIES[name], ordering)
    return stage, stage.play()


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("name", STORIES)
def test_every_request_is_answered_and_nothing_is_wrong(name, ordering):
    stage, outcome = play(name, ordering)
    assert outcome.violations == ()
    assert stage.facts.errors == []
    assert all(asked.answered_ms is not None for asked in stage.facts.asked.values())


BROKEN = [
    ("checkpoint_ahead", planted.checkpoint_does_not_wait, "liveness"),
    ("open_cut", planted.open_cut_accepted, "accuracy"),
    ("votes_in_flight", planted.votes_above_dropped, "accuracy"),
    ("votes_in_flight", planted.digest_without_votes, "accuracy"),
    ("votes_in_flight", planted.batches_not_transferred, "exception"),
    ("voter_crashes", planted.causes_not_durable, "liveness"),
]


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize(("name", "broken", "kind"), BROKEN)
def test_the_story_goes_wrong_without_its_rule(name, broken, kind, ordering):
    with patched(*broken()):
        found = Stage(STORIES[name], ordering).play().violations
    assert kind in {violation.kind for violation in found}


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_cut_with_a_vote_but_not_its_proposal_moves_nothing(ordering):
    _, outcome = play("open_cut", ordering)
    assert outcome.counts["cuts-open"]
    # What replica 2 voted for in view 0 is carried into view 2 by everybody, replica 4 included.
    stage, _ = play("open_cut", ordering)
    assert set(stage.facts.carried[2]) >= {5, 6, 7, 8}
    assert all(stage.facts.carried[2][slot] for slot in (5, 6, 7, 8))


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_primary_that_never_moves_the_cut_is_replaced(ordering):
    stage, outcome = play("cut_never_moves", ordering)
    assert all(1 in stage.facts.entered[i] for i in stage.correct)
    assert all(1 in stage.facts.opened[i] for i in stage.correct), "the next primary is given its time"
    assert outcome.counts["cuts-moved"]
    with patched(*planted.lag_never_suspected()):
        stage = Stage(STORIES["cut_never_moves"], ordering)
        outcome = stage.play()
    assert not any(stage.facts.entered.values())
    assert not outcome.counts["cuts-moved"]


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_replica_away_across_checkpoints_and_views_catches_up_and_votes(ordering):
    stage, outcome = play("away_for_long", ordering)
    assert outcome.counts["transfers"]
    late = stage.replicas[6]
    began = late.kept.cut(late.genesis)[6]
    votes = [p for group in late.library.held[6] for p in group.payloads if p[0] == PREPARE]
    assert began < late.library.last(6)
    # Without its votes nothing could have been decided once replica 5 had stopped.
    assert max(view_and_slot(vote)[1] for vote in votes) >= late.core.executed - 1
    assert late.core.view >= 2


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_faulty_replica_that_fell_behind_installs_a_state_and_is_an_adversary_again(ordering):
    stage, outcome = play("left_behind", ordering)
    assert outcome.counts["transfers-to-faulty"]
    said = stage.faulty(1).library.held[1][-1]
    votes = [view_and_slot(payload)[1] for payload in said.payloads if payload[0] in {PREPARE, COMMIT}]
    assert stage.hosts[1].core.executed >= stage.hosts[0].core.executed - 1
    assert votes
    assert max(votes) >= stage.hosts[0].core.executed - 1
    with patched((FaultyReplica, "_begin_anew", lambda _: None)):
        stage = Stage(STORIES["left_behind"], ordering)
        stage.play()
    assert stage.hosts[1].core.executed < stage.hosts[0].core.executed - 20


def who_noticed(ordering: Ordering) -> list[int]:
    """Return who noticed, at last, that log 1 has two histories."""
    stage = Stage(stories.TWO_HISTORIES, ordering)
    stage.play()
    stage.world.run(stage.world.now + 5000)
    exposed = {number: replica.core.exposed for number, replica in stage.replicas.items()}
    assert all(set(logs) <= {1} for logs in exposed.values())
    return [number for number, logs in exposed.items() if 1 in logs and logs[1].rule == "forked"]


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_two_histories_are_noticed_by_those_who_were_shown_one_each(ordering):
    assert who_noticed(ordering) == [0, 2]
    with patched((HeadsComparer, "compare", lambda *_: [])):
        assert who_noticed(ordering) == []


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_it_does_not_matter_at_which_millisecond_all_lose_power(ordering):
    for at_ms in range(298, 322, 2):
        story = replace(STORIES["power_cut"], script=partial(stories.power_cut, at_ms=at_ms))
        stage = Stage(story, ordering)
        assert stage.play().violations == ()
        assert all(asked.answered_ms is not None for asked in stage.facts.asked.values())
