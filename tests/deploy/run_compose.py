"""The compose file is run, not only read: `make test-compose`. Not part of `make test`: it takes minutes, root and an engine.

A base image is made with debootstrap, the locked wheels are copied in, and no registry is asked for an image.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.counting import PROGRAM, READ, Counting
from tests.support.engine import BASE, IMAGE, Engine, base_image, build_context
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(1200)
PAGE = Path(__file__).parents[2] / "deploy" / "README.md"
REPLICAS = ("replica-0", "replica-1", "replica-2")
LOGS = ("log-0", "log-1", "log-2")
NETWORK = "trustlog_default"
CLIENT = ("trustlog-client", "-c", "/var/lib/trustlog")
HEALTHY_S = 240


class Project:
    """The project of deploy/docker/docker-compose.yml in an engine of its own."""

    def __init__(self, engine, file) -> None:
        self.engine, self._file = engine, file
        self._variables = {"BASE": BASE, "PIP_NO_INDEX": "1"}

    def compose(self, *arguments, **options):
        return self.engine.compose(self._file, *arguments, **options, **self._variables)

    def container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service).stdout.strip()

    def within(self, service: str, *command: str, user="", check=True) -> subprocess.CompletedProcess:
        options = ["--user", user] if user else []
        return self.engine.docker("exec", *options, self.container(service), *command, check=check)

    def health(self, service: str) -> str:
        container = self.container(service)
        return self.engine.docker("inspect", "--format", "{{.State.Health.Status}}", container).stdout.strip()

    def restarts(self, service: str) -> int:
        return int(self.engine.docker("inspect", "--format", "{{.RestartCount}}", self.container(service)).stdout)

    def wait_healthy(self, *services: str, status="healthy") -> None:
        for service in services:
            try:
                wait_for(lambda service=service: self.health(service) == status, f"{service} is {status}", HEALTHY_S)
            except AssertionError:
                inspected = self.engine.docker("inspect", self.container(service)).stdout
                print(json.loads(inspected)[0]["State"].get("Health"))
                print(self.compose("logs", "--tail", "60", service).stdout)
                raise

    def reports(self) -> dict[int, dict]:
        done = self.within("gateway", *CLIENT, "status", "-o", "json")
        return {one["number"]: one["report"] for one in json.loads(done.stdout)["replicas"] if one["reachable"]}

    def wait_equal(self) -> int:
        """Wait until all replicas executed the same, and return the slot up to which."""

        def equal():
            executed = [report["executed"] for report in self.reports().values()]
            return len(executed) == 3 and len(set(executed)) == 1 and executed[0]

        return wait_for(equal, "all replicas executed the same", HEALTHY_S)

    def read(self, keys: list[str]) -> list[str]:
        return json.loads(self.within("gateway", "python3", "-c", READ, "/var/lib/trustlog", *keys).stdout)

    def get(self, key: str) -> str:
        return self.read([key])[0]

    def load(self, workers: int, prefix: str) -> Counting:
        command = [self.engine.programs["docker"], "exec", "--interactive", self.container("gateway")]
        arguments = ["127.0.0.1", "6380", "/var/lib/trustlog/password", str(workers), prefix]
        return Counting([*command, "python3", "-c", PROGRAM.read_text(), *arguments], self.engine.environment)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with Engine() as engine:
        base_image(engine)
        project = Project(engine, build_context(tmp_path_factory.mktemp("context")))
        project.compose("build", seconds=600)
        try:
            project.compose("up", "--detach")
            project.wait_healthy(*LOGS, *REPLICAS, "gateway")
            yield project
        except BaseException:
            print(project.compose("logs", "--tail", "40", check=False).stdout)
            raise
        finally:
            project.compose("down", "--volumes", "--timeout", "20", check=False)
            left = [engine.docker(kind, "ls", "--quiet").stdout for kind in ("container", "volume")]
        assert left == ["", ""], "down leaves nothing"


def page_lines() -> list[list[str]]:
    """The words behind `docker-compose -f FILE` of each line of the page."""
    start = "docker-compose -f deploy/docker/docker-compose.yml "
    lines = re.findall(rf"^    {re.escape(start)}(.*)$", PAGE.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_lines_of_the_page(project):
    """What deploy/README.md has its reader type, after `build` and `up`; but for Prometheus and Grafana, which cannot be had here."""
    lines = page_lines()
    assert lines[:3] == [["build"], ["up", "-d"], ["ps"]]
    for words in lines:
        if "monitoring" in words:
            project.compose("--profile", "monitoring", "config")
            continue
        said = project.compose(*words, seconds=600).stdout
        if words[-2:] == ["get", "greeting"]:
            assert said.strip() == "hello"
        if words[-1] == "status":
            assert said.count("trusted") == 3
        if words[-1].endswith("password"):
            assert len(said.strip()) > 30


def test_the_image_is_small_and_nobody_in_it_is_root(project):
    image = json.loads(project.engine.docker("image", "inspect", IMAGE).stdout)[0]
    base = json.loads(project.engine.docker("image", "inspect", BASE).stdout)[0]
    assert image["Config"]["User"] == "10000:10000"
    assert image["Size"] - base["Size"] < 100e6
    for service in (*REPLICAS, *LOGS, "gateway"):
        status = project.within(service, "cat", "/proc/1/status").stdout
        fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
        assert "0" not in fields["Uid"].split(), service
        assert (int(fields["CapEff"], 16), fields["NoNewPrivs"], fields["Seccomp"]) == (0, "1", "2")
        assert project.within(service, "touch", "/opt/trustlog/x", check=False).returncode != 0
    assert project.within("replica-0", "python3", "-m", "pip", "--version", check=False).returncode != 0


def test_a_log_is_apart_from_its_replica(project):
    """Another user, no network, its state in no other container; and only the replica's user may connect."""
    for number, report in project.reports().items():
        assert report["log"]["backend"] == "process"
        assert report["log"]["service"]["uid"] == 10001, number
    assert project.within("log-0", "cat", "/proc/net/route").stdout.count("\n") <= 1
    assert project.within("replica-0", "ls", "/var/lib/trustlog-log", check=False).returncode != 0
    assert project.within("replica-0", "find", "/", "-name", "seal.key", check=False).stdout == ""
    ask = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.settimeout(10);"
        "s.connect('/run/trustlog-log/log.sock'); print(s.recv(4096)[30:].decode())"
    )
    stranger = project.within("log-0", "python3", "-c", ask, user="12345:12345")
    assert "only user 10000 may speak to this log" in stranger.stdout
    busy = project.within("replica-0", "python3", "-c", ask)
    assert "is connected to this log already" in busy.stdout


def test_killed_cut_off_and_healed_under_load(project):
    """kill -9 of the primary, of a log, and a replica cut from the network: nothing acknowledged is lost, all count once."""
    engine = project.engine
    with project.load(workers=4, prefix="cut-") as load:
        load.more(200)
        primary = f"replica-{project.reports()[0]['primary']}"
        engine.kill(project.container(primary))
        load.more(200)
        wait_for(lambda: project.restarts(primary) == 1, "the engine starts it again", HEALTHY_S)
        project.wait_healthy(*REPLICAS)
        engine.kill(project.container("log-1"))
        load.more(200)
        wait_for(lambda: project.restarts("log-1") == 1, "the engine starts it again", HEALTHY_S)
        project.wait_healthy("log-1", *REPLICAS)
        before = project.reports()[2]["executed"]
        engine.docker("network", "disconnect", NETWORK, project.container("replica-2"))
        load.more(200)
        project.wait_healthy("replica-2", status="unhealthy")
        assert 2 not in project.reports(), "it is cut off"
        engine.docker("network", "connect", "--alias", "replica-2", NETWORK, project.container("replica-2"))
        wait_for(lambda: 2 in project.reports(), "it is back on the network", HEALTHY_S)
        load.more(200)
        # On a busy machine it cannot read up while the others have all the load that they can carry.
    project.wait_healthy(*REPLICAS)
    assert project.wait_equal() > before
    load.check(project.read)
    # The one that was away is the second of two now.
    project.compose("stop", "replica-0")
    load.check(project.read)
    project.compose("start", "replica-0")
    project.wait_healthy("replica-0")


def test_restarted_one_after_the_other_under_load(project):
    """`restart replica-N` for each: no request fails."""
    with project.load(workers=1, prefix="rolling-") as load:
        load.more(100)
        for replica in REPLICAS:
            project.compose("restart", "--timeout", "30", replica)
            project.wait_healthy(replica)
            load.more(100)
    assert load.unknown == []
    project.wait_equal()
    project.wait_healthy(*REPLICAS)
    load.check(project.read)


def test_down_and_up_again_keeps_keys_and_state(project):
    project.within("gateway", *CLIENT, "put", "kept", "yes")
    keys = {number: report["log"]["public_key"] for number, report in project.reports().items()}
    project.compose("down", "--timeout", "20")
    project.compose("up", "--detach")
    project.wait_healthy(*LOGS, *REPLICAS, "gateway")
    assert project.get("kept") == "yes"
    assert {number: report["log"]["public_key"] for number, report in project.reports().items()} == keys


def test_a_log_whose_volume_was_lost_is_refused(project):
    """Its container makes a new log, which has another key: the replica does not speak with it."""
    project.compose("rm", "--force", "--stop", "log-1", "replica-1", "keys-1")
    project.engine.docker("volume", "rm", "trustlog_log-state-1")
    project.compose("up", "--detach", "--no-deps", "log-1")
    project.wait_healthy("log-1")
    project.compose("up", "--detach", "--no-deps", "replica-1")
    logged = lambda: project.compose("logs", "replica-1").stdout  # noqa: E731
    wait_for(lambda: "it is another log's" in logged(), "the replica refuses the log", HEALTHY_S)
    project.within("gateway", *CLIENT, "put", "goes", "on")
    assert project.get("goes") == "on"
