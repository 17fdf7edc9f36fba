"""Every rule of a log switched off, one at a time: what it keeps from happening.

A rule is switched off for readers by taking the statement out that answers with its Violation; what the judge asks
after that it still asks. The faulty replica of each run tells the lie of `replica.sim.rulebreakers` that breaks this
rule and no other, so nothing else stops it.

RULE_CONTROLS are the rules whose absence does harm. GUARDED_OTHERWISE are the others, each with the reason why its
absence harms nobody: they are evidence against an author, and end its influence sooner. Every rule is in one of these,
or has its control in `replica.sim.controls`.
"""
# ruff: noqa: ANN401

import ast
import inspect
from functools import partial
from typing import Any

from replica.core import carry, machine, rules
from replica.core.genesis import Ordering
from replica.core.logstate import Departure
from replica.sim.control import Control, one_faulty
from replica.sim.planted import Patch
from replica.sim.scenario import PLENTY


class _Without(ast.NodeTransformer):
    """Has a rule never answered with."""

    def __init__(self, rule: str) -> None:
        self._rule = rule

    def visit_Return(self, node: ast.Return) -> ast.AST:
        """Return `if name != rule: return Violation(name, ...)` for `return Violation(name, ...)`."""
        value = node.value
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Violation"):
            return node
        other = ast.Compare(value.args[0], [ast.NotEq()], [ast.Constant(self._rule)])
        return ast.If(other, [node], [])


def without_rule(rule: str) -> list[Patch]:
    """Return the patch with which no reader applies a rule."""
    tree = ast.parse(inspect.getsource(rules))
    judging: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AnnAssign)]
    changed = ast.fix_missing_locations(_Without(rule).visit(ast.Module(judging, [])))
    names: dict[str, Any] = dict(vars(rules))
    exec(compile(changed, f"rules without {rule}", "exec"), names)  # noqa: S102 - our own source
    return [(machine, "judge", names["judge"])]


def any_entry_may_be_named() -> list[Patch]:
    """Let NEW-VIEW name any entry; what is carried is taken from a log as far as its reader happens to be."""
    right = carry.carry

    def lax(entry: Any, states: Any, stable: int) -> Any:
        known = []
        for state in states:
            copied = state.copy()
            here = Departure(state.position, state.last_checkpoint, state.top)
            copied.view_change_at.setdefault(entry.view, here)
            known.append(copied)
        return right(entry, known, stable)

    return [*without_rule("wrong-reference"), (machine, "carry", lax)]


def _one_faulty(number: int, *strategies: str) -> dict[str, Any]:
    return one_faulty(number, *strategies) | {"liveness_ms": 60_000, "retained": PLENTY}


def _at_changes(rule: str, ordering: Ordering, number: int = 1) -> dict[str, Any]:
    """Script the scenario: three replicas, of which one has views changed and breaks the rule there."""
    return _one_faulty(number, "impatient:20", f"rule-breaker:{rule}") | {"ordering": ordering}


_TWO, _THREE = Ordering.TWO_PHASE, Ordering.THREE_PHASE

RULE_CONTROLS: tuple[Control, ...] = (
    Control(
        "opened-twice",
        "a view may be opened again",
        ("agreement",),
        partial(without_rule, "opened-twice"),
        28,
        _at_changes("opened-twice", _TWO),
    ),
    Control(
        "not-primary",
        "anybody may open a view",
        ("accuracy",),
        partial(without_rule, "not-primary"),
        23,
        _at_changes("not-primary", _TWO),
    ),
    Control(
        "primary-prepared",
        "a primary may vote by PREPARE",
        ("agreement",),
        partial(without_rule, "primary-prepared"),
        33,
        _at_changes("primary-prepared", _THREE),
    ),
    Control(
        "view-backwards",
        "a replica may return to a view that it has left",
        ("bounds",),
        partial(without_rule, "view-backwards"),
        0,
        _at_changes("view-backwards", _TWO, number=2),
    ),
    Control(
        "wrong-reference",
        "NEW-VIEW may name any entry",
        ("agreement",),
        any_entry_may_be_named,
        20,
        _at_changes("wrong-reference", _TWO),
    ),
    Control(
        "beyond-window",
        "proposals may be ahead of everything",
        ("bounds",),
        partial(without_rule, "beyond-window"),
        1,
        _one_faulty(0, "rule-breaker:beyond-window"),
    ),
)

# rule -> why nobody is harmed without it.
GUARDED_OTHERWISE: dict[str, str] = {
    "slot-skipped": "votes are counted slot by slot, and correct replicas vote for nothing beyond a missing slot: "
    "a gap in a primary's log costs it the view, one in a backup's only its own vote",
    "committed-twice": "a replica is one bit among a slot's commits, however often it says them",
    "commit-without-vote": "a commit counts only where its author's vote for the same batch is counted",
    "suspected-twice": "a replica wants one view, however often it says so",
    "checkpoint-misplaced": "no correct replica says one there, so it is never stable, and soon forgotten; "
    "it waits for its slot to be executed, so it costs a little memory at most",
    "checkpoint-backwards": "only the last one of a log counts, for its base and its window, which going back narrows",
    "cut-ahead": "a cut moves nothing to a position at which no group that was read ends",
    "reference-ahead": "without it the NEW-VIEW waits for ever for its own author; the view is never open, and is left "
    "when patience ends",
}
# rule -> what its absence did in the simulator without transfers; no seed below 100 shows it since, with three
# replicas, storms of views and either ordering. Only the unit tests of the rules hold these.
HARM_IS_RARE: dict[str, str] = {
    "view-not-open": "seed 22: correct replicas executed different batches",
    "voted-twice": "seed 88: correct replicas executed different batches",
}
# rule -> what holds it instead. Nobody asks for receipts in the simulator, and another lie that takes its turn would
# make other runs of the seeds that were recorded.
NOT_TOLD: dict[str, str] = {
    "beyond-list": "tests/replica/core/test_lists.py, and the control no-barrier: only where members change",
    "result-beyond-window": "tests/replica/core: such a RESULT would wait for ever, and stop its author's log alone",
    "too-many-results": "tests/replica/core: a flood of RESULTs would grow every replica's disk",
}
# rule -> the control that breaks it, in `replica.sim.controls`.
CONTROLLED_ELSEWHERE = {"wrong-view": "votes-after-change", "proposed-twice": "second-proposal"}
