"""What RELATED.md says of this design, where no other test says it; and that the tests that it names are there."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from replica.core.genesis import Ordering
from replica.lab.scenario import LONG_INTERVALS, Scenario
from replica.lab.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "replica" / "lab" / "RELATED.md"


def busy(system_of: str) -> Scenario:
    """Twelve requests that come together, one to a batch."""
    scenario = SCENARIOS[system_of]
    assert isinstance(scenario, Scenario)
    return replace(
        scenario,
        script=lambda stage: [stage.ask(client, 10, *([210] * 6)) for client in (0, 1)],
        limits=replace(LONG_INTERVALS, batch_envelopes_max=1),
        faulty=(),
        also=(),
    )


@pytest.mark.parametrize("name", ["equivocation-three-phase", "equivocation-two-phase"])
def test_many_slots_are_ordered_at_once_under_one_attestation(name: str) -> None:
    scenario = busy(name)
    trace = scenario.run()
    assert not trace.of("violation")
    kinds = [[entry["kind"] for entry in line["entries"]] for line in trace.of("append") if line["who"] == "r0"]
    assert max(group.count("PRE-PREPARE") for group in kinds) >= 2
    proposed = {
        entry["slot"]: line["step"]
        for line in trace.of("append")
        for entry in line["entries"]
        if entry["kind"] == "PRE-PREPARE"
    }
    executed = {line["slot"]: line["step"] for line in trace.of("execute") if line["who"] == "r0"}
    in_flight = [sum(proposed[s] < proposed[slot] < executed[s] for s in executed) for slot in executed]
    assert max(in_flight) >= 3
    if scenario.system.ordering is Ordering.THREE_PHASE:
        assert any({"PREPARE", "COMMIT"} <= {e["kind"] for e in line["entries"]} for line in trace.of("append"))


def test_the_tests_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text()))
    assert len(named) >= 12
    missing = []
    for path, name in sorted(named):
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if name not in functions:
            missing.append(f"{path}::{name}")
    assert missing == []


def test_the_scenarios_that_the_pages_name_are_there() -> None:
    for page in (PAGE, PAGE.with_name("README.md")):
        named = set(re.findall(r"scenarios? `([\w-]+)`|lab run ([\w-]+)", page.read_text()))
        assert {first or second for first, second in named} <= {*SCENARIOS, "NAME"}
