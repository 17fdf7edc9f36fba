"""The Makefile's targets as a user calls them, and the pages that name them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.ledger import pages
from tests.documents.test_commands import ROOT, commands, environment, run
from tests.support.tools import tool

MAKEFILE = (ROOT / "Makefile").read_text()


def make(line: str, seconds: float = 60) -> str:
    """Run a line that calls make, in this tree, with the environment that runs this, as it is; return what it printed."""
    program, *words = line.split()
    assert program == "make"
    venv = os.path.relpath(sys.prefix, ROOT)
    env = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST"))}
    done = subprocess.run(
        [tool("make"), f"VENV={venv}", f"--old-file={venv}/.installed", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_help_lists_every_target_and_the_pages_name_no_other():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    shown = re.findall(r"^  make ([a-z-]+) +\S", make("make help"), re.MULTILINE)
    assert sorted(shown) == sorted(phony)
    assert make("make") == make("make help")
    named = {
        (page, target)
        for page, content in pages().items()
        for target in re.findall(r"(?:`|^    )make ([a-z-]+)", content, re.MULTILINE)
    }
    assert len(named) > 20
    assert {(page, target) for page, target in named if target not in phony} == set()


def test_make_test_runs_tests():
    """Of the whole, which runs this, one file: as `make help` says."""
    (line,) = [line for line in commands("README.md") if line.startswith("make test")]
    assert line == "make test"
    assert "= 1 passed in " in make(f"{line} TESTS=tests/documents/test_links.py JOBS=0")


@pytest.mark.timeout(180)
def test_make_demo_as_a_user_would():
    (line,) = [line for line in commands("README.md") if line.startswith("make demo")]
    said = make(line, 170)
    assert "5932 records, all equal" in said
    assert "verified" in said
    assert "nothing lost" in said


def test_the_simulators_lines(tmp_path: Path):
    campaign, *runs = commands("replica/sim/README.md")
    assert campaign == "make sim SEEDS=1000"
    # Seed 0 takes long: it has real signatures.
    assert "\nfailed=0\n" in make(campaign.replace("1000", "2 FIRST=1"))
    assert len(runs) == 2
    for line in runs:
        done = run(line, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "seed=17\n" in done.stdout
        assert "PREPARE v0 s1" in done.stderr
