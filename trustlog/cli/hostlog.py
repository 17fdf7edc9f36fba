"""The host's side of the stand-alone command line: payloads, and the attestations of all groups.

    entries.jsonl   {"index": 1, "payload": hex}                                     one line per entry
    groups.jsonl    {"first": 1, "last": 3, "statement": hex, "signature": hex}      one line per append

Order of one append: payloads durable, then the trusted append (durable before it is signed), then the
attestation durable. After a crash between any two of them ``HostLog`` puts things right, with the trusted
part's ``last`` as the measure of what must be there: entries beyond it were never said, and go; a missing
last attestation is issued again. Anything else that is missing is damage. An attestation beyond ``last``
proves that the trusted state is old.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from trustlog.cli.contract import CommandError
from trustlog.errors import MisuseError
from trustlog.hashing import entry_digest
from trustlog.keys import VerifyingKey
from trustlog.log import AttestedLog
from trustlog.statements import AppendStatement
from trustlog.tpm.backend import TpmLog
from trustlog.verification import Attestation, LogIdentity, verify_append

STANDALONE_CONTEXT = hashlib.sha256(b"trustlog/standalone").digest()
ENTRIES_FILE = "entries.jsonl"
GROUPS_FILE = "groups.jsonl"

_ENTRY: dict[str, type] = {"index": int, "payload": str}
_GROUP: dict[str, type] = {"first": int, "last": int, "statement": str, "signature": str}


class HostLog:
    """An attested log with its payloads and attestations in ``directory``, which ``log`` has locked."""

    def __init__(self, directory: Path, log: AttestedLog | TpmLog) -> None:
        """Read the files, and finish what a crash interrupted; CommandError for damage."""
        self._entries_path = directory / ENTRIES_FILE
        self._groups_path = directory / GROUPS_FILE
        self._log = log
        if isinstance(log, TpmLog):
            self._take_epoch_groups(log)
        self._payloads = self._read_entries()
        self._groups = self._read_groups()
        self._recover()

    def append(self, payloads: Sequence[bytes]) -> tuple[Attestation, list[bytes]]:
        """Append one group; returns its attestation and digests."""
        if not payloads:
            raise MisuseError("nothing to append: give a text, or lines on standard input")
        first = self._log.last + 1
        lines = [{"index": index, "payload": payload.hex()} for index, payload in enumerate(payloads, first)]
        digests = [entry_digest(payload) for payload in payloads]
        _append_lines(self._entries_path, lines)
        attestation = self._log.append(digests, context=STANDALONE_CONTEXT)
        self._payloads.extend(payloads)
        self._store_group(first, self._log.last, attestation)
        return attestation, digests

    def lookup(self, index: int, nonce: bytes) -> tuple[Attestation, bytes | None]:
        """Ask the trusted part for ``index``; returns its answer, and the payload if one is assigned."""
        group = None
        payload = None
        if self._log.low <= index <= self._log.last:
            first, last, attestation = next(g for g in self._groups if g[0] <= index <= g[1])
            group = (attestation, self._digests(first, last))
            payload = self._payloads[index - 1]
        answer = self._log.lookup(index, nonce=nonce, context=STANDALONE_CONTEXT, group=group)
        return answer, payload

    def _digests(self, first: int, last: int) -> list[bytes]:
        return [entry_digest(payload) for payload in self._payloads[first - 1 : last]]

    def _store_group(self, first: int, last: int, attestation: Attestation) -> None:
        _append_lines(self._groups_path, [_group_line(first, last, attestation)])
        self._groups.append((first, last, attestation))

    def _take_epoch_groups(self, log: TpmLog) -> None:
        """Write down what the log itself said last: CLOSE and OPEN of its epochs."""
        for payloads, attestation in log.epoch_groups():
            said = AppendStatement.decode(attestation.statement)
            if len(_read_lines(self._entries_path, _ENTRY)) == said.first - 1:
                lines = [
                    {"index": index, "payload": payload.hex()} for index, payload in enumerate(payloads, said.first)
                ]
                _append_lines(self._entries_path, lines)
            groups = _read_lines(self._groups_path, _GROUP)
            if groups and groups[-1][0] is not None and groups[-1][0]["last"] == said.first - 1:
                _append_lines(self._groups_path, [_group_line(said.first, said.last, attestation)])

    def close_epoch(self, log: TpmLog) -> Attestation:
        """Have the log say CLOSE, and keep it."""
        attestation = log.close_epoch()
        self._take_epoch_groups(log)
        return attestation

    def _read_entries(self) -> list[bytes]:
        payloads: list[bytes] = []
        lines = _read_lines(self._entries_path, _ENTRY)
        for index, (line, _) in enumerate(lines[: self._log.last], 1):
            if line is None or line.get("index") != index:
                raise _damage(self._entries_path, index)
            payloads.append(bytes.fromhex(line["payload"]))
        if len(payloads) < self._log.last:
            raise _damage(self._entries_path, len(payloads) + 1)
        # What follows was written, but never appended: nobody was told of it.
        _cut(self._entries_path, lines[self._log.last - 1][1] if self._log.last else 0)
        return payloads

    def _read_groups(self) -> list[tuple[int, int, Attestation]]:
        groups: list[tuple[int, int, Attestation]] = []
        end = 0
        lines = _read_lines(self._groups_path, _GROUP)
        for number, (line, offset) in enumerate(lines, 1):
            if line is None and number == len(lines):
                break
            if line is None:
                raise _damage(self._groups_path, number)
            attestation = Attestation(bytes.fromhex(line["statement"]), bytes.fromhex(line["signature"]))
            groups.append((line["first"], line["last"], attestation))
            end = offset
        _cut(self._groups_path, end)
        return groups

    def _recover(self) -> None:
        stored = self._groups[-1][1] if self._groups else 0
        if stored > self._log.last:
            raise CommandError(
                f"the trusted state ends at {self._log.last}, but {self._groups_path} holds its signature "
                f"up to {stored}: the trusted state is an old copy",
                "never use this log again: it would say the same indexes twice. Create a new one",
                code="rolled-back",
            )
        bounds = self._log.last_group
        if bounds is None or stored == self._log.last:
            return
        first, last = bounds
        if stored != first - 1:
            raise _damage(self._groups_path, len(self._groups) + 1)
        attestation = self._log.reissue()
        pins = self._log.identity.tpm if isinstance(self._log, TpmLog) else None
        key = VerifyingKey.from_bytes(self._log.public_key)
        identity = LogIdentity(key, self._log.kind, self._log.epoch, pins)
        verify_append(identity, attestation, self._digests(first, last), context=STANDALONE_CONTEXT)
        self._store_group(first, last, attestation)


def _group_line(first: int, last: int, attestation: Attestation) -> dict[str, object]:
    statement, signature = attestation.statement.hex(), attestation.signature.hex()
    return {"first": first, "last": last, "statement": statement, "signature": signature}


def _damage(path: Path, line: int) -> CommandError:
    return CommandError(
        f"{path}: line {line} is missing or damaged, but the trusted log attests it",
        "restore this file (not log.state) from a copy",
        code="damaged",
    )


def _read_lines(path: Path, fields: dict[str, type]) -> list[tuple[dict[str, Any] | None, int]]:
    """Return each line with the offset of its end; None for an unreadable one, a torn last one included."""
    if not path.exists():
        return []
    lines: list[tuple[dict[str, Any] | None, int]] = []
    offset = 0
    for raw in path.read_bytes().splitlines(keepends=True):
        offset += len(raw)
        lines.append((_parse(raw, fields), offset))
    return lines


def _parse(raw: bytes, fields: dict[str, type]) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
        if not raw.endswith(b"\n") or {name: type(value) for name, value in line.items()} != fields:
            return None
        for name in {"payload", "statement", "signature"} & set(fields):
            bytes.fromhex(line[name])
    except (ValueError, AttributeError, RecursionError):
        return None
    return cast("dict[str, Any]", line)


def _append_lines(path: Path, lines: Sequence[dict[str, object]]) -> None:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    fresh = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb", closefd=True) as stream:  # noqa: PTH123
        stream.write(data)
        stream.flush()
        os.fsync(fd)
    if fresh:
        _sync_directory(path.parent)


def _cut(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as stream:
            stream.truncate(size)
            os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
