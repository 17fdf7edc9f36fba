"""The units of deploy/systemd are started by a real systemd, as their page says: `make test-systemd`.

Three containers stand for three machines, each with systemd as its first process.
"""

import json
import re
from pathlib import Path

import pytest

from tests.support.engine import PYTHON, Engine, base_image, build_context
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(1200)
PAGE = Path(__file__).parents[2] / "deploy" / "systemd" / "README.md"
MACHINES = range(3)
BASE, IMAGE, NETWORK = "trustlog-systemd-base:test", "trustlog-systemd:test", "machines"
READY_S = 240
CLIENT = "/opt/trustlog/bin/trustlog-client -c /var/lib/trustlog --deadline 60"


class Machine:
    """A container that systemd runs."""

    def __init__(self, engine, number: int) -> None:
        self._engine, self.number, self.name = engine, number, f"m{number}"
        # systemd makes mounts and networks for its units; it has control groups of its own.
        options = ["--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--security-opt", "seccomp=unconfined"]
        options += ["--cgroupns", "private", "--tmpfs", "/run", "--tmpfs", "/run/lock", "--env", "container=docker"]
        options += ["--detach", "--name", self.name, "--hostname", self.name, "--network", NETWORK]
        engine.docker("run", *options, IMAGE, "/lib/systemd/systemd")
        wait_for(lambda: "running" in self.shell("systemctl is-system-running", check=False), "systemd runs", READY_S)
        # Where the units expect what `make install` makes.
        self.shell("ln -s /opt/trustlog /opt/trustlog/.venv")

    def shell(self, script: str, check=True) -> str:
        done = self._engine.docker("exec", self.name, "bash", "-c", script, check=False, seconds=120)
        assert not check or done.returncode == 0, f"{self.name}: {script}: {done.stdout}{done.stderr}\n{self.journal()}"
        return done.stdout

    def journal(self) -> str:
        return self._engine.docker("exec", self.name, "journalctl", "--no-pager", "-n", "60", check=False).stdout

    def copy_in(self, source: Path, target: str) -> None:
        self._engine.docker("cp", str(source), f"{self.name}:{target}")

    def property(self, unit: str, name: str) -> str:
        return self.shell(f"systemctl show --value -p {name} {unit}@replica-{self.number}").strip()


def page_lines(number: int, section: str = "") -> list[str]:
    """The lines of a section, or of what comes before them, for this machine, in the state in which a reader types them."""
    text = PAGE.read_text()
    text = (text.split(f"\n## {section}\n")[1] if section else text).split("\n## ")[0]
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert lines, section
    mine = [
        line.replace("replica-0", f"replica-{number}").replace("--number 0", f"--number {number}") for line in lines
    ]
    return [line.replace("192.0.2.10:", f"m{number}:") for line in mine]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    context = tmp_path_factory.mktemp("context")
    build_context(context)
    with Engine() as engine:
        base_image(engine, BASE, ("dbus", *PYTHON, "systemd", "systemd-sysv"))
        arguments = ("--build-arg", f"BASE={BASE}", "--build-arg", "PIP_NO_INDEX=1", "--target", "build")
        file = f"{context}/deploy/docker/Dockerfile"
        engine.docker("build", "--file", file, "--tag", IMAGE, *arguments, str(context), seconds=600)
        engine.docker("network", "create", NETWORK)
        found = [Machine(engine, number) for number in MACHINES]
        place = tmp_path_factory.mktemp("public")
        public = []
        for machine in found:
            machine.shell("mkdir -p /source/deploy")
            machine.copy_in(PAGE.parent, "/source/deploy/systemd")
            first = page_lines(machine.number)[:-1]
            machine.shell("set -e; cd /source\n" + "\n".join(first))
            public.append(f"/var/lib/trustlog/replica-{machine.number}/replica-{machine.number}.public.toml")
            engine.docker("cp", f"{machine.name}:{public[-1]}", str(place))
        for number in MACHINES:
            found[0].copy_in(place / f"replica-{number}.public.toml", "/tmp")
        found[0].shell(
            "set -e; cd /tmp; PATH=/opt/trustlog/bin:$PATH; trustlog-replica client-key operator; trustlog-replica "
            "assemble replica-?.public.toml --operator $(cat operator/client.pub) --out cluster.toml"
        )
        engine.docker("cp", "m0:/tmp/cluster.toml", str(place))
        for machine in found:
            machine.copy_in(place / "cluster.toml", "/var/lib/trustlog/cluster.toml")
            machine.shell(page_lines(machine.number)[-1])
        found[0].shell("/opt/trustlog/bin/trustlog-replica client-key /var/lib/trustlog/client")
        yield found


def test_the_units_run_as_the_page_says(machines):
    first = machines[0]
    assert first.shell(f"{CLIENT} put greeting hello").strip() == "created"
    assert first.shell(f"{CLIENT} get greeting").strip() == "hello"
    replicas = json.loads(first.shell(f"{CLIENT} status -o json"))["replicas"]
    assert [one["reachable"] for one in replicas] == [True] * 3
    for one, machine in zip(replicas, machines, strict=True):
        uid = int(machine.shell("id -u trustlog-log"))
        assert (one["report"]["log"]["backend"], one["report"]["log"]["service"]["uid"]) == ("process", uid)
        for unit, user in (("trustlog-log", "trustlog-log"), ("trustlog-replica", "trustlog")):
            pid = machine.property(unit, "MainPID")
            fields = dict(
                line.split(":\t") for line in machine.shell(f"cat /proc/{pid}/status").splitlines() if ":\t" in line
            )
            assert set(fields["Uid"].split()) == {machine.shell(f"id -u {user}").strip()}
            assert (int(fields["CapEff"], 16), fields["NoNewPrivs"], fields["Seccomp"]) == (0, "1", "2")
    assert "trustlog-log" in first.shell(f"{CLIENT} status -o table")


def test_what_ends_is_started_again(machines):
    """kill -9 of a log, and of a replica, on each machine: systemd brings them back, and clients go on."""
    for machine in machines:
        for unit in ("trustlog-log", "trustlog-replica"):
            before = machine.property(unit, "MainPID")
            machine.shell(f"kill -KILL {before}")
            other = machines[0]
            other.shell(f"{CLIENT} incr counter")
            wait_for(
                lambda machine=machine, unit=unit, before=before: (
                    machine.property(unit, "ActiveState") == "active"
                    and machine.property(unit, "MainPID") not in {"0", before}
                ),
                f"{unit} of {machine.name} is back",
                READY_S,
            )
            assert machine.property(unit, "NRestarts") == "1"

        def ready(machine=machine):
            replicas = json.loads(machines[0].shell(f"{CLIENT} status -o json"))["replicas"]
            report = replicas[machine.number]["report"]
            return report and report["not_ready"] is None

        wait_for(ready, f"the replica of {machine.name} is ready", READY_S)
    assert machines[0].shell(f"{CLIENT} get counter").strip() == "6"


def test_they_end_when_they_are_asked(machines):
    for machine in machines:
        machine.shell(f"systemctl stop trustlog-replica@replica-{machine.number} trustlog-log@replica-{machine.number}")
        assert machine.property("trustlog-replica", "Result") == "success"
        assert machine.property("trustlog-log", "ActiveState") in {"inactive", "failed"}


def test_a_replica_is_given_the_tpm_and_no_log_of_the_service(machines):
    """As the page says it for a log in a TPM; there is none in a container, so what systemd would do is asked for."""
    machine = machines[-1]
    machine.shell("set -e; cd /source\n" + "\n".join(page_lines(machine.number, "A log in a TPM")))
    assert [machine.property("trustlog-replica", name) for name in ("PrivateDevices", "SupplementaryGroups")] == [
        "no",
        "tss",
    ]
    assert "/dev/tpmrm0 rw" in machine.property("trustlog-replica", "DeviceAllow").splitlines()
    assert machine.property("trustlog-log", "LoadState") == "masked"
