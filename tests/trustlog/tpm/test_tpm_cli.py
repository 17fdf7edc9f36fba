"""The commands of a TPM's log as its users start them, from enrolment by somebody else to anchors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.swtpm import manufacture, software_tpm
from tests.trustlog.support import NONCE, OTHER_NONCE, fixed_key
from tests.trustlog.test_cli import Shell
from tests.trustlog.tpm.support import public_of, sign
from trustlog.tpm.chain import read_public_file
from trustlog.tpm.opening import open_log
from trustlog.tpm.sealing import SEALED_FILE, load

VERIFIER = fixed_key(7)


@pytest.fixture
def shell(tmp_path):
    directory = tmp_path / "a place"
    directory.mkdir()
    return Shell(directory)


@pytest.fixture
def log(shell, machine):
    shell("init", "log", "--backend", "tpm", "--tpm", machine.address)
    return shell


def keep(shell, name, *arguments):
    out, _ = shell(*arguments, "-o", "json")
    (shell.directory / name).write_text(out)
    return json.loads(out)


def enrol(shell, *trust, code=0):
    keep(shell, "request.json", "tpm", "request", "log")
    if code:
        return shell.json("tpm", "challenge", "request.json", *trust, "--secret", "secret.json", code=code)
    keep(shell, "challenge.json", "tpm", "challenge", "request.json", *trust, "--secret", "secret.json")
    keep(shell, "answer.json", "tpm", "answer", "log", "challenge.json")
    return shell.json("tpm", "accept", "request.json", "answer.json", "--secret", "secret.json", "--out", "pinned.pub")


def test_a_log_is_made_enrolled_used_and_verified_by_what_was_pinned(log):
    said = enrol(log, "--any-tpm")
    assert (said["accepted"], said["pcr"], said["endorsed"]) == (True, 14, "not checked (--any-tpm)")
    assert (log.directory / "pinned.pub").read_bytes() == (log.directory / "log" / "log.pub").read_bytes()
    assert (log.directory / "secret.json").stat().st_mode & 0o777 == 0o600
    other = json.loads((log.directory / "request.json").read_text()) | {"certificate": "00"}
    (log.directory / "other.json").write_text(json.dumps(other))
    swapped = ["tpm", "accept", "other.json", "answer.json", "--secret", "secret.json", "--out", "other.pub"]
    assert log.json(*swapped, code=1)["code"] == "wrong-request"
    assert not (log.directory / "other.pub").exists()
    keep(log, "append.json", "append", "log", "first entry")
    keep(log, "end.json", "end", "log", "--nonce", NONCE.hex())
    checked = log.json("verify", "--key", "pinned.pub", "append.json", "--payload", "first entry")
    assert (checked["verified"], checked["kind"], checked["first"]) == (True, "tpm", 1)
    shown, _ = log("verify", "--key", "pinned.pub", "append.json")
    assert re.search(r"^NOT proven:? +that this is the log's entry 1 \(only replaying", shown, re.MULTILINE)
    assert log.json("verify", "--key", "pinned.pub", "end.json", "--nonce", NONCE.hex())["fresh"] is True
    (log.directory / "key.pub").write_text((log.directory / "pinned.pub").read_text().split("\n")[0] + "\n")
    refused = log.json("verify", "--key", "key.pub", "append.json", code=1)
    assert refused["code"] == "not-pinned"
    late = log.json("tpm", "answer", "log", "challenge.json", code=2)
    assert "the log has 1 entries" in late["message"]


def test_the_makers_certificate_is_asked_for(tmp_path, shell):
    manufacture(tmp_path / "state", tmp_path / "authority")
    authority = tmp_path / "authority"
    chain = [(authority / name).read_text() for name in ("issuercert.pem", "swtpm-localca-rootca-cert.pem")]
    (shell.directory / "maker.pem").write_text("".join(chain))
    (shell.directory / "other.pem").write_text(chain[0])
    (shell.directory / "none.pem").write_text("")
    with software_tpm(tmp_path / "state") as machine:
        shell("init", "log", "--backend", "tpm", "--tpm", machine.address, "--pcr", "9")
        assert enrol(shell, "--ca", "other.pem", code=1)["code"] == "wrong-certificate"
        assert enrol(shell, "--ca", "none.pem", code=2)["code"] == "bad-certificates"
        said = enrol(shell, "--ca", "maker.pem")
        assert (said["endorsed"], said["pcr"]) == ("by its maker's certificate", 9)


def test_a_certificate_that_cannot_be_read_is_an_error_by_contract(tmp_path, shell):
    manufacture(tmp_path / "state", tmp_path / "authority")
    (shell.directory / "ca.pem").write_text((tmp_path / "authority" / "issuercert.pem").read_text())
    with software_tpm(tmp_path / "state") as machine:
        shell("init", "log", "--backend", "tpm", "--tpm", machine.address)
        keep(shell, "request.json", "tpm", "request", "log")
    asked = json.loads((shell.directory / "request.json").read_text())
    # Version 6 of a certificate, of which there are three.
    asked["certificate"] = asked["certificate"].replace("a003020102", "a003020105", 1)
    (shell.directory / "bad.json").write_text(json.dumps(asked))
    refused = shell.json("tpm", "challenge", "bad.json", "--ca", "ca.pem", "--secret", "secret.json", code=1)
    assert refused["code"] == "wrong-certificate"
    assert not (shell.directory / "secret.json").exists()


def test_what_a_tpm_does_not_attest_is_said(log):
    log("append", "log", "one")
    for command in (["lookup", "log", "1"], ["truncate", "log", "1"]):
        assert "a TPM attests no" in log.json(*command, code=2)["message"]
    assert "give --ca" in log.json("tpm", "challenge", "log", "--secret", "s", code=2)["message"]
    for wrong in ("[1]", "{", '{"key": 1}'):
        (log.directory / "bad.json").write_text(wrong)
        assert log.json("tpm", "challenge", "bad.json", "--any-tpm", "--secret", "s", code=1)["code"] == "malformed"
    assert log.json("init", "other", "--backend", "tpm", "--tpm", "/nowhere", code=1)["code"]
    assert not (log.directory / "other").exists()


def test_a_log_goes_on_after_a_reboot_that_it_was_closed_for(log, machine):
    log("append", "log", "one")
    assert log.json("tpm", "close", "log")["closed_at"] == 2
    assert "goes on after the next boot" in log.json("append", "log", "two", code=2)["message"]
    machine.reboot()
    said = log.json("append", "log", "two")
    assert (said["first"], said["epoch"]) == (4, 2 << 32)
    (log.directory / "append.json").write_text(json.dumps(said))
    assert log.json("verify", "--key", "log/log.pub", "append.json", "--payload", "two")["verified"] is True
    status = log.json("tpm", "status", "log")
    assert (status["resets"], status["restarts"], status["last"], status["anchored_to"]) == (2, 0, 4, None)
    machine.cut_power()
    machine.start()
    ended = log.json("append", "log", "three", code=2)
    assert "the machine was started again" in ended["message"]
    status = json.loads(log("tpm", "status", "log", "-o", "json", code=1)[0])
    assert (status["resets"], status["last"]) == (2, 4)
    assert "the machine was started again, and the log in log was not closed before" in status["ended"]


def test_a_lost_close_is_told_from_one_that_never_was(log, machine):
    log("append", "log", "one")
    log("tpm", "close", "log")
    close = log.directory / "log" / "close.group"
    kept = close.read_bytes()
    machine.reboot()
    for wrong in (None, b"", kept[:-1], kept[:40] + bytes([kept[40] ^ 1]) + kept[41:]):
        close.unlink(missing_ok=True)
        if wrong is not None:
            close.write_bytes(wrong)
        message = log.json("append", "log", "two", code=2)["message"]
        assert "was closed before, but close.group, which proves it, is missing there, damaged" in message
    close.write_bytes(kept)
    assert log.json("append", "log", "two")["first"] == 4


def test_another_backend_does_not_open_it(log):
    log("append", "log", "one")
    serve = [sys.executable, "-m", "trustlog.cli.main", "serve", "--state", "log", "--socket", "run/s"]
    serve += ["--user", "0"] if os.geteuid() == 0 else []
    served = subprocess.run(serve, cwd=log.directory, capture_output=True, text=True, timeout=30, check=False)
    assert served.returncode == 2
    assert "is a TPM's, which no other backend can open" in served.stderr
    (log.directory / "log" / "tpm.json").rename(log.directory / "tpm.json")
    assert "if its tpm.json is missing, restore" in log.json("append", "log", "two", code=2)["message"]
    (log.directory / "tpm.json").rename(log.directory / "log" / "tpm.json")
    assert log.json("append", "log", "two")["first"] == 2


def test_what_was_anchored_is_certified_also_where_something_else_extended_the_register(log, machine):
    (log.directory / "verifier.pub").write_text(public_of(VERIFIER).hex() + "\n")
    by = ["--verifier", "verifier.pub"]
    assert begin_anchoring(log, lambda message: sign(VERIFIER, message).hex()) == (0, "")
    log("append", "log", "one")
    log("tpm", "anchor", "log", *by)
    with machine.connect() as tpm:
        tpm.pcr_extend(14, bytes(32))
    assert "something else extended it" in log.json("append", "log", "two", code=2)["message"]
    assert "something else extended it" in json.loads(log("tpm", "status", "log", "-o", "json", code=1)[0])["ended"]
    keep(log, "anchors.json", "tpm", "anchor", "log", *by, "--nonce", NONCE.hex())
    check = ["tpm", "verify-anchors", "anchors.json", "--key", "log/log.pub", *by, "--nonce", NONCE.hex()]
    assert log.json(*check)["anchored_to"] == 1


def test_a_crash_before_the_attestation_was_stored_is_repaired(log):
    log("append", "log", "one")
    log("append", "log", "two")
    groups = log.directory / "log" / "groups.jsonl"
    groups.write_bytes(groups.read_bytes().splitlines(keepends=True)[0])
    assert log.json("append", "log", "three")["first"] == 3
    assert len(groups.read_bytes().splitlines()) == 3


def test_after_a_firmware_update_a_new_log_is_pinned_in_the_place_of_the_old_one(log, machine):
    log("append", "log", "one")
    log("tpm", "close", "log")
    machine.reboot()
    with machine.connect() as tpm:
        tpm.pcr_extend(14, bytes(32))  # what the new loader measures
    assert "a firmware or loader update" in log.json("append", "log", "two", code=2)["message"]
    assert log.json("tpm", "retire", "log", code=2)["code"] == "usage"
    assert log.json("tpm", "retire", "log", "--yes")["handle"] == "0x81017400"
    assert "no key at 0x81017400 any more" in log.json("tpm", "retire", "log", "--yes", code=1)["message"]
    assert "has no key at 0x81017400 any more" in log.json("append", "log", "two", code=1)["message"]
    made = log.json("init", "new", "--backend", "tpm", "--tpm", machine.address)
    assert "this log ends with the next reboot" in made["warning"]
    assert "has another key than this log's" in log.json("tpm", "retire", "log", "--yes", code=1)["message"]
    assert "warning" not in log.json("init", "zero", "--backend", "tpm", "--tpm", machine.address, "--pcr", "9")
    status = log.json("tpm", "status", "new")
    assert (status["last"], status["resets"], status["base"] == "00" * 32) == (0, 2, False)


def begin_anchoring(shell, key):
    command = [sys.executable, "-m", "trustlog.cli.main", "tpm", "anchor-begin", "log", "--verifier", "verifier.pub"]
    with subprocess.Popen(
        command, cwd=shell.directory, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        asked = child.stderr.readline()
        message = bytes.fromhex(asked.rpartition(": ")[2])
        _, errors = child.communicate(key(message) + "\n", timeout=30)
        return child.returncode, errors


def test_heads_are_anchored_and_verified_without_a_tpm_also_after_a_power_cut(log, machine):
    (log.directory / "verifier.pub").write_text(public_of(VERIFIER).hex() + "\n")
    by = ["--verifier", "verifier.pub"]
    assert log.json("tpm", "anchor", "log", *by, code=2)["message"].startswith("this log is not anchored yet")
    assert begin_anchoring(log, lambda message: sign(VERIFIER, message).hex()) == (0, "")
    log("append", "log", "one")
    keep(log, "anchors.json", "tpm", "anchor", "log", *by, "--nonce", NONCE.hex())
    check = ["tpm", "verify-anchors", "anchors.json", "--key", "log/log.pub", *by]
    assert log.json(*check, "--nonce", NONCE.hex())["anchored_to"] == 1
    assert log.json(*check)["fresh"] is False
    status = log.json("tpm", "status", "log")
    assert (status["anchored_to"], status["anchor_trouble"]) == (1, None)
    anchors = log.directory / "log" / "anchors.jsonl"
    whole = anchors.read_bytes()
    anchors.write_bytes(b"junk\n")
    status = log.json("tpm", "status", "log")
    assert (status["last"], status["anchored_to"]) == (1, None)
    assert status["anchor_trouble"].startswith("nothing is anchored: ")
    assert "anchors.jsonl" in status["anchor_trouble"]
    anchors.write_bytes(whole)
    machine.cut_power()
    machine.start()
    assert "the machine was started again" in log.json("append", "log", "two", code=2)["message"]
    keep(log, "later.json", "tpm", "anchor", "log", *by, "--nonce", OTHER_NONCE.hex())
    assert "was not closed" in json.loads(log("tpm", "status", "log", "-o", "json", code=1)[0])["ended"]
    later = ["tpm", "verify-anchors", "later.json", "--key", "log/log.pub", *by, "--nonce", OTHER_NONCE.hex()]
    assert log.json(*later)["anchored_to"] == 1
    shown = json.loads((log.directory / "anchors.json").read_text())
    shown["anchors"][-1]["last"] = 2
    (log.directory / "anchors.json").write_text(json.dumps(shown))
    assert log.json(*check, code=1)["code"] == "wrong-anchors"
    assert "no NV index" in log.json(*check, "--index", "zz", code=2)["message"]
    assert read_public_file(log.directory / "verifier.pub")[1] is None


def test_an_answer_that_is_no_signature_begins_nothing(log):
    (log.directory / "verifier.pub").write_text(public_of(VERIFIER).hex() + "\n")
    code, errors = begin_anchoring(log, lambda _: "nonsense")
    assert (code, "the answer is no signature" in errors) == (2, True)


def test_a_stores_key_is_made_anew_and_sealed_for_the_next_version(log):
    folder = log.directory / "log"
    assert "keeps no key" in str(log.json("tpm", "reseal", "log", code=2))
    assert log.json("tpm", "reseal", "log", "--new-key")["also_for"] == "no other program"
    assert "exists already" in str(log.json("tpm", "reseal", "log", "--new-key", code=2))
    with open_log(folder) as opened:
        key = opened.store_key()
    other = "66" * 32
    assert log.json("tpm", "reseal", "log", "--measurement", other)["also_for"] == other
    assert log.json("tpm", "reseal", "log", "--measurement", other[1:], code=1)["code"] == "malformed"
    assert len(load(folder / SEALED_FILE).objects) == 3
    with open_log(folder) as opened:
        assert opened.store_key() == key
