"""State at rest: a sealed, append-only journal of fixed records in one preallocated file.

The file has 256 sectors of 512 bytes. Sector 0 is the header, sectors 1 … 255 are records, written in
order, one per state; a sector that is all zeros was never written. Integers are big-endian.

    header    0  16  magic "trustlog/state", zero padded
             16   1  format version, 1
             17  16  generation: random, new for every file
             33  12  nonce          45  451 sealed identity     496  16 tag
    record    0  12  nonce          12  484 sealed state        496  16 tag

What is sealed is u16 length ‖ value ‖ zeros, with AES-256-GCM under a key that belongs to this one file
(HMAC-SHA256 of the sealing key over "trustlog/seal" and the generation, so that random nonces never run
out). The associated data is the header's first 33 bytes and u32(sector number): a record moved to another
place or file does not authenticate. On opening, every sector must authenticate or be zeros, and no record
may follow a zero sector; a flipped bit anywhere is refused, by sector. When all records are used, a new
file takes over, which begins with the newest state.

Assumptions. (1) A sector of 512 bytes is written whole or not at all (etcd's write-ahead log relies on the
same to tell a torn write), so a crash leaves the old state or the new. (2) The disk keeps what it
confirmed: if the newest record alone goes back to zeros, this file looks like that of a crash; peers who
saw more must notice. (3) The sealing key lies beside the file, readable by its owner only: sealing detects
damage; it stops neither a thief nor whoever puts an old copy of the file back.

Why a journal: overwriting allocated space and syncing its data costs about a quarter of writing a new file,
renaming it and syncing the directory, and every append to the log pays it.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import struct
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from trustlog.errors import LogInUseError, MisuseError, SealedStateError

SECTOR_SIZE = 512
SECTORS = 256
FILE_SIZE = SECTOR_SIZE * SECTORS
SEAL_KEY_SIZE = 32
IDENTITY_SIZE_MAX = 449
STATE_SIZE_MAX = 482

_MAGIC = b"trustlog/state\0\0"
_VERSION = b"\x01"
_PREFIX_SIZE = 33
_NONCE_SIZE = 12
_ZERO_SECTOR = bytes(SECTOR_SIZE)


class Files:
    """The few file operations that durability rests on; a seam, so that tests can make each of them fail."""

    def open(self, path: Path, *, create_mode: int | None = None) -> int:
        """Open read-write, never through a symbolic link; with a mode, create what must not exist."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        if create_mode is None:
            return os.open(path, flags)
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, create_mode)

    def read(self, fd: int, size_max: int) -> bytes:
        """Read a file from its beginning, at most ``size_max`` bytes."""
        parts: list[bytes] = []
        while part := os.pread(fd, size_max - sum(map(len, parts)), sum(map(len, parts))):
            parts.append(part)
        return b"".join(parts)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def sync(self, fd: int) -> None:
        """Make a file's content durable."""
        os.fdatasync(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Put ``source`` in the place of ``target``, at once."""
        source.replace(target)

    def sync_directory(self, directory: Path) -> None:
        """Make names in a directory durable."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class UnsyncedFiles(Files):
    """Forces nothing to disk, so a power cut forgets what was said: for experiments only."""

    def sync(self, fd: int) -> None:
        """Leave it to the operating system."""

    def sync_directory(self, directory: Path) -> None:
        """Leave it to the operating system."""


def lock_directory(directory: Path) -> int:
    """Lock a log's directory: returns the descriptor that holds the lock. LogInUseError if it is taken."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise LogInUseError(
            f"{directory} is in use by another process: one log has one owner; stop that process first"
        ) from error
    return fd


def write_new(files: Files, path: Path, data: bytes, mode: int) -> None:
    """Create a file with durable content (its name: ``sync_directory``); FileExistsError if it exists."""
    fd = files.open(path, create_mode=mode)
    try:
        files.write(fd, data, 0)
        files.sync(fd)
    finally:
        os.close(fd)


class _Seal:
    """Seals the sectors of one file."""

    def __init__(self, seal_key: bytes, prefix: bytes) -> None:
        self._prefix = prefix
        self._cipher = AESGCM(hmac.digest(seal_key, b"trustlog/seal" + prefix[17:], "sha256"))

    def seal(self, sector: int, value: bytes) -> bytes:
        start = self._prefix if sector == 0 else b""
        room = SECTOR_SIZE - len(start) - _NONCE_SIZE - 16
        nonce = os.urandom(_NONCE_SIZE)
        plain = (struct.pack(">H", len(value)) + value).ljust(room, b"\0")
        return start + nonce + self._cipher.encrypt(nonce, plain, self._associated(sector))

    def unseal(self, sector: int, data: bytes) -> bytes:
        start = _PREFIX_SIZE if sector == 0 else 0
        nonce, sealed = data[start : start + _NONCE_SIZE], data[start + _NONCE_SIZE :]
        plain = self._cipher.decrypt(nonce, sealed, self._associated(sector))
        return plain[2 : 2 + int.from_bytes(plain[:2], "big")]

    def _associated(self, sector: int) -> bytes:
        return self._prefix + struct.pack(">I", sector)


class SealedJournal:
    """A log's identity, given once, and the sequence of its states; ``states`` holds those read on opening.

    Not thread-safe: its one user holds a lock. An OSError from any method leaves the file's content
    unknown: stop using the object and open it again.
    """

    def __init__(self, path: Path, seal_key: bytes, files: Files) -> None:
        """Use ``create`` or ``open``."""
        self._path = path
        self._files = files
        self._seal_key = seal_key
        self._fd = -1
        self._used = 0
        self._seal: _Seal
        self.identity = b""
        self.states: list[bytes] = []

    @classmethod
    def create(cls, path: Path, seal_key: bytes, identity: bytes, state: bytes, files: Files) -> Self:
        """Make the file, durable with its name; MisuseError if it exists. Sizes: ≤ 449 and ≤ 482 bytes."""
        if path.exists():
            raise MisuseError(f"{path} exists already: a log is never created twice")
        journal = cls(path, seal_key, files)
        journal.identity = identity
        journal._take_over(state)
        journal.states = [state]
        return journal

    @classmethod
    def open(cls, path: Path, seal_key: bytes, files: Files) -> Self:
        """Check every byte of the file: SealedStateError names the damaged sector; OSError if unreadable."""
        journal = cls(path, seal_key, files)
        journal._fd = files.open(path)
        try:
            journal._load(files.read(journal._fd, FILE_SIZE + 1))
        except BaseException:
            journal.close()
            raise
        return journal

    def save(self, state: bytes) -> None:
        """Make ``state`` the newest, durable when this returns; OSError if that is not certain."""
        if len(state) > STATE_SIZE_MAX:
            raise MisuseError(f"a state has at most {STATE_SIZE_MAX} bytes, not {len(state)}")
        if self._used == SECTORS - 1:
            self._take_over(state)
            return
        self._write(self._used + 1, state)
        self._used += 1

    def close(self) -> None:
        """Give the file back; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, sector: int, state: bytes) -> None:
        self._files.write(self._fd, self._seal.seal(sector, state), sector * SECTOR_SIZE)
        self._files.sync(self._fd)

    def _take_over(self, state: bytes) -> None:
        """Write a new file with ``state`` as its first record, and put it in the old one's place."""
        prefix = _MAGIC + _VERSION + os.urandom(16)
        seal = _Seal(self._seal_key, prefix)
        content = seal.seal(0, self.identity) + seal.seal(1, state)
        new = self._path.with_name(self._path.name + ".new")
        # A crash can leave one behind. Nothing was signed on its strength: that needs the rename.
        new.unlink(missing_ok=True)
        write_new(self._files, new, content.ljust(FILE_SIZE, b"\0"), 0o600)
        self._files.replace(new, self._path)
        self._files.sync_directory(self._path.parent)
        self.close()
        self._fd = self._files.open(self._path)
        self._seal = seal
        self._used = 1

    def _load(self, data: bytes) -> None:
        if len(data) != FILE_SIZE:
            size = os.fstat(self._fd).st_size
            raise self._damage(min(size, FILE_SIZE), f"the file has {size} bytes instead of {FILE_SIZE}")
        if data[:17] != _MAGIC + _VERSION:
            raise self._damage(0, "the header does not begin with the magic and version 1")
        self._seal = _Seal(self._seal_key, data[:_PREFIX_SIZE])
        self.identity = self._unseal(0, data)
        while self._used < SECTORS - 1 and _sector(data, self._used + 1) != _ZERO_SECTOR:
            self._used += 1
            self.states.append(self._unseal(self._used, data))
        if not self.states:
            raise self._damage(SECTOR_SIZE, "the first record is missing")
        for sector in range(self._used + 1, SECTORS):
            if _sector(data, sector) != _ZERO_SECTOR:
                raise self._damage(sector * SECTOR_SIZE, f"record {sector} follows one that is missing")
        # What was read may exist in the page cache only: the process died, or the sync failed, before it
        # reached the disk. Nothing may be signed on its strength before the same bytes are known to be
        # there.
        self._files.write(self._fd, _sector(data, self._used), self._used * SECTOR_SIZE)
        self._files.sync(self._fd)
        self._files.sync_directory(self._path.parent)

    def _unseal(self, sector: int, data: bytes) -> bytes:
        try:
            return self._seal.unseal(sector, _sector(data, sector))
        except InvalidTag as error:
            what = f"record {sector}" if sector else "the header"
            raise self._damage(sector * SECTOR_SIZE, f"{what} does not authenticate") from error

    def _damage(self, offset: int, what: str) -> SealedStateError:
        return SealedStateError(
            f"{self._path}: damaged at offset {offset}: {what}. Nothing was signed with it. Check the disk, "
            "and that the sealing key belongs to this file; never restore an older copy. A log whose state "
            "is lost is retired: create a new one, with a new key"
        )


def _sector(data: bytes, number: int) -> bytes:
    return data[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]
