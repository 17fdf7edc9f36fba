"""Public keys and signatures: ECDSA on P-256 with SHA-256, the one algorithm of all backends."""

from __future__ import annotations

from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from trustlog.errors import VerificationError
from trustlog.hashing import log_id

PUBLIC_KEY_SIZE = 65
SIGNATURE_SIZE = 64
SIGNATURE_ALGORITHM = ec.ECDSA(hashes.SHA256())

_CURVE = ec.SECP256R1()
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


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
