"""Every scenario of the lab comes as expected, is decided by the step that it names, and can come otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replica.core.homecoming import Homecoming
from replica.core.machine import ReplicaCore
from replica.lab import systems
from replica.lab.pbft_scenarios import PbftScenario
from replica.lab.scenario import Scenario
from replica.lab.scenarios import SCENARIOS
from replica.lab.systems import CLONED, OUTCOME, OUTCOME_3F1, SYSTEMS, THREE_PHASE, UNORDERED
from replica.lab.trace import FORMAT, read_json_lines, transcript
from replica.sim import planted
from replica.sim.control import patched
from replica.sim.run import run_seed

SEEDS = (0, 1, 2, 3, 4)
# Which step decides each: its type, and a word of what it says.
DECIDED_BY = {
    "pbft-equivocation": ("meter", "B2"),
    "pbft-2f1": ("violation", "agreement"),
    "outcome-only": ("violation", "agreement"),
    "outcome-only-3f1": ("meter", "B2"),
    "outcome-only-beyond-f": ("note", "its log attests another outcome"),
    "unordered": ("violation", "agreement"),
    "equivocation-three-phase": ("note", "proposed-twice"),
    "equivocation-two-phase": ("note", "proposed-twice"),
    "hidden-vote-three-phase": ("note", "reads nothing beyond the gap"),
    "hidden-vote-two-phase": ("note", "reads nothing beyond the gap"),
    "cloned-log": ("violation", "agreement"),
    "rollback-software": ("note", "rolled back"),
    "rollback-tpm": ("note", "its own log"),
    "rollback-hidden": ("violation", "agreement"),
    "log-ahead": ("note", "asks replica 1 for log 0"),
    "withheld-replies": ("execute", "A2"),
    "ignored-client": ("view", "v1 is open"),
    "one-replica-told": ("view", "v1 is open"),
    "quorums-logs": ("view", "it carries"),
    "quorums-pbft": ("view", "it carries"),
}
UNSAFE = {"pbft-2f1", "outcome-only", "outcome-only-beyond-f", "unordered", "cloned-log", "rollback-hidden"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_it_comes_as_expected(name: str, seed: int) -> None:
    verdict = SCENARIOS[name].run(seed).verdict
    assert verdict["as_expected"], verdict
    assert verdict["safe"] == (name not in UNSAFE)
    assert verdict["live"] or name in UNSAFE


@pytest.mark.parametrize("name", sorted(UNSAFE))
def test_what_follows_from_two_outcomes_is_not_told_as_more_that_went_wrong(name: str) -> None:
    kinds = [line["kind"] for line in SCENARIOS[name].run().of("violation")]
    assert "agreement" in kinds
    assert not {"state", "exactly-once", "durability", "linearizability"} & set(kinds)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reply_without_a_result_claims_no_outcome(seed: int) -> None:
    notes = SCENARIOS["outcome-only-3f1"].run(seed).of("note")
    assert not [line["text"] for line in notes if line["text"].endswith("for s0")]


def test_only_attempt_2_reads_out_of_order() -> None:
    assert [system.name for system in SYSTEMS.values() if not system.in_order] == ["unordered"]
    assert SYSTEMS["unordered"].patches()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_step_that_decides_it_is_the_one_named(name: str) -> None:
    trace = SCENARIOS[name].run()
    kind, word = DECIDED_BY[name]
    line = trace.lines[trace.verdict["decided_by"]]
    assert line["type"] == kind
    assert word in line.get("text", " ".join(line.get("ops", ())))


def test_the_table_names_every_scenario() -> None:
    assert set(DECIDED_BY) == set(SCENARIOS)


def test_what_is_replaced_is_put_back() -> None:
    before = run_seed(4).trace_hash
    for name in SCENARIOS:
        SCENARIOS[name].run()
    assert run_seed(4).trace_hash == before


# Each can fail: in another system the same script comes otherwise, and the verdict says so.


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("outcome-only", THREE_PHASE),
        ("outcome-only", OUTCOME_3F1),
        ("outcome-only-3f1", OUTCOME),
        ("outcome-only-beyond-f", replace(OUTCOME_3F1, outcomes=False)),
        ("unordered", THREE_PHASE),
        ("equivocation-three-phase", CLONED),
        ("equivocation-two-phase", OUTCOME),
        ("hidden-vote-three-phase", UNORDERED),
        ("hidden-vote-two-phase", UNORDERED),
        ("cloned-log", THREE_PHASE),
        ("rollback-hidden", THREE_PHASE),
    ],
)
def test_in_another_system_it_comes_otherwise(name: str, system: systems.System) -> None:
    scenario = SCENARIOS[name]
    assert isinstance(scenario, Scenario)
    assert not replace(scenario, system=system).run().verdict["as_expected"]


def never() -> list[tuple[object, str, object]]:
    return planted.nobody_suspects()


def nobody_asks() -> list[tuple[object, str, object]]:
    return planted.missing_never_asked_for()


def no_halt() -> list[tuple[object, str, object]]:
    return [
        (Homecoming, "contradiction", lambda *_: None),
        (Homecoming, "missing", lambda *_: None),
        (ReplicaCore, "_check_ahead", lambda _: None),
    ]


def one_wish_is_enough() -> list[tuple[object, str, object]]:
    return planted.change_without_quorum()


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("rollback-software", no_halt),
        ("log-ahead", nobody_asks),
        ("withheld-replies", nobody_asks),
        ("ignored-client", never),
        ("one-replica-told", one_wish_is_enough),
        ("quorums-logs", nobody_asks),
    ],
)
def test_with_a_planted_bug_it_comes_otherwise(name: str, bug) -> None:
    with patched(*bug()):
        assert not SCENARIOS[name].run().verdict["as_expected"]


def test_without_the_old_disk_a_tpms_log_has_nothing_to_fetch() -> None:
    scenario = SCENARIOS["rollback-tpm"]
    assert isinstance(scenario, Scenario)
    untouched = replace(scenario, script=lambda stage: stage.ask(0, 10, 220, 260))
    assert not untouched.run().verdict["as_expected"]


def test_pbft_with_a_quorum_less_comes_otherwise() -> None:
    for name in ("pbft-equivocation", "pbft-2f1"):
        scenario = SCENARIOS[name]
        assert isinstance(scenario, PbftScenario)
        other = (lambda f: (2 * f + 1, f + 1)) if name == "pbft-equivocation" else (lambda f: (3 * f + 1, 2 * f + 1))
        assert not replace(scenario, members=other).run().verdict["as_expected"]


def test_the_quorums_share_one_replica_with_logs_and_two_in_pbft() -> None:
    drawn = {name: SCENARIOS[name].run().of("quorums")[0] for name in ("quorums-logs", "quorums-pbft")}
    assert drawn["quorums-logs"]["common"] == ["r1"]
    assert drawn["quorums-pbft"]["common"] == ["r1", "r2"]
    assert [len(part["members"]) for part in drawn["quorums-logs"]["sets"]] == [2, 2]
    assert [len(part["members"]) for part in drawn["quorums-pbft"]["sets"]] == [3, 3]


# The trace.


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_trace_is_what_its_format_says(name: str) -> None:
    trace = SCENARIOS[name].run()
    assert trace.header["format"] == FORMAT
    assert [line["step"] for line in trace.lines] == list(range(len(trace.lines)))
    assert all(a["at"] <= b["at"] for a, b in zip(trace.lines, trace.lines[1:], strict=False))
    assert (trace.lines[0]["type"], trace.lines[-1]["type"]) == ("header", "verdict")
    lanes = {lane["id"] for lane in trace.header["lanes"]}
    for line in trace.lines:
        assert {line.get("who"), line.get("from"), line.get("to")} <= lanes | {None}
    for line in trace.of("append"):
        assert line["last"] - line["first"] + 1 == len(line["entries"])
    assert read_json_lines(trace.json_lines()).lines == trace.lines
    assert transcript(trace)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_seed_gives_the_same_trace_and_another_one_another(name: str) -> None:
    scenario = SCENARIOS[name]
    assert scenario.run(3).json_lines() == scenario.run(3).json_lines()
    assert scenario.run(3).json_lines() != scenario.run(4).json_lines()


def test_the_logs_of_a_trace_are_chains() -> None:
    """Each group begins with the head at which the one before ended; only a cloned log has two groups at one index."""
    for name, forks in (("equivocation-three-phase", 0), ("cloned-log", 1)):
        groups = SCENARIOS[name].run().of("append")
        heads: dict[tuple[str, int], set[str]] = {}
        for line in groups:
            heads.setdefault((line["who"], line["first"]), set()).add(line["head_before"])
        assert all(len(found) == 1 for found in heads.values())
        starts = [(line["who"], line["first"]) for line in groups]
        assert len(starts) - len(set(starts)) == forks


def test_a_file_that_is_no_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="no trace"):
        read_json_lines('{"type": "header"}\n')
    with pytest.raises(ValueError, match="no trace"):
        read_json_lines("")


def test_every_variant_replaces_a_few_functions_of_the_product_only() -> None:
    counts = {name: len(system.patches()) for name, system in SYSTEMS.items()}
    assert counts == {
        "three-phase": 0,
        "two-phase": 0,
        "outcome": 4,
        "outcome-3f1": 8,
        "unordered": 3,
        "cloned": 0,
        "rolled-back": 0,
    }
    for system in SYSTEMS.values():
        for owner, _, _ in system.patches():
            module = getattr(owner, "__module__", None) or owner.__name__
            assert module.startswith("replica.core")
