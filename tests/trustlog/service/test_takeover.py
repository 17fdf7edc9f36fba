"""What a program that took the replica over cannot do to a log that is a process of its own, and what it can.

The first test is what the process backend is for. The others show that its checks can fail, and name the weaker cases:
the same user, and root.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from tests.trustlog.service import intruder
from tests.trustlog.service.support import (
    IS_ROOT,
    LOG_UID,
    REPLICA_UID,
    STRANGER_UID,
    Service,
    as_root,
    public_folder,
)
from tests.trustlog.support import CONTEXT, digests_of
from trustlog import (
    Attestation,
    BackendKind,
    LogIdentity,
    VerifyingKey,
    create,
    entry_digest,
    open_log,
)
from trustlog.service import command as command_of_service
from trustlog.service.client import RemoteLog, ServiceLostError, ServiceRefusedError
from trustlog.service.protocol import Protection
from trustlog.statements import AppendStatement

WHOLE = Protection.NO_NEW_PRIVILEGES | Protection.NO_DUMP
FILES = ("read log.state", "open log.state to write", "read seal.key", "open seal.key to write")
FOLDER = ("list the state's folder", "put a file into it", "rename it")
MEMORY = ("read /proc/PID/mem", "read /proc/PID/maps", "process_vm_readv", "ptrace")
REFUSED = {"EACCES", "EPERM"}


def intrude(service: Service, uid: int) -> dict:
    """Run the intruder as `uid`; it is the replica's program from now on."""
    arguments = [service.socket, service.state, service.process.pid, uid]
    done = subprocess.run(
        [sys.executable, "-m", intruder.__name__, *map(str, arguments)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_never_two_at_one_index(found):
    """Whatever else it could do: over the socket no index got a second value, and nothing was taken back."""
    first = AppendStatement.decode(bytes.fromhex(found["append"]))
    again = AppendStatement.decode(bytes.fromhex(found["issued again"]))
    assert (first.first, first.last) == (found["last"], found["last"])
    assert again == first
    assert found["append another at the same index"] == "MisuseError"
    assert found["truncate below"] == "MisuseError"
    assert found["second connection"] == "ServiceBusyError"


@as_root
def test_a_replica_that_was_taken_over_is_held_to_its_log():
    with public_folder() as folder, Service(folder, client_uid=REPLICA_UID) as service:
        found = intrude(service, REPLICA_UID)
        check_never_two_at_one_index(found)
        for what in (*FILES, *FOLDER, *MEMORY, "put another socket in its place", "read its files through /proc"):
            assert found[what] in REFUSED, (what, found[what])
        assert found["signal it"] in REFUSED
        assert service.process.poll() is None


@as_root
def test_under_the_same_user_only_its_memory_is_kept():
    """The weaker case: status says so. Here the log's files can be read and written, so its key is known."""
    with public_folder() as folder, Service(folder, client_uid=LOG_UID) as service:
        found = intrude(service, LOG_UID)
        check_never_two_at_one_index(found)
        assert {found[what] for what in (*FILES, *FOLDER[:2])} == {"done"}
        for what in MEMORY:
            assert found[what] in REFUSED, (what, found[what])


@as_root
def test_without_the_sandbox_memory_can_be_read(tmp_path):
    """The check of memory can fail: a process of the same user that was not hidden is open to it."""
    sleeper = subprocess.Popen(["/bin/sleep", "60"], user=LOG_UID, group=LOG_UID, extra_groups=[], cwd="/")
    try:
        code = (
            "import os, sys\nfrom tests.trustlog.service import intruder\n"
            f"os.setgroups([]); os.setresgid({LOG_UID},{LOG_UID},{LOG_UID}); os.setresuid({LOG_UID},{LOG_UID},{LOG_UID})\n"
            "print(intruder.attempt(lambda: intruder.read_memory(int(sys.argv[1]))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(sleeper.pid)],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == "done\n"
    finally:
        sleeper.kill()
        sleeper.wait()


@as_root
def test_root_reads_everything():
    """Named in SECURITY.md as not withstood: against root, a TPM is needed."""
    with public_folder() as folder, Service(folder, client_uid=0) as service:
        found = intrude(service, 0)
        check_never_two_at_one_index(found)
        assert {found[what] for what in (*FILES, "read /proc/PID/mem")} == {"done"}


@as_root
@pytest.mark.parametrize("uid", [LOG_UID, REPLICA_UID])
def test_what_root_made_only_root_can_exchange(uid):
    """Root sets an owner there at every start: neither user may put a link to another file in the socket's place."""
    code = (
        "import os, sys, pathlib\nfrom tests.trustlog.service.intruder import attempt\n"
        "path = pathlib.Path(sys.argv[1])\n"
        f"os.setgroups([]); os.setresgid({uid},{uid},{uid}); os.setresuid({uid},{uid},{uid})\n"
        "print(attempt(path.unlink), attempt(lambda: path.rename(path.with_name('t'))),\n"
        "      attempt(lambda: path.with_name('t').symlink_to('/etc/shadow')),\n"
        "      attempt(lambda: path.parent.rename(path.parent.with_name('t'))), attempt(lambda: path.parent.chmod(0o777)))"
    )
    with public_folder() as folder, Service(folder, client_uid=REPLICA_UID) as service:
        done = subprocess.run(
            [sys.executable, "-c", code, service.socket],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert set(done.stdout.split()) <= REFUSED, done.stdout
        assert len(done.stdout.split()) == 5
        assert service.socket.parent.stat().st_uid == 0


@as_root
def test_a_stranger_cannot_connect():
    with public_folder() as folder, Service(folder, client_uid=REPLICA_UID) as service:
        code = (
            "import os, sys, pathlib\nfrom trustlog.service.client import RemoteLog\n"
            f"os.setgroups([]); os.setresuid({STRANGER_UID},{STRANGER_UID},{STRANGER_UID})\n"
            "RemoteLog.connect(pathlib.Path(sys.argv[1]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, service.socket],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Permission denied" in done.stderr
        # Root may reach the socket, and is refused by its user id.
        with pytest.raises(ServiceRefusedError, match="only user 64002"):
            service.connect()
        modes = [path.stat().st_mode & 0o777 for path in (service.socket.parent, service.socket)]
        assert modes == [0o711, 0o600]


@as_root
def test_not_started_by_root_the_peers_user_decides():
    """As a systemd unit runs it: the socket is open to all, the folder to pass through, and the kernel says who connects."""
    with public_folder() as folder:
        create(folder / "log", kind=BackendKind.PROCESS).close()
        for path in (*(folder / "log").iterdir(), folder / "log"):
            os.chown(path, LOG_UID, LOG_UID)
        (folder / "run").mkdir(mode=0o711)
        os.chown(folder / "run", LOG_UID, LOG_UID)
        # What the interpreter loads on first use may lie where only root can read: the options are read once before.
        code = (
            "import os, sys\nfrom trustlog.service.__main__ import _parse, main\n_parse(sys.argv[1:])\n"
            f"os.setgroups([]); os.setresgid({LOG_UID},{LOG_UID},{LOG_UID}); os.setresuid({LOG_UID},{LOG_UID},{LOG_UID})\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        path = folder / "run" / "s"
        options = ["--state", folder / "log", "--socket", path, "--client-uid", str(REPLICA_UID)]
        service = subprocess.Popen(
            [sys.executable, "-c", code, *options], cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL
        )
        try:
            wait_for(lambda: path.exists() and path.stat().st_mode & 0o777 == 0o666, "listening", 30)

            def answered(uid):
                code = (
                    "import os, sys, pathlib\nfrom trustlog.service.client import RemoteLog\n"
                    f"os.setgroups([]); os.setresgid({uid},{uid},{uid}); os.setresuid({uid},{uid},{uid})\n"
                    "print(RemoteLog.connect(pathlib.Path(sys.argv[1])).process.uid)"
                )
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", code, path],
                    cwd=Path(__file__).parents[3],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                return done.stdout.strip() or done.stderr.splitlines()[-1]

            assert answered(REPLICA_UID) == str(LOG_UID)
            assert f"only user {REPLICA_UID}" in answered(STRANGER_UID)
            assert f"only user {REPLICA_UID}" in answered(0)
            assert f"only user {REPLICA_UID}" in answered(LOG_UID)
        finally:
            service.kill()
            service.wait()


@as_root
def test_the_command_needs_a_user_too():
    """Without the user that it would become, it does not stay root."""
    command = [sys.executable, "-m", "trustlog.cli.main", "serve", "--socket", "/nowhere/s", "--state", "/nowhere/log"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no user trustlog-log" in done.stderr
    done = subprocess.run([*command, "--user", "no-such-user"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no user 'no-such-user'" in done.stderr


def test_it_says_what_it_gave_up():
    with public_folder() as folder, Service(folder) as service, service.connect() as log:
        assert log.process.pid == service.process.pid
        assert (log.process.uid, log.process.client_uid) == (service.uid, os.getuid())
        assert WHOLE in log.process.protections
        assert not log.process.is_apart, "root as the client, or the same user"
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{log.process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split() == 4 * [str(service.uid)]
        assert status["NoNewPrivs"] == "1"
        if Protection.SYSTEM_CALLS in log.process.protections:
            assert status["Seccomp"] == "2"
        if IS_ROOT:
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
            assert status["Groups"].split() == []


def test_killed_and_started_again_it_goes_on_where_it_was():
    with public_folder() as folder, Service(folder) as service:
        log = service.connect()
        groups = [log.append(digests_of(str(number)), context=CONTEXT) for number in range(300)]
        log.truncate(100, context=CONTEXT)
        service.kill(signal.SIGKILL)
        with pytest.raises(ServiceLostError):
            log.append(digests_of("x"), context=CONTEXT)
        log.close()
        with pytest.raises(ServiceLostError, match="no log service can be reached"):
            service.connect()
        service.start().wait_ready()
        with service.connect() as log:
            assert (log.low, log.last, log.last_group) == (100, 300, (300, 300))
            assert log.reissue().statement == groups[-1].statement
            log.append(digests_of("next"), context=CONTEXT)


def copy_state(service: Service) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in service.state.iterdir()}


@as_root
def test_an_old_copy_put_back_by_root_shows_in_the_greeting():
    """The log itself cannot notice; whoever saw more does: the greeting says, signed, where it ends now."""
    with public_folder() as folder, Service(folder) as service:
        with service.connect() as log:
            log.append(digests_of("1"), context=CONTEXT)
            old = copy_state(service)
            log.append(digests_of("2"), context=CONTEXT)
            end = (log.last, log.head)
        service.kill()
        for name, content in old.items():
            (service.state / name).write_bytes(content)
        service.start().wait_ready()
        with service.connect() as log:
            assert (log.last, log.head) != end
            assert log.last == 1


def serve_until_it_ends(folder: Path, *options: str, state: Path | None = None, code: int = 2, **kinds) -> str:
    """Run the service with a mistake in it; its one line of error."""
    state = state or folder / "log"
    command = [*command_of_service(), "--state", state]
    command += options or ["--socket", str(folder / "run" / "s"), "--user", f"{os.getuid()}:{os.getgid()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **kinds)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_what_keeps_it_from_starting_is_said():
    with public_folder() as folder:
        assert "there is no log" in serve_until_it_ends(folder)
        create(folder / "log").close()
        assert "created for the software backend and cannot be opened as process" in serve_until_it_ends(folder)
        create(folder / "own", kind=BackendKind.PROCESS).close()
        state = folder / "own"
        state.chmod(0o750)
        assert "mode 0700" in serve_until_it_ends(folder, state=state)
        state.chmod(0o700)
        (folder / "run").chmod(0o777)
        assert "can be written by others" in serve_until_it_ends(folder, state=state)
        (folder / "run").chmod(0o700)
        (folder / "run" / "s").unlink(missing_ok=True)
        (folder / "run" / "s").write_text("")
        assert "is no socket" in serve_until_it_ends(folder, state=state)
        long = folder / "run" / ("x" * 120)
        options = ["--socket", str(long), "--user", f"{os.getuid()}:{os.getgid()}"]
        assert "107 bytes" in serve_until_it_ends(folder, *options, state=state)
        raw = bytearray((state / "log.state").read_bytes())
        raw[600] ^= 1
        (state / "log.state").write_bytes(raw)
        (folder / "run" / "s").unlink()
        assert "damaged at offset 512" in serve_until_it_ends(folder, state=state, code=1)


@as_root
def test_root_must_name_a_user():
    with public_folder() as folder:
        create(folder / "log", kind=BackendKind.PROCESS).close()
        assert "--user" in serve_until_it_ends(folder, "--socket", str(folder / "run" / "s"))


def test_a_second_service_of_one_log_or_one_socket_is_refused():
    with public_folder() as folder, Service(folder) as service:
        user = f"{service.uid}:{service.uid}" if IS_ROOT else f"{os.getuid()}:{os.getgid()}"
        other = ["--socket", str(folder / "run2" / "s"), "--user", user]
        assert "in use by another process" in serve_until_it_ends(folder, *other)
        same = ["--socket", str(service.socket), "--user", user]
        assert "another service listens" in serve_until_it_ends(folder, *same)
        with service.connect_when_free() as log:
            log.append(digests_of("1"), context=CONTEXT)


def test_a_process_log_is_not_opened_by_a_program_of_another_kind():
    with public_folder() as folder:
        create(folder / "log", kind=BackendKind.PROCESS).close()
        with contextlib.suppress(Exception), open_log(folder / "log"):
            pytest.fail("opened")


@as_root
def test_a_stolen_socket_path_proves_nothing():
    """Another service at the path, with another key, is refused by the client that knows its own."""
    with public_folder() as folder, public_folder() as elsewhere:
        own = Service(folder)
        with Service(elsewhere) as other:
            with pytest.raises(ServiceRefusedError, match="another log's"):
                RemoteLog.connect(other.socket, public_key=own.public_key)
            with other.connect_when_free() as log:
                digests = [entry_digest(b"x")]
                identity = LogIdentity(VerifyingKey.from_bytes(other.public_key), BackendKind.PROCESS)
                attestation = log.append(digests, context=CONTEXT)
                assert isinstance(attestation, Attestation)
                assert identity.key.log_id == log.log_id
