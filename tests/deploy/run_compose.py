"""The compose file is run, not only read: `make test-compose`. Not part of `make test`: it takes minutes, root and an engine.

A base image is made with debootstrap, the locked wheels are copied in, and no registry is asked for an image.
"""

import json
import re
import shlex
import subprocess
import time
from collections import Counter
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
START = "docker-compose -f deploy/docker/docker-compose.yml "
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
COLLECTOR = Path(__file__).parent / "collecting.py"
CLIENT = ("trustlog-client", "-c", "/var/lib/trustlog")
HEALTHY_S = 240


class Project:
    """The project of deploy/docker/docker-compose.yml in an engine of its own."""

    def __init__(self, engine, file) -> None:
        self.engine, self._file, self._more = engine, file, ()
        self.root = file.parents[2]
        self._variables = {"BASE": BASE, "PIP_NO_INDEX": "1"}

    def compose(self, *arguments, **options):
        return self.engine.compose(self._file, *self._more, *arguments, **(self._variables | options))

    def give(self, file: str) -> None:
        """Give this file of the context with every command from now on."""
        self._more = (*self._more, "--file", str(self.root / file))

    def type_line(self, line: str, number=1) -> str:
        """Do what a line of the page says, for this replica, and wait where the page says so; return what it printed."""
        variables, words = words_of(re.sub(r"(?<=-)1\b", str(number), line))
        words = [str(self.root / word) if word.startswith("deploy/") else word for word in words]
        said = self.compose(*words, seconds=600, **variables).stdout
        if "--no-deps" in words and words[-1] in REPLICAS:
            self.wait_healthy(words[-1])
        return said

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


def section_lines(title: str) -> list[str]:
    """The lines of one section of the page, or of what comes before its sections, that begin with docker-compose."""
    page = PAGE.read_text().split("\n## Containers on one machine\n")[1].split("\n## ")[0]
    section = page.split(f"\n### {title}\n")[1] if title else page
    lines = re.findall(r"^    ((?:\w+=\S+ )*docker-compose .*)$", section.split("\n### ")[0], re.MULTILINE)
    assert lines, title
    return lines


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables of a line, and the words behind `docker-compose -f FILE`."""
    before, words = line.split(START)
    return dict(word.split("=", 1) for word in before.split()), shlex.split(words)


def test_the_lines_of_the_page(project):
    """What deploy/README.md has its reader type, after `build` and `up`; but for Prometheus and Grafana, which cannot be had here."""
    lines = [words_of(line)[1] for line in section_lines("")]
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
    print(f"{image['Size'] / 1e6:.0f} MB, of which the base has {base['Size'] / 1e6:.0f}")
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


LOST = "Replacing a replica whose volume is lost"


def wait_over(project, lists: list[int]) -> None:
    """Wait until every replica works under the newest list; lists: since which each is a member."""

    def over():
        words = ("run", "--rm", "-T", "operator", "trustlog-replica", "member", "list", "/etc/trustlog", "-o", "json")
        found = json.loads(project.compose(*words).stdout)
        return found["list"] == max(lists) and all(
            (one["works_under_list"], one["since_list"]) == (max(lists), since)
            for one, since in zip(found["replicas"], lists, strict=True)
        )

    wait_for(over, f"all work under list {max(lists)}", HEALTHY_S)


def test_it_is_replaced_as_the_page_says(project):
    """The replica of the test before, whose log is lost."""
    keys = {number: report["log"]["public_key"] for number, report in project.reports().items()}
    for line in section_lines(LOST):
        project.type_line(line)
    project.wait_healthy(*LOGS, *REPLICAS, "gateway")
    wait_over(project, [0, 1, 0])
    now = {number: report["log"]["public_key"] for number, report in project.reports().items()}
    assert {number for number in now if now[number] != keys.get(number)} == {1}
    assert project.get("goes") == "on"
    project.wait_equal()
    # With another one away, the new one is needed; the gateway knows it since it was restarted.
    project.compose("stop", "replica-0")
    project.within("gateway", *CLIENT, "put", "goes", "further")
    project.compose("start", "replica-0")
    project.wait_healthy(*REPLICAS)


def test_keys_get_a_passphrase(project):
    """In a cluster that runs, as the page says; and no program starts without it any more."""
    (line,) = re.findall(r"^    (openssl .*)$", PAGE.read_text(), re.MULTILINE)
    subprocess.run(["bash", "-ec", line], cwd=project.root, check=True)
    for line in section_lines("Keys with a passphrase"):
        project.type_line(line)
    project.give("deploy/docker/passphrase.yml")
    folders = {"gateway": "client/client.key", **dict.fromkeys(REPLICAS, "replica/tls.key")}
    for service, name in folders.items():
        assert "ENCRYPTED" in project.within(service, "head", "-1", f"/var/lib/trustlog/{name}").stdout
    for service in (*REPLICAS, "gateway"):
        project.compose("restart", "--timeout", "30", service)
        project.wait_healthy(service)
    project.within("gateway", *CLIENT, "put", "locked", "yes")
    for log in LOGS:
        assert project.within(log, "ls", "/run/secrets", check=False).returncode != 0, "a log has no passphrase"
    without = ("env", "-u", "TRUSTLOG_PASSPHRASE_FILE", *CLIENT, "get", "locked")
    assert "this private key is encrypted" in project.within("gateway", *without, check=False).stderr


def test_who_lost_all_its_volumes_is_replaced_under_load(project):
    """A replica's and its log's containers and volumes vanish; the page's lines bring it back, and no request fails."""
    engine = project.engine
    with project.load(workers=2, prefix="lost-") as load:
        load.more(200)
        lost = project.compose("ps", "--all", "--quiet", "replica-2", "log-2", "keys-2").stdout.split()
        engine.docker("rm", "--force", *lost)
        engine.docker("volume", "rm", "trustlog_replica-2", "trustlog_log-state-2", "trustlog_log-socket-2")
        load.more(200)
        begun = time.monotonic()
        for line in section_lines(LOST):
            # The load is in the gateway's container, which is restarted later.
            if not line.endswith("restart gateway"):
                project.type_line(line, 2)
        project.wait_healthy("replica-2")
        print(f"replaced in {time.monotonic() - begun:.0f} s")
        load.more(200)
    assert load.unknown == []
    wait_over(project, [0, 1, 2])
    assert "ENCRYPTED" in project.within("replica-2", "head", "-1", "/var/lib/trustlog/replica/tls.key").stdout
    project.compose("restart", "gateway")
    project.wait_healthy("gateway", *REPLICAS)
    project.wait_equal()
    project.compose("stop", "replica-1")
    load.check(project.read)
    project.compose("start", "replica-1")
    project.wait_healthy(*REPLICAS)


def test_requests_are_traced(project):
    """With the other image and an endpoint, as the page says; and the usual image says what it lacks."""
    build, up = section_lines("Traces")
    project.type_line(build)
    image = words_of(up)[0]["TRUSTLOG_IMAGE"]
    options = ("--detach", "--name", "collector", "--network", NETWORK, "--no-healthcheck")
    program = COLLECTOR.read_text()
    project.engine.docker("run", *options, image, "python3", "-c", program, words_of(up)[0][ENDPOINT].split(":")[-1])
    try:
        project.type_line(up)
        project.wait_healthy(*REPLICAS, "gateway")
        project.within("gateway", *CLIENT, "put", "traced", "yes")

        def complete():
            spans = [line.split() for line in project.engine.docker("logs", "collector").stdout.splitlines()]
            traces = Counter(trace for trace, _, _ in spans)
            whole = [trace for trace in traces if traces[trace] == 16]
            return whole and Counter(name for trace, name, _ in spans if trace == whole[0])

        spans = wait_for(complete, "a whole trace has come", HEALTHY_S)
        assert spans == {"request": 1, "propose": 1, "prepare": 2} | dict.fromkeys(
            ("replica", "commit", "execute", "reply"), 3
        )
    finally:
        project.engine.docker("rm", "--force", "collector")
    project.compose("up", "--detach", "--no-deps", "replica-0", **{ENDPOINT: "http://collector:4318"})
    logged = lambda: project.compose("logs", "replica-0").stdout  # noqa: E731
    wait_for(lambda: "OpenTelemetry is not installed here" in logged(), "the replica says so", HEALTHY_S)
    project.compose("up", "--detach")
    project.wait_healthy(*REPLICAS, "gateway")
    assert project.get("traced") == "yes"
