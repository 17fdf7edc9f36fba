"""Remote attestation: evidence of which program holds a log's key, and its appraisal (roles of RFC 9334).

The *attester* (``make_evidence``) is the host of a log. The *verifier* (``appraise``) judges what it says by a *policy*
(``load_policy``) and comes to an *attestation result*: what was proven, by what root, and what was not. The README of
this package says what each kind of evidence proves.
"""

from trustlog.appraisal.attester import make_evidence
from trustlog.appraisal.evidence import Evidence, QuotedPcrs, ShownAnchors, TpmEvidence, TsmEvidence, decode_evidence
from trustlog.appraisal.policy import EvidenceLevel, Policy, PolicyError, load_policy, parse_policy, policy_of_table
from trustlog.appraisal.result import AttestationResult, MeasuredProgram
from trustlog.appraisal.verifier import appraise

__all__ = [
    "AttestationResult",
    "Evidence",
    "EvidenceLevel",
    "MeasuredProgram",
    "Policy",
    "PolicyError",
    "QuotedPcrs",
    "ShownAnchors",
    "TpmEvidence",
    "TsmEvidence",
    "appraise",
    "decode_evidence",
    "load_policy",
    "make_evidence",
    "parse_policy",
    "policy_of_table",
]
