"""The service's program in this process, without its sandbox: what it opens, serves, and says when it cannot."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from tests.trustlog.service.support import LOG_UID, REPLICA_UID, as_root, public_folder
from tests.trustlog.support import CONTEXT, digests_of
from trustlog import BackendKind, LogInUseError, MisuseError, create
from trustlog.service import __main__ as program
from trustlog.service import sandbox
from trustlog.service.client import RemoteLog
from trustlog.service.protocol import Protection
from trustlog.service.server import Server, StorageError


@pytest.fixture(autouse=True)
def no_sandbox(monkeypatch):
    """What it gives up could not be had back for the other tests."""
    for name in ("hide_memory", "filter_system_calls"):
        monkeypatch.setattr(sandbox, name, lambda: Protection(0))
    monkeypatch.setattr(program, "_ignore_signals", lambda: None)


class Running:
    """`main` in a thread; `status` is what it returned."""

    def __init__(self, *options):
        self.status = None
        self._thread = threading.Thread(target=self._run, args=([str(option) for option in options],), daemon=True)
        self._thread.start()

    def _run(self, options):
        self.status = program.main(options)

    def join(self):
        self._thread.join(20)
        return self.status


def with_client(state, *options):
    own, its = socket.socketpair()
    return own, Running("--state", state, "--fd", its.detach(), *options)


def test_one_client_is_served_until_it_hangs_up(tmp_path, capfd):
    create(tmp_path / "log", kind=BackendKind.PROCESS).close()
    for options, durability in ((["--unsynced"], "memory"), ([], "disk")):
        own, running = with_client(tmp_path / "log", *options)
        with RemoteLog(own) as log:
            log.append(digests_of("1"), context=CONTEXT)
            assert log.durability == durability
            key = log.store_key()
        assert running.join() == 0
        assert len(key) == 32
    assert "no filter of system calls" in capfd.readouterr().err


def test_the_client_is_told_why_there_is_no_service(tmp_path, monkeypatch):
    own, running = with_client(tmp_path / "log")
    with pytest.raises(MisuseError, match="there is no log"):
        RemoteLog(own)
    assert running.join() == 2
    monkeypatch.setattr(program, "LOCK_WAIT_S", 0)
    with create(tmp_path / "log", kind=BackendKind.PROCESS):
        own, running = with_client(tmp_path / "log")
        with pytest.raises(LogInUseError):
            RemoteLog(own)
        assert running.join() == 2
    (tmp_path / "log").chmod(0o755)
    own, running = with_client(tmp_path / "log")
    with pytest.raises(MisuseError, match="mode 0755"):
        RemoteLog(own)
    assert running.join() == 2


def test_it_ends_when_the_state_cannot_be_saved(tmp_path, monkeypatch):
    create(tmp_path / "log", kind=BackendKind.PROCESS).close()

    def fails(self, connection):
        connection.close()
        raise StorageError("no space")

    monkeypatch.setattr(Server, "serve_one", fails)
    own, running = with_client(tmp_path / "log")
    with own:
        assert running.join() == 1


def test_it_listens_and_takes_a_stale_socket_over(monkeypatch, capfd):
    """As whoever runs the tests, which for root is an explicit wish to stay root."""
    served = []

    def serve(self, listener):
        served.append(listener.getsockname())

    monkeypatch.setattr(Server, "serve", serve)
    monkeypatch.setattr(sandbox, "become", lambda uid, gid: served.append((uid, gid)))
    own = (os.getuid(), os.getgid())
    with public_folder() as folder:
        create(folder / "log", kind=BackendKind.PROCESS).close()
        path = folder / "run" / "s"
        options = ["--state", folder / "log", "--socket", path]
        options += ["--user", f"{own[0]}:{own[1]}"] if own[0] == 0 else []
        for _ in range(2):  # the second finds the first one's socket
            assert Running(*options).join() == 0
        assert served.count(str(path)) == 2
        assert "serving log" in capfd.readouterr().err
        assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
        if own[0] == 0:
            assert served.count(own) == 2
        else:
            assert Running(*options, "--client-uid", own[0] + 1).join() == 0
            assert path.stat().st_mode & 0o777 == 0o666
            assert Running(*options, "--user", "1:1").join() == 2


def start_as_root(folder, path, client_uid=REPLICA_UID):
    """The part of the start that root does; the log's state is missing, so it ends after that."""
    options = ["--state", folder / "log", "--socket", path, "--user", f"{LOG_UID}:{LOG_UID}"]
    return Running(*options, "--client-uid", client_uid).join()


@pytest.fixture
def became(monkeypatch):
    users = []
    monkeypatch.setattr(sandbox, "become", lambda *ids: users.append(ids))
    return users


def looks(path):
    found = path.lstat()
    return found.st_uid, found.st_mode & 0o7777


@as_root
def test_the_sockets_folder_stays_roots_own(became):
    with public_folder() as folder:
        before = os.umask(0o077)
        try:
            start_as_root(folder, folder / "run" / "s")
        finally:
            os.umask(before)
        assert became == [(LOG_UID, LOG_UID)]
        assert looks(folder / "run") == (0, 0o711)
        assert looks(folder / "run" / "s") == (REPLICA_UID, 0o600)


@as_root
@pytest.mark.parametrize("owner", [LOG_UID, REPLICA_UID])
@pytest.mark.parametrize("whose", ["run", "."])
def test_root_listens_in_no_folder_of_another_user_nor_below_one(became, capfd, owner, whose):
    with public_folder() as folder:
        (folder / "run").mkdir(mode=0o755)
        os.chown(folder / whose, owner, owner)
        assert start_as_root(folder, folder / "run" / "s") == 2
        assert f"can be written by others (user {owner}" in capfd.readouterr().err
        assert (became, list((folder / "run").iterdir())) == ([], [])


@as_root
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_root_listens_in_no_folder_that_others_may_write(became, capfd, mode):
    """Sticky folders may lie on the way, as /tmp does here; in one, anybody could have been first at the name."""
    with public_folder() as folder:
        (folder / "run").mkdir()
        (folder / "run").chmod(mode)
        assert start_as_root(folder, folder / "run" / "s") == 2
        assert "can be written by others (user 0" in capfd.readouterr().err
        assert (became, list((folder / "run").iterdir())) == ([], [])


@as_root
def test_root_follows_no_link(became, capfd):
    with public_folder() as folder:
        (folder / "real").mkdir(mode=0o711)
        (folder / "run").symlink_to("real")
        for path in (folder / "run" / "s", folder / "run" / "made" / "s"):
            assert start_as_root(folder, path) == 2
            assert "without links on the way to it" in capfd.readouterr().err
        (folder / "real" / "s").symlink_to(folder / "nowhere")
        assert start_as_root(folder, folder / "real" / "s") == 2
        assert "is no socket" in capfd.readouterr().err
        assert became == []
        assert [path.name for path in (folder / "real").iterdir()] == ["s"]


@as_root
@pytest.mark.parametrize("call", ["bind", "listen"])
@pytest.mark.parametrize("put", ["link", "file", "hard link"])
def test_a_file_put_in_the_sockets_place_changes_no_owner(became, monkeypatch, call, put):
    """What the log's user once could do between two calls; the folder forbids it now, and this is the second line."""
    with public_folder() as folder:
        path, roots = folder / "run" / "s", folder / "roots"
        roots.write_text("root's")
        roots.chmod(0o640)
        real = getattr(socket.socket, call)

        def and_replace(self, *arguments):
            real(self, *arguments)
            path.unlink()
            if put == "link":
                path.symlink_to(roots)
            elif put == "file":
                path.write_text("")
            else:
                path.hardlink_to(roots)

        monkeypatch.setattr(socket.socket, call, and_replace)
        assert start_as_root(folder, path) == 2
        assert looks(roots) == (0, 0o640)
        assert path.lstat().st_uid == 0
        assert became == ([] if call == "bind" else [(LOG_UID, LOG_UID)])


@as_root
def test_a_socket_exchanged_while_it_changes_its_owner_is_noticed(became, monkeypatch, capfd):
    with public_folder() as folder:
        path = folder / "run" / "s"
        real = os.chown

        def and_replace(name, *arguments, **options):
            real(name, *arguments, **options)
            path.rename(folder / "old")
            other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            other.bind(str(path))
            other.close()
            real(path, REPLICA_UID, -1)

        monkeypatch.setattr(os, "chown", and_replace)
        assert start_as_root(folder, path) == 2
        assert "was replaced" in capfd.readouterr().err
        assert became == []


@as_root
@pytest.mark.parametrize("whose", ["log", "."])
def test_who_stays_root_opens_no_state_that_another_user_can_exchange(became, capfd, whose):
    with public_folder() as folder:
        state = folder / "state" / "log"
        state.parent.mkdir()
        create(state, kind=BackendKind.PROCESS).close()
        os.chown(state.parent / whose, REPLICA_UID, REPLICA_UID)
        options = ["--state", state, "--socket", folder / "run" / "s", "--user", "0:0", "--client-uid", REPLICA_UID]
        assert Running(*options).join() == 2
        assert f"can be written by others (user {REPLICA_UID}" in capfd.readouterr().err


def test_a_socket_never_has_another_mode_than_its_own(tmp_path, monkeypatch):
    """The mode comes from the umask at bind: there is no moment between two calls."""
    seen = []
    real = socket.socket.bind

    def bind(self, path):
        real(self, path)
        seen.append(os.lstat(path).st_mode & 0o777)

    monkeypatch.setattr(socket.socket, "bind", bind)
    with public_folder() as folder:
        for mode in (0o600, 0o666):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                program._bind(listener, folder / f"{mode}", mode)
    assert seen == [0o600, 0o666]
