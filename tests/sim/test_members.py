"""Runs in which the members change: replaced, lost and replaced, two more, two less, up to three times."""

import pytest

from replica.sim.run import run_seed
from replica.sim.scenario import MEMBERS_FROM, draw

SEEDS = range(MEMBERS_FROM, MEMBERS_FROM + 60)


def sizes(scenario):
    """Yield each change of the members, and how many there are after it."""
    n = scenario.n
    for change in scenario.changes:
        n += {"add": 2, "remove": -2}.get(change.kind, 0)
        yield change, n


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.long) for part in (2, 3, 4, 5))])
def test_members_change_and_nothing_else_does(part):
    for seed in SEEDS[part::6]:
        outcome = run_seed(seed)
        assert not outcome.violations, f"trustlog-replica sim --seed {seed}: {outcome.violations}"
        done = sum(outcome.counts[f"change-{kind}"] for kind in ("replace", "add", "remove"))
        assert done == len(draw(seed).changes) > 0
        assert outcome.counts["went-over"] > 0
        for change, n in sizes(draw(seed)):
            assert outcome.counts[f"{change.kind}-to-n{n}"] > 0


@pytest.mark.parametrize("seed", [1_002_200, 1_002_283])
def test_who_is_late_is_told_that_a_log_is_gone(seed):
    """Once others had gone over, they took questions about a replaced log for such about the one with its number now."""
    outcome = run_seed(seed)
    assert not outcome.violations


def test_every_kind_of_change_is_drawn():
    changes = [change for seed in SEEDS for change in draw(seed).changes]
    assert {change.kind for change in changes} == {"replace", "add", "remove"}
    assert {change.lost for change in changes if change.kind == "replace"} == {True, False}
    assert {change.off for change in changes} == {True, False}
    assert any("forged-list" in chosen for seed in SEEDS for chosen in draw(seed).strategies)


def test_seven_are_reached_by_two_more_from_five_and_from_three():
    grown = [(draw(seed).n, [n for change, n in sizes(draw(seed)) if change.kind == "add"]) for seed in SEEDS]
    assert (5, [7]) in grown
    assert (3, [5, 7]) in grown


def test_seven_go_back_to_five():
    """In a run that begins with three: twice two more, then two less."""
    seed = 1_000_113
    assert [(change.kind, n) for change, n in sizes(draw(seed))] == [("add", 5), ("add", 7), ("remove", 5)]
    outcome = run_seed(seed)
    assert not outcome.violations
    assert [outcome.counts[name] for name in ("add-to-n5", "add-to-n7", "remove-to-n5")] == [1, 1, 1]


def test_other_seeds_are_about_other_things():
    assert not any(draw(seed).changes for seed in range(200))
