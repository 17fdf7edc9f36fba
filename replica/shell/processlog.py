"""A replica's log in a process of its own: connected, watched, and connected again when it was away.

States: *here* (a connection greeted and verified), *away* (none; a new one is tried with growing pauses), *contrary*
(the service is back with another end than this replica knows: never spoken to again). Rules:

1. While the log is away, a call to it waits. It is made from the outbox's own thread, so the replica says nothing
   meanwhile, and reads on.
2. A new connection must show the expected key and, freshly signed, the end that is known here; or the end that the
   append under way leads to. Then that group was appended, and its statement is issued again: nothing is appended
   twice. Any other end means that the log was rolled back, or that somebody else appended.
3. Only the watching thread makes and closes connections.
"""

import os
import pwd
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from replica.shell.trustedlog import ExternalLog
from trustlog import Attestation, BackendKind, TrustLogError, fold, service
from trustlog.service.client import REPLY_S, RemoteLog, ServiceLostError
from trustlog.service.protocol import Protection

# How long opening the log may take before the replica gives up starting.
OPEN_S = 20.0
RETRY_FIRST_S = 0.05
RETRY_S_MAX = 2.0
# How long an ended service's process is waited for before it is killed.
END_S = 5.0

Answer = TypeVar("Answer")
Connect = Callable[[], RemoteLog]


class ContraryLogError(TrustLogError):
    """The log came back with another end than it had: it must never be used again."""


def connecting(path: Path, public_key: bytes, reply_s: float = REPLY_S) -> Connect:
    """Return what connects to the service at `path`, which must hold the log of `public_key`."""
    return lambda: RemoteLog.connect(path, public_key=public_key, reply_s=reply_s)


class StartedService:
    """Starts the service of the log in `state` as a child, and again at every call; at most one runs."""

    def __init__(self, state: Path, public_key: bytes, *, unsynced: bool = False) -> None:
        self._public_key = public_key
        self._command = [*service.command(), "--state", str(state)]
        if unsynced:
            self._command.append("--unsynced")
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> RemoteLog:
        """Start it and connect; raises as RemoteLog does."""
        self.end()
        own, its = socket.socketpair()
        with its:
            # It ends when its one client hangs up, however that ends: no signal is needed.
            self._child = subprocess.Popen(  # noqa: S603 - our own program
                [*self._command, "--fd", str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        return RemoteLog(own, public_key=self._public_key)

    def end(self) -> None:
        """Wait for the child, whose connection is closed, and kill it if it does not end."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass(frozen=True, slots=True)
class _End:
    """Where the log ends."""

    last: int
    head: bytes


class ProcessLog(ExternalLog):
    """The verbs of a trusted log that a service keeps. Made connected; close() ends it.

    `connect` makes a connection, `remedy` says what a person can do when the log is away. TrustLogError if no
    connection comes about within `open_s`, or for a reason that waiting does not mend.
    """

    def __init__(self, connect: Connect, remedy: str, log: Any, open_s: float = OPEN_S) -> None:  # noqa: ANN401
        self._connect = connect
        self._remedy = remedy
        self._log = log
        self._changed = threading.Condition()
        self._trouble: str | None = None
        self._contrary: str | None = None
        self._hurried = False
        self._closing = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            remote = self._open(open_s)
        except BaseException:
            self._release()
            raise
        self._remote: RemoteLog | None = remote
        self._newest = remote  # the last connection there was: what it said stays known
        self._known = _End(remote.last, remote.head)
        self._pending: _End | None = None  # where the append under way leads
        self._watcher = threading.Thread(target=self._watch, name="trusted-log", daemon=True)
        self._watcher.start()

    def _open(self, open_s: float) -> RemoteLog:
        deadline = time.monotonic() + open_s
        while True:
            try:
                return self._connect()
            except ServiceLostError as error:
                if time.monotonic() > deadline:
                    raise ServiceLostError(f"{error}; {self._remedy}") from error
                time.sleep(RETRY_FIRST_S)

    # What is known

    @property
    def kind(self) -> BackendKind:
        """See trustlog.AttestedLog."""
        return self._newest.kind

    @property
    def public_key(self) -> bytes:
        """The log's key, 65 bytes."""
        return self._newest.public_key

    @property
    def low(self) -> int:
        """The first index that is not forgotten."""
        return self._newest.low

    @property
    def last(self) -> int:
        """The last index whose assignment this replica knows."""
        return self._known.last

    @property
    def head(self) -> bytes:
        """The chain's head there."""
        return self._known.head

    @property
    def last_group(self) -> tuple[int, int] | None:
        """The bounds of the last group."""
        return self._newest.last_group

    @property
    def trouble(self) -> str | None:
        """See ExternalLog."""
        return self._contrary or self._trouble

    @property
    def pid(self) -> int:
        """The process id of the service, as it says."""
        return self._newest.process.pid

    @property
    def protects(self) -> str:
        """See ExternalLog."""
        process = self._newest.process
        if process.client_uid == 0:
            return "process, replica is root: not against this host's own program"
        if not process.is_apart:
            return "process, same user: its memory is kept, its files are not"
        lacks = "" if Protection.SYSTEM_CALLS in process.protections else ", no system call filter"
        return f"process, user {_user_name(process.uid)}{lacks}: against the replica program"

    @property
    def details(self) -> dict[str, object]:
        """See ExternalLog."""
        process = self._newest.process
        gave_up = [each.name for each in Protection if each in process.protections and each.name]
        return {
            "pid": process.pid,
            "uid": process.uid,
            "durability": self._newest.durability,
            "gave_up": [name.lower() for name in gave_up],
        }

    # Verbs

    def append(self, digests: Sequence[bytes], *, context: bytes) -> Attestation:
        """Append a group exactly once, however often the service goes away meanwhile; blocks.

        ContraryLogError if it came back with another end; ServiceLostError if it is away and nobody waits any more.
        """
        before = self._known
        self._pending = _End(before.last + len(digests), fold(before.head, before.last + 1, digests))

        def append_or_issue(remote: RemoteLog) -> Attestation:
            if remote.last == before.last:
                return remote.append(digests, context=context)
            return remote.reissue()

        try:
            attestation = self._ask(append_or_issue)
            self._known = self._pending
        finally:
            with self._changed:
                self._pending = None
        return attestation

    def reissue(self) -> Attestation:
        """Attest the last group again; blocks."""
        return self._ask(lambda remote: remote.reissue())

    def quote(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Attest which program holds the key; blocks."""
        return self._ask(lambda remote: remote.quote(nonce=nonce, context=context))

    def truncate(self, index: int, *, context: bytes) -> Attestation:
        """Forget what is below `index`; blocks. Asked twice, it is done once."""
        return self._ask(lambda remote: remote.truncate(index, context=context))

    def store_key(self) -> bytes:
        """See ExternalLog."""
        return self._ask(lambda remote: remote.store_key())

    def stop_waiting(self) -> None:
        """See ExternalLog."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def close(self) -> None:
        """Hang up and end the watching thread; harmless when repeated."""
        if self._closing.is_set():
            return
        self.stop_waiting()
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        self._newest.close()
        self._watcher.join()
        self._newest.close()  # one that was made meanwhile
        self._release()

    def _release(self) -> None:
        if isinstance(self._connect, StartedService):
            self._connect.end()
        os.close(self._wake)

    def _ask(self, call: Callable[[RemoteLog], Answer]) -> Answer:
        while True:
            remote = self._wait_here()
            try:
                return call(remote)
            except ServiceLostError as error:
                self._away(remote, str(error))

    def _wait_here(self) -> RemoteLog:
        with self._changed:
            while True:
                if self._contrary is not None:
                    raise ContraryLogError(self._contrary)
                if self._remote is not None:
                    return self._remote
                if self._hurried:
                    raise ServiceLostError(self._trouble or "the trusted log is away")
                self._changed.wait()

    def _away(self, remote: RemoteLog, why: str) -> None:
        """Note that a connection is of no use any more; whoever notices first."""
        with self._changed:
            if self._remote is not remote:
                return
            self._remote = None
            self._trouble = f"the trusted log is away ({why}): nothing is said until it is back; {self._remedy}"
            os.eventfd_write(self._wake, 1)
        if not self._closing.is_set():
            self._log.error("trusted log away; the replica says nothing and reads on", reason=why, remedy=self._remedy)

    # The watching thread

    def _watch(self) -> None:
        while not self._closing.is_set():
            remote = self._remote
            if remote is not None:
                self._wait_for_hang_up(remote)
                continue
            self._newest.close()
            self._come_back()

    def _wait_for_hang_up(self, remote: RemoteLog) -> None:
        connection = remote.fileno()
        if connection < 0:
            return  # closed just now
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        # Replies are the caller's; only the end of the connection is waited for here.
        poller.register(connection, select.POLLRDHUP)
        ready = {descriptor for descriptor, _ in poller.poll()}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if ready - {self._wake} and not self._closing.is_set():
            self._away(remote, "its service ended")

    def _come_back(self) -> None:
        pause, since = RETRY_FIRST_S, time.monotonic()
        while not self._closing.is_set() and self._contrary is None:
            try:
                remote = self._connect()
            except (TrustLogError, OSError) as error:
                self._trouble = f"the trusted log is away ({error}): nothing is said until it is back; {self._remedy}"
                self._closing.wait(pause)
                pause = min(2 * pause, RETRY_S_MAX)
                continue
            self._take(remote, since)
            return
        if self._contrary is not None:
            self._closing.wait()

    def _take(self, remote: RemoteLog, since: float) -> None:
        """Go on with a new connection if the log ends where it must."""
        end = _End(remote.last, remote.head)
        with self._changed:
            if end in (self._known, self._pending) and remote.low >= self._newest.low:
                self._remote = self._newest = remote
                self._trouble = None
            else:
                remote.close()
                self._contrary = (
                    f"the trusted log came back with its end at {end.last} instead of {self._known.last}: it was "
                    "rolled back to an older copy, or another program appended to it. It must never be used again: "
                    "replace this replica with a new log"
                )
            self._changed.notify_all()
        if self._contrary is not None:
            self._log.critical("trusted log refused", reason=self._contrary)
        else:
            self._log.info("trusted log is back", away_s=round(time.monotonic() - since, 3), last=end.last)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
