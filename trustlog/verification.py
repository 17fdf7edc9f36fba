"""Verifying what logs attest: stateless, with public keys only.

What a verifier may conclude from a valid statement is what the log's owner cannot take back, given that the
log's trusted part is intact. APPEND: these digests, and no others, stand at these indexes of this log.
LOOKUP and END: so it was at some moment after the nonce was chosen. TRUNCATE: nothing below low will ever
be answered for again. A TPM's APPEND proves less by itself, and the same by replaying; its END says only the head,
and it attests no other statement: see ``trustlog.tpm.chain``.

Checks run from cheap to dear, the signature last. A signature is not an identifier: ECDSA allows two for
the same statement (r‖s and r‖n-s) and every signing makes another one; compare statements instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from trustlog.errors import VerificationError
from trustlog.hashing import HASH_SIZE, fold, genesis_head
from trustlog.keys import PUBLIC_KEY_SIZE, SIGNATURE_SIZE, VerifyingKey
from trustlog.statements import (
    APPEND_SIZE,
    TPM_PROOF_SIZE,
    AppendStatement,
    BackendKind,
    EndStatement,
    LookupStatement,
    QuoteStatement,
    TruncateStatement,
)

if TYPE_CHECKING:
    from trustlog.tpm.chain import TpmPins

__all__ = [
    "ATTESTATION_SIZE_MAX",
    "GROUP_ENTRIES_MAX",
    "PUBLIC_KEY_SIZE",
    "SIGNATURE_SIZE",
    "Attestation",
    "LogIdentity",
    "VerifyingKey",
    "find_contradiction",
    "heads_of",
    "initial_head",
    "verify_append",
    "verify_end",
    "verify_lookup",
    "verify_signature",
    "verify_truncate",
]

GROUP_ENTRIES_MAX = 1024
ATTESTATION_SIZE_MAX = APPEND_SIZE + TPM_PROOF_SIZE

AnyStatement = TypeVar(
    "AnyStatement", AppendStatement, LookupStatement, EndStatement, TruncateStatement, QuoteStatement
)


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Verify once with a raw public key (65 bytes); VerificationError("malformed", "bad-signature")."""
    VerifyingKey.from_bytes(public_key).verify(signature, message)


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """Whose statements a verifier takes: the key, the kinds of backend its policy counts, and the epoch.

    tpm: what was pinned when a TPM's log was enrolled, its epochs among it; without that no TPM's statement counts, and
    with it no other kind's: a TPM's restricted key also signs what its caller hands in, unless that looks like a TPM's
    own structure ("TPM 2.0 Library, Part 1", section 23.2.2). A bare signature of it is the host's word.
    """

    key: VerifyingKey
    kind: BackendKind | frozenset[BackendKind]
    epoch: int = 0
    tpm: TpmPins | None = None

    @classmethod
    def published(cls, key: VerifyingKey, tpm: TpmPins | None) -> Self:
        """Whom a log.pub names: with pins a TPM, and without them a log that signs by itself."""
        return cls(key, _SELF_SIGNING if tpm is None else BackendKind.TPM, tpm=tpm)

    def accepts(self, kind: BackendKind) -> bool:
        """Tell whether the policy counts statements of this kind of backend."""
        if self.tpm is not None and kind is not BackendKind.TPM:
            return False
        return kind in self.kind if isinstance(self.kind, frozenset) else kind is self.kind


@dataclass(frozen=True, slots=True)
class Attestation:
    """A statement's bytes as the log released them, with their signature (r‖s, 64 bytes; a TPM's proof: 209)."""

    statement: bytes
    signature: bytes

    @property
    def raw(self) -> bytes:
        """Both, one after the other."""
        return self.statement + self.signature

    @classmethod
    def of_group(cls, raw: bytes) -> Self:
        """Take an append statement and its signature from the beginning of ``raw``, verifying nothing.

        Where the signature ends depends on the kind of backend that stands in the statement; of bytes that are too
        short there is less.
        """
        end = APPEND_SIZE + (TPM_PROOF_SIZE if raw[17:18] == _TPM else SIGNATURE_SIZE)
        return cls(raw[:APPEND_SIZE], raw[APPEND_SIZE:end])


_TPM = bytes([BackendKind.TPM])
_SELF_SIGNING = frozenset({BackendKind.SOFTWARE, BackendKind.PROCESS})


def initial_head(identity: LogIdentity) -> bytes:
    """Return the head (32 bytes) of the log while it is empty."""
    if identity.tpm is None:
        return genesis_head(identity.key.log_id, identity.epoch)
    from trustlog.tpm import chain as tpm_chain  # noqa: PLC0415 - see _pins

    return tpm_chain.initial_head(identity.tpm)


def heads_of(identity: LogIdentity, statement: AppendStatement, digests: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return the heads (32 bytes each) by which a verified group continues one and is continued by another."""
    if statement.kind is not BackendKind.TPM:
        return statement.head_before, statement.head_after
    from trustlog.tpm import chain as tpm_chain  # noqa: PLC0415 - see _pins

    return tpm_chain.link_of(statement, digests, _pins(identity))


def verify_append(
    identity: LogIdentity, attestation: Attestation, digests: Sequence[bytes], *, context: bytes
) -> AppendStatement:
    """Verify that the log holds exactly ``digests`` (32 bytes each) at first … last; else VerificationError.

    Whether the group continues what the verifier has seen (first, head before) is for the caller to compare.
    """
    statement = _decode(AppendStatement, identity, attestation, context)
    count = statement.last - statement.first + 1
    if not count == len(digests) <= GROUP_ENTRIES_MAX:
        raise VerificationError(
            "wrong-count", f"{len(digests)} digests for a group of {count} (at most {GROUP_ENTRIES_MAX})"
        )
    if any(len(digest) != HASH_SIZE for digest in digests):
        raise VerificationError("malformed", "a digest is not 32 bytes")
    if statement.kind is BackendKind.TPM:
        from trustlog.tpm import chain as tpm_chain  # noqa: PLC0415 - see _pins

        signed, proof = attestation.statement, attestation.signature
        tpm_chain.verify_group(identity.key, _pins(identity), statement, signed, proof, digests)
        return statement
    if fold(statement.head_before, statement.first, digests) != statement.head_after:
        raise VerificationError("wrong-head", "the digests do not lead to the attested head")
    identity.key.verify(attestation.signature, attestation.statement)
    return statement


def verify_lookup(
    identity: LogIdentity, attestation: Attestation, *, context: bytes, nonce: bytes, index: int
) -> LookupStatement:
    """Verify the answer to a lookup of ``index`` asked with ``nonce`` (32 bytes); else VerificationError."""
    statement = _decode(LookupStatement, identity, attestation, context)
    _check_nonce(statement.nonce, nonce)
    if statement.index != index:
        raise VerificationError("wrong-range", f"the answer is about index {statement.index}, not {index}")
    identity.key.verify(attestation.signature, attestation.statement)
    return statement


def verify_end(identity: LogIdentity, attestation: Attestation, *, context: bytes, nonce: bytes) -> EndStatement:
    """Verify where the log ended after ``nonce`` (32 bytes) was chosen; VerificationError otherwise."""
    statement = _decode(EndStatement, identity, attestation, context)
    _check_nonce(statement.nonce, nonce)
    if statement.kind is BackendKind.TPM:
        from trustlog.tpm import chain as tpm_chain  # noqa: PLC0415 - see _pins

        signed, proof = attestation.statement, attestation.signature
        tpm_chain.verify_fresh(identity.key, _pins(identity), statement, signed, proof)
        return statement
    identity.key.verify(attestation.signature, attestation.statement)
    return statement


def verify_truncate(identity: LogIdentity, attestation: Attestation, *, context: bytes) -> TruncateStatement:
    """Verify that the log forgot everything below low; VerificationError otherwise."""
    statement = _decode(TruncateStatement, identity, attestation, context)
    identity.key.verify(attestation.signature, attestation.statement)
    return statement


def verify_quote(identity: LogIdentity, attestation: Attestation, *, context: bytes, nonce: bytes) -> QuoteStatement:
    """Verify what a log says of the program that holds its key, after ``nonce`` was chosen; else VerificationError.

    That the log's own key signed it makes it no more than the program's own word: see trustlog.appraisal.
    """
    statement = _decode(QuoteStatement, identity, attestation, context)
    _check_nonce(statement.nonce, nonce)
    identity.key.verify(attestation.signature, attestation.statement)
    return statement


def find_contradiction(
    identity: LogIdentity,
    a: Attestation,
    digests_a: Sequence[bytes],
    b: Attestation,
    digests_b: Sequence[bytes],
) -> str | None:
    """Tell how two groups of one log prove its trusted part broken, or None if they agree.

    Both must verify by themselves, in whatever context (VerificationError otherwise). An intact log says
    every index once: two groups either are the same statement, or do not overlap, and neighbours share a
    head. Not so a TPM, which knows no indexes: see ``trustlog.tpm.chain``.
    """
    if a.statement[17:18] == b.statement[17:18] == _TPM:
        return _find_tpm_contradiction(identity, a, digests_a, b, digests_b)
    first = verify_append(identity, a, digests_a, context=AppendStatement.decode(a.statement).context)
    second = verify_append(identity, b, digests_b, context=AppendStatement.decode(b.statement).context)
    if first == second:
        return None
    if second.first < first.first:
        first, second = second, first
    if second.first <= first.last:
        return (
            f"index {second.first} was attested twice: in {first.first} … {first.last} "
            f"and in {second.first} … {second.last}"
        )
    if second.first == first.last + 1 and second.head_before != first.head_after:
        return f"two histories: the head at {first.last} was attested with two values"
    return None


def _find_tpm_contradiction(
    identity: LogIdentity, a: Attestation, digests_a: Sequence[bytes], b: Attestation, digests_b: Sequence[bytes]
) -> str | None:
    """Tell whether one value of the PCR was moved to two in one epoch; that an index stands twice proves nothing."""
    from trustlog.tpm import chain as tpm_chain  # noqa: PLC0415 - see _pins

    pins = identity.tpm or tpm_chain.pins_of_any(a.signature)
    pinned = LogIdentity(identity.key, identity.kind, tpm=pins)
    first = verify_append(pinned, a, digests_a, context=AppendStatement.decode(a.statement).context)
    second = verify_append(pinned, b, digests_b, context=AppendStatement.decode(b.statement).context)
    starts = {heads_of(pinned, first, digests_a)[0], heads_of(pinned, second, digests_b)[0]}
    if first.epoch != second.epoch or len(starts) != 1 or first.head_after == second.head_after:
        return None
    return (
        f"the PCR went on from one value in two ways in one epoch: with {first.first} … {first.last} and with "
        f"{second.first} … {second.last}; the TPM is broken, or a software TPM was copied"
    )


def _pins(identity: LogIdentity) -> TpmPins:
    """Return what is pinned. What verifies quotes is loaded here and there only: other kinds of log run without it."""
    if identity.tpm is None:
        raise VerificationError("not-pinned", "a TPM's statement counts only with what was pinned at its enrolment")
    return identity.tpm


def _decode(
    statement_type: type[AnyStatement], identity: LogIdentity, attestation: Attestation, context: bytes
) -> AnyStatement:
    statement = statement_type.decode(attestation.statement)
    if statement.log_id != identity.key.log_id:
        raise VerificationError("wrong-log", "the statement is another log's")
    if not identity.accepts(statement.kind):
        raise VerificationError(
            "wrong-kind", f"statements of the {statement.kind.name.lower()} backend do not count here"
        )
    if statement.kind is BackendKind.TPM:
        if isinstance(statement, (LookupStatement, TruncateStatement)):
            raise VerificationError("wrong-kind", "a TPM attests groups and the head, and nothing else")
        epoch_counts = _pins(identity).accepts(statement.epoch)
    else:
        epoch_counts = statement.epoch == identity.epoch
    if not epoch_counts:
        raise VerificationError("wrong-epoch", f"the statement is of epoch {statement.epoch}, which does not count")
    if statement.context != context:
        raise VerificationError("wrong-context", "the statement was made for another context")
    return statement


def _check_nonce(attested: bytes, expected: bytes) -> None:
    if attested != expected:
        raise VerificationError("wrong-nonce", "the answer is to another question: its nonce differs")
