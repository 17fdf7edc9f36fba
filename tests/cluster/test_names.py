"""A peer whose name cannot be resolved: named once, with what to do, whether the resolver refuses or hangs."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.provision import init_cluster
from tests.support.cluster import Processes, environment, replica_command
from tests.support.tools import tool
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

NAME = "no-such-host.invalid"
TO_DO = "see that this machine knows the name (DNS, /etc/hosts), or write an address into cluster.toml"
SILENT_DNS = Path(__file__).parents[1] / "support" / "silent_dns.py"


@pytest.fixture
def directory(tmp_path):
    """A cluster whose last replica has a name that nobody knows (RFC 6761, section 6.4)."""
    init_cluster(tmp_path / "c", base_port=0)
    path = tmp_path / "c" / "cluster.toml"
    text, count = re.subn(r'(number = 2\naddress = ")127\.0\.0\.1', rf"\g<1>{NAME}", path.read_text())
    assert count == 1
    path.write_text(text)
    return tmp_path / "c"


@pytest.fixture
def hangs(tmp_path):
    """How to run a command where every question to a name server is heard, and none answered."""
    unshare = [tool("unshare"), "--user", "--map-root-user", "--mount", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no namespaces here, so no name server can be made to hang")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:3 attempts:2\n")
    heard = tmp_path / "heard"
    heard.touch()

    def wrapped(command):
        script = f"{shlex.quote(tool('ip'))} link set lo up; mount --bind {tmp_path}/resolv.conf /etc/resolv.conf; "
        script += f"exec {shlex.join([sys.executable, str(SILENT_DNS), str(heard), *command])}"
        return [*unshare, "bash", "-euc", script]

    return wrapped, heard


def about_names(logged):
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("peer") == 2]


def test_a_replica_says_it_once_and_the_others_work(directory):
    with Processes(directory) as cluster:
        for number in (0, 1):
            cluster.start(number)
        address = load_cluster_file(directory).replicas[2].address
        done = subprocess.run(
            [sys.executable, "-m", "client.cli.main", "-c", str(directory), "--deadline", "30", "put", "a", "b"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "created\n", "")
        for number in (0, 1):
            cluster.kill(number, signal.SIGTERM)
            logged = cluster.log_path(number).read_text()
            (said,) = about_names(logged)
            assert said["address"] == address
            assert said["why"] == f"the name {NAME} cannot be resolved: Name or service not known; {TO_DO}"
            assert "Traceback" not in logged
            assert "never retrieved" not in logged
        done = subprocess.run(
            [sys.executable, "-m", "client.cli.main", "-c", str(directory), "--deadline", "1", "get", "a"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3
        assert done.stderr.count(f"replica 2 ({address}): the name {NAME} cannot be resolved") == 1
        assert TO_DO in done.stderr


def test_its_own_name(directory):
    done = subprocess.run(
        replica_command(directory / "replica-2"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"the name {NAME} cannot be resolved here" in done.stderr
    assert "set `listen` in replica.toml" in done.stderr


@pytest.mark.parametrize("program", ["replica", "client"])
def test_a_resolver_that_hangs_longer_than_an_attempt_lasts(directory, hangs, tmp_path, program):
    """An attempt ends after 5 s, the question after 6 s: its failure must be somebody's."""
    wrapped, heard = hangs
    command = replica_command(directory / "replica-0")
    if program == "client":
        command = [sys.executable, "-m", "client.cli.main", "-c", str(directory), "--deadline", "9", "get", "a"]
    output = tmp_path / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(wrapped(command), env=environment(), stdout=out, stderr=out)
    try:
        if program == "replica":
            # A name is asked for by two questions, A and AAAA, after 0 and 3 s of each attempt: the second attempt's
            # second ones come after the first attempt's end and the resolver's.
            wait_for(lambda: process.poll() is not None or heard.stat().st_size >= 8, "the second attempt", 40)
            assert process.poll() is None, output.read_text()
            found = about_names(output.read_text())
            assert [one["why"] for one in found] == [
                f"the name {NAME} cannot be resolved: no answer within 5 s; {TO_DO}"
            ]
        else:
            assert process.wait(40) == 3
            assert f"replica 2 ({NAME}:" in output.read_text()
            assert heard.stat().st_size >= 6
    finally:
        process.terminate()
        process.wait(20)
    said = output.read_text()
    assert "never retrieved" not in said
    assert "Traceback" not in said
    assert said.count("cannot be resolved: no answer within 5 s") == 1
