"""Primaries that are only slow, in whole runs: each is replaced, and correct ones stay, however slow the network is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from replica.core import requests
from replica.core.genesis import Ordering
from replica.sim.bounds import SLOW_PATIENCES_MAX
from replica.sim.clients import Habits
from replica.sim.control import patched
from replica.sim.planted import slowness_never_suspected
from replica.sim.run import Outcome, run_seed
from replica.sim.scenario import LIMITS
from replica.sim.world import Weather

QUICK = Weather(1, 4)
CALM: dict[str, Any] = {
    "faulty": (),
    "strategies": (),
    "faulty_clients": 0,
    "crashes": 0,
    "damages": (),
    "power_cuts": 0,
    "partitions": 0,
    "stalls": 0,
    "disconnects": 0,
    "rolled_back": None,
    "real_signatures": False,
    "limits": LIMITS,
    "append_ms_max": 2,
    "clients": 3,
    "habits": Habits(concurrency=2, think_ms=120),
    "weather": QUICK,
    "healed": QUICK,
    "storm_ms": 0,
    "goes_on_ms": 20_000,
}


def run(f: int, **chosen: Any) -> Outcome:
    return run_seed(1, overrides={**CALM, "f": f, **chosen})


def views(outcome: Outcome, replicas: int) -> float:
    """Return how many views a correct replica entered, on average."""
    return outcome.counts["views-entered"] / replicas


@pytest.mark.parametrize(
    ("strategy", "f"),
    [
        ("slow-primary", 1),
        ("slow-primary", 2),
        ("slow-primary:70", 1),
        ("dripping-primary", 1),
        ("dripping-primary", 2),
        ("dripping-primary:70", 1),
    ],
)
def test_slow_primaries_in_a_row_are_replaced_each_within_the_bound(strategy, f):
    outcome = run(f, faulty=tuple(range(f)), strategies=((strategy,),) * f, patience_ms=600, goes_on_ms=15_000 * f)
    assert not outcome.violations
    assert 0 < outcome.counts["slow-patiences-max"] <= SLOW_PATIENCES_MAX
    # The first correct primary comes after f slow ones, and stays.
    assert views(outcome, f + 1) == f


def test_nobody_who_does_not_look_replaces_it():
    with patched(*slowness_never_suspected()):
        outcome = run(1, faulty=(0,), strategies=(("slow-primary",),), patience_ms=600)
    assert {violation.kind for violation in outcome.violations} == {"slow"}
    assert views(outcome, 2) == 0


@pytest.mark.parametrize("ordering", [Ordering.TWO_PHASE, Ordering.THREE_PHASE])
@pytest.mark.parametrize(
    ("weather", "patience_ms"),
    [(QUICK, 300), (Weather(20, 60), 600), (Weather(1, 200), 1000), (Weather(100, 300), 1500)],
    ids=["quick", "slow", "spread", "slower"],
)
def test_correct_primaries_stay(weather, patience_ms, ordering):
    outcome = run(1, weather=weather, healed=weather, patience_ms=patience_ms, ordering=ordering)
    assert not outcome.violations
    assert views(outcome, 3) == 0


def test_correct_primaries_with_more_to_do_than_they_can_stay():
    limits = replace(LIMITS, batch_envelopes_max=1)
    busy = Habits(concurrency=4, think_ms=20, patience_ms=100)
    outcome = run(1, limits=limits, habits=busy, patience_ms=300, goes_on_ms=8000)
    assert not outcome.violations
    assert views(outcome, 3) == 0


@pytest.mark.parametrize("seed", [3, 12, 28])
def test_little_under_way_at_a_time_keeps_nobody_waiting_for_ever(seed, monkeypatch):
    """The bounds on what is proposed are never reached by the simulator's small requests; here they always are."""
    monkeypatch.setattr(requests, "UNDER_WAY_MAX", 2)
    monkeypatch.setattr(requests, "BATCH_OPERATIONS_MAX", 1)
    assert not run_seed(seed).violations
