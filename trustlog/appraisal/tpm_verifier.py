"""Judging what a TPM attests: the quote, the programs that extended their measurement, and whose TPM it is.

A restricted key signs no quote but its TPM's own. So whoever knows that the attestation key is one (enrolment showed
it: the policy lists the key, or a cluster file does) may believe the PCRs in its quotes, but no bare statement under
its signature: such a key signs what its host hands in, unless it begins as a quote does. The quote's extra data is the
host's claim, and is used for freshness alone: it is the digest of the QUOTE statement, which holds the nonce. What the
statement says of the program is compared with the PCR that the program extended.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from trustlog.appraisal.evidence import ANCHOR_SIZE, QuotedPcrs, ShownAnchors, TpmEvidence
from trustlog.appraisal.policy import Policy
from trustlog.errors import VerificationError
from trustlog.keys import VerifyingKey
from trustlog.statements import QuoteStatement
from trustlog.tpm.anchors import Anchor, AnchorIndex, verify_anchors
from trustlog.tpm.chain import TpmPins, initial_head
from trustlog.tpm.client import Signed
from trustlog.tpm.enrol import (
    check_attestation_key,
    check_certificate,
    check_endorsement_key,
    reading_certificates,
)
from trustlog.tpm.quote import Quote, verify_quote
from trustlog.tpm.registers import ProgramEvent, replay_programs
from trustlog.tpm.structures import ALG_SHA1, ALG_SHA256, RH_ENDORSEMENT, Public, qualified_name


def verify_quotes(said: QuoteStatement, statement: bytes, shown: TpmEvidence, pins: TpmPins | None) -> Quote:
    """Verify the quote, and the SHA-1 bank's if there is one; returns the first. VerificationError otherwise.

    pins: of the log's enrolment, if they are known: then the key must stand where it stood.
    """
    key = VerifyingKey.from_bytes(said.public_key)
    quote = _verify(key, statement, shown.sha256, ALG_SHA256)
    if pins is not None and quote.qualified_signer != pins.signer:
        raise VerificationError("wrong-signer", "the quote's signer stands in another hierarchy than at its enrolment")
    if quote.clock.epoch != said.epoch:
        raise VerificationError(
            "wrong-epoch", f"the TPM is in epoch {quote.clock.epoch}, and the statement is of epoch {said.epoch}"
        )
    if shown.sha1 is not None:
        _verify(key, statement, shown.sha1, ALG_SHA1)
    return quote


def _verify(key: VerifyingKey, statement: bytes, quoted: QuotedPcrs, bank: int) -> Quote:
    nonce = hashlib.sha256(statement).digest()
    return verify_quote(key, quoted.quote, quoted.signature, quoted.pcrs, nonce=nonce, bank=bank)


def verify_programs(said: QuoteStatement, shown: TpmEvidence, policy: Policy) -> list[ProgramEvent]:
    """Verify that the program PCR was extended by this program last, for this log; VerificationError otherwise."""
    quoted = shown.sha256.pcrs.get(policy.tpm.program_pcr)
    if quoted is None:
        raise VerificationError(
            "program-log",
            f"the quote does not cover PCR {policy.tpm.program_pcr}, where the policy expects the program",
        )
    programs = replay_programs(shown.programs, policy.tpm.program_base, quoted)
    own = [event for event in programs if event.log_id == said.log_id]
    if not own:
        raise VerificationError("program-log", "no program was measured for this log since the machine started")
    if (own[-1].measurement, own[-1].kind) != (said.measurement, said.kind):
        raise VerificationError(
            "wrong-measurement", "the statement names another program than the TPM's register: one of both lies"
        )
    return programs


def verify_shown_anchors(
    said: QuoteStatement, statement: bytes, shown: ShownAnchors, policy: Policy, pins: TpmPins
) -> int:
    """Return the last index that the TPM's NV index anchors; VerificationError if the anchors are not proven."""
    key = VerifyingKey.from_bytes(said.public_key)
    starts = range(0, len(shown.records), ANCHOR_SIZE)
    records = [shown.records[start : start + ANCHOR_SIZE] for start in starts]
    listed = [Anchor(int.from_bytes(one[:8], "big"), one[8:]) for one in records]
    proof, nonce = Signed(shown.attest, shown.signature), hashlib.sha256(statement).digest()
    refused: VerificationError | None = None
    for verifier in sorted(policy.tpm.anchor_verifiers):
        place = AnchorIndex(shown.index, said.log_id, VerifyingKey.from_bytes(verifier))
        try:
            verify_anchors(place, key, initial_head(pins), listed, proof, nonce)
        except VerificationError as error:
            refused = error
        else:
            return listed[-1].last
    raise refused or VerificationError("wrong-anchors", "the policy names nobody who may begin anchors")


def verify_endorsement(
    said: QuoteStatement, quote: Quote, shown: TpmEvidence, policy: Policy, now: datetime | None
) -> str:
    """Return who vouches for the TPM, after verifying it up to a root of the policy; VerificationError otherwise.

    Believed only of a key that enrolment showed to be a TPM's: its quotes name the key above it (part 1, section 16.5).
    now: when the certificates must be valid; None: on the day of their issue.
    """
    if not shown.certificates or not shown.endorsement_key or not shown.attestation_key:
        raise VerificationError(
            "endorsement", "the policy names endorsement_roots, and the evidence holds no endorsement certificate"
        )
    key, endorsement_key = Public.parse(shown.attestation_key), Public.parse(shown.endorsement_key)
    check_attestation_key(key)
    check_endorsement_key(endorsement_key)
    above = qualified_name(RH_ENDORSEMENT.to_bytes(4, "big"), endorsement_key.name)
    if key.key != said.public_key or quote.qualified_signer != qualified_name(above, key.name):
        raise VerificationError("endorsement", "the quote is signed by another key, or one that stands elsewhere")
    with reading_certificates():
        leaf, *others = (x509.load_der_x509_certificate(der) for der in shown.certificates)
        then = leaf.not_valid_before_utc if now is None else now
        root = check_certificate(shown.certificates[0], endorsement_key, others, then)
        fingerprint, name = hashlib.sha256(root.public_bytes(Encoding.DER)).digest(), root.subject.rfc4514_string()
    if fingerprint not in policy.tpm.endorsement_roots:
        raise VerificationError(
            "endorsement", "the endorsement certificate leads to a root that the policy does not list"
        )
    return name
