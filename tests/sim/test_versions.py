"""Runs in which versions of the application are put in force one after the other, under attack."""

import itertools

import pytest

from replica.sim.run import run_seed
from replica.sim.scenario import VERSIONS_FROM, draw

SEEDS = range(VERSIONS_FROM, VERSIONS_FROM + 24)


@pytest.mark.parametrize("part", range(4))
def test_every_slot_is_executed_by_the_version_in_force(part):
    for seed in SEEDS[part::4]:
        outcome = run_seed(seed)
        assert not outcome.violations, f"trustlog-replica sim --seed {seed}: {outcome.violations}"
        assert outcome.counts["version-activated"] == len(draw(seed).releases) > 0


def test_versions_are_left_out_in_some_runs_and_there_are_none_below():
    gaps = {b.version - a.version for seed in SEEDS for a, b in itertools.pairwise(draw(seed).releases)}
    assert {1, 2, 7} <= gaps
    assert not any(draw(seed).releases for seed in (*range(200), 1_000_000, 2_000_000))
