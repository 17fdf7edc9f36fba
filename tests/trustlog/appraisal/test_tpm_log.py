"""Evidence of a log of the TPM backend, from its start on, up to the TPM maker's root."""

from __future__ import annotations

import datetime as dt
import hashlib
from contextlib import suppress
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.trustlog.appraisal.lists import usual_boot, usual_programs
from tests.trustlog.appraisal.support import policy, refused
from tests.trustlog.support import CONTEXT, NONCE, digests_of, flip
from tests.trustlog.tpm.support import public_of, sign
from trustlog import MisuseError, VerificationError, VerifyingKey, measurement
from trustlog.appraisal import EvidenceLevel, appraise, decode_evidence, make_evidence
from trustlog.statements import BackendKind
from trustlog.tpm import anchors, enrol
from trustlog.tpm.chain import initial_head
from trustlog.tpm.credential import public_key_of
from trustlog.tpm.opening import open_log
from trustlog.tpm.registers import PROGRAMS_FILE
from trustlog.tpm.structures import ALG_ECC, Public

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)


@pytest.fixture
def log(machine, tmp_path):
    with enrol.create(tmp_path / "log", address=machine.address, endorsement_kind=ALG_ECC) as made:
        yield made


def demanded(log, text=""):
    return policy(f'minimum_evidence = "tpm"\n[tpm]\nattestation_keys = ["{log.public_key.hex()}"]\n{text}')


class Maker:
    """A TPM maker: a root, an intermediate, and certificates for endorsement keys."""

    def __init__(self, name="Maker") -> None:
        self.key, self.middle_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.root = self._issue(f"{name} Root", f"{name} Root", self.key.public_key(), self.key, ca=True)
        self.middle = self._issue(f"{name} CA", f"{name} Root", self.middle_key.public_key(), self.key, ca=True)
        self.name = name

    def _issue(self, subject, issuer, public, key, *, ca=False):
        def named(text):
            return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])

        until = NOW + dt.timedelta(days=900)
        return (
            x509.CertificateBuilder(named(issuer), named(subject), public, 7, NOW - dt.timedelta(days=9), until)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(False, False, True, False, False, ca, False, False, False), critical=True)
            .sign(key, hashes.SHA256())
        )

    def endorse(self, endorsement_key: bytes) -> tuple[bytes, ...]:
        public = public_key_of(Public.parse(endorsement_key))
        leaf = self._issue("TPM", f"{self.name} CA", public, self.middle_key)
        return tuple(one.public_bytes(Encoding.DER) for one in (leaf, self.middle, self.root))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.root.public_bytes(Encoding.DER)).hexdigest()


def test_the_program_is_measured_before_the_key_is_used(log, tmp_path):
    assert len((tmp_path / "log" / PROGRAMS_FILE).read_text().splitlines()) == 1
    evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
    assert decode_evidence(evidence.encode()) == evidence
    result = appraise(evidence, demanded(log), nonce=NONCE, context=CONTEXT, public_key=log.public_key)
    assert result.levels == {EvidenceLevel.TPM}
    assert result.measurement == measurement.own_measurement(BackendKind.TPM)
    log.append(digests_of("an entry"), context=CONTEXT)  # the log's own register is another one
    appraise(make_evidence(log, nonce=NONCE, context=CONTEXT), demanded(log), nonce=NONCE)


def test_opened_again_by_the_same_program_and_after_a_reboot(log, machine, tmp_path):
    log.append(digests_of("an entry"), context=CONTEXT)
    log.close_epoch()
    log.close()
    with open_log(tmp_path / "log") as again:
        assert len(again.programs.events) == 1
    machine.reboot()
    with open_log(tmp_path / "log") as again:
        assert len(again.programs.events) == 1
        assert (
            appraise(make_evidence(again, nonce=NONCE, context=CONTEXT), demanded(again), nonce=NONCE).epoch > log.epoch
        )


def test_another_program_on_the_same_log_is_shown(log, tmp_path, monkeypatch):
    log.close()
    monkeypatch.setattr("trustlog.tpm.backend.own_measurement", lambda _: b"\x66" * 32)
    with open_log(tmp_path / "log") as other:
        other.close()
    monkeypatch.undo()
    with open_log(tmp_path / "log") as again:
        evidence = make_evidence(again, nonce=NONCE, context=CONTEXT)
    own = measurement.own_measurement(BackendKind.TPM).hex()
    assert len(evidence.tpm.programs) == 3
    text = f'accepted_measurements = ["{own}"]'
    assert refused(appraise, evidence, policy(text), nonce=NONCE) == "wrong-measurement"


def test_a_log_without_its_programs_list_works_and_attests_nothing(log, tmp_path):
    log.close()
    (tmp_path / "log" / PROGRAMS_FILE).unlink()
    with open_log(tmp_path / "log") as again:
        again.append(digests_of("an entry"), context=CONTEXT)
        with pytest.raises(MisuseError, match="another program extended it, or this file is an old copy"):
            make_evidence(again, nonce=NONCE, context=CONTEXT)


def test_a_log_on_the_programs_register_takes_the_next(machine, tmp_path):
    with enrol.create(tmp_path / "log", address=machine.address, pcr=13, endorsement_kind=ALG_ECC) as log:
        evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
        assert refused(appraise, evidence, demanded(log), nonce=NONCE) == "program-log"
        appraise(evidence, demanded(log, "program_pcr = 12"), nonce=NONCE)


def test_whose_tpm_it_is(log):
    maker, other = Maker(), Maker("Other")
    made = make_evidence(log, nonce=NONCE, context=CONTEXT)
    chain = maker.endorse(made.tpm.endorsement_key)
    evidence = replace(made, tpm=replace(made.tpm, certificates=chain))
    roots = demanded(log, f'endorsement_roots = ["{maker.fingerprint}"]')
    result = appraise(evidence, roots, nonce=NONCE, now=NOW)
    assert result.summary().endswith("AK endorsed by CN=Maker Root")
    assert "CN=Maker Root" in result.root
    appraise(evidence, roots, nonce=NONCE)

    def changed(**fields):
        return replace(made, tpm=replace(evidence.tpm, **fields))

    foreign_key = public_of_other_tpm(evidence)
    for one in (
        changed(certificates=()),
        changed(certificates=chain[:2]),
        changed(certificates=(b"junk", *chain[1:])),
        changed(certificates=other.endorse(made.tpm.endorsement_key)),
        changed(certificates=(chain[0], *other.endorse(made.tpm.endorsement_key)[1:])),
        changed(endorsement_key=b""),
        changed(endorsement_key=foreign_key, certificates=maker.endorse(foreign_key)),
        changed(attestation_key=made.tpm.endorsement_key),
    ):
        assert refused(appraise, one, roots, nonce=NONCE, now=NOW) in {"endorsement", "wrong-certificate", "wrong-key"}
    late = NOW + dt.timedelta(days=1000)
    assert refused(appraise, evidence, roots, nonce=NONCE, now=late) == "wrong-certificate"
    for position in range(len(evidence.tpm.endorsement_key)):
        altered = bytearray(evidence.tpm.endorsement_key)
        altered[position] ^= 1
        one = changed(endorsement_key=bytes(altered))
        refused(appraise, one, roots, nonce=NONCE, now=NOW)


def test_a_certificate_that_cannot_be_read_raises_nothing_unexpected(log):
    maker = Maker()
    made = make_evidence(log, nonce=NONCE, context=CONTEXT)
    chain = maker.endorse(made.tpm.endorsement_key)
    roots = demanded(log, f'endorsement_roots = ["{maker.fingerprint}"]')
    version_6 = chain[0].replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020105"), 1)
    unreadable = replace(made, tpm=replace(made.tpm, certificates=(version_6, *chain[1:])))
    assert refused(appraise, unreadable, roots, nonce=NONCE, now=NOW) == "wrong-certificate"
    for position, der in enumerate(chain):
        for bit in range(0, len(der) * 8, 3):
            changed = (*chain[:position], flip(der, bit), *chain[position + 1 :])
            evidence = replace(made, tpm=replace(made.tpm, certificates=changed))
            with suppress(VerificationError):
                appraise(evidence, roots, nonce=NONCE, now=NOW)  # any other error would end the examination


def public_of_other_tpm(evidence):
    """The same template with another point."""
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    old = evidence.tpm.endorsement_key
    return old[:-68] + b"\0\x20" + point.x.to_bytes(32, "big") + b"\0\x20" + point.y.to_bytes(32, "big")


def anchored(log, tmp_path, verifier, *ends):
    """Begin the log's anchors with the verifier's signature, and anchor after each of these numbers of entries."""
    place = anchors.AnchorIndex(anchors.INDEX_DEFAULT, log.log_id, VerifyingKey.from_bytes(public_of(verifier)))
    anchorage = anchors.Anchorage(log.client, place, tmp_path / "log")
    anchorage.begin(initial_head(log.config.pins), lambda message: sign(verifier, message))
    for count in ends:
        log.append(digests_of(*map(str, range(count))), context=CONTEXT)
        anchorage.anchor(log.last, log.head)


def test_what_the_tpm_anchors(log, tmp_path):
    verifier = ec.generate_private_key(ec.SECP256R1())
    anchored(log, tmp_path, verifier, 4, 1000)
    evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
    assert decode_evidence(evidence.encode()) == evidence
    wanted = demanded(log, f'anchor_verifiers = ["{public_of(verifier).hex()}"]')
    known = {"nonce": NONCE, "pins": log.config.pins}
    result = appraise(evidence, wanted, **known)
    assert result.anchored == 1004
    assert result.summary().endswith("AK enrolled, anchored to 1,004 by its host's word")
    assert any("the anchors that are shown, in this order" in one for one in result.proven)
    assert any("that the last anchor is of entry 1,004" in one for one in result.not_proven)
    assert result.facts()["anchored"] == 1004
    for unknown in (appraise(evidence, demanded(log), **known), appraise(evidence, wanted, nonce=NONCE)):
        assert unknown.anchored is None
        assert any("what the NV index anchors" in one for one in unknown.not_proven)
    shown = evidence.tpm.anchors

    def changed(**fields):
        return replace(evidence, tpm=replace(evidence.tpm, anchors=replace(shown, **fields)))

    other = public_of(ec.generate_private_key(ec.SECP256R1())).hex()
    assert refused(appraise, evidence, demanded(log, f'anchor_verifiers = ["{other}"]'), **known) == "wrong-index"
    assert refused(appraise, changed(records=shown.records[:-40]), wanted, **known) == "wrong-anchors"
    assert refused(appraise, changed(index=shown.index + 1), wanted, **known) == "wrong-index"
    old = make_evidence(log, nonce=CONTEXT, context=CONTEXT)
    stale = replace(evidence, tpm=replace(evidence.tpm, anchors=old.tpm.anchors))
    assert refused(appraise, stale, wanted, **known) == "wrong-nonce"
    for bit in range(0, len(shown.attest) * 8, 7):
        with pytest.raises(VerificationError):
            appraise(changed(attest=flip(shown.attest, bit)), wanted, **known)
    path = tmp_path / "log" / anchors.ANCHORS_FILE
    path.write_text(path.read_text() + '{"last": 2000, "head": "' + "00" * 32 + '"}\n')
    assert make_evidence(log, nonce=NONCE, context=CONTEXT).tpm.anchors is None  # a crash before the index was extended
    for bit in range(0, len(shown.records) * 8, 7):
        with pytest.raises(VerificationError):
            appraise(changed(records=flip(shown.records, bit)), wanted, **known)


def test_anchors_that_are_too_many_are_said_to_be_not_shown(log, tmp_path, monkeypatch):
    verifier = ec.generate_private_key(ec.SECP256R1())
    anchored(log, tmp_path, verifier, 1, 1)
    wanted = demanded(log, f'anchor_verifiers = ["{public_of(verifier).hex()}"]')
    known = {"nonce": NONCE, "pins": log.config.pins}
    whole = appraise(make_evidence(log, nonce=NONCE, context=CONTEXT), wanted, **known)
    assert not any("NV index" in one for one in whole.not_proven)
    monkeypatch.setattr("trustlog.appraisal.tpm_attester.ANCHORS_BYTES_MAX", 2 * 40)
    result = appraise(make_evidence(log, nonce=NONCE, context=CONTEXT), wanted, **known)
    assert result.anchored is None
    assert any("what the log's NV index anchors: not shown" in one for one in result.not_proven)


def test_anchors_in_another_index_are_not_shown(log, tmp_path):
    (tmp_path / "log" / anchors.ANCHORS_FILE).write_text('{"last": 0, "head": "' + "00" * 32 + '"}\n')
    evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
    assert evidence.tpm.anchors is None


def test_a_key_that_is_only_listed_is_its_own_word(log):
    """Pins are known of a cluster file, where every member's are; that says nothing of a TPM."""
    evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
    result = appraise(evidence, policy(), nonce=NONCE, pins=log.config.pins)
    assert result.levels == {EvidenceLevel.SELF_ASSERTED}
    assert result.summary().endswith("AK listed, enrolment not shown")
    wanted = policy('minimum_evidence = "tpm"')
    assert refused(appraise, evidence, wanted, nonce=NONCE, pins=log.config.pins) == "insufficient-evidence"
    known = frozenset([log.public_key])
    appraise(evidence, wanted, nonce=NONCE, pins=log.config.pins, enrolled=known)


def test_the_key_must_stand_where_it_was_enrolled(log):
    evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
    elsewhere = replace(log.config.pins, signer=log.config.pins.signer[:-1] + b"x")
    assert refused(appraise, evidence, demanded(log), nonce=NONCE, pins=elsewhere) == "wrong-signer"


def test_measured_boot_of_a_log(log, machine, tmp_path, monkeypatch):
    firmware, kernel = usual_boot(), usual_programs()
    log.close()  # a software TPM serves one client at a time
    with machine.connect() as tpm:
        firmware.extend(tpm)
        kernel.extend(tpm)
    (tmp_path / "bios").write_bytes(firmware.log)
    (tmp_path / "ima").write_bytes(kernel.list)
    monkeypatch.setattr("trustlog.appraisal.tpm_attester.BOOT_LOG", tmp_path / "bios")
    monkeypatch.setattr("trustlog.appraisal.tpm_attester.IMA_LIST", tmp_path / "ima")
    with open_log(tmp_path / "log") as again:
        evidence = make_evidence(again, nonce=NONCE, context=CONTEXT, measured_boot=True)
    result = appraise(evidence, demanded(log, "require_measured_boot = true"), nonce=NONCE)
    assert r"\EFI\debian\shimx64.efi" in {one.name for one in result.programs}
