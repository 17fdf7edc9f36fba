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
from replica.cluster.keys import is_encrypted
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

    def waiting(self) -> subprocess.Popen:
        """Start the script's `await`."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["timeout", str(DEADLINE_S), "sh", SCRIPT, "await"], env=self.environment, **pipes)

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
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.iterdir()}


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
    assert cluster.genesis.operators == ()
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
    for machine in machines:
        machine.setup("replica", f"replica-{machine.number}:7100")
    with machines[1].waiting() as waiting:
        machines[0].setup("cluster", "3")
        assert waiting.stdout.read() == (machines[1].public / "replica-1.public.toml").read_text()
    assert waiting.returncode == 0


def test_who_may_change_members_stands_in_the_cluster_file(machines):
    machines[0].setup("operator")
    public_key = (machines[0].directory / "operator" / "client.pub").read_text()
    machines[0].setup("operator")
    for machine in machines:
        machine.setup("replica", f"replica-{machine.number}:7100")
    machines[0].setup("cluster", "3")
    cluster = load_cluster_file(machines[0].public / "cluster.toml")
    assert cluster.genesis.operators == (bytes.fromhex(public_key),), "the key that was made first"
    assert modes(machines[0].directory / "operator")["client.key"] == 0o600


def test_a_passphrase_is_copied_for_nobody_else_to_read(machines, tmp_path):
    """As a Secret of Kubernetes arrives: a group may read it, which the program refuses."""
    secret, copied = tmp_path / "secret", tmp_path / "memory" / "passphrase"
    secret.write_text("correct horse\n")
    secret.chmod(0o440)
    copied.parent.mkdir()
    machine = machines[0]
    machine.environment |= {"TRUSTLOG_PASSPHRASE_SECRET": str(secret), "TRUSTLOG_PASSPHRASE_FILE": str(copied)}
    for _ in range(2):
        machine.setup("replica", "replica-0:7100")
        assert (copied.read_text(), modes(copied.parent)["passphrase"]) == ("correct horse\n", 0o600)
    assert is_encrypted(machine.directory / "replica" / "tls.key")


@pytest.fixture
def shown(tmp_path):
    """A machine whose folder is a member's when its members.toml says so; no program is asked but a stand-in."""
    (tmp_path / "public").mkdir()
    machine = Machine(tmp_path, 1)
    programs = machine.directory / "bin"
    programs.mkdir()
    shim = programs / "trustlog-replica"
    shim.write_text(
        '#!/bin/sh\n[ ! -e "$3/broken" ] || { cat "$3/broken" >&2; exit 2; }\ngrep -q mine "$3/members.toml" "$3/replica.toml" 2> /dev/null || { echo "no member" >&2; exit 1; }\n'
    )
    shim.chmod(0o755)
    machine.environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    (machine.directory / "replica").mkdir()
    (machine.directory / "replica" / "replica-1.public.toml").write_text("public\n")
    (machine.directory / "replica" / "replica.toml").write_text('listen = "0.0.0.0:7100"\n')
    (machine.public / "cluster.toml").write_text("x")
    return machine


@pytest.mark.parametrize(
    ("there", "brought", "taken"),
    [
        ({}, "mine", "mine"),
        ({}, "another's", None),
        ({"store.sqlite": "it ran"}, "mine", None),
        ({"replica.toml": 'listen = "mine"'}, "mine", None),
        ({"members.toml": "mine, and older"}, "mine", "mine, and older"),
        ({"members.toml": "not in it"}, "mine", "not in it"),
        ({"broken": "a variable"}, "mine", None),
        ({"broken": "a variable", "members.toml": "its own"}, "mine", "its own"),
        ({"members.trying": "", "members.toml": "half a li"}, "mine", "mine"),
        ({"members.trying": "", "members.toml": "another's"}, "another's", None),
    ],
    ids=[
        "new and a member",
        "not in it",
        "it ran",
        "member without it",
        "has its own",
        "has one without it",
        "something else is wrong",
        "something else is wrong and it has its own",
        "ended while it tried one",
        "ended while it tried a wrong one",
    ],
)
def test_a_list_is_taken_by_who_never_ran_and_is_no_member_without_it(shown, there, brought, taken):
    folder = shown.directory / "replica"
    for name, content in there.items():
        (folder / name).write_text(content)
    (shown.public / "cluster.members.toml").write_text(brought)
    shown.setup("replica", "replica-1:7100")
    found = folder / "members.toml"
    assert (found.read_text() if found.exists() else None) == taken


def test_who_is_no_member_yet_waits_and_says_why_once(shown):
    with shown.waiting() as waiting:
        assert [waiting.stdout.readline() for _ in range(2)] == ["public\n", "# waiting: no member\n"]
        (shown.public / "cluster.members.toml").write_text("mine")
        assert waiting.stdout.read() == ""
    assert waiting.returncode == 0
    assert (shown.directory / "replica" / "members.toml").read_text() == "mine"


def test_what_is_wrong_otherwise_is_said_and_takes_nothing(shown):
    broken, members = shown.directory / "replica" / "broken", shown.directory / "replica" / "members.toml"
    broken.write_text("environment: a variable\n")
    (shown.public / "cluster.members.toml").write_text("mine")
    with shown.waiting() as waiting:
        assert [waiting.stdout.readline() for _ in range(2)] == ["public\n", "# waiting: environment: a variable\n"]
        assert not members.exists()
        broken.unlink()
        assert waiting.stdout.read() == ""
    assert waiting.returncode == 0
    assert members.read_text() == "mine"


def test_a_replica_with_a_passphrase_keeps_its_list(machines, tmp_path):
    """With a chart's variables and the real program: what is there already is never taken away."""
    secret, copied = tmp_path / "secret", tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    given = {"TRUSTLOG_PASSPHRASE_SECRET": str(secret), "TRUSTLOG_PASSPHRASE_FILE": str(copied)}
    for machine in machines:
        machine.environment |= given
        machine.setup("replica", f"replica-{machine.number}:7100")
    machines[0].setup("cluster", "3")
    machine = machines[1]
    own = machine.directory / "replica" / "members.toml"
    own.write_text("format = 1\nlinks = []\n")
    (machine.public / "cluster.members.toml").write_text("format = 1\n# another\nlinks = []\n")
    machine.setup("replica", "replica-1:7100")
    assert own.read_text() == "format = 1\nlinks = []\n"
    own.unlink()
    machine.setup("await")
    assert not own.exists(), "it is a member without one"


def test_who_ran_does_not_wait(shown):
    """Whatever is wrong with it then, the replica itself says."""
    (shown.directory / "replica" / "store.sqlite").write_text("it ran")
    with shown.waiting() as waiting:
        assert waiting.stdout.read() == "public\n"
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
    (machine.public / "cluster.members.toml").write_text("y")
    assert (folder / "cluster.members.toml").read_text() == "y"
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
