"""The TPM backend: the log's chain is a PCR, its key lives in the TPM, and a folder remembers what a host must know.

Order of an append: the new state durable, TPM2_PCR_Extend, TPM2_Quote. The PCR is the truth, and the folder is not
trusted: on opening, the TPM's own quote must show the value that the folder leads to, or the one before its last group,
which is then extended. Anything else means that something else extended the PCR, or that the folder is an old copy of
itself: then the log signs nothing more.

A reboot ends the log, unless ``close_epoch`` was called before it and the next boot is this one; then ``open_log``
says OPEN and the log goes on. Losing the folder loses the log, but lets nobody say anything twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from trustlog.errors import MisuseError, VerificationError
from trustlog.hashing import HASH_SIZE, entry_digest
from trustlog.keys import VerifyingKey
from trustlog.measurement import own_measurement
from trustlog.sealed import Files, SealedJournal, write_new
from trustlog.statements import (
    CLOSE_PAYLOAD,
    CONTEXT_SIZE,
    NONCE_SIZE,
    U64_MAX,
    AppendStatement,
    BackendKind,
    EndStatement,
    open_payload,
)
from trustlog.tpm import chain
from trustlog.tpm.anchors import AutomaticAnchors
from trustlog.tpm.chain import ATTEST_SIZE, CLOSE_DIGEST
from trustlog.tpm.client import Tpm
from trustlog.tpm.folder import (
    CLOSE_FILE,
    Role,
    TpmConfig,
    TpmState,
)
from trustlog.tpm.quote import parse_quote, pcr_digest
from trustlog.tpm.registers import ProgramEvent, Programs
from trustlog.tpm.storekey import StoreKey
from trustlog.tpm.wire import TpmError
from trustlog.verification import GROUP_ENTRIES_MAX, Attestation, LogIdentity, verify_append

RETIRE = (
    "This log can say nothing more, and a new log is a new identity: it must be admitted to the cluster by an ordered "
    "change of members, which this version does not have yet; until then the replica stays out"
)


class RestartedError(MisuseError):
    """The machine was started again without a CLOSE right before: what the log said last is not proven."""


class ForeignValueError(MisuseError):
    """The log's PCR does not hold what the log gave it: something else extended it, or the folder is an older copy."""


class TpmLog:
    """One attested log in a TPM. Thread-safe: one lock around every verb. Made by ``create`` and ``open_log``.

    The verbs are ``AttestedLog``'s, but for what a TPM cannot attest: a lookup (show the group that holds the index
    instead), and low, which is the host's word. TpmError if the TPM fails: the log then stops until it is opened again.
    """

    kind = BackendKind.TPM
    durability: Literal["disk", "memory"] = "disk"

    def __init__(self, directory: Path, tpm: Tpm, config: TpmConfig, key: VerifyingKey, journal: SealedJournal) -> None:
        self.identity = LogIdentity(key, BackendKind.TPM, config.pins.epoch, config.pins)
        self.config = config
        self._directory = directory
        self._tpm = tpm
        self._journal = journal
        self._state = TpmState.decode(journal.states[-1])
        self._lock = threading.Lock()
        self._stopped: str | None = None
        self._resources = ExitStack()
        # Before the key is used: which program this is.
        self._program = program_event(key)
        self.programs = Programs(tpm, directory, self._program, config.pins.pcr)
        self._store_key = StoreKey(tpm, directory, self.programs, self._program)
        self._closing: Attestation | None = None
        self.anchors = AutomaticAnchors.load(tpm, directory, self.log_id)

    @property
    def client(self) -> Tpm:
        """The connection to the TPM, for anchors and evidence about the same machine."""
        return self._tpm

    @property
    def public_key(self) -> bytes:
        """The attestation key's uncompressed public key, 65 bytes."""
        return self.identity.key.raw

    @property
    def log_id(self) -> bytes:
        """SHA-256 of the public key, 32 bytes."""
        return self.identity.key.log_id

    @property
    def directory(self) -> Path:
        """The folder, where the host keeps what belongs to the log."""
        return self._directory

    @property
    def epoch(self) -> int:
        """The log's epoch: u32 reset count, u32 restart count."""
        return self._state.epoch

    @property
    def low(self) -> int:
        """First index not forgotten: the host's word."""
        return self._state.low

    @property
    def last(self) -> int:
        """Last index assigned; 0 in an empty log."""
        return self._state.last

    @property
    def head(self) -> bytes:
        """Head of the chain at ``last``, 32 bytes (``trustlog.tpm.chain.head``)."""
        return chain.head(self._state.epoch, self._state.pcr, closed=self._state.role == Role.CLOSE)

    @property
    def last_group(self) -> tuple[int, int] | None:
        """Bounds (first, last) of the last group, None in an empty log."""
        return (self._state.first, self._state.last) if self._state.last else None

    def append(self, digests: Sequence[bytes], *, context: bytes) -> Attestation:
        """Add one group of 1 … 1024 digests (32 bytes each): the PCR is extended once, and quoted once."""
        return self._append(tuple(digests), context, Role.NORMAL)

    def close_epoch(self) -> Attestation:
        """Say CLOSE before the machine is switched off, so that the log can go on after the next boot."""
        if self._state.last == 0:
            raise MisuseError("the log is empty: there is nothing to close; after a reboot create it anew")
        attestation = self._append((CLOSE_DIGEST,), self._state.context, Role.CLOSE)
        self._keep_close(attestation)
        return attestation

    def reissue(self) -> Attestation:
        """Quote the last group's one statement again, for a host that crashed before storing it."""
        with self._lock:
            self._check_running()
            if self._state.last == 0:
                raise MisuseError("the log is empty: there is no last group to attest again; append one first")
            return self._attest(self._append_statement(self._state).encode(), self._state.pcr)

    def end(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Attest END: the PCR's value now, with the asker's nonce; low and last stand beside it as claims."""
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            state = self._state
            header = (self.kind, context, self.log_id, state.epoch)
            statement = EndStatement(*header, nonce, state.low, state.last, state.pcr)
            return self._attest(statement.encode(), state.pcr)

    def lookup(self, index: int, **_: object) -> Attestation:
        """Refuse: a TPM attests what was appended, and nothing about an index."""
        raise MisuseError(
            f"a TPM attests no lookup of index {index}: show the group that holds it, with those before it "
            "back to what the verifier has, and end for freshness"
        )

    def quote(self, **_: object) -> Attestation:
        """Refuse: what a TPM attests of its program are registers, with lists that explain them."""
        raise MisuseError("a TPM log's quote needs its registers: use trustlog.appraisal.make_evidence")

    def truncate(self, index: int, *, context: bytes) -> None:
        """Remember that nothing below ``index`` (low ≤ index ≤ last + 1) is needed; a TPM cannot attest that."""
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            if not self._state.low <= index <= self._state.last + 1:
                raise MisuseError(f"cannot truncate to {index}: choose {self._state.low} … {self._state.last + 1}")
            self._save(replace(self._state, low=index))

    def epoch_groups(self) -> list[tuple[tuple[bytes, ...], Attestation]]:
        """Return what the log itself said last: payloads and attestation of CLOSE, and of OPEN if that came after it.

        A host that keeps the log's groups takes those from here that it does not have.
        """
        groups: list[tuple[tuple[bytes, ...], Attestation]] = []
        role = self._state.role
        if role != Role.NORMAL and self._closing is not None:
            groups.append(((CLOSE_PAYLOAD,), self._closing))
        if role == Role.OPEN:
            groups.append(((self._open_payload(),), self.reissue()))
        return groups

    # A key for the host's payloads at rest (``trustlog.tpm.storekey``).

    def store_key(self) -> bytes:
        """Return the key, 32 bytes, which the TPM releases to the measured program alone; see ``StoreKey.release``."""
        return self._store_key.release()

    def create_store_key(self) -> None:
        """Make a key, for an empty store; see ``StoreKey.create``."""
        self._store_key.create()

    def reseal_store_key(self, measurement: bytes | None = None) -> None:
        """Seal the key anew, for another program as well; see ``StoreKey.reseal``."""
        self._store_key.reseal(measurement)

    def close(self) -> None:
        """Say nothing more and let the TPM and the folder go; harmless when repeated. This is not ``close_epoch``."""
        with self._lock:
            self._stopped = "the log is closed; open it again"
            self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, digests: tuple[bytes, ...], context: bytes, role: Role) -> Attestation:
        if not 1 <= len(digests) <= GROUP_ENTRIES_MAX:
            raise MisuseError(f"a group has 1 … {GROUP_ENTRIES_MAX} entries, not {len(digests)}; split it")
        if any(len(digest) != HASH_SIZE for digest in digests):
            raise MisuseError("every digest must be 32 bytes: pass entry_digest(payload), not the payload")
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            old = self._state
            if old.role == Role.CLOSE:
                raise MisuseError("the log was closed for a shutdown: it goes on after the next boot")
            first, last = old.last + 1, old.last + len(digests)
            if last >= U64_MAX:
                raise MisuseError("the log is full: 2^64 - 1 entries")
            event = chain.event_digest(self.log_id, first, context, digests)
            after = chain.extended(old.pcr, event)
            new = TpmState(old.epoch, old.low, last, first, role, after, old.pcr, context, event)
            attestation = self._advance(new)
            # What the TPM signed is what was meant, or something else moved the PCR in between.
            verify_append(self.identity, attestation, digests, context=context)
            self._stopped = None
            if self.anchors is not None:
                self.anchors.offer(last, self.head, final=role is Role.CLOSE)
            return attestation

    def _advance(self, new: TpmState) -> Attestation:
        """Durable, extended, quoted: the only way from one state to the next."""
        self._save(new)
        self._stopped = "the log stopped because the TPM or the disk failed; repair the cause and open it again"
        self._tpm.pcr_extend(self.config.pins.pcr, new.event)
        return self._attest(self._append_statement(new).encode(), new.pcr)

    def _save(self, new: TpmState) -> None:
        stopped = self._stopped
        self._stopped = "the log stopped because its state could not be saved; repair the cause and open it again"
        self._journal.save(new.encode())
        self._state = new
        self._stopped = stopped

    def _append_statement(self, state: TpmState) -> AppendStatement:
        header = (self.kind, state.context, self.log_id, state.epoch)
        return AppendStatement(*header, state.first, state.last, state.pcr_before, state.pcr)

    def _attest(self, statement: bytes, pcr: bytes) -> Attestation:
        asked = chain.asked(statement)
        signed = self._tpm.quote(self.config.handle, [self.config.pins.pcr], asked)
        quote = parse_quote(signed.attest)
        if len(signed.attest) != ATTEST_SIZE:
            raise TpmError(
                f"{self.config.address}: its quotes have {len(signed.attest)} bytes instead of {ATTEST_SIZE}"
            )
        if quote.digest != pcr_digest({self.config.pins.pcr: pcr}) or quote.clock.epoch != self._state.epoch:
            self._stopped = f"the log in {self._directory} has ended. {RETIRE}"
            raise TpmError(
                f"PCR {self.config.pins.pcr} of {self.config.address} was extended by something else than this log, or "
                f"the machine was suspended or started again. {RETIRE}"
            )
        return Attestation(statement, signed.attest + signed.signature)

    def _open_payload(self) -> bytes:
        state, pins = self._state, self.config.pins
        closed = chain.head(pins.before(state.epoch), state.pcr_before, closed=True)
        return open_payload(state.first - 1, closed)

    def _keep_close(self, attestation: Attestation) -> None:
        path = self._directory / CLOSE_FILE
        path.unlink(missing_ok=True)
        files = Files()
        write_new(files, path, attestation.raw, 0o644)
        files.sync_directory(self._directory)
        self._closing = attestation

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise MisuseError(self._stopped)

    # Opening: where the TPM stands, against what the folder says.

    def _resume(self) -> None:
        """Compare the TPM with the folder, and finish or begin what is due.

        RestartedError, ForeignValueError: the log can say nothing more. TpmError: the TPM fails.
        """
        pins, state = self.config.pins, self._state
        self._closing = self._read_close()
        signed = self._tpm.quote(self.config.handle, [pins.pcr], bytes(HASH_SIZE))
        self.identity.key.verify(signed.signature, signed.attest)
        epoch = parse_quote(signed.attest).clock.epoch
        value = self._tpm.pcr_read([pins.pcr])[pins.pcr]
        if epoch != state.epoch:
            self._reopen(epoch, value)
            return
        if value != state.pcr:
            began = pins.base if state.role == Role.OPEN else state.pcr_before
            if state.last == 0 or value != began:
                raise ForeignValueError(
                    f"PCR {pins.pcr} of {self.config.address} does not hold what the log in {self._directory} gave it: "
                    "something else extended it, or the folder is an older copy of itself; if it was restored, put the "
                    f"newest one back. Otherwise: {RETIRE}"
                )
            self._tpm.pcr_extend(pins.pcr, state.event)
            self.reissue()
        if state.role == Role.CLOSE and self._closing is None:
            self._keep_close(self.reissue())

    def _read_close(self) -> Attestation | None:
        """Return the kept attestation of the CLOSE that the state knows; None if there is none, or an older one's."""
        state = self._state
        closed = {Role.CLOSE: state.pcr, Role.OPEN: state.pcr_before}.get(state.role)
        try:
            kept = Attestation.of_group((self._directory / CLOSE_FILE).read_bytes())
            said = AppendStatement.decode(kept.statement)
            verify_append(self.identity, kept, (entry_digest(CLOSE_PAYLOAD),), context=said.context)
        except (FileNotFoundError, VerificationError):
            return None  # a crash came between CLOSE and the file: in the same epoch it is quoted again
        return kept if said.head_after == closed else None

    def _reopen(self, epoch: int, value: bytes) -> None:
        """Go on in the next epoch if nothing can have been said in between; RestartedError otherwise."""
        pins, state = self.config.pins, self._state
        if state.role == Role.CLOSE and self._closing is None:
            raise RestartedError(
                f"the machine was started again; the log in {self._directory} was closed before, but {CLOSE_FILE}, "
                "which proves it, is missing there, damaged, or an older one: restore it from a copy. Without it: "
                f"{RETIRE}"
            )
        if state.role != Role.CLOSE:
            raise RestartedError(
                f"the machine was started again, and the log in {self._directory} was not closed before: nothing "
                f"proves that entry {state.last} was its last. {RETIRE}"
            )
        if not pins.accepts(epoch) or pins.before(epoch) != state.epoch:
            raise RestartedError(
                f"the machine was started more than once (or suspended) since the log in {self._directory} was closed: "
                f"it could have gone on differently in between. {RETIRE}"
            )
        if value != pins.base:
            raise RestartedError(
                f"PCR {pins.pcr} of {self.config.address} has another value at boot than at the log's enrolment: a "
                f"firmware or loader update, or something extended it since. {RETIRE}"
            )
        closed = chain.head(state.epoch, state.pcr, closed=True)
        digest = entry_digest(open_payload(state.last, closed))
        event = chain.event_digest(self.log_id, state.last + 1, state.context, (digest,))
        after = chain.extended(pins.base, event)
        first = state.last + 1
        new = TpmState(epoch, state.low, first, first, Role.OPEN, after, state.pcr, state.context, event)
        attestation = self._advance(new)
        verify_append(self.identity, attestation, (digest,), context=state.context)
        self._stopped = None


def program_event(key: VerifyingKey) -> ProgramEvent:
    """Return what is measured of this program before ``key`` is used."""
    return ProgramEvent(BackendKind.TPM, key.log_id, own_measurement(BackendKind.TPM))


def _check_size(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise MisuseError(f"{name} must be {size} bytes, not {len(value)}")
