"""Examining a replica's trusted log: opened as `run` opens it, and compared with the store, while nobody has it open.

A log that is in use is let alone. So is one that a service of its own keeps, which counts whoever else connects as an
intruder, and a TPM's, because opening that can say OPEN.
"""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import structlog

from replica.cluster.home import LOG_STATE_NAME, LOST_LOG_REMEDY, SETTINGS_NAME, ReplicaHome
from replica.cluster.strict_toml import ConfigError
from replica.operations.backup import own_end
from replica.operations.findings import Finding, fine, problem, warning
from replica.shell.opening import open_trusted_log, payload_seal
from replica.shell.outbox import ROLLED_BACK_REMEDY, rolled_back
from replica.shell.sqlitefile import reading
from trustlog import BackendKind, LogInUseError, TrustLogError
from trustlog.sealed import lock_directory

_IN_USE = "the replica, or another program, has it open"


def examine_log(home: ReplicaHome) -> Iterator[Finding]:
    """Say whether the log is there, whether `run` could open it, and whether it was rolled back."""
    socket = home.settings.trusted_log.socket
    yield _in_folder(home) if socket is None else _at_socket(socket)
    if home.settings.durability == "memory":
        remedy = 'take durability = "memory" out of replica.toml, but for experiments'
        yield warning(
            "durability", home.path / SETTINGS_NAME, "nothing is forced to disk: a power cut ends the log", remedy
        )


def _at_socket(path: Path) -> Finding:
    remedy = "start the log's service: trustlog serve, or its systemd unit"
    try:
        found = stat.S_ISSOCK(path.stat().st_mode)
    except OSError as error:
        return problem("log", path, f"no socket of the log's service: {error.strerror}", remedy)
    if not found:
        return problem("log", path, "is no socket", remedy)
    return fine("log", path, "the log's service has a socket here; it was not asked, as it serves its replica only")


def _in_folder(home: ReplicaHome) -> Finding:
    path = home.log_path
    missing = [str(path / name) for name in (LOG_STATE_NAME, "seal.key") if not (path / name).exists()]
    if missing:
        return problem("log", path, f"lost: {', '.join(missing)}", LOST_LOG_REMEDY)
    try:
        why = _why_not_opened(home)
        return _opened(home) if not why else fine("log", path, f"its state and key are there; not opened: {why}")
    except LogInUseError:
        return fine("log", path, f"its state and key are there; not opened: {_IN_USE}")
    except (TrustLogError, OSError, ConfigError) as error:
        return problem("log", path, str(error), "do what the text says; `run` refuses to start before that")


def _why_not_opened(home: ReplicaHome) -> str:
    """Return why the log is let alone; "" if it can be opened without disturbing anybody. LogInUseError if it is."""
    backend, found = home.settings.trusted_log.backend, home.log_path.stat()
    if backend is BackendKind.TPM:
        return "that can make the TPM say OPEN"
    # The process that keeps a log refuses the folder of another user, root too, and one that is open to others.
    if found.st_uid != os.geteuid() and (backend is BackendKind.PROCESS or os.geteuid() != 0):
        return f"it belongs to user {found.st_uid}; run the doctor as that user: sudo -u '#{found.st_uid}' …"
    if backend is BackendKind.PROCESS and found.st_mode & 0o077:
        return "its folder's mode has to be mended first"
    os.close(lock_directory(home.log_path))
    return ""


def _opened(home: ReplicaHome) -> Finding:
    silent = structlog.wrap_logger(structlog.testing.ReturnLogger(), processors=[])
    with closing(open_trusted_log(home, silent)) as log:
        payload_seal(home, log)
        last, held = log.last, _held(home)  # before somebody else can append to it
    trouble = rolled_back(held, last)
    if trouble:
        return problem("log", home.log_path, f"{home.store_path} {trouble}", ROLLED_BACK_REMEDY)
    return fine("log", home.log_path, f"can be opened, and ends at entry {last}; the store holds it up to {held}")


def _held(home: ReplicaHome) -> int:
    try:
        with reading():
            return own_end(home.store_path, home.number) if home.store_path.exists() else 0
    except sqlite3.Error:
        return 0  # what is wrong with the store has a finding of its own
