"""The software backend: the trusted part runs in the caller's process, with its state in a directory.

    seal.key    32 bytes, mode 0600: the sealing key
    log.state   mode 0600: the private key and the journal of states, sealed (see trustlog.sealed)
    log.pub     the public key, 130 hex digits: what verifiers need

What it withstands: crashes and power loss at any moment, damage to its files (refused by name), two
processes at once (the directory is locked). What it does not: a host program that lies about its own log, a
thief of the directory, and whoever puts an old copy of the directory back; for those there are other
backends.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from trustlog.errors import MisuseError, SealedStateError
from trustlog.hashing import log_id
from trustlog.keys import PUBLIC_KEY_SIZE
from trustlog.log import AttestedLog, LogState, public_key_bytes
from trustlog.measurement import own_measurement
from trustlog.sealed import SEAL_KEY_SIZE, Files, SealedJournal, lock_directory, write_new
from trustlog.statements import BackendKind

STATE_FILE = "log.state"
KEY_FILE = "seal.key"
PUBLIC_KEY_FILE = "log.pub"

_SERVE = "; its own program opens it: trustlog serve"
_NEW_IDENTITY = "Without it this log cannot go on, and a new log is a new identity"
_RESTORE_KEY = f"restore the missing file from a copy. {_NEW_IDENTITY}"
_RESTORE_STATE = (
    "restore the missing file itself, if it was moved away; an older copy of it must never be used, because "
    f"the log would say indexes twice. {_NEW_IDENTITY}"
)


def create(directory: Path, *, kind: BackendKind = BackendKind.SOFTWARE, files: Files | None = None) -> AttestedLog:
    """Make ``directory`` (mode 0700, must not exist) with a new key and an empty log, durable, and open it.

    ``kind`` stays with the log for ever: a key that was once held in a weaker way never counts as a
    stronger one. MisuseError if the directory exists, OSError if it cannot be written.
    """
    files = files or Files()
    own_measurement(kind)  # before there is a key
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError as error:
        raise MisuseError(f"{directory} exists already: choose a new directory for a new log") from error
    private_key = ec.generate_private_key(ec.SECP256R1())
    public_key = public_key_bytes(private_key)
    state = LogState.empty(log_id(public_key))
    with ExitStack() as stack:
        stack.callback(os.close, lock_directory(directory))
        seal_key = os.urandom(SEAL_KEY_SIZE)
        write_new(files, directory / KEY_FILE, seal_key, 0o600)
        write_new(files, directory / PUBLIC_KEY_FILE, public_key.hex().encode() + b"\n", 0o644)
        identity = bytes([kind]) + private_key.private_numbers().private_value.to_bytes(32, "big")
        # The state comes last: while it is missing, the log does not exist and nothing was signed.
        journal = SealedJournal.create(directory / STATE_FILE, seal_key, identity, state.encode(), files)
        stack.callback(journal.close)
        files.sync_directory(directory.parent)
        return AttestedLog(private_key, kind, state, journal, on_close=stack.pop_all().close)


def open_log(directory: Path, *, kind: BackendKind = BackendKind.SOFTWARE, files: Files | None = None) -> AttestedLog:
    """Open the log in ``directory`` after checking all of it; ``close()`` gives it back.

    MisuseError: no log there, in use, of another kind, or a key file that others may read.
    SealedStateError: any damage. OSError: unreadable.
    """
    files = files or Files()
    own_measurement(kind)  # before the key is read
    with ExitStack() as stack:
        try:
            stack.callback(os.close, lock_directory(directory))
            (directory / STATE_FILE).lstat()
            seal_key = _read_seal_key(directory / KEY_FILE, files)
            journal = SealedJournal.open(directory / STATE_FILE, seal_key, files)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MisuseError(_missing(directory, Path(error.filename))) from error
        stack.callback(journal.close)
        private_key = _unpack_identity(directory, kind, journal.identity)
        public_key = public_key_bytes(private_key)
        _check_public_key(directory / PUBLIC_KEY_FILE, public_key)
        state = _newest_state(directory / STATE_FILE, journal.states, log_id(public_key))
        return AttestedLog(private_key, kind, state, journal, on_close=stack.pop_all().close)


def in_memory(private_key: ec.EllipticCurvePrivateKey | None = None) -> AttestedLog:
    """Make an empty log that forgets everything with the process: for tests and experiments only.

    With a key that ever signed before, it says the same indexes a second time: use a key once.
    """
    private_key = private_key or ec.generate_private_key(ec.SECP256R1())
    state = LogState.empty(log_id(public_key_bytes(private_key)))
    return AttestedLog(private_key, BackendKind.SOFTWARE, state, _Memory(), durability="memory")


class _Memory:
    """Keeps nothing."""

    def save(self, state: bytes) -> None:
        """Forget ``state``."""


def _missing(directory: Path, path: Path) -> str:
    """Say what to do about a missing file. A log that may have signed is never to be created again."""
    if path == directory:
        return f"there is no log in {directory}: there is no such directory"
    made = {STATE_FILE + ".new", KEY_FILE, PUBLIC_KEY_FILE}
    if path.name == STATE_FILE and {entry.name for entry in directory.iterdir()} <= made:
        # A used log that has lost its state may look the same, if its host keeps the entries elsewhere.
        return (
            f"there is no log in {directory}: {path} is missing. If creating it was interrupted, nothing was "
            "signed yet: remove the directory and create the log again. If this log was ever used, do not "
            f"remove it: {_RESTORE_STATE}"
        )
    remedy = _RESTORE_STATE if path.name == STATE_FILE else _RESTORE_KEY
    return f"the log in {directory} is not complete: {path} is missing. Do not remove the directory: {remedy}"


def _read_seal_key(path: Path, files: Files) -> bytes:
    fd = files.open(path)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o077:
            raise MisuseError(f"{path} is open to other users (mode {mode:04o}): run chmod 600 on it")
        seal_key = files.read(fd, SEAL_KEY_SIZE + 1)
    finally:
        os.close(fd)
    if len(seal_key) != SEAL_KEY_SIZE:
        raise SealedStateError(f"{path}: damaged: not {SEAL_KEY_SIZE} bytes. Without it the state is lost")
    return seal_key


def _unpack_identity(directory: Path, kind: BackendKind, identity: bytes) -> ec.EllipticCurvePrivateKey:
    if len(identity) == PUBLIC_KEY_SIZE:
        raise MisuseError(
            f"the log in {directory} is a TPM's, which no other backend can open; if its tpm.json is missing, restore "
            "that file from a copy"
        )
    if identity[0] != kind:
        raise MisuseError(
            f"the log in {directory} was created for the {BackendKind(identity[0]).name.lower()} backend "
            f"and cannot be opened as {kind.name.lower()}{_SERVE if identity[0] == BackendKind.PROCESS else ''}"
        )
    return ec.derive_private_key(int.from_bytes(identity[1:], "big"), ec.SECP256R1())


def _check_public_key(path: Path, public_key: bytes) -> None:
    expected = public_key.hex()
    if not path.is_file() or path.read_bytes() != expected.encode() + b"\n":
        raise SealedStateError(f"{path}: damaged: it should hold this one line: {expected}")


def _newest_state(path: Path, records: list[bytes], own_id: bytes) -> LogState:
    """Return the last of the states (the journal holds at least one) after checking all, and their order."""
    states: list[LogState] = []
    for record, encoded in enumerate(records, 1):
        try:
            state = LogState.decode(encoded)
            state.check(own_id)
        except SealedStateError as error:
            raise SealedStateError(f"{path}: record {record}: {error}. Retire this log") from error
        if states and not state.follows(states[-1]):
            raise SealedStateError(f"{path}: record {record} does not follow the one before it. Retire this log")
        states.append(state)
    return states[-1]
