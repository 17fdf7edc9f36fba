"""The program of the process backend; ``trustlog.service.command`` starts it.

It is started in a new interpreter with nothing in it but the standard library, trustlog and `cryptography`: whatever an
environment, a working folder, a .pth file or a command line's libraries could bring along would hold the key too.

    --state DIR          the log, made by ``trustlog init --backend process DIR``
    --socket PATH        where to listen; or
    --fd N               an inherited, connected socket: serve that one client, and end when it hangs up
    --user UID:GID       as root: become this user first
    --client-uid UID     whose processes may connect; without it, those of the service's own user
    --unsynced           for experiments: a power cut forgets what was attested
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import stat
import sys
import time
from pathlib import Path

from trustlog.errors import LogInUseError, MisuseError, TrustLogError
from trustlog.log import AttestedLog
from trustlog.sealed import SEAL_KEY_SIZE, Files, UnsyncedFiles
from trustlog.service import sandbox
from trustlog.service.protocol import Protection, Why, encode_refusal, frame
from trustlog.service.server import BACKLOG, Answering, Server, StorageError, peer_of, store_key
from trustlog.software import KEY_FILE, open_log
from trustlog.statements import BackendKind

# A client that was killed and started again finds the service it had before still ending.
LOCK_WAIT_S = 3.0
_WRONG_USE = (MisuseError, FileNotFoundError, NotADirectoryError, PermissionError)


def main(argv: list[str] | None = None) -> int:
    """Serve until killed or, with --fd, until the client hangs up; if that is impossible, say why.

    Then 2 is returned for wrong options, paths and owners, and 1 for what the machine does not give.
    """
    options = _parse(argv)
    client: socket.socket | None = None
    try:
        if options.fd is not None:
            client = socket.socket(fileno=options.fd)
            _ignore_signals()
            protections = sandbox.hide_memory()
            with _open(options.state, unsynced=options.unsynced) as log:
                server = _server(log, options, protections, peer_of(client)[1])
                server.serve_one(client)
            return 0
        listener, client_uid = _listen(options)
        protections = sandbox.hide_memory()
        with listener, _open(options.state, unsynced=options.unsynced) as log:
            server = _server(log, options, protections, client_uid)
            _say(f"serving log {log.log_id.hex()} at {options.socket} for user {client_uid}, as user {os.getuid()}")
            server.serve(listener)
    except (TrustLogError, OSError, StorageError) as error:
        return _fail(error, client)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trustlog.service")
    parser.add_argument("--state", type=Path, required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path)
    where.add_argument("--fd", type=int)
    parser.add_argument("--user", type=_user)
    parser.add_argument("--client-uid", type=int)
    parser.add_argument("--unsynced", action="store_true")
    return parser.parse_args(argv)


def _user(text: str) -> tuple[int, int]:
    uid, _, gid = text.partition(":")
    return int(uid), int(gid)


def _ignore_signals() -> None:
    """Leave the end to the client: a signal to the whole group must not cut its last words off."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _server(log: AttestedLog, options: argparse.Namespace, protections: Protection, client_uid: int) -> Server:
    key = store_key((options.state / KEY_FILE).read_bytes()[:SEAL_KEY_SIZE])
    protections |= sandbox.filter_system_calls()
    if Protection.SYSTEM_CALLS not in protections:
        _say("no filter of system calls on this machine: rely on the unit file's")
    answering = Answering(log, protections, key, is_durable=not options.unsynced)
    return Server(answering, client_uid, _say)


def _open(state: Path, *, unsynced: bool) -> AttestedLog:
    """Open the log, which must belong to the service alone."""
    files = UnsyncedFiles() if unsynced else Files()
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            log = open_log(state, kind=BackendKind.PROCESS, files=files)
            break
        except LogInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    found = state.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        log.close()
        raise MisuseError(
            f"{state} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; it must be user "
            f"{os.getuid()}'s with mode 0700: run chown and chmod on it"
        )
    return log


def _listen(options: argparse.Namespace) -> tuple[socket.socket, int]:
    """Bind the socket, give up root, and return the socket with the user id that may connect."""
    path = Path(os.path.abspath(options.socket))  # noqa: PTH100 - Path.resolve would follow links
    is_root = os.geteuid() == 0
    if is_root and options.user is None:
        raise MisuseError("started as root: name the log's own user with --user (0 to stay root)")
    if not is_root and options.user not in {None, (os.getuid(), os.getgid())}:
        raise MisuseError("only root can become another user: leave --user out, or start as root")
    own_uid = options.user[0] if options.user else os.getuid()
    client_uid = own_uid if options.client_uid is None else options.client_uid
    folder = _socket_folder(path.parent, is_shared=client_uid != os.getuid())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path, folder)
        # To connect is to write. If others can reach the socket, the peer's user id decides.
        _bind(listener, path, 0o600 if is_root or client_uid == own_uid else 0o666)
        if is_root:
            _give(path.name, folder, client_uid)
            sandbox.become(*options.user)
            if options.user[0] == 0:
                _check_roots_state(options.state)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)
    return listener, client_uid


def _check_roots_state(path: Path) -> None:
    """Check the way to the state of who stays root; if it is missing, only root can put one there."""
    with contextlib.suppress(FileNotFoundError):
        os.close(_roots_own(Path(os.path.abspath(path))))  # noqa: PTH100


def _socket_folder(path: Path, *, is_shared: bool) -> int:
    """Return a descriptor of the socket's folder, which is made if it is missing.

    Whoever may rename in it could put another socket in this one's place, or have root change what is none. So root
    wants it, and the way to it, to be root's own.
    """
    mode = 0o711 if is_shared else 0o700
    if os.geteuid() == 0:
        return _roots_own(path, make_mode=mode)
    if not path.exists():
        path.mkdir()
        path.chmod(mode)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    found = os.fstat(folder)
    if found.st_mode & 0o022 or found.st_uid not in {0, os.getuid()}:
        os.close(folder)
        raise MisuseError(
            f"{path} can be written by others (user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}): "
            "give the socket a folder of its own, such as /run/trustlog-log"
        )
    return folder


def _roots_own(path: Path, *, make_mode: int | None = None) -> int:
    """Return a descriptor of an absolute folder after a walk from / that nobody but root can have steered.

    Each folder on the way is opened in the one before, never through a link, and must be root's and closed to other
    writers (or sticky like /tmp, where nobody moves what is root's). With ``make_mode`` a missing last one is made.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    here, way = os.open("/", flags), Path("/")
    try:
        for name in path.parts[1:]:
            way /= name
            is_last = way == path
            is_made = is_last and make_mode is not None and not _exists(name, here)
            if is_made:
                os.mkdir(name, 0o700, dir_fd=here)
            try:
                there = os.open(name, flags, dir_fd=here)
            except FileNotFoundError as error:
                raise FileNotFoundError(error.errno, error.strerror, str(way)) from error
            except OSError as error:
                raise MisuseError(
                    f"{way} cannot be used by root: {error.strerror}; name a folder without links on the way to it"
                ) from error
            os.close(here)
            here = there
            _check_roots(way, os.fstat(here), is_on_the_way=not is_last)
            if is_made:
                os.fchmod(here, make_mode or 0)  # mkdir's mode depends on the umask
    except BaseException:
        os.close(here)
        raise
    return here


def _check_roots(path: Path, found: os.stat_result, *, is_on_the_way: bool) -> None:
    is_open = found.st_mode & 0o022 and not (is_on_the_way and found.st_mode & stat.S_ISVTX)
    if found.st_uid != 0 or is_open:
        raise MisuseError(
            f"{path} can be written by others (user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}), who could "
            "steer root: it must be root's own (chown root, chmod go-w); or start as the log's user"
        )


def _exists(name: str, folder: int) -> bool:
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def _bind(listener: socket.socket, path: Path, mode: int) -> None:
    """Bind to ``path``, which never has another mode."""
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise MisuseError(f"cannot listen at {path}: {error} (a socket's path has at most 107 bytes)") from error
    finally:
        os.umask(before)


def _give(name: str, folder: int, uid: int) -> None:
    """As root, make the socket that was just bound ``uid``'s: only this user can connect then, besides root."""
    bound = os.lstat(name, dir_fd=folder)
    if not stat.S_ISSOCK(bound.st_mode) or bound.st_uid != 0 or bound.st_nlink != 1:
        raise MisuseError(f"{name} is not the socket that was bound: somebody else writes to its folder")
    os.chown(name, uid, -1, dir_fd=folder, follow_symlinks=False)
    given = os.lstat(name, dir_fd=folder)
    if (given.st_dev, given.st_ino, given.st_uid) != (bound.st_dev, bound.st_ino, uid):
        raise MisuseError(f"{name} was replaced while the service started: somebody else writes to its folder")


def _remove_stale(path: Path, folder: int) -> None:
    """Remove the socket that a killed service left behind."""
    if not _exists(path.name, folder):
        return
    if not stat.S_ISSOCK(os.lstat(path.name, dir_fd=folder).st_mode):
        raise MisuseError(f"{path} exists and is no socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            os.unlink(path.name, dir_fd=folder)
            return
        except BlockingIOError:
            pass  # its queue is full
    raise MisuseError(f"another service listens at {path}: stop it first")


def _fail(error: Exception, client: socket.socket | None) -> int:
    """Tell whoever waits, a client or an operator, why there is no service."""
    if client is None:
        as_whom = f" (as user {os.getuid()})" if isinstance(error, PermissionError) else ""
        _say(f"error: {error}{as_whom}")
    elif not isinstance(error, StorageError):  # that one the client has been told
        with client, contextlib.suppress(OSError):
            client.sendall(frame(encode_refusal(Why.UNAVAILABLE, str(error), type(error).__name__)))
    return 2 if isinstance(error, _WRONG_USE) else 1


def _say(text: str) -> None:
    os.write(2, f"trustlog serve: {text}\n".encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
