"""The page of PBFT, the baseline: its commands in their order, at free ports and for a moment."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.documents.test_commands import ROOT, Dev, run, run_python

PAGE = ROOT / "replica" / "pbft" / "README.md"


@pytest.mark.cluster
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    found = re.findall(r"^    ((?:trustlog|python).*?)(?: +#.*)?$", PAGE.read_text(), re.MULTILINE)
    init, dev, put, bench = found
    done = run(f"{init} --base-port 0", tmp_path)
    assert (done.returncode, "measuring and teaching" in done.stderr) == (0, True), done.stderr
    with Dev(dev, tmp_path) as running:
        done = run(put, tmp_path)
        assert done.returncode == 0, (done.stderr, running.log.read_text()[-2000:])
    assert running.process.returncode == 0
    assert "four replicas" in PAGE.read_text()
    assert len(list((tmp_path / "pbft-cluster").glob("replica-*/signing.key"))) == 4
    program, *words = shlex.split(f"{bench} --runs 1 --seconds 0.2 --concurrency 5 -o json")
    assert program == "python"
    done = run_python(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cluster"]["ordering"] == "pbft"
