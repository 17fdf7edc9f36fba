"""Each planted bug is found with its recorded seed, and the seed is clean without it."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from replica.core.envelope import Status
from replica.sim import controls, run
from replica.sim.clients import CorrectClient
from replica.sim.control import SEARCH_SEEDS, Control, one_faulty, patched
from replica.sim.controls import CLONED, EQUIVOCATING, SCRIPTED
from replica.sim.rulecontrols import RULE_CONTROLS
from replica.sim.run import Outcome
from replica.sim.witness import Violation

CONTROLS = (*controls.CONTROLS, *RULE_CONTROLS)
BY_NAME = {control.name: control for control in (*CONTROLS, CLONED, EQUIVOCATING)}
# What `replica.sim.witness` can say.
KINDS = {
    "agreement",
    "state",
    "exactly-once",
    "durability",
    "linearizability",
    "log-conflict",
    "forked",
    "accuracy",
    "bounds",
    "halted",
    "rollback",
    "exception",
    "reply",
    "liveness",
    "slow",
}


@cache
def found_by(name: str) -> Outcome:
    return BY_NAME[name].run()


def test_there_are_enough_controls_with_different_names():
    assert len({control.name for control in CONTROLS}) == len(CONTROLS) >= 15
    assert len({control.patches for control in CONTROLS}) == len(CONTROLS)


def test_what_is_scripted_is_said():
    assert {control.name for control in controls.CONTROLS if control.overrides} == set(SCRIPTED)
    # Those of the rules are all about a replica that breaks the rule.
    assert all(f"rule-breaker:{control.name}" in control.overrides["strategies"][0] for control in RULE_CONTROLS)


def test_each_is_found_within_the_stated_number_of_seeds():
    assert all(0 <= control.seed < SEARCH_SEEDS for control in BY_NAME.values())


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_planted_bug_is_found_and_without_it_the_seed_is_clean(control):
    found = found_by(control.name)
    assert control.is_found(found), f"{control.breaks}: seed {control.seed} found {found.violations}; see search()"
    clean = control.run_without()
    assert not clean.violations, clean.violations


def test_whole_runs_show_every_kind_of_violation():
    shown = {violation.kind for name in BY_NAME for violation in found_by(name).violations}
    # A carried vote for a batch that nobody knows is the end of a core.
    unknown = replace(BY_NAME["carry-unproposed"], overrides=one_faulty(2, "lying-vote"))
    shown |= {violation.kind for violation in unknown.run(2).violations}
    # A history without any order is shown to the checker itself: tests/sim/test_histories.py. So is a false answer.
    assert shown | {"linearizability", "reply"} == KINDS


@pytest.mark.parametrize("status", [None, Status.EXPIRED, Status.OK])
def test_an_answer_that_nobody_waits_for_or_that_is_none_is_a_violation(status):
    """status: of the one answer that is waited for; None: nobody waits."""
    said: list[str] = []
    witness = SimpleNamespace(
        violation=lambda kind, text: said.append(f"{kind}: {text}"), acknowledged=lambda *_: said.append("acknowledged")
    )
    setting = SimpleNamespace(witness=witness, audience=SimpleNamespace(answered=lambda *_: None))
    asked = SimpleNamespace(raw=b"o", returned=None, value=None)
    client: Any = SimpleNamespace(unanswered={} if status is None else {1: asked}, obliged={}, setting=setting)
    client.number, client.completed, client.key = 7, 0, SimpleNamespace(public=b"")
    client.world = SimpleNamespace(now=5, note=lambda _: None)
    CorrectClient._answered(client, 1, status or Status.OK, 3, b"v")
    expected = {
        None: "reply: client 7 got a second answer to one operation",
        Status.EXPIRED: "reply: client 7 was answered EXPIRED to b'o'",
        Status.OK: "acknowledged",
    }
    assert said == [expected[status]]


def test_what_hides_other_harm_must_be_named():
    control = BY_NAME["votes-after-change"]
    found = found_by(control.name)
    assert control.is_found(found)
    assert not replace(control, kinds=(*control.kinds, "forked")).is_found(found)
    crashed = replace(found, violations=(*found.violations, Violation("exception", "", 0)))
    assert not control.is_found(crashed)


def test_one_wish_that_moves_the_view_costs_liveness_too(monkeypatch):
    control = BY_NAME["change-without-quorum"]
    monkeypatch.setattr(run, "bounds", lambda _: {})
    assert {violation.kind for violation in control.run(18).violations} == {"liveness"}
    assert not control.run_without(18).violations


def test_search_finds_a_seed_again():
    control = BY_NAME["votes-after-change"]
    assert control.search(control.seed, 1) == control.seed
    harmless = Control("nothing", "nothing", control.kinds, list, 1)
    assert harmless.search(1, 1) is None


def test_cloned_trusted_log_is_noticed_and_named():
    outcome = found_by(CLONED.name)
    forked = [v for v in outcome.violations if v.kind == "forked"]
    assert forked
    assert all("log 1 is forked" in v.text for v in forked)
    assert any(v.kind == "log-conflict" and "log 1" in v.text for v in outcome.violations)
    # Nobody else was blamed.
    assert not any(v.kind == "accuracy" for v in outcome.violations)


def test_a_primary_with_a_cloned_log_divides_correct_replicas_and_is_named():
    outcome = found_by(EQUIVOCATING.name)
    assert any(v.kind == "agreement" for v in outcome.violations)
    assert any(v.kind == "forked" and "log 0 is forked" in v.text for v in outcome.violations)


@pytest.mark.parametrize("control", [CLONED, EQUIVOCATING], ids=lambda control: control.name)
def test_without_a_second_copy_nothing_is_wrong(control):
    assert not control.run_without().violations


def test_patches_are_taken_back():
    for control in CONTROLS:
        patches = control.patches()
        before = [getattr(owner, name) for owner, name, _ in patches]
        with patched(*patches):
            assert [getattr(owner, name) for owner, name, _ in patches] != before
        assert [getattr(owner, name) for owner, name, _ in patches] == before
