"""AMD SEV-SNP: the report and certificates that omne-attest publishes, and reports of a maker of our own.

The published report was made by a rented virtual machine on a Milan chip, launched with debugging allowed.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from omne_attest import vectors

from tests.trustlog.appraisal import amd
from tests.trustlog.appraisal.support import SimulatedTsm, certificate_table, policy, refused
from tests.trustlog.support import CONTEXT, NONCE, OTHER_NONCE, fixed_key
from trustlog import BackendKind, VerificationError, create, in_memory
from trustlog.appraisal import EvidenceLevel, appraise, make_evidence
from trustlog.appraisal.policy import SnpPolicy
from trustlog.appraisal.snp import SnpReport, verify_report
from trustlog.appraisal.tsm import make_report

PUBLISHED = vectors.attestation()
CHAIN = [vectors.ark(), vectors.ask(), vectors.vcek()]
DATA = PUBLISHED[0x50:0x90]
POLICY = SnpPolicy(roots=frozenset([vectors.ARK_SHA256]), allow_debug=True)


def test_the_published_report_verifies():
    said = verify_report(PUBLISHED, CHAIN, POLICY, DATA, dt.datetime(2026, 12, 1, tzinfo=dt.UTC))
    assert said.version == 2
    assert said.debug
    assert said.vmpl == 0
    assert said.tcb == (2, 0, 5, 68)
    assert said.chip_id.hex().startswith("3ac3fe21e13fb099")
    assert said.launch_measurement.hex().startswith("b07af9620f3b839b")
    assert verify_report(PUBLISHED, CHAIN[::-1], POLICY, DATA) == said


@pytest.mark.parametrize("bit", [0, 7])
def test_every_altered_byte_of_the_report_is_refused(bit):
    for position in range(len(PUBLISHED)):
        changed = bytearray(PUBLISHED)
        changed[position] ^= 1 << bit
        with pytest.raises(VerificationError):
            verify_report(bytes(changed), CHAIN, POLICY, DATA)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_altered_byte_of_the_certificates_is_refused(number):
    for position in range(len(CHAIN[number])):
        changed = bytearray(CHAIN[number])
        changed[position] ^= 1
        chain = [bytes(changed) if other == number else der for other, der in enumerate(CHAIN)]
        assert refused(verify_report, PUBLISHED, chain, POLICY, DATA) == "snp-chain"


@pytest.mark.parametrize("size", [0, 1183, 1185])
def test_another_size_is_refused(size):
    assert refused(verify_report, (PUBLISHED * 2)[:size], CHAIN, POLICY, DATA) == "snp-malformed"


def test_what_the_published_report_does_not_fulfil():
    refuse = [
        (replace(POLICY, allow_debug=False), DATA, "snp-policy"),
        (replace(POLICY, minimum_tcb=(2, 0, 5, 69)), DATA, "snp-policy"),
        (replace(POLICY, launch_measurements=frozenset([bytes(48)])), DATA, "snp-policy"),
        (replace(POLICY, chip_ids=frozenset([bytes(64)])), DATA, "snp-policy"),
        (replace(POLICY, roots=frozenset([bytes(32)])), DATA, "snp-chain"),
        (POLICY, bytes(64), "snp-report-data"),
    ]
    for demanded, data, reason in refuse:
        assert refused(verify_report, PUBLISHED, CHAIN, demanded, data) == reason
    enough = replace(
        POLICY,
        minimum_tcb=(2, 0, 5, 68),
        launch_measurements=frozenset([PUBLISHED[0x90:0xC0]]),
        chip_ids=frozenset([PUBLISHED[0x1A0:0x1E0]]),
    )
    verify_report(PUBLISHED, CHAIN, enough, DATA)


@pytest.mark.parametrize("year", [2019, 2034])
def test_certificates_that_are_not_valid_then(year):
    then = dt.datetime(year, 1, 1, tzinfo=dt.UTC)
    assert refused(verify_report, PUBLISHED, CHAIN, POLICY, DATA, then) == "snp-chain"


@pytest.mark.parametrize(
    "chain", [[], CHAIN[:2], CHAIN[1:], [CHAIN[0], *CHAIN], [*CHAIN, CHAIN[1]], [*CHAIN, CHAIN[2]], [*CHAIN, b"junk"]]
)
def test_one_certificate_of_each_is_demanded(chain):
    assert refused(verify_report, PUBLISHED, chain, POLICY, DATA) == "snp-chain"


# Reports of our own maker: what no published sample shows.

OWN = SnpPolicy(roots=frozenset([hashlib.sha256(amd.ark()).digest()]))


def own_chain(**options) -> list[bytes]:
    return [amd.ark(), amd.ask(), amd.vcek(**options)]


def test_our_own_maker_makes_proper_reports():
    for version in (2, 3, 5):
        assert verify_report(amd.report(DATA, version=version), own_chain(), OWN, DATA).tcb == amd.TCB
    # AMD stores the chip id bare; newer tools wrap it into an octet string.
    verify_report(amd.report(DATA), own_chain(chip_id=b"\x04\x40" + amd.CHIP_ID), OWN, DATA)
    high = (3, 1, 8, 209)
    verify_report(amd.report(DATA, tcb=high), own_chain(tcb=high), OWN, DATA)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": 1}, "snp-malformed"),
        ({"version": 6}, "snp-malformed"),
        ({"algorithm": 2}, "snp-malformed"),
        ({"key_bits": 1 << 2}, "snp-malformed"),  # a VLEK
        ({"version": 3, "family": 0x1A}, "snp-malformed"),  # another layout of the TCB
        ({"vmpl": 1}, "snp-policy"),
        ({"debug": True}, "snp-policy"),
        ({"tcb": (3, 1, 8, 114)}, "snp-tcb"),
        ({"key": ec.generate_private_key(ec.SECP384R1())}, "snp-signature"),
    ],
)
def test_reports_that_are_refused_although_signed(options, reason):
    assert refused(verify_report, amd.report(DATA, **options), own_chain(), OWN, DATA) == reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chip_id": bytes(64)}, "snp-chip"),
        ({"chip_id": amd.CHIP_ID[:32]}, "snp-chip"),
        ({"tcb": (3, 1, 8, 116)}, "snp-tcb"),
        ({"leave_out": ["4"]}, "snp-chain"),
        ({"leave_out": ["3.8"]}, "snp-chain"),
        ({"e8": b"\x04\x01s"}, "snp-chain"),
        ({"e8": b"\x02\x02\x01s"}, "snp-chain"),
        ({"e8": b"\x02\x01\xf3"}, "snp-chain"),
        ({"e8": b"\x02\x01"}, "snp-chain"),
        ({"key": ec.generate_private_key(ec.SECP256R1())}, "snp-chain"),
        ({"issuer_key": amd.rsa_key(0)}, "snp-chain"),
    ],
)
def test_chip_certificates_that_are_refused(options, reason):
    assert refused(verify_report, amd.report(DATA), own_chain(**options), OWN, DATA) == reason


def test_intermediates_that_are_refused():
    key, root = amd.rsa_key(1), amd.rsa_key(0)
    bad = [
        amd.certificate("SEV-Test", "ARK-Test", key, root, ca=False),
        amd.certificate("SEV-Other", "ARK-Test", key, root),
        amd.certificate("SEV-Test", "ARK-Other", key, root),
        amd.certificate("SEV-Test", "ARK-Test", key, root, signing=padding.PKCS1v15()),
        amd.certificate("SEV-Test", "ARK-Test", key, root, digest=hashes.SHA256()),
        amd.certificate("SEV-Test", "ARK-Test", key, key),
    ]
    for intermediate in bad:
        chain = [amd.ark(), intermediate, amd.vcek()]
        assert refused(verify_report, amd.report(DATA), chain, OWN, DATA) == "snp-chain"


def test_a_root_without_an_rsa_key_is_refused():
    root = amd.certificate("ARK-Test", "ARK-Test", amd.chip_key(), amd.rsa_key(0))
    demanded = SnpPolicy(roots=frozenset([hashlib.sha256(root).digest()]))
    assert refused(verify_report, amd.report(DATA), [root, amd.ask(), amd.vcek()], demanded, DATA) == "snp-chain"


def test_decoding_looks_at_no_signature():
    assert SnpReport.decode(amd.report(DATA)).chip_id == amd.CHIP_ID


# The whole way: a log in a confidential virtual machine.


def evidence_of(log, nonce=NONCE):
    auxiliary = certificate_table(amd.vcek(), amd.ask(), amd.ark())
    folder = SimulatedTsm(amd.report, auxiliary=auxiliary)
    return make_evidence(log, nonce=nonce, context=CONTEXT, reporter=lambda inblob: make_report(inblob, files=folder))


def test_a_log_in_a_confidential_virtual_machine(tmp_path):
    demanded = policy(
        f'minimum_evidence = "sev-snp"\n[sev-snp]\nroots = ["{hashlib.sha256(amd.ark()).hexdigest()}"]\n'
        f'launch_measurements = ["{amd.LAUNCH.hex()}"]'
    )
    with create(tmp_path / "log", kind=BackendKind.PROCESS) as log:
        evidence = evidence_of(log)
    result = appraise(evidence, demanded, nonce=NONCE, now=amd.NOT_BEFORE)
    assert result.levels == {EvidenceLevel.SEV_SNP, EvidenceLevel.SELF_ASSERTED}
    assert "AMD's root key" in result.root
    assert any(amd.LAUNCH.hex() in one for one in result.proven)
    assert any("which program in the virtual machine" in one for one in result.not_proven)
    assert any("revoked" in one for one in result.not_proven)
    assert result.summary().startswith("sev-snp, self-asserted, measured ")
    assert "endorsed by AMD" in result.summary()
    undated = appraise(evidence, policy(f'[sev-snp]\nroots = ["{hashlib.sha256(amd.ark()).hexdigest()}"]'), nonce=NONCE)
    assert any("no time was given" in one for one in undated.not_proven)
    assert any("launch_measurements" in one for one in undated.not_proven)


def test_a_report_for_another_log_or_nonce_is_refused():
    demanded = policy(f'[sev-snp]\nroots = ["{hashlib.sha256(amd.ark()).hexdigest()}"]')
    mine, other = evidence_of(in_memory(fixed_key())), evidence_of(in_memory())
    assert refused(appraise, replace(mine, tsm=other.tsm), demanded, nonce=NONCE) == "snp-report-data"
    old = evidence_of(in_memory(fixed_key()), OTHER_NONCE)
    assert refused(appraise, replace(mine, tsm=old.tsm), demanded, nonce=NONCE) == "snp-report-data"


def test_debugging_that_the_policy_allows_is_said():
    root = hashlib.sha256(amd.ark()).hexdigest()
    demanded = policy(f'[sev-snp]\nroots = ["{root}"]\nallow_debug = true')
    folder = SimulatedTsm(lambda data: amd.report(data, debug=True), auxiliary=certificate_table(*own_chain()))
    evidence = make_evidence(
        in_memory(), nonce=NONCE, context=CONTEXT, reporter=lambda inblob: make_report(inblob, files=folder)
    )
    assert any("allows debugging" in one for one in appraise(evidence, demanded, nonce=NONCE).not_proven)
