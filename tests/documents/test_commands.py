"""What the documents say is run: README's commands and examples, the several-machines page."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from client.records import LINE_BYTES_MAX
from replica.application import Context, OperationError, load_application
from replica.apps import kv
from replica.cluster.clusterfile import load_cluster_file
from replica.core.evidence import Claim, Evidence, Kind
from replica.core.genesis import Limits
from replica.core.group import encode_group, encode_payloads
from replica.core.state import BucketedMap
from replica.shell.evidence import EvidenceFolder
from tests.support.ports import free_port
from tests.support.tools import required
from tests.support.waiting import wait_for
from trustlog import AttestedLog, BackendKind, LogState, entry_digest, open_log
from trustlog.cli.documents import contradiction_document

ROOT = Path(__file__).parents[2]
PROGRAMS = {"trustlog": "trustlog", "trustlog-replica": "replica", "trustlog-client": "client"}
DEADLINE_S = 60


def commands(page: str) -> list[str]:
    """The indented command lines of a page, comments cut off."""
    lines = re.findall(
        r"^    ((?:\w+=\S+ )*(?:trustlog|make|source|export)\b.*)$", (ROOT / page).read_text(), re.MULTILINE
    )
    return [line.split(" #")[0].strip() for line in lines]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def as_process(line: str) -> list[str]:
    """A command line of the documents, run by this interpreter's packages."""
    words = shlex.split(line)
    while "=" in words[0]:
        words.pop(0)
    return [sys.executable, "-m", f"{PROGRAMS[words[0]]}.cli.main", *words[1:]]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRUSTLOG")}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}.", "PYTHONUNBUFFERED": "1"} | more


def ended(command: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def run(line: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return ended(as_process(line), cwd, **more)


def type_lines(lines: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Type lines into one shell, which ends at the first that fails; `.venv` there is the environment that runs this."""
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        required("the tests run in no environment that could be activated")
    (cwd / ".venv").symlink_to(sys.prefix)
    return ended(["bash", "-exc", "\n".join(lines)], cwd)


def run_python(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python` as a page types it, by this interpreter."""
    return ended([sys.executable, *words], cwd)


def executed(cwd: Path, cluster: str, number: int) -> int:
    """How far a running replica has executed; 0 if it does not answer."""
    reported = json.loads(run(f"trustlog-client -c {cluster} status -o json", cwd).stdout)["replicas"][number]["report"]
    return reported["executed"] if reported else 0


class Dev:
    """`trustlog-replica dev` in the background."""

    def __init__(self, line: str, cwd: Path, ready: str = "Ctrl-C ends all of it") -> None:
        self.log = cwd / "dev.log"
        self._ready = ready.encode()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(as_process(line), cwd=cwd, env=environment(), stdout=log, stderr=log)

    def __enter__(self) -> Self:
        """Wait until the cluster's directory is there, as a user would who reads the banner."""
        deadline = time.monotonic() + DEADLINE_S
        while self._ready not in self.log.read_bytes():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.__exit__()
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(DEADLINE_S)


def test_readme_cluster_and_application(tmp_path: Path) -> None:
    """The commands of "A cluster of your own" and "An application in 20 lines", in a directory with a space."""
    cwd = tmp_path / "a b"
    cwd.mkdir()
    lines = commands("README.md")
    first, second = (line for line in lines if " dev " in line)
    (cwd / "votes.py").write_text(next(block for block in python_blocks("README.md") if "class Votes" in block))
    with Dev(first, cwd) as dev:
        # The gateway's lines are run by test_front_doors.
        typed = [
            line
            for line in lines
            if line.split()[0] in {"source", "export", "trustlog-client"} and not {"-c", "gateway"} & set(line.split())
        ]
        assert len(typed) >= 9
        done = type_lines(typed, cwd)
        assert done.returncode == 0, (done.stderr, dev.log.read_text()[-2000:])
        assert done.stdout.startswith("created\nhello")
        assert 'put "greeting" "hello" gave replaced' in done.stdout
        example = next(block for block in python_blocks("README.md") if "Client.from_dir" in block)
        done = run_python(["-c", example], cwd)
        assert (done.returncode, done.stdout) == (0, "b'hello'\n"), done.stderr
    assert dev.process.returncode == 0
    with Dev(second, cwd) as dev:
        line = next(line for line in lines if "vote alice" in line)
        done = run(line, cwd)
        assert (done.returncode, done.stdout.strip()) == (0, "1"), (done.stderr, dev.log.read_text()[-2000:])
        again = run(line, cwd)
        assert again.returncode == 1
        assert "voted already" in again.stderr


def test_readme_application_refuses_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "votes.py").write_text(next(block for block in python_blocks("README.md") if "class Votes" in block))
    monkeypatch.syspath_prepend(tmp_path)
    votes = load_application("votes:Votes")
    context = Context(BucketedMap(), client=b"k" * 65)
    assert votes.apply(b"vote alice", context) == b"1"
    with pytest.raises(OperationError):
        votes.apply(b"vote bob", context)
    assert votes.apply(b"count alice", context) == b"1"


def test_what_the_readme_makes_in_the_clone_is_ignored() -> None:
    """Clusters hold private keys."""
    made = [f"{name}/" for name in re.findall(r"trustlog-replica dev (\S+)", (ROOT / "README.md").read_text())]
    assert made == ["my-cluster/", "vote-cluster/"]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"/{name}" for name in [*made, "votes.py"]} <= set(ignored)


def test_the_limits_in_the_clients_page() -> None:
    page, limits = (ROOT / "client" / "README.md").read_text(), Limits()
    assert (limits.operation_bytes_max, limits.result_bytes_max) == (2**20, 2**20)
    assert f"1 to {kv.KEY_BYTES_MAX} bytes" in page
    assert f"{kv.SCAN_LIMIT_MAX} keys, and it ends early after {kv.SCAN_BYTES_MAX // 1024} KiB" in page
    assert f"| line of `load` | {LINE_BYTES_MAX // 2**20} MiB |" in page
    names = set(re.findall(r"`genesis\.limits\.(\w+)`", page))
    assert names == {"operation_bytes_max", "result_bytes_max"}


def test_the_private_files_that_the_security_page_names(tmp_path: Path) -> None:
    """Each that it says is refused when others may read it, is."""
    page = (ROOT / "SECURITY.md").read_text()
    assert (
        "refuse `seal.key`, `tls.key`, `client.key` and a gateway's `--password-file`, and the file of a pass" in page
    )
    assert run("trustlog-replica init c --base-port 0", tmp_path).returncode == 0
    for name, command in (
        ("replica-0/log/seal.key", "trustlog end c/replica-0/log"),
        ("replica-0/tls.key", "trustlog-replica run c/replica-0"),
        ("client/client.key", "trustlog-client -c c get k"),
        ("password", "trustlog-client -c c gateway --password-file c/password"),
        ("password", "trustlog-replica client-key other --passphrase-file c/password"),
    ):
        if name == "password":
            (tmp_path / "c" / name).write_text("secret\n")
            (tmp_path / "c" / "client" / "client.key").chmod(0o600)
        (tmp_path / "c" / name).chmod(0o640)
        done = run(command, tmp_path)
        assert done.returncode == 2, (name, done.stderr)
        assert "open to other users" in done.stderr


def test_several_machines_page(tmp_path: Path) -> None:
    """keygen three times, assemble, run, client-key: with loopback addresses instead of the documentation's."""
    lines = commands("replica/cluster/README.md")
    keygen = next(line for line in lines if "keygen" in line)
    ports = []
    for number in range(3):
        ports.append(free_port())
        line = keygen.replace("replica-0", f"replica-{number}").replace("--number 0", f"--number {number}")
        line = re.sub(r"--address \S+", f"--address 127.0.0.1:{ports[-1]}", line)
        (tmp_path / "my-cluster").mkdir(exist_ok=True)
        done = run(line, tmp_path)
        assert done.returncode == 0, done.stderr
        # What a user copies to the machine that assembles.
        made = tmp_path / "my-cluster" / f"replica-{number}" / f"replica-{number}.public.toml"
        shutil.copy(made, tmp_path)
    key = "$(cat my-cluster/operator/client.pub)"
    made = [line for line in lines if line.split()[1] in {"client-key", "assemble"}]
    assert ["operator" in line for line in made] == [True, True, False]
    for line in made:
        public = tmp_path / "my-cluster" / "operator" / "client.pub"
        done = run(line.replace(key, public.read_text().strip()) if key in line else line, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert key in made[1]
    assert load_cluster_file(tmp_path / "my-cluster").genesis.operators
    running = []
    try:
        for number in range(3):
            line = next(line for line in lines if "run" in line.split()).replace("replica-0", f"replica-{number}")
            with (tmp_path / f"{number}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(as_process(line), cwd=tmp_path, env=environment(), stdout=log, stderr=log)
                )
        done = run("trustlog-client -c my-cluster --deadline 30 put a b", tmp_path)
        assert done.returncode == 0, (done.stderr, (tmp_path / "0.log").read_text())
        # Two of them served that; the third may not have got so far that it can end in order.
        logs = [tmp_path / f"{number}.log" for number in range(3)]
        wait_for(lambda: all("listening" in log.read_text() for log in logs), "all three listening", 30)
    finally:
        for process in running:
            process.terminate()
        assert [process.wait(20) for process in running] == [0, 0, 0]


def test_the_commands_of_the_section_on_passphrases(tmp_path: Path) -> None:
    """All of them, in their order; the replica and the client against nobody, so far as the key is opened."""
    page = (ROOT / "replica/cluster/README.md").read_text()
    section = page.split("## Keys with a passphrase")[1].split("\n## ")[0]
    lines = re.findall(r"^    (trustlog\S* .*)$", section, re.MULTILINE)
    assert len(lines) == 6
    for name, words in (("my-passphrase", "one"), ("my-new-passphrase", "two")):
        (tmp_path / name).write_text(words + "\n")
        (tmp_path / name).chmod(0o600)
    for line in lines:
        if " get " in line:
            done = run(line.replace("get", "--deadline 0.2 get"), tmp_path)
            assert (done.returncode, "not executed" in done.stderr) == (3, True), done.stderr
        elif " run " in line:
            with Dev(line, tmp_path, "listening") as running:
                pass
            assert running.process.returncode == 0
        else:
            done = run(line.replace(" init my-cluster", " init my-cluster --base-port 0"), tmp_path)
            assert done.returncode == 0, (line, done.stderr)
    headers = {path: path.read_text().splitlines()[0] for path in (tmp_path / "my-cluster").glob("*/*.key")}
    assert {path.parent.name for path, head in headers.items() if "ENCRYPTED" not in head} == {"replica-0", "client"}
    assert len(headers) == 5  # three replicas', the client's and the operator's


def test_one_attestation_is_verified_offline(tmp_path: Path) -> None:
    """`inspect` of a stopped replica and `trustlog verify` with a public key: yes; with another context or key: no."""
    assert run("trustlog-replica init c --base-port 0", tmp_path).returncode == 0
    with Dev("trustlog-replica dev c", tmp_path) as dev:
        done = run("trustlog-client -c c --deadline 30 put a b", tmp_path)
        assert done.returncode == 0, (done.stderr, dev.log.read_text()[-2000:])
        # Two of three served that; the third may have read nothing of it yet.
        wait_for(lambda: executed(tmp_path, "c", 1) > 0, "replica 1 executing it", DEADLINE_S)
    done = run("trustlog-replica inspect c/replica-1 --log 0 --index 1 -o json", tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "group.json").write_text(done.stdout)
    context = re.search(r'"context": "([0-9a-f]{64})"', done.stdout)
    assert context is not None
    good = f"trustlog verify --key c/replica-0/log/log.pub --context {context[1]} group.json -o json"
    assert run(good, tmp_path).returncode == 0
    assert run(good.replace("replica-0", "replica-1"), tmp_path).returncode == 1
    assert run(good.replace(context[1], "0" * 64), tmp_path).returncode == 1
    assert run(good.replace(context[1], "0" * 63), tmp_path).returncode == 2
    missing = run("trustlog-replica inspect c/replica-1 --log 0 --index 999999 -o json", tmp_path)
    assert missing.returncode == 1


class Unkept:
    """Where a log forgets what it says."""

    def save(self, state: bytes) -> None: ...


def test_the_evidence_commands_of_the_replicas_page(tmp_path: Path) -> None:
    """With evidence made by hand, at the index and under the names that the page shows."""
    lines = [line for line in commands("replica/README.md") if "evidence" in line]
    assert len(lines) == 3
    names = [re.search(r"evidence/(\S+)", line) for line in lines[1:]]
    assert run("trustlog-replica init my-cluster --base-port 0", tmp_path).returncode == 0
    cluster = load_cluster_file(tmp_path / "my-cluster")
    genesis, folder = cluster.genesis, EvidenceFolder(tmp_path / "my-cluster" / "replica-0" / "evidence")
    with open_log(tmp_path / "my-cluster" / "replica-2" / "log", kind=BackendKind.PROCESS) as log:
        for payloads in ([b"x"] * 56, [b"junk"]):
            digests = [entry_digest(payload) for payload in payloads]
            attestation = log.append(digests, context=genesis.context())
        private_key = log._private_key
    raw = encode_group(attestation, encode_payloads((b"junk",)))
    shown = Evidence(Kind.ENTRY, genesis.cluster_id(), Claim(2, 57, "malformed"), ((raw,),))
    forked = AttestedLog(private_key, BackendKind.PROCESS, LogState.empty(log.log_id), Unkept())
    other = forked.append([entry_digest(b"y")] * 57, context=genesis.context())
    fork = json.dumps(contradiction_document(attestation, digests, other, [entry_digest(b"y")] * 57))
    for name, content in zip(names, (shown.encode(), fork.encode()), strict=True):
        assert name is not None
        assert folder.write(name[1], content)
    for line in lines:
        done = run(line, tmp_path)
        assert done.returncode == 0, (line, done.stderr)
        assert "57" in done.stdout
