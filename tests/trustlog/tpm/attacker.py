"""Root on the machine of a TPM log: it speaks to the TPM without the backend."""

from __future__ import annotations

from tests.trustlog.support import CONTEXT
from trustlog import (
    AppendStatement,
    Attestation,
    BackendKind,
    entry_digest,
)
from trustlog.statements import open_payload
from trustlog.tpm import chain


class Attacker:
    """Root on the log's machine, without the backend's manners."""

    def __init__(self, tpm, identity, handle):
        self.tpm = tpm
        self.identity = identity
        self.handle = handle

    def value(self, pcr=None):
        return self.tpm.pcr_read([pcr or self.identity.tpm.pcr])[pcr or self.identity.tpm.pcr]

    def say(self, first, digests, *, epoch, head_before=None, pcr=None, before=None):
        """Extend the PCR by a group and have it quoted; `head_before`: what the statement says stood there."""
        pcr = self.identity.tpm.pcr if pcr is None else pcr
        before = self.value(pcr) if before is None else before
        log_id = self.identity.key.log_id
        event = chain.event_digest(log_id, first, CONTEXT, digests)
        self.tpm.pcr_extend(pcr, event)
        after = chain.extended(before, event)
        last = first + len(digests) - 1
        header = (BackendKind.TPM, CONTEXT, log_id, epoch)
        statement = AppendStatement(*header, first, last, head_before or before, after).encode()
        signed = self.tpm.quote(self.handle, [pcr], chain.asked(statement))
        return Attestation(statement, signed.attest + signed.signature), digests

    def open(self, last, closed_epoch, closed_pcr, *, epoch):
        """Say OPEN after a CLOSE, in whatever epoch this is."""
        payload = open_payload(last, chain.head(closed_epoch, closed_pcr, closed=True))
        return self.say(last + 1, [entry_digest(payload)], epoch=epoch, head_before=closed_pcr)


def attacker_on(machine, log):
    return Attacker(machine.connect(), log.identity, log.config.handle)
