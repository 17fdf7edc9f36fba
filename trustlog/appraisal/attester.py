"""The attester: has a log, and the platform it runs on, make evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from trustlog.appraisal import tsm
from trustlog.appraisal.evidence import Evidence, TsmEvidence
from trustlog.appraisal.tpm_attester import make_tpm_evidence
from trustlog.errors import MisuseError
from trustlog.measurement import measurement_of, own_manifest
from trustlog.statements import BackendKind, QuoteStatement
from trustlog.tpm.backend import TpmLog
from trustlog.verification import Attestation

Reporter = Callable[[bytes], TsmEvidence]


class Quotable(Protocol):
    """What is asked of a log here."""

    @property
    def kind(self) -> BackendKind:
        """What keeps the key."""

    def quote(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Attest QUOTE."""


def make_evidence(
    log: Quotable | TpmLog,
    *,
    nonce: bytes,
    context: bytes,
    reporter: Reporter | None = None,
    measured_boot: bool = False,
) -> Evidence:
    """Have ``log`` make evidence for ``nonce`` (32 bytes). reporter: ``tsm.make_report``, in a confidential machine.

    MisuseError, TsmError or what the log raises.
    """
    if isinstance(log, TpmLog):
        evidence = make_tpm_evidence(log, nonce=nonce, context=context, measured_boot=measured_boot)
        return with_report(evidence, reporter)
    if measured_boot:
        raise MisuseError("measured boot is quoted by a TPM: only a log of the TPM backend has one")
    attestation = log.quote(nonce=nonce, context=context)
    said = QuoteStatement.decode(attestation.statement)
    # Only for people, and only if it is the measured one: a log of another process may be of other files.
    manifest = own_manifest(log.kind)
    if measurement_of(manifest) != said.measurement:
        manifest = b""
    return with_report(Evidence(attestation.statement, attestation.signature, manifest), reporter)


def with_report(evidence: Evidence, reporter: Reporter | None) -> Evidence:
    """Add the report of the confidential virtual machine to evidence; nothing without a ``reporter``."""
    if reporter is None:
        return evidence
    return replace(evidence, tsm=reporter(tsm.report_data(QuoteStatement.decode(evidence.statement))))
