"""The trusted part proper: one attested log's state and the verbs that move it (A2M, SOSP 2007, section 3).

The rule that everything rests on: *durable first, then signed*. A verb computes the new state, has the
store make it durable, and only then signs. So a crash may forget a state that nobody was told of, but never
one that was signed, and no index is ever attested with two values. When the store fails, what the disk
holds is unknown: the log then stops, and signs nothing until it is opened again.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trustlog.errors import MisuseError, SealedStateError, VerificationError
from trustlog.hashing import HASH_SIZE, fold, genesis_head
from trustlog.keys import SIGNATURE_ALGORITHM, VerifyingKey
from trustlog.measurement import own_measurement
from trustlog.statements import (
    CONTEXT_SIZE,
    NONCE_SIZE,
    U64_MAX,
    ZERO_DIGEST,
    AppendStatement,
    BackendKind,
    EndStatement,
    LookupStatement,
    Outcome,
    QuoteStatement,
    TruncateStatement,
    lookup_outcome,
)
from trustlog.verification import (
    GROUP_ENTRIES_MAX,
    Attestation,
    LogIdentity,
    verify_append,
)

Group = tuple[Attestation, Sequence[bytes]]
Statement = AppendStatement | LookupStatement | EndStatement | TruncateStatement | QuoteStatement


class StateStore(Protocol):
    """Where the log's state survives a crash."""

    def save(self, state: bytes) -> None:
        """Make ``state`` (128 bytes) durable before returning; any exception stops the log."""


@dataclass(frozen=True, slots=True)
class LogState:
    """Everything that the trusted part remembers; fixed layout, 128 bytes, big-endian.

    offset 0: epoch, 8: low, 16: last, 24: first of the last group (u64 each); 32: head, 64: head before the
    last group, 96: context of the last group (32 bytes each).

    Invariants (``check``): 1. all numbers are u64. 2. 1 ≤ low ≤ last + 1. 3. An empty log has no last
    group: first, head before and context are zero, and the head is the genesis head. 4. Otherwise 1 ≤ first
    ≤ last, and the last group has at most 1024 entries. Between two saved states (``follows``): 5. epoch
    and low never fall. 6. Either last grew, and the new last group begins right after the old last, on the
    old head; or nothing but low changed.
    """

    epoch: int
    low: int
    last: int
    first: int
    head: bytes
    head_before: bytes
    context: bytes

    @classmethod
    def empty(cls, log_id: bytes, epoch: int = 0) -> Self:
        """State of a log without entries."""
        return cls(epoch, 1, 0, 0, genesis_head(log_id, epoch), ZERO_DIGEST, bytes(CONTEXT_SIZE))

    def encode(self) -> bytes:
        """Return the 128 bytes of the layout above."""
        numbers = (self.epoch, self.low, self.last, self.first)
        return _STATE.pack(*numbers, self.head, self.head_before, self.context)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read 128 bytes; SealedStateError for another length. The invariants are ``check``'s."""
        if len(data) != _STATE.size:
            raise SealedStateError(f"a saved state has {len(data)} bytes instead of {_STATE.size}")
        return cls(*_STATE.unpack(data))

    def check(self, log_id: bytes) -> None:
        """Raise SealedStateError, naming the invariant, if this cannot be a state of the log ``log_id``."""
        if not all(0 <= number <= U64_MAX for number in (self.epoch, self.low, self.last, self.first)):
            raise SealedStateError("invariant 1 of the log's state is broken: a number is not a u64")
        if not 1 <= self.low <= self.last + 1:
            raise SealedStateError("invariant 2 of the log's state is broken: low is not within 1 … last + 1")
        if self.last == 0 and self != self.empty(log_id, self.epoch):
            raise SealedStateError("invariant 3 of the log's state is broken: an empty log remembers something")
        if self.last and not self.first <= self.last < self.first + GROUP_ENTRIES_MAX:
            raise SealedStateError("invariant 4 of the log's state is broken: bounds of the last group")
        if self.last and self.first == 0:
            raise SealedStateError("invariant 4 of the log's state is broken: the last group begins at 0")

    def follows(self, before: LogState) -> bool:
        """Tell whether invariants 5 and 6 hold from ``before`` to this state."""
        if self.epoch < before.epoch or self.low < before.low:
            return False
        if self.last > before.last:
            return self.first == before.last + 1 and self.head_before == before.head
        return replace(self, epoch=before.epoch, low=before.low) == before


_STATE = struct.Struct(">4Q32s32s32s")


class AttestedLog:
    """One attested log: its key, its state and the verbs. Thread-safe: one lock around every verb.

    Contexts and nonces are 32 bytes. Every verb raises MisuseError for arguments out of their range and
    when the log is closed or stopped; whatever the store raises passes through, once, and stops the log.
    """

    def __init__(
        self,
        private_key: ec.EllipticCurvePrivateKey,
        kind: BackendKind,
        state: LogState,
        store: StateStore,
        *,
        durability: Literal["disk", "memory"] = "disk",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Take over ``state``, which ``store`` holds; SealedStateError if it cannot be this key's."""
        if not isinstance(private_key.curve, ec.SECP256R1):
            raise MisuseError("an attested log needs a P-256 key; make one with ec.generate_private_key(SECP256R1())")
        # Whoever read the key has asked for it before; here it only counts for keys that came another way.
        self._measurement = own_measurement(kind)
        self._private_key = private_key
        self._kind = kind
        key = VerifyingKey.from_bytes(public_key_bytes(private_key))
        self._identity = LogIdentity(key, kind, state.epoch)
        state.check(self.log_id)
        self._state = state
        self._store = store
        self._lock = threading.Lock()
        self._stopped: str | None = None
        self._durability: Literal["disk", "memory"] = durability
        self._on_close = on_close

    @property
    def public_key(self) -> bytes:
        """The uncompressed P-256 public key, 65 bytes."""
        return self._identity.key.raw

    @property
    def log_id(self) -> bytes:
        """SHA-256 of the public key, 32 bytes."""
        return self._identity.key.log_id

    @property
    def kind(self) -> BackendKind:
        """What keeps the key; stands in every statement."""
        return self._kind

    @property
    def measurement(self) -> bytes:
        """The measurement (32 bytes) of the trusted part that holds the key, see trustlog.measurement."""
        return self._measurement

    @property
    def durability(self) -> Literal["disk", "memory"]:
        """Whether the state survives the process: to be shown wherever status is."""
        return self._durability

    @property
    def epoch(self) -> int:
        """The log's epoch; software backends have only 0."""
        return self._state.epoch

    @property
    def low(self) -> int:
        """First index not forgotten; 1 at first."""
        return self._state.low

    @property
    def last(self) -> int:
        """Last index assigned; 0 in an empty log."""
        return self._state.last

    @property
    def head(self) -> bytes:
        """Head of the chain at ``last``, 32 bytes."""
        return self._state.head

    @property
    def last_group(self) -> tuple[int, int] | None:
        """Bounds (first, last) of the last group, None in an empty log."""
        state = self._state
        return (state.first, state.last) if state.last else None

    def append(self, digests: Sequence[bytes], *, context: bytes) -> Attestation:
        """Add one group of 1 … 1024 digests (32 bytes each); attests APPEND once that is durable."""
        digests = tuple(digests)
        if not 1 <= len(digests) <= GROUP_ENTRIES_MAX:
            raise MisuseError(f"a group has 1 … {GROUP_ENTRIES_MAX} entries, not {len(digests)}; split it")
        if any(len(digest) != HASH_SIZE for digest in digests):
            raise MisuseError("every digest must be 32 bytes: pass entry_digest(payload), not the payload")
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            old = self._state
            last = old.last + len(digests)
            if last >= U64_MAX:
                raise MisuseError("the log is full: 2^64 - 1 entries")
            head = fold(old.head, old.last + 1, digests)
            new = LogState(old.epoch, old.low, last, old.last + 1, head, old.head, context)
            return self._advance(new, self._append_statement(new))

    def reissue(self) -> Attestation:
        """Sign the last group's one statement again, for a host that crashed before storing it."""
        with self._lock:
            self._check_running()
            if self._state.last == 0:
                raise MisuseError("the log is empty: there is no last group to attest again; append one first")
            return self._sign(self._append_statement(self._state))

    def lookup(self, index: int, *, nonce: bytes, context: bytes, group: Group | None) -> Attestation:
        """Attest LOOKUP of ``index`` (≥ 1): unassigned, forgotten, or assigned with its digest.

        The log keeps no history: for an assigned index the host hands in ``group``, the attestation of the
        append that holds it and that group's digests. VerificationError if it is not this log's or does not
        hold ``index``.
        """
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        if not 1 <= index <= U64_MAX:
            raise MisuseError(f"indexes run from 1 to 2^64 - 1; {index} is none")
        with self._lock:
            self._check_running()
            state = self._state
            outcome = lookup_outcome(index, state.low, state.last)
            digest = self._digest_in(index, group) if outcome is Outcome.ASSIGNED else ZERO_DIGEST
            header = (self._kind, context, self.log_id, state.epoch)
            return self._sign(LookupStatement(*header, nonce, index, outcome, digest, state.low, state.last))

    def end(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Attest END: low, last and head now, with the asker's nonce."""
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            state = self._state
            header = (self._kind, context, self.log_id, state.epoch)
            return self._sign(EndStatement(*header, nonce, state.low, state.last, state.head))

    def quote(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Attest QUOTE: which program holds this key, with the asker's nonce. Signed by the log's own key."""
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            header = (self._kind, context, self.log_id, self._state.epoch)
            return self._sign(QuoteStatement(*header, nonce, self._measurement, self.public_key))

    def truncate(self, index: int, *, context: bytes) -> Attestation:
        """Forget what is below ``index`` (low ≤ index ≤ last + 1) for ever; attests TRUNCATE once durable."""
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            self._check_running()
            if not self._state.low <= index <= self._state.last + 1:
                raise MisuseError(
                    f"cannot truncate to {index}: low never falls and at most the whole log is forgotten; "
                    f"choose {self._state.low} … {self._state.last + 1}"
                )
            new = replace(self._state, low=index)
            header = (self._kind, context, self.log_id, new.epoch)
            return self._advance(new, TruncateStatement(*header, new.low, new.last, new.head))

    def close(self) -> None:
        """Sign nothing more and release the store; harmless when repeated."""
        with self._lock:
            self._stopped = "the log is closed; open it again"
            on_close, self._on_close = self._on_close, None
            if on_close is not None:
                on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self, new: LogState, statement: AppendStatement | TruncateStatement) -> Attestation:
        """Durable first, then signed: the only way from one state to the next."""
        # Stays set if save() does not return, whatever the reason: the disk may then hold the old state or
        # the new.
        self._stopped = "the log stopped because its state could not be saved; repair the cause and open it again"
        self._store.save(new.encode())
        self._state = new
        self._stopped = None
        return self._sign(statement)

    def _append_statement(self, state: LogState) -> AppendStatement:
        header = (self._kind, state.context, self.log_id, state.epoch)
        return AppendStatement(*header, state.first, state.last, state.head_before, state.head)

    def _digest_in(self, index: int, group: Group | None) -> bytes:
        if group is None:
            raise MisuseError(f"index {index} is assigned: hand in the attested group that holds it")
        attestation, digests = group
        # Within one context or another, the log said it: the group's own context stands in its statement.
        context = AppendStatement.decode(attestation.statement).context
        statement = verify_append(self._identity, attestation, digests, context=context)
        if not statement.first <= index <= statement.last:
            raise VerificationError(
                "wrong-range", f"the group {statement.first} … {statement.last} does not hold index {index}"
            )
        return digests[index - statement.first]

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise MisuseError(self._stopped)

    def _sign(self, statement: Statement) -> Attestation:
        data = statement.encode()
        r, s = decode_dss_signature(self._private_key.sign(data, SIGNATURE_ALGORITHM))
        return Attestation(data, r.to_bytes(32, "big") + s.to_bytes(32, "big"))


def public_key_bytes(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the uncompressed public key (65 bytes) of a P-256 key."""
    return private_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _check_size(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise MisuseError(f"{name} must be {size} bytes, not {len(value)}")
