"""Services for tests: in a thread over a socket pair, or the real program, which tests end by its own pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.support.waiting import wait_for
from trustlog import AttestedLog, BackendKind, LogState, create
from trustlog.log import public_key_bytes
from trustlog.service.client import RemoteLog, ServiceLostError, ServiceRefusedError
from trustlog.service.protocol import Protection
from trustlog.service.server import Answering, Server, StorageError

KEY = bytes(range(100, 132))
# Users who own nothing and have no name: a test that runs as root becomes them.
LOG_UID, REPLICA_UID, STRANGER_UID = 64001, 64002, 64003
IS_ROOT = os.geteuid() == 0
# Where tools are required, as in CI, they run and fail instead.
as_root = pytest.mark.skipif(
    not IS_ROOT and not os.environ.get("REQUIRE_TOOLS"), reason="only root can give the log and the replica their users"
)


class Forgetful:
    """A state store that keeps nothing, or fails when told to."""

    def __init__(self):
        self.error: Exception | None = None
        self.saved = 0

    def save(self, state):
        if self.error is not None:
            raise self.error
        self.saved += 1


def process_log(key, store=None) -> AttestedLog:
    """An empty log of kind PROCESS in memory."""
    from trustlog import log_id

    state = LogState.empty(log_id(public_key_bytes(key)))
    return AttestedLog(key, BackendKind.PROCESS, state, store or Forgetful(), durability="memory")


def serve_in_thread(log: AttestedLog) -> RemoteLog:
    """Return a connection to a service of `log`, which ends when that is closed."""
    own, its = socket.socketpair()

    def serve():
        with its, contextlib.suppress(StorageError):
            Server(Answering(log, Protection(0), KEY), os.getuid(), lambda _: None).serve_one(its)

    threading.Thread(target=serve, daemon=True).start()
    return RemoteLog(own, reply_s=20)


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's, with a short path, as sockets need."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    try:
        path.chmod(0o711)
        yield path
    finally:
        shutil.rmtree(path)


class Service:
    """`trustlog serve` as a child: as root under its own user, else under ours."""

    def __init__(self, folder: Path, *, client_uid: int | None = None, own_user: bool = IS_ROOT) -> None:
        self.state, self.socket = folder / "log", folder / "run" / "log.sock"
        self.uid = LOG_UID if own_user else os.getuid()
        self.client_uid = os.getuid() if client_uid is None else client_uid
        self.errors = folder / "errors"
        with create(self.state, kind=BackendKind.PROCESS) as log:
            self.public_key = log.public_key
        if own_user:
            for path in (*self.state.iterdir(), self.state):
                os.chown(path, self.uid, self.uid)
        self.process: subprocess.Popen | None = None

    def start(self) -> Service:
        command = [sys.executable, "-m", "trustlog.cli.main", "serve", "--socket", self.socket, "--state", self.state]
        command += ["--client-user", str(self.client_uid)]
        if IS_ROOT:
            command += ["--user", str(self.uid)]
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors)
        return self

    def wait_ready(self) -> Service:
        def ready():
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            return "serving log" in self.said()

        wait_for(ready, "the service ready", 30)
        return self

    def said(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""

    def connect(self, **options) -> RemoteLog:
        return RemoteLog.connect(self.socket, public_key=self.public_key, **options)

    def connect_when_free(self) -> RemoteLog:
        """Connect as soon as the service has noticed that the client before hung up."""

        def connected():
            with contextlib.suppress(ServiceRefusedError, ServiceLostError):
                return self.connect()
            return None

        return wait_for(connected, "a free service")

    def raw(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(20)
        connection.connect(str(self.socket))
        return connection

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(20)
        self.errors.write_text("")

    def __enter__(self) -> Self:
        return self.start().wait_ready()

    def __exit__(self, *_) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
