"""Evidence of a measured boot, from a real software TPM: firmware's list, the kernel's, and what a policy demands."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest

from tests.trustlog.appraisal.hosts import made_host, quote
from tests.trustlog.appraisal.lists import Firmware, Kernel, usual_boot, usual_programs
from tests.trustlog.appraisal.support import policy, refused
from tests.trustlog.support import NONCE, flip
from trustlog import MisuseError, VerificationError, measurement
from trustlog.appraisal import appraise, decode_evidence
from trustlog.appraisal.evidence import QuotedPcrs, TpmEvidence
from trustlog.appraisal.measured_boot import judge_boot
from trustlog.tpm.exchange import no_password


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


def test_the_name_of_a_template_is_its_hosts_word(tpm, tmp_path):
    kernel, firmware = usual_programs(), usual_boot()
    kernel.other("trusted-keys", b"what nobody here can read")
    kernel.extend(tpm)
    firmware.extend(tpm)
    (tmp_path / "ima").write_bytes(kernel.list)
    (tmp_path / "bios").write_bytes(firmware.log)
    with made_host(tpm, tmp_path, boot_log=tmp_path / "bios", ima_list=tmp_path / "ima") as host:
        result = appraise(host.evidence(measured_boot=True), host.enrolled(), nonce=NONCE)
    shown = {one.name: one.name_proven for one in result.programs if one.source == "ima"}
    assert (shown["trusted-keys"], shown["/usr/bin/true"]) == (False, True)


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
