"""What the tests of the trusted log share: fixed keys, shorthand, and a disk that forgets what was not synced."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from trustlog import Attestation, AttestedLog, LogIdentity, VerifyingKey, entry_digest
from trustlog.sealed import Files

CONTEXT = bytes(range(32))
OTHER_CONTEXT = bytes(range(1, 33))
NONCE = bytes(range(32, 64))
OTHER_NONCE = bytes(range(33, 65))


def fixed_key(number: int = 1) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(0x1234567890ABCDEF + number, ec.SECP256R1())


def identity_of(log: AttestedLog) -> LogIdentity:
    return LogIdentity(VerifyingKey.from_bytes(log.public_key), log.kind)


def digests_of(*payloads: str) -> list[bytes]:
    return [entry_digest(payload.encode()) for payload in payloads]


def add(log: AttestedLog, *payloads: str) -> tuple[Attestation, list[bytes]]:
    digests = digests_of(*payloads)
    return log.append(digests, context=CONTEXT), digests


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Crash(BaseException):
    """The process dies here; nothing may catch it as an error."""


class ForgetfulFiles(Files):
    """Files in a real directory, plus a model of what the disk holds: synced content under synced names.

    Dies at the ``crash_at``-th step (every operation has one step before it and one after it). ``lose_power`` then
    turns the directory into what a disk may hold: what was not synced is lost or not, content and names apart.
    """

    def __init__(self, directory: Path, crash_at: int | None = None) -> None:
        self.directory = directory
        self.crash_at = crash_at
        self.steps = 0
        self.failing: set[str] = set()
        self.current: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}
        self.synced_names: dict[str, int] = {}

    def _step(self, operation: str) -> None:
        self.steps += 1
        if self.steps == self.crash_at:
            raise Crash(operation)
        if operation in self.failing:
            raise OSError(5, "Input/output error")

    def open(self, path: Path, *, create_mode: int | None = None) -> int:
        self._step("open")
        fd = super().open(path, create_mode=create_mode)
        if create_mode is not None:
            inode = os.fstat(fd).st_ino
            self.current[inode] = b""
            self.synced.pop(inode, None)
        self._step("opened")
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self._step("write")
        super().write(fd, data, offset)
        self.current[os.fstat(fd).st_ino] = os.pread(fd, 10**6, 0)
        self._step("written")

    def sync(self, fd: int) -> None:
        self._step("sync")
        inode = os.fstat(fd).st_ino
        self.synced[inode] = self.current[inode]
        self._step("synced")

    def replace(self, source: Path, target: Path) -> None:
        self._step("replace")
        super().replace(source, target)
        self._step("replaced")

    def sync_directory(self, directory: Path) -> None:
        self._step("sync_directory")
        if directory == self.directory:
            self.synced_names = self._names()
        self._step("synced_directory")

    def _names(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.directory.iterdir()}

    def lose_power(self, *, names: bool, content: bool) -> None:
        """Reboot; ``names`` and ``content``: whether what was not synced survived nevertheless."""
        inodes = self._names() if names else self.synced_names
        held = {name: (self.current if content else self.synced).get(inode, b"") for name, inode in inodes.items()}
        for path in self.directory.iterdir():
            path.unlink()
        self.current, self.synced = {}, {}
        for name, data in held.items():
            path = self.directory / name
            path.write_bytes(data)
            path.chmod(0o600)
            self.current[path.stat().st_ino] = self.synced[path.stat().st_ino] = data
        self.synced_names = self._names()
        self.crash_at = None
