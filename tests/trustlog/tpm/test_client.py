"""The client against a real software TPM, and quotes that tpm2-tools verify and make."""

from __future__ import annotations

import hashlib
import os
import shlex
import socket
import struct
import subprocess
import sys
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support import tpm_relay
from tests.trustlog.support import flip
from tests.trustlog.tpm.support import attestation_key
from trustlog import VerificationError, VerifyingKey
from trustlog.tpm.client import Tpm
from trustlog.tpm.exchange import no_password
from trustlog.tpm.quote import parse_quote, verify_quote
from trustlog.tpm.structures import (
    AK_ATTRIBUTES,
    ALG_ECC,
    EK_ATTRIBUTES,
    RH_ENDORSEMENT,
    Public,
    attestation_key_template,
    ecdsa_signature,
    endorsement_key_template,
    pcr_selection,
    qualified_name,
    sized,
)
from trustlog.tpm.wire import TpmError, Wire

NONCE = bytes(range(32))


def test_a_quote_by_a_child_of_the_endorsement_key_verifies(tpm):
    before = tpm.pcr_read([14])[14]
    tpm.pcr_extend(14, NONCE)
    after = hashlib.sha256(before + NONCE).digest()
    with attestation_key(tpm) as (handle, public, signer):
        signed = tpm.quote(handle, [14], b"fresh")
        assert public.attributes == AK_ATTRIBUTES
    quote = verify_quote(
        VerifyingKey.from_bytes(public.key), signed.attest, signed.signature, {14: after}, nonce=b"fresh", signer=signer
    )
    assert quote.clock.reset_count == 1
    with pytest.raises(VerificationError, match="other values"):
        verify_quote(VerifyingKey.from_bytes(public.key), signed.attest, signed.signature, {14: before})


def test_the_qualified_name_tells_where_a_key_stands(tpm):
    ek, ek_public = tpm.create_primary(RH_ENDORSEMENT, endorsement_key_template(ALG_ECC))
    tpm.flush(ek)
    assert ek_public.attributes == EK_ATTRIBUTES
    hierarchy = struct.pack(">I", RH_ENDORSEMENT)
    with attestation_key(tpm) as (_, public, signer):
        assert signer == qualified_name(qualified_name(hierarchy, ek_public.name), public.name)
    primary, public = tpm.create_primary(RH_ENDORSEMENT, attestation_key_template())
    with tpm.loaded(primary):
        assert tpm.read_public(primary)[1] == qualified_name(hierarchy, public.name)


def test_nothing_is_left_loaded(tpm):
    with attestation_key(tpm) as (handle, _, _):
        tpm.evict_control(handle, 0x81017400)
        assert tpm.handles(0x80000000)
    assert tpm.handles(0x80000000) == []
    assert tpm.handles(0x02000000) == tpm.handles(0x03000000) == []
    assert tpm.handles(0x81000000) == [0x81017400]
    tpm.evict_control(0x81017400, 0x81017400)
    assert tpm.handles(0x81000000) == []


def test_several_pcrs_are_read_at_once(tpm):
    values = tpm.pcr_read(range(24))
    assert sorted(values) == list(range(24))
    assert values[14] == bytes(32)
    assert values[17] == b"\xff" * 32


def test_a_refusal_says_which_command_and_why(tpm, machine):
    with pytest.raises(
        TpmError, match="TPM2_PCR_Reset was refused with 0x907: not possible at this locality"
    ) as caught:
        tpm.pcr_reset(14)
    assert caught.value.number == 0x907
    with pytest.raises(TpmError, match=r"TPM2_ReadPublic was refused with 0x18b: no such handle"):
        tpm.read_public(0x81010099)
    with pytest.raises(TpmError, match="0x1c3: hash algorithm not supported"):
        tpm.pcr_read([14], bank=0x27)
    with pytest.raises(TpmError, match="does not know its property"):
        tpm.get_property(0x9999)
    with pytest.raises(TpmError, match="more than a TPM takes"):
        tpm.pcr_extend(14, bytes(5000))
    assert tpm.get_property(0x100) == 0x322E3000  # "2.0"
    tpm.startup()  # the firmware did it


def test_a_tpm_that_cannot_be_reached_is_named(machine, tmp_path):
    with pytest.raises(TpmError, match=r"nothing-here: cannot be opened: No such file"):
        Tpm.open(str(tmp_path / "nothing-here"))
    with pytest.raises(TpmError, match="host:port"):
        Tpm.open("localhost:port")
    tpm = machine.connect()
    machine.cut_power()
    with pytest.raises(TpmError, match="cannot be reached"):
        tpm.pcr_read([14])
    with pytest.raises(TpmError, match="the connection is closed"):
        tpm.pcr_read([14])
    machine.start()


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ([b"\x80\x01\x00\x00\x00\x05\x00\x00\x00\x00"], "cut off"),
        ([b"\x80\x01\x00\x00"], "closed"),
        ([b"\x80\x01\xff\xff\xff\xff\x00\x00\x00\x00" + bytes(8000)], "cut off"),
        (
            [b"\x80\x01\x00\x00\x00\x0a\x00\x00\x09\x22"] * 2 + [b"\x80\x01\x00\x00\x00\x0a\x00\x00\x01\x01"],
            "failure mode",
        ),
        ([b"\x80\x01\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x05"], "malformed"),
        ([], "no answer in time"),
    ],
    ids=["size too small", "half a header", "size too large", "asks for patience", "half a response", "silence"],
)
def test_a_broken_tpm_breaks_nothing_else(tmp_path, answers, what):
    """Over TCP, as swtpm also listens there."""
    done = threading.Event()

    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            for answer in answers:
                connection.recv(4096)
                connection.sendall(answer)
            if not answers:
                done.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        tpm = Tpm(Wire(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2 if not answers else 20))
        with tpm, pytest.raises((TpmError, VerificationError), match=what):
            tpm.read_public(0x81000000)
        done.set()
        thread.join()


def test_a_device_is_written_and_read_whole(tmp_path):
    """A pseudo-terminal stands in for /dev/tpmrm0: one write, one read."""
    master, slave = os.openpty()
    os.set_blocking(master, True)
    subprocess.run(["stty", "-F", os.ttyname(slave), "raw", "-echo"], check=True)
    wire = Wire(os.ttyname(slave), timeout_s=20)
    answer = b"\x80\x01\x00\x00\x00\x0a\x00\x00\x01\x01"
    os.write(master, answer)
    assert wire.exchange(b"\x80\x01command") == answer
    assert os.read(master, 100) == b"\x80\x01command"
    wire._timeout_s = 0.01
    with pytest.raises(TpmError, match="no answer in time"):
        wire.exchange(b"\x80\x01command")
    os.close(master)
    os.close(slave)


# Interoperability with tpm2-tools


def _pem(raw):
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), raw)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _signature_structure(signature):
    return struct.pack(">HH", 0x18, 0x0B) + sized(signature[:32]) + sized(signature[32:])


def test_tpm2_checkquote_believes_our_quote_and_refuses_it_altered(tpm, tmp_path):
    tpm.pcr_extend(14, NONCE)
    with attestation_key(tpm) as (handle, public, _):
        signed = tpm.quote(handle, [14], NONCE)
    (tmp_path / "ak.pem").write_bytes(_pem(public.key))
    (tmp_path / "signature").write_bytes(_signature_structure(signed.signature))

    def check(attest):
        (tmp_path / "quote").write_bytes(attest)
        command = [
            "tpm2_checkquote",
            "-u",
            "ak.pem",
            "-m",
            "quote",
            "-s",
            "signature",
            "-q",
            NONCE.hex(),
            "-g",
            "sha256",
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    assert check(signed.attest) == 0
    assert check(flip(signed.attest, 8 * len(signed.attest) - 1)) != 0


def test_a_quote_of_tpm2_tools_verifies(machine, tmp_path):
    tcti = "cmd:" + shlex.join([sys.executable, tpm_relay.__file__, machine.address])
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti}

    def tool(*command):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)

    tool("tpm2_createek", "-c", "0x81010001", "-G", "ecc", "-u", "ek.pub")
    tool(
        "tpm2_createak", "-C", "0x81010001", "-c", "ak.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-u", "ak.pub"
    )
    tool("tpm2_pcrextend", f"14:sha256={NONCE.hex()}")
    tool(
        "tpm2_quote",
        "-c",
        "ak.ctx",
        "-l",
        "sha256:14",
        "-q",
        NONCE.hex(),
        "-m",
        "quote",
        "-s",
        "signature",
        "-g",
        "sha256",
    )
    public = Public.parse((tmp_path / "ak.pub").read_bytes()[2:])
    attest = (tmp_path / "quote").read_bytes()
    signature = ecdsa_signature((tmp_path / "signature").read_bytes())
    value = hashlib.sha256(bytes(32) + NONCE).digest()
    verify_quote(VerifyingKey.from_bytes(public.key), attest, signature, {14: value}, nonce=NONCE)
    assert parse_quote(attest).selection == {11: (14,)}
    with pytest.raises(VerificationError):
        verify_quote(VerifyingKey.from_bytes(public.key), flip(attest, 400), signature, {14: value}, nonce=NONCE)


def test_helpers_are_what_the_specification_says():
    assert no_password() == bytes.fromhex("40000009000000 0000".replace(" ", ""))
    assert pcr_selection([14]) == bytes.fromhex("00000001000b03004000")


class CannedWire:
    """Answers every command with one response: result and parameters."""

    address = "canned"

    def __init__(self, result, content=b""):
        self.response = struct.pack(">HII", 0x8001, 10 + len(content), result) + content

    def exchange(self, _):
        return self.response


def test_what_no_good_tpm_answers_is_refused():
    with pytest.raises(TpmError, match="TPM2_Startup was refused with 0x101: failure mode"):
        Tpm(CannedWire(0x101)).startup()
    nothing = bytes(4) + struct.pack(">I", 0) + struct.pack(">I", 0)
    with pytest.raises(TpmError, match=r"PCRs \[14\] have no values in bank 0x000b; is it allocated"):
        Tpm(CannedWire(0, nothing)).pcr_read([14])
    rsa = sized(b"attest") + struct.pack(">HH", 0x14, 0x0B) + sized(bytes(256))
    with pytest.raises(TpmError, match="is the key P-256 with SHA-256"):
        Tpm(CannedWire(0, struct.pack(">I", len(rsa)) + rsa)).quote(1, [14], b"")


def test_a_tpm_that_never_stops_asking_for_patience_is_given_up(monkeypatch):
    monkeypatch.setattr("trustlog.tpm.exchange.RETRY_PAUSE_S", 0)
    with pytest.raises(TpmError, match="refused with 0x922"):
        Tpm(CannedWire(0x922)).pcr_reset(23)


def test_whoever_queues_for_a_software_tpm_waits_and_is_told_when_it_was_too_long(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(TpmError, match="cannot be opened: Resource temporarily unavailable"):
            Wire(path, timeout_s=0.05)

        def make_room():
            listener.accept()[0].close()

        threading.Timer(0.05, make_room).start()
        Wire(path, timeout_s=20).close()
