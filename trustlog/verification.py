"""Verifying what logs attest: stateless, with public keys only.

What a verifier may conclude from a valid statement is what the log's owner cannot take back, given that the
log's trusted part is intact. APPEND: these digests, and no others, stand at these indexes of this log.
LOOKUP and END: so it was at some moment after the nonce was chosen. TRUNCATE: nothing below low will ever
be answered for again.

Checks run from cheap to dear, the signature last. A signature is not an identifier: ECDSA allows two for
the same statement (r‖s and r‖n-s) and every signing makes another one; compare statements instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from trustlog.errors import VerificationError
from trustlog.hashing import HASH_SIZE, fold, log_id
from trustlog.statements import (
    AppendStatement,
    BackendKind,
    EndStatement,
    LookupStatement,
    TruncateStatement,
)

GROUP_ENTRIES_MAX = 1024
PUBLIC_KEY_SIZE = 65
SIGNATURE_SIZE = 64
SIGNATURE_ALGORITHM = ec.ECDSA(hashes.SHA256())

_CURVE = ec.SECP256R1()
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

AnyStatement = TypeVar("AnyStatement", AppendStatement, LookupStatement, EndStatement, TruncateStatement)


class VerifyingKey:
    """A log's P-256 public key, parsed once. Equal and hashed by its bytes."""

    __slots__ = ("_key", "log_id", "raw")

    raw: bytes
    log_id: bytes

    def __init__(self, key: ec.EllipticCurvePublicKey, raw: bytes) -> None:
        """Use ``from_bytes``."""
        self._key = key
        self.raw = raw
        self.log_id = log_id(raw)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Parse an uncompressed point (65 bytes, 0x04‖x‖y); VerificationError("malformed") otherwise."""
        if len(raw) != PUBLIC_KEY_SIZE or raw[0] != 4:
            raise VerificationError("malformed", "public key is not an uncompressed P-256 point of 65 bytes")
        try:
            return cls(ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, raw), raw)
        except ValueError as error:
            raise VerificationError("malformed", "public key is not a point of P-256") from error

    def verify(self, signature: bytes, message: bytes) -> None:
        """Check ECDSA with SHA-256, ``signature`` = r‖s (64 bytes); VerificationError("bad-signature")."""
        if len(signature) != SIGNATURE_SIZE:
            raise VerificationError("bad-signature", f"signature has {len(signature)} bytes instead of 64")
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        if not (0 < r < _CURVE_ORDER and 0 < s < _CURVE_ORDER):
            raise VerificationError("bad-signature", "signature is out of range")
        try:
            self._key.verify(encode_dss_signature(r, s), message, SIGNATURE_ALGORITHM)
        except InvalidSignature as error:
            raise VerificationError("bad-signature", "signature does not verify") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyingKey) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"VerifyingKey(log_id={self.log_id.hex()[:16]}…)"


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Verify once with a raw public key (65 bytes); VerificationError("malformed", "bad-signature")."""
    VerifyingKey.from_bytes(public_key).verify(signature, message)


@dataclass(frozen=True, slots=True)
class LogIdentity:
    """Whose statements a verifier takes: the key, the kinds of backend its policy counts, and the epoch."""

    key: VerifyingKey
    kind: BackendKind | frozenset[BackendKind]
    epoch: int = 0

    def accepts(self, kind: BackendKind) -> bool:
        """Tell whether the policy counts statements of this kind of backend."""
        return kind in self.kind if isinstance(self.kind, frozenset) else kind is self.kind


@dataclass(frozen=True, slots=True)
class Attestation:
    """A statement's bytes as the log released them, with their signature (r‖s, 64 bytes)."""

    statement: bytes
    signature: bytes


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
    identity.key.verify(attestation.signature, attestation.statement)
    return statement


def verify_truncate(identity: LogIdentity, attestation: Attestation, *, context: bytes) -> TruncateStatement:
    """Verify that the log forgot everything below low; VerificationError otherwise."""
    statement = _decode(TruncateStatement, identity, attestation, context)
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
    head.
    """
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
    if statement.epoch != identity.epoch:
        raise VerificationError("wrong-epoch", f"the statement is of epoch {statement.epoch}, not {identity.epoch}")
    if statement.context != context:
        raise VerificationError("wrong-context", "the statement was made for another context")
    return statement


def _check_nonce(attested: bytes, expected: bytes) -> None:
    if attested != expected:
        raise VerificationError("wrong-nonce", "the answer is to another question: its nonce differs")
