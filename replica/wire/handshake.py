"""How a client proves its key on a connection.

The replica sends a random nonce; the client signs

    16 tag "trustlog/connect"   u8 version 1   32 cluster id   u16 replica number
    32 SHA-256 of the replica's TLS certificate (DER)   32 nonce

The certificate stands in it so that a replica cannot hand its own challenge from another replica to a client and then
pass for that client there.
"""

import hashlib
import struct

from replica.wire.messages import WIRE_VERSION, Challenge

CONNECT_TAG = b"trustlog/connect"


def connect_statement(challenge: Challenge, certificate_der: bytes) -> bytes:
    """Return the bytes that a client signs to prove its key to the replica with this certificate."""
    fingerprint = hashlib.sha256(certificate_der).digest()
    header = CONNECT_TAG + bytes([WIRE_VERSION]) + challenge.cluster_id
    return header + struct.pack(">H", challenge.number) + fingerprint + challenge.nonce
