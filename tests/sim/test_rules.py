"""Every rule of a log has its lie; switched off it does the harm that its control shows, or none, for a stated reason."""

from __future__ import annotations

import ast
import inspect

import pytest

from replica.core import rules
from replica.sim.controls import CONTROLS, patched
from replica.sim.rulebreakers import AT_CHANGES, BY_PROPOSERS, LIES
from replica.sim.rulecontrols import (
    CONTROLLED_ELSEWHERE,
    GUARDED_OTHERWISE,
    HARM_IS_RARE,
    NOT_TOLD,
    RULE_CONTROLS,
    without_rule,
)
from replica.sim.run import run_seed
from replica.sim.scenario import FOCUS_EVERY, draw

# What keeps a reduced state as documented notices this one; nothing else does.
NOTICED_BY_INVARIANT = {"commit-without-vote"}


def named_rules() -> set[str]:
    tree = ast.parse(inspect.getsource(rules))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    calls = [
        node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Violation"
    ]
    named = {node.value for node in calls if isinstance(node, ast.Constant)}
    # Two rules share a statement: their names are chosen before.
    chosen = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "rule"
    ]
    named |= {part.value for choice in chosen for part in (choice.body, choice.orelse)}
    assert named <= words
    return named


def test_every_rule_has_its_lie():
    assert set(LIES) == named_rules() - set(NOT_TOLD)
    assert set(NOT_TOLD) <= named_rules()
    assert set(AT_CHANGES) | set(BY_PROPOSERS) <= set(LIES)


def test_every_rule_has_a_control_or_a_reason_to_have_none():
    controlled = [control.name for control in RULE_CONTROLS]
    assert sorted([*controlled, *GUARDED_OTHERWISE, *HARM_IS_RARE, *CONTROLLED_ELSEWHERE]) == sorted(LIES)
    assert set(CONTROLLED_ELSEWHERE.values()) <= {control.name for control in CONTROLS}


def test_every_lie_has_its_turn_in_two_hundred_seeds():
    told = {strategy for seed in range(200) for strategies in draw(seed).strategies for strategy in strategies}
    assert {f"rule-breaker:{rule}" for rule in LIES} <= told


def turn_of(rule: str) -> int:
    """Return the seed that is about this rule."""
    return FOCUS_EVERY * (2 * list(LIES).index(rule) + 1)


@pytest.mark.parametrize("rule", LIES)
def test_a_lie_breaks_its_rule_and_exposes_its_author_for_that(rule):
    counts = run_seed(turn_of(rule)).counts
    assert counts[f"attack-rule-breaker-{rule}"]
    assert {name for name in counts if name.startswith("exposed-")} == {f"exposed-{rule}"}


@pytest.mark.parametrize("rule", GUARDED_OTHERWISE)
def test_without_a_rule_that_only_gives_evidence_nobody_is_harmed(rule):
    with patched(*without_rule(rule)):
        outcome = run_seed(turn_of(rule), overrides={"liveness_ms": 60_000})
    assert outcome.counts[f"attack-rule-breaker-{rule}"]
    assert not outcome.counts[f"exposed-{rule}"]
    if rule in NOTICED_BY_INVARIANT:
        assert all(v.kind == "bounds" and "invariant 1" in v.text for v in outcome.violations)
    else:
        assert not outcome.violations


def test_without_one_rule_the_others_hold():
    seed = turn_of("proposed-twice")
    with patched(*without_rule("slot-skipped")):
        assert run_seed(seed).counts["exposed-proposed-twice"]
    # Two rules share a statement.
    with patched(*without_rule("voted-twice")):
        assert not run_seed(turn_of("voted-twice"), overrides={"liveness_ms": 100}).counts["exposed-voted-twice"]
