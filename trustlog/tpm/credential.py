"""MakeCredential: a secret that only the TPM with this endorsement key *and* this attestation key can read.

"TPM 2.0 Library, Part 1", sections 24 (credential protection), 11.4.10 (KDFa and KDFe), annexes B.10 (RSA) and C.6
(elliptic curves). The key that encrypts the secret is derived from the attestation key's name, and the TPM derives it
from the name of the key that is loaded: so an answer proves that this very public area is in that TPM.

    blob     TPM2B HMAC over (encrypted secret ‖ name), then AES-128-CFB(TPM2B secret)
    secret   RSA: OAEP(seed); elliptic curve: TPM2B x, TPM2B y of an ephemeral key, whose ECDH with the endorsement
             key gives the seed
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from trustlog.tpm.structures import ALG_RSA, Public, malformed, sized

_IDENTITY = b"IDENTITY\0"
RSA_EXPONENT = 65537  # what the template's 0 stands for
RSA_BITS = 2048  # the template's


class Credential(NamedTuple):
    """What TPM2_ActivateCredential is given: contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    blob: bytes
    secret: bytes


def make_credential(endorsement_key: Public, name: bytes, secret: bytes) -> Credential:
    """Encrypt ``secret`` (at most 32 bytes) for the key called ``name`` (34 bytes), in the endorsement key's TPM."""
    seed, encrypted_seed = _share_seed(endorsement_key)
    encrypted = cfb(kdfa(seed, b"STORAGE", name, 128), sized(secret))
    tag = hmac.digest(kdfa(seed, b"INTEGRITY", b"", 256), encrypted + name, "sha256")
    return Credential(sized(tag) + encrypted, encrypted_seed)


def public_key_of(public: Public) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """Return a public area's key; VerificationError("malformed") if it is none."""
    try:
        if public.kind == ALG_RSA:
            modulus = int.from_bytes(public.key, "big")
            if modulus.bit_length() != RSA_BITS:
                raise malformed(f"its RSA key has {modulus.bit_length()} bits, not {RSA_BITS}")
            return rsa.RSAPublicNumbers(public.detail[1] or RSA_EXPONENT, modulus).public_key()
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public.key)
    except ValueError as error:
        raise malformed("its public key is none") from error


def _share_seed(endorsement_key: Public) -> tuple[bytes, bytes]:
    key = public_key_of(endorsement_key)
    if isinstance(key, rsa.RSAPublicKey):
        seed = os.urandom(32)
        sha256 = hashes.SHA256()
        try:
            return seed, key.encrypt(seed, padding.OAEP(padding.MGF1(sha256), sha256, _IDENTITY))
        except ValueError as error:  # an even modulus
            raise malformed("its public key is none") from error
    return share_secret(key, _IDENTITY)


def share_secret(key: ec.EllipticCurvePublicKey, use: bytes) -> tuple[bytes, bytes]:
    """Return a new secret (32 bytes), and the point from which the TPM with ``key`` derives it. use: ends with a zero.

    Annex C.6.3: ECDH with an ephemeral key, then KDFe, one round, as 256 bits are what SHA-256 gives.
    """
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    numbers, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
    shared = ephemeral.exchange(ec.ECDH(), key)
    secret = hashlib.sha256(struct.pack(">I", 1) + shared + use + x + theirs.x.to_bytes(32, "big")).digest()
    return secret, sized(x) + sized(y)


def kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa, one round: at most 256 bits."""
    message = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits)
    return hmac.digest(key, message, "sha256")[: bits // 8]


def cfb(key: bytes, data: bytes, vector: bytes = bytes(16), *, decrypt: bool = False) -> bytes:
    """AES-CFB, from single blocks, as the library counts this mode among the obsolete ones."""
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - one block each, chained here
    block, done = vector, b""
    for at in range(0, len(data), 16):
        mask, given = encryptor.update(block), data[at : at + 16]
        made = bytes(a ^ b for a, b in zip(given, mask, strict=False))
        block = given if decrypt else made
        done += made
    return done
