"""A session with a TPM that keeps secrets from whoever reads the bus between processor and chip, and notices changes.

"TPM 2.0 Library, Part 1", sections 19.6 (session keys, HMAC) and 21 (parameter encryption). The caller encrypts a salt
for a key that only the TPM holds; both derive the session's key from it and their nonces:

    session key      KDFa(salt, "ATH", nonce of the TPM ‖ nonce of the caller)
    authorization    HMAC(session key, SHA-256(code ‖ name ‖ parameters) ‖ caller's nonce ‖ TPM's nonce ‖ attributes)
    response         HMAC(session key, SHA-256(u32 0 ‖ code ‖ parameters) ‖ TPM's nonce ‖ caller's nonce ‖ attributes)
    first parameter  AES-128-CFB, key and vector from KDFa(session key, "CFB", sender's nonce ‖ receiver's nonce)

Whoever can change the bus while the key's public area is read could stand in between: compare its name with one that
was kept from before.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct

from cryptography.hazmat.primitives.asymmetric import ec

from trustlog.tpm.credential import cfb, kdfa, public_key_of, share_secret
from trustlog.tpm.structures import Public, Reader, malformed, sized

NONCE_SIZE = 32

_CONTINUE, _DECRYPT, _ENCRYPT = 0x01, 0x20, 0x40


def share_salt(public: Public) -> tuple[bytes, bytes]:
    """Return a new salt (32 bytes), and what tells it to the TPM with this P-256 key."""
    key = public_key_of(public)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise malformed("a salt is shared with a P-256 key only")
    return share_secret(key, b"SECRET\0")


class SaltedSession:
    """A session that was begun (``Tpm.salted_session``), for commands one after the other; nonces are 32 bytes."""

    def __init__(self, handle: int, salt: bytes, caller_nonce: bytes, tpm_nonce: bytes) -> None:
        self.handle = handle
        self._key = kdfa(salt, b"ATH", tpm_nonce + caller_nonce, 256)
        self._caller_nonce = caller_nonce
        self._tpm_nonce = tpm_nonce
        self._attributes = 0

    def begin(self) -> None:
        """Begin a command, with a new nonce."""
        self._caller_nonce = os.urandom(NONCE_SIZE)

    def encrypt(self, secret: bytes) -> bytes:
        """Encrypt the content of a command's first parameter."""
        return self._cfb(self._caller_nonce + self._tpm_nonce, secret, decrypt=False)

    def authorize(self, code: int, name: bytes, parameters: bytes, *, decrypt: bool) -> bytes:
        """Return the authorization of a command on the object ``name``. decrypt: its first parameter is secret."""
        self._attributes = _CONTINUE | _ENCRYPT | (_DECRYPT if decrypt else 0)
        digest = hashlib.sha256(struct.pack(">I", code) + name + parameters).digest()
        proof = self._proof(digest, self._caller_nonce + self._tpm_nonce)
        return struct.pack(">I", self.handle) + sized(self._caller_nonce) + bytes([self._attributes]) + sized(proof)

    def open(self, code: int, parameters: bytes, authorization: bytes) -> bytes:
        """Check a response and return its parameters in the clear; VerificationError("malformed") if it was changed."""
        reader = Reader(authorization)
        tpm_nonce, attributes, proof = reader.sized(), reader.number(1), reader.sized()
        reader.finish()
        digest = hashlib.sha256(struct.pack(">II", 0, code) + parameters).digest()
        nonces = tpm_nonce + self._caller_nonce
        if attributes != self._attributes or not hmac.compare_digest(proof, self._proof(digest, nonces)):
            raise malformed("its authorization does not fit")
        self._tpm_nonce = tpm_nonce
        content = Reader(parameters)
        return sized(self._cfb(nonces, content.sized(), decrypt=True)) + content.rest()

    def _proof(self, digest: bytes, nonces: bytes) -> bytes:
        return hmac.digest(self._key, digest + nonces + bytes([self._attributes]), "sha256")

    def _cfb(self, nonces: bytes, data: bytes, *, decrypt: bool) -> bytes:
        keys = kdfa(self._key, b"CFB", nonces, 256)
        return cfb(keys[:16], data, keys[16:], decrypt=decrypt)
