"""The containers' setup script, run without containers: what it makes, what it leaves alone, and how it fails."""

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from replica.cli.probe import listens
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home
from tests.support.cluster import environment
from tests.support.waiting import wait_for
from tests.trustlog.service.support import Service, public_folder

SCRIPT = Path(__file__).parents[2] / "deploy" / "docker" / "setup"
DEADLINE_S = 60


class Machine:
    """Where one pod's or container's folders are."""

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory / str(number), number
        self.directory.mkdir()
        self.public = directory / "public"
        self.environment = environment(
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            TRUSTLOG_LOG_STATE=f"{self.directory}/state",
            TRUSTLOG_LOG_SOCKET=f"{self.directory}/run/log.sock",
            TRUSTLOG_FOLDER=f"{self.directory}/replica",
            TRUSTLOG_PUBLIC=str(self.public),
            TRUSTLOG_CLIENT=str(self.directory),
            TRUSTLOG_REPLICA_USER=str(os.getuid()),
        )

    def setup(self, *words: str, check=True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            ["sh", SCRIPT, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def log(self) -> subprocess.Popen:
        """Start the script's `log`. In a container it is never root; here it may be, and then stays it."""
        programs = self.directory / "bin"
        programs.mkdir(exist_ok=True)
        shim = programs / "trustlog"
        stay = '[ "$1" != serve ] || set -- "$@" --user 0\n' if os.getuid() == 0 else ""
        shim.write_text(f'#!/bin/sh\n{stay}exec "{sys.executable}" -m trustlog.cli.main "$@"\n')
        shim.chmod(0o755)
        own = self.environment | {"PATH": f"{programs}{os.pathsep}{self.environment['PATH']}"}
        return subprocess.Popen(["sh", SCRIPT, "log"], env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.fixture
def machines(tmp_path):
    """Three, each with a running log."""
    (tmp_path / "public").mkdir()
    with contextlib.ExitStack() as stack:
        found = []
        for number in range(3):
            machine = Machine(tmp_path, number)
            service = Service(stack.enter_context(public_folder()))
            stack.enter_context(service)
            machine.environment["TRUSTLOG_LOG_SOCKET"] = str(service.socket)
            found.append(machine)
        yield found


def test_a_cluster_is_made_once(machines):
    for machine in machines:
        done = machine.setup("replica", f"replica-{machine.number}.example:71{machine.number:02}")
        assert (machine.public / f"replica-{machine.number}.public.toml").read_text() in done.stdout
    machines[0].setup("cluster", "3")
    cluster = load_cluster_file(machines[0].public / "cluster.toml")
    assert [place.address for place in cluster.replicas] == [f"replica-{n}.example:71{n:02}" for n in range(3)]
    before = {path: path.read_bytes() for path in machines[1].directory.rglob("*") if path.is_file()}
    for machine in machines:
        home = load_home(machine.directory / "replica")
        assert (home.number, home.listen_address) == (machine.number, ("0.0.0.0", 7100 + machine.number))
        assert modes(machine.directory)["replica"] == 0o700
        assert modes(machine.directory / "replica")["tls.key"] == 0o600
        assert modes(machine.directory / "replica")["replica.toml"] & 0o077 == 0
        machine.setup("replica", f"replica-{machine.number}.example:71{machine.number:02}")
    machines[0].setup("cluster", "3")
    assert all(path.read_bytes() == content for path, content in before.items()), "done once"
    assert load_cluster_file(machines[0].public / "cluster.toml").cluster_id == cluster.cluster_id


def test_what_waits_says_the_public_file_and_nothing_else(machines):
    machine = machines[1]
    machine.setup("replica", "replica-1:7100")
    with subprocess.Popen(
        ["sh", SCRIPT, "await"], env=machine.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as waiting:
        (machine.public / "cluster.toml").write_text("here")
        assert waiting.stdout.read() == (machine.public / "replica-1.public.toml").read_text()
    assert waiting.returncode == 0


def test_a_clients_key_and_password(machines):
    machine = machines[0]
    (machine.public / "cluster.toml").write_text("x")
    machine.setup("client")
    folder = machine.directory
    assert modes(folder)["password"] == 0o600
    assert modes(folder / "client")["client.key"] == 0o600
    password = (folder / "password").read_text()
    assert len(password) > 30
    assert (folder / "cluster.toml").read_text() == "x"
    machine.setup("client")
    assert (folder / "password").read_text() == password


def test_words_that_it_does_not_know(machines):
    for words in ((), ("other",), ("replica",), ("cluster",)):
        done = machines[0].setup(*words, check=False)
        assert done.returncode == 2, words
        assert done.stderr


def test_a_log_is_made_once_and_served(tmp_path):
    machine = Machine(tmp_path, 0)
    socket, public = Path(machine.environment["TRUSTLOG_LOG_SOCKET"]), machine.directory / "state" / "log.pub"
    keys = []
    for _ in range(2):
        with machine.log() as log:
            wait_for(lambda log=log: listens(socket) or log.poll() is not None, "it listens", DEADLINE_S)
            is_running = log.poll() is None
            log.kill()
            assert is_running, log.stderr.read()
        keys.append(public.read_text())
        assert not listens(socket)
    assert keys[0] == keys[1]
