"""The trustlog programs that ran since the machine started, as a TPM's PCR remembers them.

Before it uses its key, a log of the TPM backend extends its measurement into a PCR (13 unless the policy says
otherwise; one that cannot be reset without a reboot). The event has 82 bytes, and what is extended is its SHA-256:

    offset size field
         0   16 tag "trustlog/measure"
        16    1 version, 1
        17    1 kind of backend
        18   32 log id
        50   32 measurement

The list of events is kept by the host, and replaying it must lead from the PCR's base value to the quoted one: none can
be left out, added or exchanged. Every program that ever extended itself since the machine started stands in it, the
present one last.

What this proves depends on who extended. The PCR remembers that *somebody* said so, and that it was said before
everything after it; root can extend any measurement. With the firmware's event log and IMA the verifier can see which
interpreter and files really ran.

The host keeps the list in a file, one line of hexadecimal digits per event (``programs.log`` in the log's folder).
Order: the line durable, then TPM2_PCR_Extend. So a crash in between leaves one line too many, which the next start
takes off; a list that does not lead to the PCR otherwise means that something else extended it, and evidence then fails
until the next reboot.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trustlog.errors import MisuseError, VerificationError
from trustlog.statements import BackendKind
from trustlog.tpm.client import Signed, Tpm
from trustlog.tpm.quote import parse_quote, pcr_digest
from trustlog.tpm.structures import ALG_SHA256
from trustlog.tpm.wire import TpmError

PROGRAMS_FILE = "programs.log"
PROGRAM_PCR = 13
PROGRAM_EVENTS_MAX = 256
# PCRs may move between reading and quoting them: IMA's does with every program that starts.
QUOTE_ATTEMPTS_MAX = 20

TAG = b"trustlog/measure"
VERSION = 1
EVENT = struct.Struct(">16sBB32s32s")


@dataclass(frozen=True, slots=True)
class ProgramEvent:
    """A program with this measurement began to use this log's key."""

    kind: BackendKind
    log_id: bytes
    measurement: bytes

    def encode(self) -> bytes:
        """Return the 82 bytes of the layout above."""
        return EVENT.pack(TAG, VERSION, self.kind, self.log_id, self.measurement)

    def digest(self) -> bytes:
        """Return what is extended, 32 bytes."""
        return hashlib.sha256(self.encode()).digest()

    def extended(self, before: bytes = bytes(32)) -> bytes:
        """Return what a register that held ``before`` (after a boot, zeros) holds once this was extended."""
        return hashlib.sha256(before + self.digest()).digest()


def replay_programs(events: Sequence[bytes], base: bytes, quoted: bytes) -> list[ProgramEvent]:
    """Return the events after replaying them from ``base`` to ``quoted``; VerificationError otherwise."""
    programs: list[ProgramEvent] = []
    value = base
    for raw in events:
        programs.append(_decode(raw))
        value = hashlib.sha256(value + hashlib.sha256(raw).digest()).digest()
    if value != quoted:
        raise VerificationError(
            "program-log",
            "the list of measured programs does not lead to the quoted PCR: one is missing or was changed",
        )
    return programs


def _decode(raw: bytes) -> ProgramEvent:
    if len(raw) != EVENT.size:
        raise VerificationError("program-log", f"a program event of {len(raw)} bytes instead of {EVENT.size}")
    tag, version, kind, log_id, measurement = EVENT.unpack(raw)
    if tag != TAG or version != VERSION or kind not in {*BackendKind}:
        raise VerificationError("program-log", "a program event has an unknown tag, version or kind")
    return ProgramEvent(BackendKind(kind), log_id, measurement)


def record_program(tpm: Tpm, path: Path, event: ProgramEvent, pcr: int = PROGRAM_PCR) -> list[bytes]:
    """Extend ``pcr`` with this program unless it was the last that did; returns all events since the machine started.

    To be called before the key is used. MisuseError: the list in ``path`` is not what the PCR remembers, or is full.
    """
    events, _ = _events_and_value(tpm, path, pcr)
    raw = event.encode()
    if not events or events[-1] != raw:
        if len(events) >= PROGRAM_EVENTS_MAX:
            raise MisuseError(
                f"{path}: {PROGRAM_EVENTS_MAX} programs were measured since the machine started; reboot it"
            )
        events.append(raw)
        _write(path, events)
        tpm.pcr_extend(pcr, event.digest())
    return events


def value_with_program(tpm: Tpm, path: Path, event: ProgramEvent, pcr: int) -> bytes:
    """Return what ``pcr`` holds once ``record_program`` was called, without extending it. MisuseError as there."""
    events, value = _events_and_value(tpm, path, pcr)
    return value if events and events[-1] == event.encode() else event.extended(value)


def _events_and_value(tpm: Tpm, path: Path, pcr: int) -> tuple[list[bytes], bytes]:
    value = tpm.pcr_read([pcr])[pcr]
    return _remembered(_read(path), value, path, pcr), value


def program_pcr(log_pcr: int) -> int:
    """Return the register of the programs: 13, or 12 if 13 is the log's own."""
    return PROGRAM_PCR if log_pcr != PROGRAM_PCR else PROGRAM_PCR - 1


class Programs:
    """The programs that were measured for a log since the machine started. Without them the log works, and quotes none.

    pcr: 13, or 12 if 13 is the log's own.
    """

    def __init__(self, tpm: Tpm, directory: Path, event: ProgramEvent, log_pcr: int) -> None:
        """Measure the program of ``event``. TpmError if the TPM fails."""
        self.pcr = program_pcr(log_pcr)
        self._events: list[bytes] = []
        self._trouble: MisuseError | None = None
        try:
            self._events = record_program(tpm, directory / PROGRAMS_FILE, event, self.pcr)
        except MisuseError as error:
            self._trouble = error

    @property
    def events(self) -> tuple[bytes, ...]:
        """The events, 82 bytes each; MisuseError if the list is not what the PCR remembers."""
        if self._trouble is not None:
            raise self._trouble
        return tuple(self._events)


def quote_values(
    tpm: Tpm, key: int, pcrs: Sequence[int], extra_data: bytes, bank: int = ALG_SHA256
) -> tuple[Signed, dict[int, bytes]]:
    """Have ``key`` quote these PCRs, and return their values with the quote; TpmError if they will not stand still."""
    for _ in range(QUOTE_ATTEMPTS_MAX):
        values = tpm.pcr_read(pcrs, bank)
        signed = tpm.quote(key, pcrs, extra_data, bank=bank)
        if parse_quote(signed.attest).digest == pcr_digest(values):
            return signed, values
    raise TpmError(f"{tpm.address}: PCRs {pcrs} change faster than they can be quoted; ask again")


def _remembered(events: list[bytes], value: bytes, path: Path, pcr: int) -> list[bytes]:
    """Return the events that lead from zeros to the PCR's value: all, all but the last, or none after a reboot."""
    reached = bytes(32)
    steps = [reached]
    for event in events:
        reached = hashlib.sha256(reached + hashlib.sha256(event).digest()).digest()
        steps.append(reached)
    for count in (len(events), len(events) - 1, 0):
        if count >= 0 and steps[count] == value:
            return events[:count]
    raise MisuseError(
        f"{path} does not lead to what PCR {pcr} holds: another program extended it, or this file is an old copy; "
        "choose a PCR that nothing else uses, and reboot"
    )


def _read(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            content = file.read((2 * EVENT.size + 1) * PROGRAM_EVENTS_MAX + 1)
    except FileNotFoundError:
        return []
    try:
        return [bytes.fromhex(line.decode("ascii")) for line in content.splitlines()][: PROGRAM_EVENTS_MAX + 1]
    except ValueError:
        raise MisuseError(f"{path}: not a list of program events; remove it and reboot") from None


def _write(path: Path, events: Sequence[bytes]) -> None:
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, b"".join(event.hex().encode() + b"\n" for event in events))
        os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
