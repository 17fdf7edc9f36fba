"""Real programs with encrypted keys: files, the variable, a terminal; and what they say without one."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replica.cluster.keys import is_encrypted, load_private_key
from tests.cluster.test_members import Changing, under_load
from tests.support.cluster import Processes, environment, replica_command
from tests.support.keymaterial import forms, scalar
from tests.support.waiting import on_loop_for, wait_for

pytestmark = pytest.mark.cluster

WORDS = "correct horse battery staple"


def program(name, *arguments, **more):
    """Run a program without a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", f"{name}.cli.main", *map(str, arguments)],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert WORDS not in done.stdout + done.stderr
    return done


class Terminal:
    """A program on a terminal of its own; what it prints, and what is typed."""

    def __init__(self, name, *arguments):
        self.process, descriptor = pty.fork()
        if self.process == 0:
            program = [sys.executable, "-m", f"{name}.cli.main", *map(str, arguments)]
            os.execve(program[0], program, environment())  # noqa: S606
        self._descriptor = descriptor
        self.shown = b""

    def expect(self, text, seconds=30.0):
        ends = time.monotonic() + seconds
        while text.encode() not in self.shown:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, ends - time.monotonic()))
            assert ready, (text, self.shown)
            try:
                self.shown += os.read(self._descriptor, 4096)
            except OSError:  # the program has ended
                assert text.encode() in self.shown, (text, self.shown)

    def type(self, text):
        os.write(self._descriptor, text.encode() + b"\n")

    def end(self, stop=None):
        if stop is not None:
            os.kill(self.process, stop)
        _, status = os.waitpid(self.process, 0)
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "the words"
    path.write_text(WORDS + "\n")
    path.chmod(0o600)
    return path


def test_an_encrypted_cluster_runs_with_the_variable_and_says_what_is_wrong_without(tmp_path, words):
    made = program("replica", "init", tmp_path / "c", "--base-port", 0, "--passphrase-file", words)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "c" / "replica-0"
    assert all(is_encrypted(path) for path in (folder / "tls.key", tmp_path / "c" / "client" / "client.key"))

    done = program("replica", "run", folder, "-o", "json")
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    error = json.loads(line)["error"]
    assert (error["code"], error["exit"]) == ("configuration", 2)
    assert f"{folder / 'tls.key'}: this private key is encrypted" in error["message"]
    assert "--passphrase-file or TRUSTLOG_PASSPHRASE_FILE" in error["message"]
    words.chmod(0o644)
    open_to_all = program("replica", "run", folder, TRUSTLOG_PASSPHRASE_FILE=str(words))
    assert (open_to_all.returncode, "chmod 600" in open_to_all.stderr) == (2, True)
    words.chmod(0o600)

    with Processes(tmp_path / "c", extra_environment={"TRUSTLOG_PASSPHRASE_FILE": str(words)}) as cluster:
        for number in range(3):
            cluster.start(number)
        for number in range(3):
            cluster.wait_logged(number, "listening")
        given = {"TRUSTLOG_PASSPHRASE_FILE": str(words)}
        put = program("client", "-c", tmp_path / "c", "--deadline", 30, "put", "a", "b", **given)
        assert (put.returncode, put.stdout) == (0, "created\n"), put.stderr
        got = program("client", "-c", tmp_path / "c", "--passphrase-file", words, "get", "a")
        assert (got.returncode, got.stdout) == (0, "b")
        locked = program("client", "-c", tmp_path / "c", "get", "a")
        assert locked.returncode == 2
        assert "client.key: this private key is encrypted" in locked.stderr
        # What needs no key wants no passphrase.
        wait_for(lambda: program("replica", "health", folder).returncode == 0, "ready", 60)
        assert program("replica", "backup", folder, tmp_path / "backup").returncode == 0
        assert program("replica", "debug", "dump", folder, tmp_path / "dump").returncode == 0
        for more, text in (({}, "so it was not opened"), (given, f"the passphrase in {words} ")):
            found = json.loads(program("replica", "doctor", folder, "-o", "json", **more).stdout)["findings"]
            (key,) = (one for one in found if one["check"] == "key")
            assert (key["severity"], key["subject"]) == ("ok", str(folder / "tls.key"))
            assert key["text"].startswith("encrypted")
            assert text in key["text"]
        for number in range(3):
            logged = cluster.log_path(number).read_bytes()
            secret = load_private_key(cluster.folder(number) / "tls.key", WORDS.encode())
            assert not any(form in logged for form in [WORDS.encode(), *forms(scalar(secret))])


def test_the_doctor_names_a_passphrase_that_opens_nothing(tmp_path, words):
    assert program("replica", "init", tmp_path / "c", "--passphrase-file", words).returncode == 0
    words.write_text("another\n")
    folder = tmp_path / "c" / "replica-0"
    done = program("replica", "doctor", folder, "--offline", "-o", "json", TRUSTLOG_PASSPHRASE_FILE=str(words))
    (key,) = (one for one in json.loads(done.stdout)["findings"] if one["check"] == "key")
    assert (done.returncode, key["severity"]) == (1, "problem")
    assert "does not open this private key" in key["text"]
    plain = program("replica", "keys", "passphrase", tmp_path / "c", "--remove")
    assert plain.returncode == 2
    words.write_text(WORDS + "\n")
    plain = program("replica", "keys", "passphrase", tmp_path / "c", "--remove", "--passphrase-file", words)
    assert (plain.returncode, len(plain.stdout.splitlines())) == (0, 5), plain.stderr
    again = program("replica", "keys", "passphrase", tmp_path / "c", "--remove")
    assert (again.returncode, again.stdout.startswith("nothing was changed: ")) == (0, True), again.stdout
    done = program("replica", "doctor", folder, "--offline", "-o", "json")
    (key,) = (one for one in json.loads(done.stdout)["findings"] if one["check"] == "key")
    assert key["text"].startswith("not encrypted")


def test_all_keys_in_a_clusters_directory_get_a_passphrase_whatever_their_folders_are_called(tmp_path, words):
    assert program("replica", "init", tmp_path / "c").returncode == 0
    (tmp_path / "c" / "replica-2").rename(tmp_path / "c" / "new-2")
    (tmp_path / "c" / "client").rename(tmp_path / "c" / "meter")
    (tmp_path / "c" / "a web server").mkdir()
    (tmp_path / "c" / "a web server" / "tls.key").write_text("not ours")
    done = program("replica", "keys", "passphrase", tmp_path / "c", "--new-passphrase-file", words)
    keys = sorted(path.relative_to(tmp_path) for path in (tmp_path / "c").glob("[!a]*/*.key"))
    assert (done.returncode, len(keys)) == (0, 5), done.stderr
    assert (tmp_path / "c" / "a web server" / "tls.key").read_text() == "not ours"
    assert all(is_encrypted(tmp_path / key) for key in keys)


def test_a_dump_is_refused_that_would_hold_an_encrypted_key(tmp_path, words):
    assert program("replica", "init", tmp_path / "c", "--passphrase-file", words).returncode == 0
    folder = tmp_path / "c" / "replica-0"
    log = tmp_path / "its.log"
    arguments = ("debug", "dump", folder, tmp_path / "dump", "--log", log, "--deadline", "0.5")
    log.write_text((folder / "tls.key").read_text())
    done = program("replica", *arguments)
    assert (done.returncode, str(folder / "tls.key") in done.stderr) == (1, True)
    # The key itself is found only where its passphrase is known.
    log.write_text(scalar(load_private_key(folder / "tls.key", WORDS.encode())).hex())
    done = program("replica", *arguments, TRUSTLOG_PASSPHRASE_FILE=str(words))
    assert (done.returncode, str(folder / "tls.key") in done.stderr) == (1, True)
    assert not (tmp_path / "dump").exists()


def test_on_a_terminal_one_is_asked(tmp_path):
    shell = Terminal("replica", "init", tmp_path / "c", "--base-port", 0, "--encrypt-keys")
    shell.expect("New passphrase: ")
    shell.type(WORDS)
    shell.expect("Repeat it: ")
    shell.type(WORDS)
    shell.expect("next:")
    assert shell.end() == 0
    assert WORDS.encode() not in shell.shown
    folder = tmp_path / "c" / "replica-0"

    wrong = Terminal("replica", "run", folder)
    wrong.expect(f"Passphrase of {folder}")
    wrong.type("not it")
    wrong.expect("that was typed does not open this private key")
    assert wrong.end() == 2

    right = Terminal("replica", "run", folder)
    right.expect("tls.key: ")
    right.type(WORDS)
    right.expect("listening")
    assert right.end(signal.SIGTERM) == 0
    assert WORDS.encode() not in right.shown

    client = Terminal("client", "-c", tmp_path / "c", "keys", "passphrase")
    client.expect("New passphrase: ")
    client.type("one")
    client.expect("Repeat it: ")
    client.type("two")
    client.expect("the two differ")
    assert client.end() == 2

    client = Terminal("client", "-c", tmp_path / "c", "keys", "passphrase")
    for prompt, answer in (("New passphrase: ", "new"), ("Repeat it: ", "new"), ("Passphrase of ", WORDS)):
        client.expect(prompt)
        client.type(answer)
    client.expect("encrypted with the new passphrase; 1 of 1")
    assert client.end() == 0
    assert load_private_key(tmp_path / "c" / "client" / "client.key", b"new")


def test_new_keys_without_a_terminal_and_without_a_file(tmp_path):
    done = program("replica", "client-key", tmp_path / "client", "--encrypt-keys")
    assert (done.returncode, "no terminal to ask on" in done.stderr) == (2, True)
    assert not (tmp_path / "client").exists()
    done = program("replica", "keys", "passphrase", tmp_path)
    assert (done.returncode, "holds no private key" in done.stderr) == (2, True)


def test_a_development_cluster_with_a_passphrase(tmp_path, words):
    command = [*replica_command(tmp_path / "c"), "--passphrase-file", str(words)]
    command[command.index("run")] = "dev"
    log = tmp_path / "log"
    with log.open("wb") as out:
        dev = subprocess.Popen(command, env=environment(), stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: log.read_text().count("listening") == 3 or dev.poll() is not None, "all listening", 60)
        assert dev.poll() is None, log.read_text()
        assert is_encrypted(tmp_path / "c" / "replica-2" / "tls.key")
    finally:
        dev.send_signal(signal.SIGINT)
        assert dev.wait(30) == 0


def replace_under_load(cluster: Changing, public_file: Path, **variables: str) -> None:
    """Kill replica 2, and replace it while clients work, until all are over."""

    def replace():
        cluster.kill(2)
        done = program("replica", "member", "replace", cluster.directory, public_file, **variables)
        assert done.returncode == 0, done.stderr
        cluster.start(2)

    @on_loop_for(120)
    async def work():
        await under_load(cluster, replace)
        await cluster.until_all_are_over(1)

    work()


def test_members_change_with_an_encrypted_operators_key_and_replicas_keep_their_passphrase(tmp_path, words):
    """A replica that goes over to the next list of members makes its TLS contexts anew, and asks nobody."""
    variable = {"TRUSTLOG_PASSPHRASE_FILE": str(words)}
    with Changing(tmp_path / "c", passphrase=WORDS.encode(), extra_environment=variable) as cluster:
        assert is_encrypted(tmp_path / "c" / "operator" / "client.key")
        client_key = tmp_path / "c" / "client" / "client.key"
        done = program("replica", "keys", "passphrase", client_key.parent, "--remove", **variable)
        assert done.returncode == 0, done.stderr
        cluster.start_and_wait()
        public_file = cluster.make(2, "new-2")
        locked = program("replica", "member", "replace", tmp_path / "c", public_file)
        assert locked.returncode == 2
        assert "operator/client.key: this private key is encrypted" in locked.stderr

        replace_under_load(cluster, public_file, **variable)


@pytest.mark.long
def test_keys_that_are_encrypted_while_replicas_run_are_no_matter_when_members_change(tmp_path, words):
    """No file was named when they were started: they go on with the keys that they have, and want it at the next start."""
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        for number in (0, 1):
            done = program("replica", "keys", "passphrase", cluster.folder(number), "--new-passphrase-file", words)
            assert done.returncode == 0, done.stderr
        public_file = cluster.make(2, "new-2")

        replace_under_load(cluster, public_file)
        assert cluster.kill(1, signal.SIGTERM) == 0
        locked = program("replica", "run", cluster.folder(1))
        assert (locked.returncode, "this private key is encrypted" in locked.stderr) == (2, True)
