"""Appraisal policies: strict, and every mistake named where it stands."""

from __future__ import annotations

import pytest

from tests.trustlog.appraisal.support import policy
from trustlog import BackendKind, MisuseError
from trustlog.appraisal import EvidenceLevel, Policy, PolicyError, load_policy, parse_policy, policy_of_table
from trustlog.appraisal.policy import LIST_ITEMS_MAX, POLICY_BYTES_MAX

FULL = f"""
minimum_evidence = "hardware"
accepted_measurements = ["{"ab" * 32}"]
accepted_kinds = ["process", "tpm"]
log_keys = ["{"04" * 65}"]

[tpm]
program_pcr = 12
program_base = "{"01" * 32}"
attestation_keys = ["{"05" * 65}"]
endorsement_roots = ["{"06" * 32}"]
anchor_verifiers = ["{"0c" * 65}"]
boot_pcrs = [7, 0]
boot_values = {{7 = "{"07" * 32}", 10 = "{"0a" * 32}"}}
require_measured_boot = true
allow_sha1 = true

[sev-snp]
roots = ["{"08" * 32}"]
launch_measurements = ["{"09" * 48}"]
chip_ids = ["{"0b" * 64}"]
minimum_tcb = {{bootloader = 2, snp = 5, microcode = 68}}
vmpl_max = 1
allow_debug = true
"""


def test_every_key_is_read():
    read = policy(FULL)
    assert read.minimum_evidence is EvidenceLevel.HARDWARE
    assert read.accepted_measurements == {b"\xab" * 32}
    assert read.accepted_kinds == {BackendKind.PROCESS, BackendKind.TPM}
    assert read.log_keys == {b"\x04" * 65}
    assert (read.tpm.program_pcr, read.tpm.program_base) == (12, b"\x01" * 32)
    assert read.tpm.attestation_keys == {b"\x05" * 65}
    assert read.tpm.endorsement_roots == {b"\x06" * 32}
    assert read.tpm.anchor_verifiers == {b"\x0c" * 65}
    assert read.tpm.boot_pcrs == (0, 7)
    assert read.tpm.boot_values == ((7, b"\x07" * 32), (10, b"\x0a" * 32))
    assert read.tpm.require_measured_boot
    assert read.tpm.allow_sha1
    assert read.snp.roots == {b"\x08" * 32}
    assert read.snp.launch_measurements == {b"\x09" * 48}
    assert read.snp.chip_ids == {b"\x0b" * 64}
    assert read.snp.minimum_tcb == (2, 0, 5, 68)
    assert (read.snp.vmpl_max, read.snp.allow_debug) == (1, True)


def test_defaults_accept_what_is_self_asserted():
    assert policy() == Policy()
    assert policy().minimum_evidence is EvidenceLevel.SELF_ASSERTED
    assert not policy().tpm.allow_sha1
    assert policy_of_table({}, "cluster.toml: appraisal") == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accepted_measurments = []", 'accepted_measurments: is not a key.*did you mean "accepted_measurements"'),
        ("[tmp]", 'tmp: is not a key that this program knows; did you mean "tpm"'),
        ("[tpm]\nprogram_prc = 3", 'tpm.program_prc: is not a key.*"program_pcr"'),
        ("[sev-snp]\nminimum_tcb = {bios = 3}", "sev-snp.minimum_tcb.bios: is not a key.*known here: bootloader"),
        ("zzzzzz = 1", "zzzzzz: is not a key that this program knows; known here: format, minimum_evidence"),
        ('minimum_evidence = "tmp"', 'minimum_evidence: "tmp" is none of none, self-asserted.*did you mean "tpm"'),
        ("minimum_evidence = 3", "minimum_evidence: must be a text in quotes, not int"),
        ('minimum_evidence = "sev-snp"', "sev-snp.roots: is missing"),
        ("accepted_measurements = []", "accepted_measurements: must not be empty: leave the key out"),
        ('accepted_measurements = "ab"', "accepted_measurements: must be a list, not str"),
        ('accepted_measurements = ["ab"]', "accepted_measurements: must be 64 hexadecimal digits"),
        (f'accepted_measurements = ["{"xy" * 32}"]', "accepted_measurements: must be 64 hexadecimal digits"),
        ("accepted_measurements = [1]", "accepted_measurements: must be 64 hexadecimal digits"),
        (f"accepted_measurements = {['ab' * 32] * (LIST_ITEMS_MAX + 1)}", "1025 items, at most 1024"),
        ('accepted_kinds = ["hardware"]', 'accepted_kinds: "hardware" is none of software, process, tpm'),
        ("[tpm]\nprogram_pcr = 16", "tpm.program_pcr: must be from 0 to 15"),
        ("[tpm]\nprogram_pcr = true", "tpm.program_pcr: must be a whole number, not bool"),
        ("[tpm]\nboot_pcrs = [24]", "tpm.boot_pcrs: must hold whole numbers from 0 to 23"),
        ("[tpm]\nboot_pcrs = [true]", "tpm.boot_pcrs: must hold whole numbers"),
        ('[tpm]\nboot_values = {24 = "00"}', 'tpm.boot_values: "24" is none of'),
        ('[tpm]\nboot_values = {4 = "00"}', "tpm.boot_values.4: must be 64 hexadecimal digits"),
        ("[tpm]\nrequire_measured_boot = 1", "tpm.require_measured_boot: must be true or false, not int"),
        ("[sev-snp]\nvmpl_max = 4", "sev-snp.vmpl_max: must be from 0 to 3"),
        ("tpm = 3", "tpm: must be a table, not int"),
        ("a = ", "policy.toml: not valid TOML"),
        ("a = 1\na = 2", "policy.toml: not valid TOML"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(PolicyError, match=r"policy\.toml: .*") as caught:
        policy(text)
    assert __import__("re").search(message, str(caught.value)), caught.value


@pytest.mark.parametrize(("raw", "message"), [(b"", "format: is missing"), (b"format = 2", "format: must be 1")])
def test_the_format_is_demanded(raw, message):
    with pytest.raises(PolicyError, match=message):
        parse_policy(raw, "p")


def test_bytes_that_are_no_text_and_too_many(tmp_path):
    with pytest.raises(PolicyError, match="not valid TOML"):
        parse_policy(b"\xff", "p")
    path = tmp_path / "p.toml"
    path.write_bytes(b"#" * (POLICY_BYTES_MAX + 1))
    with pytest.raises(PolicyError, match="larger than"):
        load_policy(path)
    path.write_text("format = 1\n")
    assert load_policy(path) == Policy()
    assert issubclass(PolicyError, MisuseError)  # exit 2 on the command line


def test_which_evidence_is_enough():
    none, own, hardware, tpm, snp = EvidenceLevel
    for minimum, enough, short in (
        (none, [set(), {own}, {tpm}], []),
        (own, [{own}, {tpm}, {snp}], [set()]),
        (hardware, [{tpm}, {own, snp}], [set(), {own}]),
        (tpm, [{tpm}], [set(), {own}, {snp, own}]),
        (snp, [{snp, own}], [set(), {own}, {tpm}]),
    ):
        assert all(minimum.is_met_by(frozenset(shown)) for shown in enough)
        assert not any(minimum.is_met_by(frozenset(shown)) for shown in short)
