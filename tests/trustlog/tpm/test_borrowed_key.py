"""What a host has its TPM's key sign: it is no word of another backend, frames nobody and is no evidence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from replica.cli.evidence import _proven_fork
from replica.core.genesis import Member
from tests.trustlog.support import CONTEXT, NONCE, digests_of
from tests.trustlog.tpm.attacker import attacker_on
from tests.trustlog.tpm.support import sign_anything
from trustlog import (
    AppendStatement,
    Attestation,
    BackendKind,
    LogIdentity,
    VerificationError,
    verify_append,
)
from trustlog.appraisal import appraise, load_policy
from trustlog.appraisal.evidence import Evidence
from trustlog.cli.contract import CommandError
from trustlog.cli.documents import Expectation, contradiction_document, document, verify_document
from trustlog.hashing import fold, genesis_head
from trustlog.statements import EndStatement, LookupStatement, Outcome, QuoteStatement, TruncateStatement
from trustlog.tpm.opening import open_log


def forged_append(root, kind, *payloads):
    """An append of another kind of backend that the TPM's key signed, as its host asked."""
    log_id, digests = root.identity.key.log_id, digests_of(*payloads)
    before = genesis_head(log_id, 0)
    after = fold(before, 1, digests)
    said = AppendStatement(kind, CONTEXT, log_id, 0, 1, len(digests), before, after).encode()
    return Attestation(said, sign_anything(root.tpm, root.handle, said)), digests


@pytest.fixture
def root(folder, machine):
    log = open_log(folder)
    log.close()
    return attacker_on(machine, log)


def test_a_restricted_key_signs_what_its_host_hands_in_unless_it_looks_like_a_quote(root):
    """TPM2_Hash gives the ticket, TPM2_Sign the signature: so no bare signature of this key means anything."""
    root.identity.key.verify(sign_anything(root.tpm, root.handle, b"anything"), b"anything")
    with pytest.raises(AssertionError):  # TPM_RC_TICKET
        sign_anything(root.tpm, root.handle, b"\xffTCG and what a quote would say")


@pytest.mark.parametrize("kind", [BackendKind.SOFTWARE, BackendKind.PROCESS])
def test_a_tpms_key_attests_nothing_of_another_backend(root, kind):
    key, log_id = root.identity.key, root.identity.key.log_id
    head = bytes(32)
    one = forged_append(root, kind, "pay alice")
    signed = [
        EndStatement(kind, CONTEXT, log_id, 0, NONCE, 1, 77, head),
        LookupStatement(kind, CONTEXT, log_id, 0, NONCE, 1, Outcome.ASSIGNED, head, 1, 1),
        TruncateStatement(kind, CONTEXT, log_id, 0, 1, 1, head),
    ]
    shown = [document(one[0], digests=one[1])]
    shown += [
        document(Attestation(said.encode(), sign_anything(root.tpm, root.handle, said.encode()))) for said in signed
    ]
    for content in shown:
        raw = json.dumps(content).encode()
        # What is signed is well-formed and the signature is right: who takes the key for a program's believes it.
        verify_document(raw, LogIdentity.published(key, None), Expectation(CONTEXT))
        for identity in (LogIdentity.published(key, root.identity.tpm), root.identity):
            with pytest.raises(VerificationError) as refused:
                verify_document(raw, identity, Expectation(CONTEXT))
            assert refused.value.reason == "wrong-kind"
    with pytest.raises(VerificationError, match="do not count here"):
        verify_append(LogIdentity(key, frozenset(BackendKind), tpm=root.identity.tpm), *one, context=CONTEXT)


def test_nobody_is_framed_with_what_a_tpms_key_signed_for_its_host(root):
    sides = [forged_append(root, BackendKind.SOFTWARE, payload) for payload in ("pay alice", "pay mallory")]
    raw = json.dumps(contradiction_document(*sides[0], *sides[1])).encode()
    key, pins = root.identity.key, root.identity.tpm
    assert "attested twice" in str(verify_document(raw, LogIdentity.published(key, None), Expectation(CONTEXT)))
    with pytest.raises(VerificationError, match="do not count here"):
        verify_document(raw, LogIdentity.published(key, pins), Expectation(CONTEXT))
    member = Member(0, BackendKind.TPM, key.raw, pins.encode())
    cluster = SimpleNamespace(lists=[SimpleNamespace(members=[member])])
    with pytest.raises(CommandError, match="proves nothing: statements of the software backend do not count here"):
        _proven_fork(raw, cluster)


def test_evidence_that_a_tpms_key_signed_for_its_host_is_refused(root, tmp_path):
    key = root.identity.key
    header = (BackendKind.PROCESS, CONTEXT, key.log_id, 0)
    said = QuoteStatement(*header, NONCE, bytes(32), key.raw).encode()
    evidence = Evidence(said, signature=sign_anything(root.tpm, root.handle, said))
    policies = {"any": "", "enrolled": f'[tpm]\nattestation_keys = ["{key.raw.hex()}"]\n'}
    for name, table in policies.items():
        (tmp_path / name).write_text(f'format = 1\nminimum_evidence = "self-asserted"\n{table}')
    unknown, listed = (load_policy(tmp_path / name) for name in policies)
    assert appraise(evidence, unknown, nonce=NONCE).level_names == "self-asserted"
    for policy, known in (
        (listed, {}),
        (unknown, {"enrolled": frozenset({key.raw})}),
        (unknown, {"pins": root.identity.tpm}),
    ):
        with pytest.raises(VerificationError, match="a bare signature is its host's word"):
            appraise(evidence, policy, nonce=NONCE, **known)
