"""What the TPM tests share: attestations made by hand with a key of ours, and attestation keys in a software TPM."""

from __future__ import annotations

import struct
from contextlib import contextmanager

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.trustlog.support import CONTEXT, digests_of
from trustlog.keys import SIGNATURE_ALGORITHM
from trustlog.log import public_key_bytes
from trustlog.tpm.quote import GENERATED, TYPE_NV_CERTIFY, TYPE_QUOTE, pcr_digest
from trustlog.tpm.structures import (
    ALG_ECC,
    ALG_NULL,
    ALG_SHA256,
    RH_ENDORSEMENT,
    RH_OWNER,
    attestation_key_template,
    ecdsa_signature,
    endorsement_key_template,
    pcr_selection,
    sized,
)
from trustlog.verification import heads_of, initial_head, verify_append

SIGNER = b"\x00\x0b" + bytes(range(32))


def sign(key, message):
    r, s = decode_dss_signature(key.sign(message, SIGNATURE_ALGORITHM))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def attest_header(kind, extra=b"", *, signer=SIGNER, resets=7, restarts=2, magic=GENERATED):
    clock = struct.pack(">QIIB", 123456, resets, restarts, 0)
    return struct.pack(">IH", magic, kind) + sized(signer) + sized(extra) + clock + struct.pack(">Q", 0x20230101)


def forged_quote(values, extra=b"", *, selection=None, **header):
    """The TPMS_ATTEST that a TPM would make for these PCRs."""
    selection = pcr_selection(values) if selection is None else selection
    return attest_header(TYPE_QUOTE, extra, **header) + selection + sized(pcr_digest(values))


def forged_certification(name, content, extra=b"", *, offset=0, **header):
    body = sized(name) + struct.pack(">H", offset) + sized(content)
    return attest_header(TYPE_NV_CERTIFY, extra, **header) + body


def public_of(key):
    return public_key_bytes(key)


@contextmanager
def attestation_key(tpm, template=None):
    """A restricted key under the endorsement key: its handle, public area and qualified name."""
    ek, _ = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(ALG_ECC))
    with tpm.loaded(ek):
        with tpm.endorsement_session() as auth:
            private, public = tpm.create(ek, template or attestation_key_template(), [auth])
        with tpm.endorsement_session() as auth:
            handle = tpm.load(ek, private, public, [auth])
        with tpm.loaded(handle):
            yield handle, *tpm.read_public(handle)


def sign_anything(tpm, handle, message):
    """Have a restricted key sign bytes of ours: TPM2_Hash, whose ticket says that they are no TPM's, then TPM2_Sign.

    The client has neither command, as nothing honest needs them ("TPM 2.0 Library, Part 3", sections 15.4 and 20.2).
    """

    def run(tag, code, body):
        answer = tpm._wire.exchange(struct.pack(">HII", tag, 10 + len(body), code) + body)
        assert answer[6:10] == bytes(4), answer.hex()
        return answer[10:]

    hashed = run(0x8001, 0x17D, sized(message) + struct.pack(">HI", ALG_SHA256, RH_OWNER))
    digest, ticket = hashed[:34], hashed[34:]
    auth = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)  # the empty password
    signed = run(0x8002, 0x15D, struct.pack(">I", handle) + auth + digest + struct.pack(">H", ALG_NULL) + ticket)
    return ecdsa_signature(signed[4 : 4 + int.from_bytes(signed[:4], "big")])


def add(log, *payloads):
    digests = digests_of(*payloads)
    return log.append(digests, context=CONTEXT), digests


class NotNextError(Exception):
    """A valid group that does not continue what the reader has."""


class Reader:
    """Reads a log as every honest verifier does: each group verified by itself, and then in order from the base."""

    def __init__(self, identity):
        self.identity = identity
        self.head = initial_head(identity)
        self.last = 0

    def read(self, attestation, digests):
        said = verify_append(self.identity, attestation, digests, context=CONTEXT)
        before, after = heads_of(self.identity, said, digests)
        if (said.first, before) != (self.last + 1, self.head):
            raise NotNextError
        self.last, self.head = said.last, after
        return said
