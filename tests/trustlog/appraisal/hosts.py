"""Machines with a TPM, and the evidence that they make."""

from __future__ import annotations

from contextlib import contextmanager

from tests.trustlog.appraisal.support import policy
from tests.trustlog.support import CONTEXT, NONCE
from tests.trustlog.tpm.support import attestation_key
from trustlog import BackendKind, QuoteStatement, log_id, measurement
from trustlog.appraisal import Evidence
from trustlog.appraisal.tpm_attester import quote_pcrs
from trustlog.tpm.quote import parse_quote
from trustlog.tpm.registers import PROGRAMS_FILE, ProgramEvent, quote_values, record_program

OWN = measurement.own_measurement(BackendKind.TPM)


def tpm_statement(public_key, epoch, *, nonce, context):
    return QuoteStatement(BackendKind.TPM, context, log_id(public_key), epoch, nonce, OWN, public_key).encode()


def quote(host, statement, programs, pcr=13, **options):
    def quoter(pcrs, extra_data, bank):
        return quote_values(host.tpm, host.key, pcrs, extra_data, bank)

    return quote_pcrs(quoter, statement, programs, pcr=pcr, **options)


class Host:
    """A machine whose TPM holds an attestation key, and a program that extends itself before it uses it."""

    def __init__(self, tpm, key, public, folder, **paths) -> None:
        self.tpm = tpm
        self.key = key
        self.public_key = public.key
        self.file = folder / PROGRAMS_FILE
        self.paths = paths

    def program(self, measured=OWN, pcr=13) -> list[bytes]:
        event = ProgramEvent(BackendKind.TPM, log_id(self.public_key), measured)
        return record_program(self.tpm, self.file, event, pcr)

    def epoch(self) -> int:
        return parse_quote(self.tpm.quote(self.key, [13], b"").attest).clock.epoch

    def evidence(self, nonce=NONCE, context=CONTEXT, **options) -> Evidence:
        statement = tpm_statement(self.public_key, self.epoch(), nonce=nonce, context=context)
        shown = quote(self, statement, self.program(), **self.paths, **options)
        return Evidence(statement, b"", measurement.own_manifest(BackendKind.TPM), tpm=shown)

    def enrolled(self, text="") -> object:
        return policy(f'minimum_evidence = "tpm"\n[tpm]\nattestation_keys = ["{self.public_key.hex()}"]\n{text}')


@contextmanager
def made_host(tpm, folder, **paths):
    with attestation_key(tpm) as (key, public, _):
        yield Host(tpm, key, public, folder, **paths)
