"""The README of trustlog/appraisal: its commands run, its numbers are those of the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from replica.shell import appraisal as peers
from trustlog import appraisal, measurement
from trustlog.appraisal import bootlog, evidence, ima, policy
from trustlog.statements import BackendKind
from trustlog.tpm import registers

PACKAGE = Path(appraisal.__file__).parent
README = (PACKAGE / "README.md").read_text()


def test_the_commands_run_in_their_order(tmp_path):
    commands = re.findall(r"^    (?:printf |trustlog |NONCE=).*$", README, re.MULTILINE)
    assert len(commands) == 7
    program = shlex.join([sys.executable, "-m", "trustlog.cli.main"])
    script = "\n".join(re.sub(r"\btrustlog ", f"{program} ", command, count=1) for command in commands)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = measurement.own_measurement(BackendKind.SOFTWARE).hex()
    assert f"measurement {measured}\n" in done.stdout
    assert f"{measured}  -\n" in done.stdout
    assert "\nNOT proven that this program holds the key" in done.stdout


def test_the_policy_is_one():
    (text,) = re.findall(r"^    format = 1\n(?:    .*\n)+", README, re.MULTILINE)
    text = (
        text.replace('"3f9a…"', f'"{"3f" * 32}"')
        .replace('"04…"', f'"{"04" * 65}"')
        .replace('"69d0…"', f'"{"69" * 32}"')
    )
    read = policy.parse_policy(text.replace("\n    ", "\n").strip().encode(), "README")
    assert read.minimum_evidence is policy.EvidenceLevel.TPM
    assert read.tpm.require_measured_boot
    for key in ("format", "minimum_evidence", "accepted_kinds", "log_keys", "program_base", "vmpl_max", "chip_ids"):
        assert key in (policy.__doc__ or "")


def test_the_limits():
    kib, mib = 1024, 2**20
    assert 16 * mib == evidence.EVIDENCE_BYTES_MAX
    assert 256 * kib == peers.EVIDENCE_BYTES_MAX
    assert (mib, 16_384, 8) == (evidence.BOOT_LOG_BYTES_MAX, bootlog.EVENTS_MAX, bootlog.ALGORITHMS_MAX)
    assert (8 * mib, 131_072) == (evidence.IMA_LIST_BYTES_MAX, ima.ENTRIES_MAX)
    assert (64 * kib, 4 * kib) == (ima.DATA_BYTES_MAX, ima.PATH_BYTES_MAX)
    assert registers.PROGRAM_EVENTS_MAX == 256
    assert (8, 16 * kib) == (evidence.CERTIFICATES_MAX, evidence.CERTIFICATE_BYTES_MAX)
    assert (256 * kib, 1024) == (policy.POLICY_BYTES_MAX, policy.LIST_ITEMS_MAX)
    assert (64 * kib, 256, mib) == (measurement.MANIFEST_BYTES_MAX, measurement.FILES_MAX, measurement.FILE_BYTES_MAX)
    assert (peers.EVIDENCE_S, peers.ANSWERS_PER_CONNECTION_MAX) == (20.0, 4)
    assert policy.PROGRAM_PCR == registers.PROGRAM_PCR
