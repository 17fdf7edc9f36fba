"""Evidence of a real software TPM: the program's register, the quote, and the lists of a measured boot."""

from __future__ import annotations

import hashlib
import struct
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.support.swtpm import software_tpm
from tests.trustlog.appraisal.lists import Firmware, Kernel, usual_boot, usual_programs
from tests.trustlog.appraisal.support import policy, refused
from tests.trustlog.support import CONTEXT, NONCE, OTHER_CONTEXT, OTHER_NONCE, flip
from tests.trustlog.tpm.support import attestation_key
from trustlog import BackendKind, MisuseError, QuoteStatement, VerificationError, in_memory, log_id, measurement
from trustlog.appraisal import Evidence, EvidenceLevel, appraise, decode_evidence, make_evidence
from trustlog.appraisal.evidence import QuotedPcrs, TpmEvidence
from trustlog.appraisal.measured_boot import judge_boot
from trustlog.appraisal.tpm_attester import quote_pcrs
from trustlog.tpm.exchange import no_password
from trustlog.tpm.quote import parse_quote
from trustlog.tpm.registers import PROGRAMS_FILE, ProgramEvent, quote_values, record_program, replay_programs
from trustlog.tpm.wire import TpmError

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


@pytest.fixture
def host(tpm, tmp_path):
    with made_host(tpm, tmp_path) as made:
        yield made


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


# Measured boot


@pytest.fixture
def booted(tpm, tmp_path):
    """A machine that measured its boot: what firmware and kernel extended, with the lists where the kernel shows them."""
    firmware, kernel = usual_boot(), usual_programs()
    firmware.extend(tpm)
    kernel.extend(tpm)
    boot_log, ima_list = tmp_path / "bios", tmp_path / "ima"
    boot_log.write_bytes(firmware.log)
    ima_list.write_bytes(kernel.list)
    with made_host(tpm, tmp_path, boot_log=boot_log, ima_list=ima_list) as made:
        yield made


def test_the_programs_that_ran_are_printed(booted):
    evidence = booted.evidence(measured_boot=True)
    assert decode_evidence(evidence.encode()) == evidence
    result = appraise(evidence, booted.enrolled("require_measured_boot = true"), nonce=NONCE)
    shown = {(one.source, one.name): one.name_proven for one in result.programs}
    assert shown[("firmware", r"\EFI\debian\shimx64.efi")] is False
    assert shown[("firmware", "linux /vmlinuz root=/dev/sda1")] is True
    assert shown[("ima", "/usr/bin/python3.11")] is True
    assert shown[("ima", "(violation: the file changed while it was read)")] is False
    assert "leads to the quoted PCRs 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in " ".join(result.proven)
    assert any("leads to the quoted PCR 10: 5 programs" in one for one in result.proven)
    assert any("trusted part's own files" in one for one in result.not_proven)
    assert any("boot_values" in one for one in result.not_proven)


def test_a_program_that_is_called_something_else_is_printed(booted):
    """An event's type is in no digest: the shim's event says that it is a tag."""
    evidence = booted.evidence(measured_boot=True)
    old = struct.pack("<II", 4, 0x80000003)
    changed = evidence.tpm.boot_log.replace(old, struct.pack("<II", 4, 0x06), 1)
    assert changed != evidence.tpm.boot_log
    renamed = replace(evidence, tpm=replace(evidence.tpm, boot_log=changed))
    shown = {one.digest: one for one in appraise(renamed, booted.enrolled(), nonce=NONCE).programs}
    one = shown[hashlib.sha256(b"the shim").digest()]
    assert (one.name, one.name_proven) == ("EV_EVENT_TAG", False)


def test_programs_after_the_quote_do_not_count(booted):
    kernel = usual_programs()
    kernel.ng("/usr/bin/evil", b"started later")
    booted.paths["ima_list"].write_bytes(kernel.list)
    result = appraise(booted.evidence(measured_boot=True), booted.enrolled(), nonce=NONCE)
    assert not any("evil" in one.name for one in result.programs)


def test_the_files_of_the_manifest_in_the_kernels_list(tpm, tmp_path):
    kernel = Kernel()
    package = __import__("pathlib").Path(measurement.__file__).parent
    for path in [*package.glob("*.py"), *(package / "tpm").glob("*.py")]:
        kernel.ng(str(path), path.read_bytes())
    kernel.extend(tpm)
    firmware = usual_boot()
    firmware.extend(tpm)
    (tmp_path / "ima").write_bytes(kernel.list)
    (tmp_path / "bios").write_bytes(firmware.log)
    with made_host(tpm, tmp_path, boot_log=tmp_path / "bios", ima_list=tmp_path / "ima") as host:
        result = appraise(host.evidence(measured_boot=True), host.enrolled(), nonce=NONCE)
    assert any(one.startswith("the IMA list holds all ") for one in result.proven)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda log: log.replace(b"shim", b"shin"), None),  # the image is measured, its path is not
        (lambda log: log[:-40], "boot-log-malformed"),
        (lambda log: log + usual_boot().log[-60:], "boot-log-malformed"),
        (lambda log: usual_boot(locality=3).log, "boot-log"),
        (lambda log: usual_boot((0x0004,)).log, "boot-log-bank"),
        (lambda log: usual_boot(None).log, "boot-log-bank"),
    ],
)
def test_other_event_logs_are_refused(booted, change, reason):
    evidence = booted.evidence(measured_boot=True)
    changed = replace(evidence, tpm=replace(evidence.tpm, boot_log=change(evidence.tpm.boot_log)))
    if reason is None:
        appraise(changed, booted.enrolled(), nonce=NONCE)
    else:
        assert refused(appraise, changed, booted.enrolled(), nonce=NONCE) == reason


def test_a_program_hidden_from_the_lists_is_noticed(booted):
    evidence = booted.evidence(measured_boot=True)
    other = usual_boot()
    other.image(4, r"\EFI\evil.efi", b"evil")
    for pcr, digests in other.extended[-1:]:
        booted.tpm.pcr_extend(pcr, digests[0x000B])
    hidden = booted.evidence(measured_boot=True)
    assert refused(appraise, hidden, booted.enrolled(), nonce=NONCE) == "boot-log"
    # A policy that does not ask for PCR 4 says that it is not explained, and shows no program of it.
    result = appraise(hidden, booted.enrolled("boot_pcrs = [0, 2, 7]"), nonce=NONCE)
    assert any("for PCRs 4: it does not lead there" in one for one in result.not_proven)
    assert not any(one.pcr == 4 for one in result.programs)
    kernel = usual_programs()
    shorter = replace(evidence.tpm, ima_list=kernel.list[: -len(kernel.list) // 3])
    assert refused(appraise, replace(evidence, tpm=shorter), booted.enrolled(), nonce=NONCE) in {
        "ima-list",
        "ima-list-malformed",
    }
    without = Kernel()
    without.ng("boot_aggregate", b"PCRs 0 to 9")
    shorter = replace(evidence.tpm, ima_list=without.list)
    assert refused(appraise, replace(evidence, tpm=shorter), booted.enrolled(), nonce=NONCE) == "ima-list"


def test_values_that_the_policy_demands(booted):
    evidence = booted.evidence(measured_boot=True)
    value = evidence.tpm.sha256.pcrs[4]
    result = appraise(evidence, booted.enrolled(f'boot_values = {{4 = "{value.hex()}"}}'), nonce=NONCE)
    assert not any("boot_values" in one for one in result.not_proven)
    for pcr, demanded in ((4, bytes(32)), (12, bytes(32))):
        text = f'boot_values = {{{pcr} = "{demanded.hex()}"}}'
        assert refused(appraise, evidence, booted.enrolled(text), nonce=NONCE) == "boot-value"


def test_measured_boot_can_be_demanded(host, tmp_path):
    demanded = host.enrolled("require_measured_boot = true")
    assert refused(appraise, host.evidence(), demanded, nonce=NONCE) == "no-measured-boot"
    host.paths = {"boot_log": tmp_path / "nothing", "ima_list": tmp_path / "nothing"}
    with pytest.raises(MisuseError, match="the kernel shows no event log"):
        host.evidence(measured_boot=True)


def test_a_kernel_without_ima(tpm, tmp_path):
    firmware = usual_boot()
    firmware.extend(tpm)
    (tmp_path / "bios").write_bytes(firmware.log)
    with made_host(tpm, tmp_path, boot_log=tmp_path / "bios", ima_list=tmp_path / "nothing") as host:
        result = appraise(host.evidence(measured_boot=True), host.enrolled(), nonce=NONCE)
    assert any("no IMA list" in one for one in result.not_proven)


def test_lists_that_are_too_large_are_not_sent(booted, monkeypatch):
    monkeypatch.setattr("trustlog.appraisal.tpm_attester.IMA_LIST_BYTES_MAX", 10)
    with pytest.raises(MisuseError, match="more than 10 bytes"):
        booted.evidence(measured_boot=True)


def test_a_legacy_event_log_is_replayed_in_the_sha1_bank(tpm, tmp_path):
    firmware, kernel = usual_boot(None), usual_programs()
    for pcr, digests in firmware.extended:
        _extend_sha1(tpm, pcr, digests[0x0004])
    for digest, _ in kernel.extended:
        _extend_sha1(tpm, 10, digest)
    (tmp_path / "bios").write_bytes(firmware.log)
    (tmp_path / "ima").write_bytes(kernel.list)
    with made_host(tpm, tmp_path, boot_log=tmp_path / "bios", ima_list=tmp_path / "ima") as host:
        evidence = host.evidence(measured_boot=True)
        allowed = host.enrolled("allow_sha1 = true")
        assert decode_evidence(evidence.encode()) == evidence
        result = appraise(evidence, allowed, nonce=NONCE)
        assert sum("collisions of SHA-1" in one for one in result.not_proven) == 2
        assert any("measures into the sha1 bank: one that it leaves out" in one for one in result.not_proven)
        assert refused(appraise, evidence, host.enrolled(), nonce=NONCE) == "boot-log-bank"
        assert {one.algorithm for one in result.programs if one.source == "firmware"} == {"sha1"}
        assert any(one.name == "/usr/bin/python3.11" for one in result.programs)
        shown = evidence.tpm
        for bit in range(0, len(shown.sha1.quote) * 8, 5):
            changed = replace(shown, sha1=replace(shown.sha1, quote=flip(shown.sha1.quote, bit)))
            with pytest.raises(VerificationError):
                appraise(replace(evidence, tpm=changed), allowed, nonce=NONCE)
        swapped = replace(shown, sha256=shown.sha1, sha1=None)
        assert refused(appraise, replace(evidence, tpm=swapped), allowed, nonce=NONCE) == "wrong-selection"


@pytest.mark.parametrize("pcr", [4, 9])
def test_the_attester_does_not_choose_the_bank(tpm, tmp_path, pcr):
    """Firmware measured into SHA-256; root filled the SHA-1 bank later, with a legacy log to fit: no collision needed."""
    tpm.pcr_extend(pcr, hashlib.sha256(b"an evil loader").digest())
    firmware = usual_boot(None)
    for register, digests in firmware.extended:
        _extend_sha1(tpm, register, digests[0x0004])
    (tmp_path / "bios").write_bytes(firmware.log)
    with made_host(tpm, tmp_path, boot_log=tmp_path / "bios", ima_list=tmp_path / "nothing") as host:
        evidence = host.evidence(measured_boot=True)
        for wanted in (host.enrolled(), host.enrolled("allow_sha1 = true")):
            assert refused(appraise, evidence, wanted, nonce=NONCE) == "boot-log-bank"
        # Nor may the SHA-256 bank be left out of the quote.
        statement = evidence.statement
        hidden = replace(evidence.tpm, sha256=quote(host, statement, host.program()).sha256)
        assert (
            refused(appraise, replace(evidence, tpm=hidden), host.enrolled("allow_sha1 = true"), nonce=NONCE)
            == "boot-log-bank"
        )


def test_an_empty_bank_explains_nothing(host, tmp_path):
    """The firmware measured into no bank that is quoted: an event log without events leads to its zeros."""
    (tmp_path / "bios").write_bytes(Firmware().log)
    host.paths = {"boot_log": tmp_path / "bios", "ima_list": tmp_path / "nothing"}
    assert refused(appraise, host.evidence(measured_boot=True), host.enrolled(), nonce=NONCE) == "boot-log"


def test_the_kernels_list_counts_in_the_sha256_bank():
    """Unless the policy takes SHA-1, and that bank is empty: root may have extended the other one as it likes."""
    shown, other, old = usual_programs(), Kernel(), usual_programs(padded=True)
    other.ng("/usr/bin/evil", b"what really ran")
    strict, allowing = policy().tpm, policy("[tpm]\nallow_sha1 = true").tpm

    def judged(wanted, sha256, kernel=shown):
        quoted = QuotedPcrs(b"", b"", {10: sha256} if sha256 else {})
        return judge_boot(
            TpmEvidence(quoted, (), b"", kernel.list, QuotedPcrs(b"", b"", {10: kernel.sha1})), wanted, b""
        )

    for wanted in (strict, allowing):
        assert len(judged(wanted, shown.sha256).programs) == 5
        assert refused(judged, wanted, other.sha256) == "ima-list"
        assert refused(judged, wanted, None) == "ima-list"
    empty = judged(strict, bytes(32))
    assert empty.programs == ()
    assert any("PCR 10 is empty" in one for one in empty.not_proven)
    assert refused(judged, strict, old.sha256, old) == "ima-list"
    for legacy in (judged(allowing, bytes(32)), judged(allowing, old.sha256, old)):
        assert len(legacy.programs) == 5
        assert any("collisions of SHA-1" in one for one in legacy.not_proven)


def _extend_sha1(tpm, pcr, digest):
    tpm.run("PCR_Extend", [pcr], struct.pack(">IH", 1, 0x0004) + digest, auths=[no_password()])


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
