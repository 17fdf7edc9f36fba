"""The operator's page: every command of it is run, in its order, against a cluster that is called as it says."""

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from replica.cli.main import cli
from replica.cluster.environment import VARIABLES
from replica.operations.asking import Outcome
from tests.documents.test_commands import as_process, commands, environment
from tests.support.cluster import Processes
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
PAGE = "replica/cli/README.md"
pytestmark = pytest.mark.cluster


def run(line, cwd):
    """Run a line of the page, with the variables before the command."""
    words = shlex.split(line)
    given = dict(word.split("=", 1) for word in words if re.match(r"TRUSTLOG_\w+=", word))
    return subprocess.run(
        as_process(line), cwd=cwd, env=environment(**given), capture_output=True, text=True, timeout=60, check=False
    )


class Renewed(Processes):
    """A cluster in which a replica's folder may have another name."""

    new: tuple[int, str] | None = None

    def folder(self, number):
        name = self.new[1] if self.new is not None and self.new[0] == number else f"replica-{number}"
        return self.directory / name

    def start_new(self, number, name):
        self.kill(number)
        self.new = (number, name)
        self.start(number)


def run_refound(line, cluster, cwd):
    """As the page says: with the survivors stopped, exit 1 and the slot first; then with the slot that it named."""
    for number in range(3):
        if cluster.is_running(number):
            cluster.kill(number, signal.SIGTERM)
    asked = run(line.partition(" --accept-loss")[0], cwd)
    assert asked.returncode == 1, (line, asked.stderr)
    (slot,) = re.findall("^accept-loss=([0-9]+)$", asked.stdout, re.MULTILINE)
    return asked if "--accept-loss" not in line else run(line.replace("4711", slot), cwd)


def until_all_work_under(number, cwd):
    def all_do():
        done = run("trustlog-replica member list my-cluster -o json", cwd)
        return {one["works_under_list"] for one in json.loads(done.stdout)["replicas"]} == {number}

    wait_for(all_do, f"all work under list {number}", 60)


@pytest.mark.timeout(300)
def test_every_command_of_the_page(tmp_path):
    cwd = tmp_path / "a b"
    cwd.mkdir()
    lines = commands(PAGE)
    assert len(lines) == 35
    ran = []
    with Renewed(cwd / "my-cluster") as cluster:
        cluster.start_and_wait()
        for number in range(3):
            health = f"trustlog-replica health my-cluster/replica-{number}"
            wait_for(lambda health=health: run(health, cwd).returncode == 0, "ready", 60)
        for line in lines:
            if " restore " in line:  # as the page says: stopped, and its databases lost
                cluster.kill(1, signal.SIGTERM)
                (cluster.folder(1) / "store.sqlite").unlink()
            if " run " in line:
                cluster.start_new(2, line.rsplit("/", 1)[1])
                until_all_work_under(1, cwd)
                ran.append(line)
                continue
            if " refound " in line:
                done = run_refound(line, cluster, cwd)
            else:
                done = run(line, cwd)
            asks = " refound " in line and "--accept-loss" not in line
            assert done.returncode == int(asks), (line, done.stdout, done.stderr)
            ran.append(line)
            if " restore " in line:
                cluster.start_and_wait(1)
                wait_for(lambda: run("trustlog-replica health my-cluster/replica-1", cwd).returncode == 0, "ready", 60)
            if "-o json" in line:
                assert json.loads(done.stdout)["schema_version"] == 1
    assert ran == lines


def test_a_container_can_use_the_health_check(tmp_path):
    (line,) = re.findall(r"^    HEALTHCHECK (.*)$", (ROOT / PAGE).read_text(), re.MULTILINE)
    words = json.loads(line[line.index("[") :])
    assert words[:2] == ["trustlog-replica", "health"]
    timeout_s = int(re.search(r"--timeout=(\d+)s", line)[1])
    command = cli.commands["health"]
    (deadline,) = [one.default for one in command.params if one.name == "deadline"]
    assert deadline < timeout_s, "the program says why before it is killed"
    with Processes(tmp_path / "c") as cluster:
        done = run(shlex.join([*words[:2], str(cluster.folder(0))]), tmp_path)
        assert (done.returncode, "nothing listens at" in done.stdout) == (1, True)


def test_the_page_names_every_command_variable_and_alert():
    page = (ROOT / PAGE).read_text()
    table = page[: page.index("## Looking")]
    named = set(re.findall(r"`([a-z]+)(?: [a-z]+)?`", table))
    elsewhere = {"init", "keygen", "client-key", "assemble", "run", "dev", "close", "sim", "lab", "completion"}
    assert named | elsewhere >= set(cli.commands)
    assert set(re.findall(r"`(TRUSTLOG_\w+)`", page)) == set(VARIABLES)
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "monitoring" / "alerts.yml").read_text())
    assert len(alerts) > 10
    assert set(re.findall(r"`(Trustlog\w+)`", page)) == set(alerts)


def test_outcomes_that_the_page_names_exist():
    page = (ROOT / PAGE).read_text()
    assert {"wrong-certificate", "wrong-cluster"} <= {outcome.value for outcome in Outcome}
    assert "`wrong-certificate`, `wrong-cluster`" in page
