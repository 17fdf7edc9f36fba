"""The gap after a primary's end is computed from answers, told with what failed, and measured on real replicas."""

import asyncio
import re

import pytest
from click.testing import CliRunner

from client.errors import Undecided
from replica.core.envelope import Result, Status
from tests.bench import gap
from tests.bench.gap import Figures, Kill, Load, are_level, gap_of, page_of
from tests.bench.programs import ProgramError
from tests.bench.report import RESULTS, marks
from tests.support.waiting import on_loop, until


def test_the_gap_ends_with_the_longest_pause_and_begins_with_what_was_under_way():
    answered = [
        1.0,
        1.9,
        2.0,
        2.01,
        3.2,
        3.3,
        4.0,
    ]  # at 2.0 the last one before the kill, at 2.01 one that was on its way
    assert gap_of(answered, killed=2.0, oldest=1.95) == pytest.approx(3.2 - 1.95)
    assert gap_of(answered, killed=2.005, oldest=2.002) == pytest.approx(3.2 - 2.0)
    # What was before the kill is no gap of its, however long.
    assert gap_of([0.0, 5.0, 5.5, 6.5], killed=5.1, oldest=5.0) == pytest.approx(1.5)


@pytest.mark.parametrize("killed", [0.5, 3.0])
def test_a_gap_without_answers_on_both_sides_is_none(killed):
    with pytest.raises(ProgramError, match="none before the kill, or none after it"):
        gap_of([1.0, 2.0], killed, 1.0)


def report(view=1, executed=7, **other):
    return {"view": view, "executed": executed, "not_ready": None, "mute": None, "view_open": True, **other}


@pytest.mark.parametrize(
    "other",
    [{"view": 2}, {"executed": 6}, {"not_ready": "reading"}, {"mute": "no log"}, {"view_open": False}],
)
def test_level_are_replicas_that_nothing_tells_apart(other):
    assert are_level({number: report() for number in range(3)})
    assert not are_level({number: report() for number in range(2)})
    assert not are_level({0: report(), 1: report(), 2: report(**other)})
    assert are_level({number: report(**other) for number in range(3)}) == (set(other) <= {"view", "executed"})


@on_loop
async def test_every_operation_that_is_not_done_is_counted(monkeypatch):
    monkeypatch.setattr(gap, "AFTER_FAILURE_S", 0.0)
    outcomes = [
        Result(Status.OK, 1, b""),
        Undecided("unknown"),
        Result(Status.ERROR, 1, b""),
        Result(Status.OK, 2, b""),
    ]

    class Some:
        async def submit(self, _):
            await asyncio.sleep(0)
            outcome = outcomes.pop(0) if outcomes else Result(Status.OK, 3, b"")
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    load = Load(Some(), 1)
    await load.until(2)
    before = load.oldest
    await until(lambda: load.oldest > before, "another operation is begun")
    await load.end()
    assert load.failed == 2


def test_the_page_says_what_was_kept():
    found = {
        "two-phase": Figures([Kill(1.4, 1000), Kill(1.2, 2000), Kill(1.3, 1000)], 12_345, 0, 3),
        "three-phase": Figures([Kill(1.6, 1000), Kill(9.0, 1000)], 998, 2, 3),
    }
    lines = page_of(found, 200, "here").splitlines()
    assert "| two-phase | 3 | 1,300 | 1,400 | 1,000 | 1,000 to 2,000 | 1.30 | 3 | 0 of 12,345 |" in lines
    assert "| three-phase | 2 | 5,300 | 9,000 | 1,000 | 1,000 | 5.30 | 3 | 2 of 1,000 |" in lines
    assert (
        "- two-phase: p50 at most 1.5 times the patience: kept (1.30); no operation failed. Each gap, in ms: 1400, 1200, 1300."
    ) in lines
    assert (
        "- three-phase: p50 at most 1.5 times the patience: missed (5.30); 2 operations failed, none may. Each gap, in ms: "
        "1600, 9000."
    ) in lines
    assert lines[-1] == "here"


def test_the_results_have_a_place():
    assert all(RESULTS.read_text().count(mark) == 1 for mark in marks("gap"))


@pytest.mark.long
def test_a_real_primary_is_killed_and_returns_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(gap, "LOADED_S", 0.2)
    killed = []
    kill = gap.Cluster.kill
    monkeypatch.setattr(gap.Cluster, "kill", lambda cluster, number: (killed.append(number), kill(cluster, number)))
    options = ["--kills", "2", "--at-once", "20", "--ordering", "two-phase", "--dir", str(tmp_path)]
    done = CliRunner().invoke(gap.main, options)
    assert done.exit_code == 0, done.output
    (row,) = re.findall(r"^\| two-phase \| (.*) \|$", done.stdout, re.MULTILINE)
    kills, middle, worst, _, _, _, views, failed = row.split(" | ")
    assert kills == "2"
    assert 0 < float(middle.replace(",", "")) <= float(worst.replace(",", ""))
    assert int(views) >= 2
    assert failed.startswith("0 of ")
    assert len(set(killed)) == 2  # each time another one was the primary
    assert list(tmp_path.iterdir()) == []
