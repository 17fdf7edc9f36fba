"""``trustlog quote``, ``appraise`` and ``measure`` as their users start them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.trustlog.appraisal import amd
from tests.trustlog.appraisal.lists import usual_boot, usual_programs
from tests.trustlog.appraisal.support import SimulatedTsm, certificate_table
from tests.trustlog.service.support import Service, public_folder
from trustlog import BackendKind, create, measurement
from trustlog.appraisal import tsm
from trustlog.cli.main import cli
from trustlog.tpm import enrol
from trustlog.tpm.structures import ALG_ECC

NONCE = "ab" * 32


def run(*arguments, cwd, code=0):
    result = subprocess.run(
        [sys.executable, "-m", "trustlog.cli.main", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def place(tmp_path):
    create(tmp_path / "mylog").close()
    (tmp_path / "policy.toml").write_text("format = 1\n")
    return tmp_path


def quoted(place, *options):
    evidence = run("quote", *options, "--nonce", NONCE, "-o", "json", cwd=place).stdout
    (place / "evidence.json").write_text(evidence)
    return json.loads(evidence)


def test_quote_and_appraise(place):
    evidence = quoted(place, "mylog")
    assert evidence["schema_version"] == 1
    assert evidence["rests_on"] == "self-asserted: the log key's own signature"
    key = ["--key", "mylog/log.pub"]
    appraise = ["appraise", "--policy", "policy.toml", "evidence.json"]
    shown = run(*appraise, "--nonce", NONCE, *key, cwd=place).stdout
    assert shown.startswith("evidence self-asserted\n")
    assert "\nproven self-asserted: " in shown
    assert "\nNOT proven that this program holds the key: the statement is self-asserted" in shown
    facts = json.loads(run(*appraise, "-o", "json", cwd=place).stdout)
    assert (facts["appraised"], facts["fresh"]) == (True, False)
    assert any("freshness" in one for one in facts["not_proven"])
    refused = run(*appraise, "--nonce", "cd" * 32, cwd=place, code=1)
    assert "error: the evidence answers another question: its nonce differs" in refused.stderr
    error = json.loads(run(*appraise, "--nonce", "cd" * 32, "-o", "json", cwd=place, code=1).stdout)["error"]
    assert (error["code"], error["exit"]) == ("wrong-nonce", 1)
    (place / "policy.toml").write_text('format = 1\nminimum_evidence = "tpm"\n')
    assert "the policy demands 'tpm'" in run(*appraise, cwd=place, code=1).stderr
    (place / "policy.toml").write_text('format = 1\nminimum_evidense = "tpm"\n')
    assert 'did you mean "minimum_evidence"?' in run(*appraise, cwd=place, code=2).stderr
    run("appraise", "--policy", "nowhere.toml", "evidence.json", cwd=place, code=2)


def test_measure_is_what_is_quoted_and_what_sha256sum_says(place):
    shown = run("measure", cwd=place).stdout.splitlines()
    manifest = run("measure", "--manifest", cwd=place).stdout
    measured = hashlib.sha256(manifest.encode()).hexdigest()
    assert shown == [f"measurement {measured}", *manifest.splitlines()]
    assert quoted(place, "mylog")["measurement"] == measured
    facts = json.loads(run("measure", "--backend", "process", "-o", "json", cwd=place).stdout)
    assert facts["measurement"] == measurement.own_measurement(BackendKind.PROCESS).hex()
    assert any("trustlog/service/server.py" in line for line in facts["manifest"])


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_wrong_use(place):
    invoke("quote", code=2)
    invoke("quote", str(place / "mylog"), "--socket", "x", code=2)
    invoke("quote", str(place / "mylog"), "--nonce", "ab", code=2)
    (place / "ark.der").write_bytes(amd.ark())
    assert "--certificate belongs to" in invoke(
        "quote", str(place / "mylog"), "--certificate", str(place / "ark.der"), code=2
    )
    for arguments in (["--measured-boot"], ["--tsm"]):
        missing = run("quote", "mylog", *arguments, cwd=place, code=2)
        assert "a TPM" in missing.stderr or "no confidential virtual machine" in missing.stderr


def test_a_report_of_a_confidential_virtual_machine(place, monkeypatch):
    folder = SimulatedTsm(amd.report, auxiliary=certificate_table(amd.vcek()))
    make_report = tsm.make_report
    monkeypatch.setattr(tsm, "make_report", lambda inblob: make_report(inblob, files=folder))
    (place / "ark.der").write_bytes(amd.ark())
    (place / "ask.pem").write_bytes(__import__("ssl").DER_cert_to_PEM_cert(amd.ask()).encode())
    log = str(place / "mylog")
    files = ["--certificate", str(place / "ark.der"), "--certificate", str(place / "ask.pem")]
    (place / "e.json").write_text(invoke("quote", log, "--nonce", NONCE, "--tsm", *files, "-o", "json"))
    (place / "policy.toml").write_text(
        f'format = 1\nminimum_evidence = "sev-snp"\n[sev-snp]\nroots = ["{hashlib.sha256(amd.ark()).hexdigest()}"]\n'
    )
    arguments = ["appraise", "--policy", str(place / "policy.toml"), str(place / "e.json"), "--nonce", NONCE]
    assert "evidence sev-snp, self-asserted" in invoke(*arguments, "-o", "plain")
    assert "AMD's root key" in invoke(*arguments, "-o", "table")
    too_many = ["--certificate", str(place / "ark.der")] * 9
    invoke("quote", log, "--tsm", *too_many, code=2)
    (place / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nxx\n")
    result = run("quote", "mylog", "--certificate", "bad.pem", cwd=place, code=2)
    assert "bad.pem holds no proper certificates" in result.stderr


def test_a_tpm_log_with_measured_boot(machine, place, monkeypatch):
    firmware, kernel = usual_boot(), usual_programs()
    with machine.connect() as tpm:
        firmware.extend(tpm)
        kernel.extend(tpm)
    with enrol.create(place / "tpmlog", address=machine.address, endorsement_kind=ALG_ECC) as log:
        key = log.public_key.hex()
    (place / "bios").write_bytes(firmware.log)
    (place / "ima").write_bytes(kernel.list)
    monkeypatch.setattr("trustlog.appraisal.tpm_attester.BOOT_LOG", place / "bios")
    monkeypatch.setattr("trustlog.appraisal.tpm_attester.IMA_LIST", place / "ima")
    (place / "policy.toml").write_text(
        f'format = 1\nminimum_evidence = "tpm"\n[tpm]\nattestation_keys = ["{key}"]\nrequire_measured_boot = true\n'
    )
    (place / "e.json").write_text(
        invoke("quote", str(place / "tpmlog"), "--nonce", NONCE, "--measured-boot", "-o", "json")
    )
    arguments = ["appraise", "--policy", str(place / "policy.toml"), str(place / "e.json"), "--nonce", NONCE]
    shown = invoke(*arguments, "--key", str(place / "tpmlog" / "log.pub"), "-o", "plain")
    shim = hashlib.sha256(b"the shim").hexdigest()
    assert f"program firmware pcr 4 sha256:{shim} \\EFI\\debian\\shimx64.efi (name not proven)" in shown
    assert f"program ima pcr 10 sha256:{hashlib.sha256(b'python').hexdigest()} /usr/bin/python3.11\n" in shown


def test_a_service(place):
    with public_folder() as folder, Service(folder, own_user=False) as service:
        evidence = quoted(place, "--socket", str(service.socket))
        assert evidence["kind"] == "process"
        assert evidence["measurement"] == measurement.own_measurement(BackendKind.PROCESS).hex()
        shown = run("appraise", "--policy", "policy.toml", "evidence.json", "--nonce", NONCE, cwd=place).stdout
        assert "NOT proven that the key is in a process of its own" in shown
    gone = run("quote", "--socket", str(service.socket), cwd=place, code=3)
    assert "no log service can be reached" in gone.stderr
