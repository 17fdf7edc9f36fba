"""How a client proves its key on a connection, and what a replica's evidence is fresh for.

The replica sends a random nonce; the client signs

    16 tag "trustlog/connect"   u8 version 1   32 cluster id   u16 replica number
    32 SHA-256 of the replica's TLS certificate (DER)   32 nonce

The certificate stands in it so that a replica cannot hand its own challenge from another replica to a client and then
pass for that client there.

Replicas ask each other for evidence with a nonce; what the asked replica's log signs in its place (`evidence_nonce`) is

    SHA-256(16 tag "trustlog/evident"   u8 version 1   32 nonce   u16 replica asked   32 SHA-256 of its certificate)

so that a replica never signs a nonce that somebody else chose.
"""

import hashlib
import struct

from replica.wire.messages import WIRE_VERSION, Challenge

CONNECT_TAG = b"trustlog/connect"


EVIDENCE_TAG = b"trustlog/evident"
EVIDENCE_VERSION = 1


def evidence_nonce(nonce: bytes, asked: int, certificate_der: bytes) -> bytes:
    """Return the nonce (32 bytes) that the evidence of replica `asked`, who has this certificate, must hold."""
    fingerprint = hashlib.sha256(certificate_der).digest()
    content = EVIDENCE_TAG + bytes([EVIDENCE_VERSION]) + nonce + struct.pack(">H", asked) + fingerprint
    return hashlib.sha256(content).digest()


def connect_statement(challenge: Challenge, certificate_der: bytes) -> bytes:
    """Return the bytes that a client signs to prove its key to the replica with this certificate."""
    fingerprint = hashlib.sha256(certificate_der).digest()
    header = CONNECT_TAG + bytes([WIRE_VERSION]) + challenge.cluster_id
    return header + struct.pack(">H", challenge.number) + fingerprint + challenge.nonce
