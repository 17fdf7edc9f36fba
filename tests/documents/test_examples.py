"""The programs in examples/, each run against three real replicas as their page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Processes, environment

ROOT = Path(__file__).parents[2]
SAYS = {
    "accounts.py": r"\d+ of 40 transfers done, nobody below zero: True\nin all accounts together: 400\n",
    "follow.py": (
        r"first: temperature/cellar 17, temperature/attic 27, temperature/cellar 18\n"
        r"then: temperature/attic 28, temperature/cellar 19, temperature/attic 29, temperature/attic gone\n"
    ),
    "jobs.py": r"12 jobs done, 12 results, none twice: True\n",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("examples") / "my-cluster") as processes:
        processes.start_and_wait()
        yield processes


def test_the_page_names_every_example_and_every_example_is_run():
    page = (ROOT / "examples" / "README.md").read_text()
    named = re.findall(r"^    python examples/(\w+\.py) my-cluster", page, re.MULTILINE)
    assert sorted(named) == sorted(SAYS) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.cluster
@pytest.mark.parametrize("name", sorted(SAYS))
def test_example(cluster, name):
    for _ in range(2):  # a second time it finds what the first has left
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / name, str(cluster.directory)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(SAYS[name], done.stdout), done.stdout
