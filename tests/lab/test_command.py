"""`trustlog-replica lab` as a program, and the commands that its page shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from replica.core import slots
from replica.lab.scenarios import SCENARIOS
from replica.lab.trace import SEED_MAX, read_json_lines
from replica.sim.control import patched
from tests.replica.cli.test_commands import call, documents  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]


def test_list_names_every_scenario(call) -> None:  # noqa: F811
    code, out, err = call("lab", "list", "-o", "json")
    assert (code, err) == (0, "")
    assert [s["name"] for s in documents(out)[0]["scenarios"]] == list(SCENARIOS)
    assert call("lab", "list", "-o", "plain")[1].count("\n") == len(SCENARIOS)
    assert "what it shows" in call("lab", "list", "-o", "table")[1]


def test_run_prints_a_transcript_and_a_verdict(call) -> None:  # noqa: F811
    code, out, err = call("lab", "run", "outcome-only")
    assert (code, err) == (0, "")
    assert "appends outcome 5: OUTCOME s5 (B2)" in out
    *_, expected, happened, decided, verdict = out.splitlines()
    assert expected.startswith("expected: safety fails")
    assert happened.startswith("happened: replicas 1 and 2 executed different requests")
    assert re.fullmatch(r"decided by: step \d+ at \d+ ms: -- agreement: .*", decided)
    assert verdict == "verdict: as expected"
    (document,) = documents(call("lab", "run", "pbft-equivocation", "-o", "json")[1])
    assert "r1 counts 2 of 3 votes for B2" in document["decided_by"]


def test_run_ends_with_1_if_it_does_not_come_as_expected(call) -> None:  # noqa: F811
    with patched((slots, "is_quorum", lambda voters, f: voters.bit_count() > 2 * f)):
        code, out, _ = call("lab", "run", "outcome-only")
    assert code == 1
    assert "verdict: NOT as expected" in out


def test_what_it_writes(call, tmp_path) -> None:  # noqa: F811
    assert call("lab", "run", "log-ahead", "--seed", 9, "--out", "t.jsonl", "--shiviz", "t.log")[0] == 0
    assert read_json_lines((tmp_path / "t.jsonl").read_text()).lines == SCENARIOS["log-ahead"].run(9).lines
    assert (tmp_path / "t.log").read_text().count("\n") % 2 == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("run", "nothing"), "lab list"),
        (("run", "log-ahead", "--seed", SEED_MAX + 1), "--seed"),
        (("run", "log-ahead", "--out", "no/such/folder"), "no/such/folder"),
        (("serve", "--attach", "no-cluster", "--port", 0), "no-cluster"),
        (("serve", "--host", "192.0.2.1", "--port", 0), "192.0.2.1"),
    ],
)
def test_what_cannot_be_is_said(call, arguments, word) -> None:  # noqa: F811
    code, out, err = call("lab", *arguments)
    assert (code, out) == (2, "")
    assert word in err


def test_the_seeds_limit_is_one(call) -> None:  # noqa: F811
    page = files("replica.lab").joinpath("page")
    assert f'max="{SEED_MAX}"' in page.joinpath("index.html").read_text()
    assert f"Math.min({SEED_MAX}," in page.joinpath("app.js").read_text()
    assert call("lab", "run", "log-ahead", "--seed", SEED_MAX)[0] == 0


def test_the_commands_of_the_page_run(tmp_path) -> None:
    page = (ROOT / "replica" / "lab" / "README.md").read_text()
    lines = re.findall(r"^    trustlog-replica (lab .*)$", page, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)
        if words[1] == "serve":
            continue  # tests/lab/test_serve.py, test_live.py
        done = subprocess.run(
            [sys.executable, "-m", "replica.cli.main", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), line
    assert json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[0])["seed"] == 7
    assert (tmp_path / "trace.log").exists()
