"""Evidence of a real software TPM: the program's register, and the quote."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from tests.support.swtpm import software_tpm
from tests.trustlog.appraisal.hosts import OWN, Host, made_host, quote, tpm_statement
from tests.trustlog.appraisal.support import policy, refused
from tests.trustlog.support import CONTEXT, NONCE, OTHER_CONTEXT, OTHER_NONCE, flip
from tests.trustlog.tpm.support import attestation_key
from trustlog import BackendKind, MisuseError, VerificationError, in_memory, log_id
from trustlog.appraisal import Evidence, EvidenceLevel, appraise, decode_evidence, make_evidence
from trustlog.tpm.registers import ProgramEvent, quote_values, record_program, replay_programs
from trustlog.tpm.wire import TpmError


def test_what_is_proven_and_what_not(host):
    evidence = host.evidence()
    assert decode_evidence(evidence.encode()) == evidence
    result = appraise(evidence, host.enrolled(), nonce=NONCE, context=CONTEXT, public_key=host.public_key)
    assert result.levels == {EvidenceLevel.TPM}
    assert result.measurement == OWN
    assert result.epoch == host.epoch() > 0
    assert result.summary() == f"tpm, measured {OWN.hex()[:8]}…, AK enrolled"
    assert any("PCR 13 was extended with 1 program(s)" in one for one in result.proven)
    unsaid = " ".join(result.not_proven)
    assert "no event log of the firmware" in unsaid
    assert "no IMA list" in unsaid
    assert "no other program of root's" in unsaid
    assert "endorsement_roots" in unsaid


def test_a_key_that_was_not_enrolled_is_its_own_word(host):
    evidence = host.evidence()
    result = appraise(evidence, policy(), nonce=NONCE)
    assert result.levels == {EvidenceLevel.SELF_ASSERTED}
    assert any("not among the attestation keys" in one for one in result.not_proven)
    assert refused(appraise, evidence, policy('minimum_evidence = "tpm"'), nonce=NONCE) == "insufficient-evidence"
    # Whoever has such a key can sign any registers, so nothing that they would show is proven.
    assert result.proven == ()
    assert (result.programs, result.anchored) == ((), None)
    assert any("was extended with 1 program(s)" in one and "the host's word" in one for one in result.not_proven)
    known = appraise(evidence, policy(), nonce=NONCE, enrolled=frozenset([host.public_key]))
    assert known.levels == {EvidenceLevel.TPM}
    assert any("was extended with 1 program(s)" in one for one in known.proven)


@pytest.mark.parametrize("demand", ["require_measured_boot = true", f'boot_values = {{4 = "{"00" * 32}"}}'])
def test_a_measured_boot_is_not_passed_by_evidence_without_an_enrolled_tpm(host, demand):
    demanded = policy(f"[tpm]\n{demand}")
    code = refused(appraise, host.evidence(), demanded, nonce=NONCE)
    assert code in {"no-measured-boot", "boot-value"}
    with in_memory() as log:
        evidence = make_evidence(log, nonce=NONCE, context=CONTEXT)
        assert refused(appraise, evidence, demanded, nonce=NONCE) == "no-measured-boot"


def test_what_a_policy_demands_of_hardware_is_named_where_there_is_none(host):
    key, root = host.public_key.hex(), "00" * 32
    text = f'[tpm]\nattestation_keys = ["{key}"]\n[sev-snp]\nroots = ["{root}"]\n'
    with in_memory() as log:
        result = appraise(make_evidence(log, nonce=NONCE, context=CONTEXT), policy(text), nonce=NONCE)
    assert any("[tpm] demands" in one for one in result.not_proven)
    assert any("[sev-snp] demands" in one for one in result.not_proven)


def test_every_flipped_bit_of_the_quote_and_the_statement_is_refused(host):
    evidence, demanded = host.evidence(), host.enrolled()
    shown = evidence.tpm
    appraise(evidence, demanded, nonce=NONCE)
    changed = [
        *(replace(evidence, statement=flip(evidence.statement, bit)) for bit in range(0, 219 * 8, 3)),
        *(
            replace(evidence, tpm=replace(shown, sha256=replace(shown.sha256, quote=flip(shown.sha256.quote, bit))))
            for bit in range(len(shown.sha256.quote) * 8)
        ),
        *(
            replace(
                evidence, tpm=replace(shown, sha256=replace(shown.sha256, signature=flip(shown.sha256.signature, b)))
            )
            for b in range(512)
        ),
        *(
            replace(
                evidence, tpm=replace(shown, sha256=replace(shown.sha256, pcrs={13: flip(shown.sha256.pcrs[13], b)}))
            )
            for b in range(256)
        ),
        *(replace(evidence, tpm=replace(shown, programs=(flip(shown.programs[0], bit),))) for bit in range(82 * 8)),
    ]
    for one in changed:
        with pytest.raises(VerificationError):
            appraise(one, demanded, nonce=NONCE, context=CONTEXT)


def test_old_and_foreign_evidence_is_refused(host):
    evidence, demanded = host.evidence(), host.enrolled()
    assert refused(appraise, evidence, demanded, nonce=OTHER_NONCE) == "wrong-nonce"
    assert refused(appraise, evidence, demanded, nonce=NONCE, context=OTHER_CONTEXT) == "wrong-context"
    later = host.evidence(OTHER_NONCE)
    replayed = replace(later, tpm=evidence.tpm)
    assert refused(appraise, replayed, demanded, nonce=OTHER_NONCE) == "wrong-nonce"
    assert refused(appraise, replace(evidence, tpm=None), demanded, nonce=NONCE) == "no-quote"
    assert refused(appraise, replace(evidence, signature=bytes(64)), demanded, nonce=NONCE) == "no-quote"
    software = make_evidence(in_memory(), nonce=NONCE, context=CONTEXT)
    assert refused(appraise, replace(software, tpm=evidence.tpm), policy(), nonce=NONCE) == "wrong-kind"


def test_another_program_before_or_after_is_seen(host):
    host.program(b"\x66" * 32)
    evidence = host.evidence()
    accepted = policy(f'accepted_measurements = ["{OWN.hex()}"]')
    assert len(evidence.tpm.programs) == 2
    assert refused(appraise, evidence, accepted, nonce=NONCE) == "wrong-measurement"
    hidden = replace(evidence, tpm=replace(evidence.tpm, programs=evidence.tpm.programs[1:]))
    assert refused(appraise, hidden, accepted, nonce=NONCE) == "program-log"
    # Another program took over after the one that the statement names.
    host.program(b"\x66" * 32)
    statement = tpm_statement(host.public_key, host.epoch(), nonce=NONCE, context=CONTEXT)
    shown = quote(host, statement, host.program(b"\x66" * 32))
    assert refused(appraise, Evidence(statement, b"", tpm=shown), policy(), nonce=NONCE) == "wrong-measurement"


def test_a_register_that_anybody_can_reset_does_not_pass(host):
    """The quote is of PCR 16 or 23, which a host sets to zeros as it likes: the policy's register is not in it."""
    statement = tpm_statement(host.public_key, host.epoch(), nonce=NONCE, context=CONTEXT)
    for pcr in (16, 23):
        event = ProgramEvent(BackendKind.TPM, log_id(host.public_key), OWN)
        programs = record_program(host.tpm, host.file.with_name(f"{pcr}.log"), event, pcr)
        shown = quote(host, statement, programs, pcr=pcr)
        assert refused(appraise, Evidence(statement, b"", tpm=shown), policy(), nonce=NONCE) == "program-log"
        moved = replace(shown, sha256=replace(shown.sha256, pcrs={13: shown.sha256.pcrs[pcr]}))
        assert refused(appraise, Evidence(statement, b"", tpm=moved), policy(), nonce=NONCE) == "wrong-selection"


def test_the_base_of_the_register_is_pinned(host):
    """Somebody extended the register before the first program: an unpinned base would hide it."""
    host.tpm.pcr_extend(13, b"\x66" * 32)
    with pytest.raises(MisuseError, match="another program extended it, or this file is an old copy"):
        host.program()
    base = host.tpm.pcr_read([13])[13]
    event = ProgramEvent(BackendKind.TPM, log_id(host.public_key), OWN)
    host.tpm.pcr_extend(13, event.digest())
    statement = tpm_statement(host.public_key, host.epoch(), nonce=NONCE, context=CONTEXT)
    shown = quote(host, statement, [event.encode()])
    evidence = Evidence(statement, b"", tpm=shown)
    assert refused(appraise, evidence, policy(), nonce=NONCE) == "program-log"
    appraise(evidence, policy(f'[tpm]\nprogram_base = "{base.hex()}"'), nonce=NONCE)


def test_a_program_is_extended_once_and_again_after_a_reboot(machine, tmp_path):
    with machine.connect() as tpm, made_host(tpm, tmp_path) as host:
        assert host.program() == host.program()
        assert host.tpm.pcr_read([13])[13] == _extended(bytes(32), host.program())
        first = host.epoch()
    machine.reboot()
    with machine.connect() as tpm, made_host(tpm, tmp_path) as host:
        assert len(host.program()) == 1
        assert host.epoch() > first
        appraise(host.evidence(), host.enrolled(), nonce=NONCE)


def _extended(base, events):
    programs = [ProgramEvent(BackendKind.TPM, raw[18:50], raw[50:82]) for raw in events]
    assert [one.encode() for one in programs] == list(events)
    value = base
    for one in programs:
        value = hashlib.sha256(value + one.digest()).digest()
    return value


def test_a_crash_between_the_list_and_the_register(host, monkeypatch):
    host.program()
    with monkeypatch.context() as patch:
        patch.setattr(type(host.tpm), "pcr_extend", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError):
            host.program(b"\x01" * 32)
    assert len(host.file.read_text().splitlines()) == 2
    assert len(host.program(b"\x02" * 32)) == 2
    host.program()
    assert len(appraise(host.evidence(), host.enrolled(), nonce=NONCE).proven) == 1


@pytest.mark.parametrize("content", ["xyz\n", "é\n"])
def test_a_damaged_list_is_named(host, content):
    host.file.write_text(content)
    with pytest.raises(MisuseError, match="not a list of program events"):
        host.program()


def test_the_list_is_bounded(host, monkeypatch):
    monkeypatch.setattr("trustlog.tpm.registers.PROGRAM_EVENTS_MAX", 1)
    host.program()
    with pytest.raises(MisuseError, match="reboot it"):
        host.program(bytes(32))


@pytest.mark.parametrize(
    "raw", [b"", bytes(82), b"trustlog/measure\x02\x03" + bytes(64), b"trustlog/measure\x01\x09" + bytes(64)]
)
def test_what_is_no_program_event_is_refused(raw):
    assert refused(replay_programs, [raw], bytes(32), bytes(32)) == "program-log"


def test_a_log_whose_program_was_never_measured(host):
    event = ProgramEvent(BackendKind.TPM, bytes(32), OWN)  # another log's, on the same machine
    programs = record_program(host.tpm, host.file, event)
    statement = tpm_statement(host.public_key, host.epoch(), nonce=NONCE, context=CONTEXT)
    shown = quote(host, statement, programs)
    assert refused(appraise, Evidence(statement, b"", tpm=shown), policy(), nonce=NONCE) == "program-log"


def test_registers_that_will_not_stand_still(host, monkeypatch):
    reads = host.tpm.pcr_read

    def moving(pcrs, bank):
        values = reads(pcrs, bank)
        host.tpm.pcr_extend(13, bytes(32))
        return values

    monkeypatch.setattr(host.tpm, "pcr_read", moving)
    with pytest.raises(TpmError, match="change faster than they can be quoted"):
        quote_values(host.tpm, host.key, [13], b"")


def test_an_unreadable_event_log_is_shown_and_refused(host, tmp_path):
    (tmp_path / "bios").write_bytes(b"nonsense")
    host.paths = {"boot_log": tmp_path / "bios", "ima_list": tmp_path / "nothing"}
    evidence = host.evidence(measured_boot=True)
    assert refused(appraise, evidence, host.enrolled(), nonce=NONCE) == "boot-log-malformed"


def test_another_epoch_is_refused(host):
    statement = tpm_statement(host.public_key, host.epoch() + 1, nonce=NONCE, context=CONTEXT)
    shown = quote(host, statement, host.program())
    assert refused(appraise, Evidence(statement, b"", tpm=shown), policy(), nonce=NONCE) == "wrong-epoch"


def test_a_copied_software_tpm_is_a_perfect_twin(machine, tmp_path):
    """What no evidence can show: both TPMs hold the same key, and both quotes pass."""
    import shutil

    with machine.connect() as tpm, attestation_key(tpm) as (key, _, _):
        tpm.evict_control(key, 0x81010010)
    machine.shut_down()
    shutil.copytree(machine.state, tmp_path / "twin", ignore=shutil.ignore_patterns(".lock"))
    machine.start()
    with software_tpm(tmp_path / "twin") as twin:
        for number, one in enumerate((machine, twin)):
            folder = tmp_path / f"host{number}"
            folder.mkdir()
            with one.connect() as tpm:
                host = Host(tpm, 0x81010010, tpm.read_public(0x81010010)[0], folder)
                assert appraise(host.evidence(), host.enrolled(), nonce=NONCE).levels == {EvidenceLevel.TPM}
