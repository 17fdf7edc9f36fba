"""The committed TPM log: its layouts computed by hand, and what a verifier makes of it whole, cut and mixed."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest

import trustlog
from tests.trustlog.tpm.support import NotNextError, Reader
from trustlog import (
    TPM_PINS_SIZE,
    Attestation,
    BackendKind,
    LogIdentity,
    VerificationError,
    VerifyingKey,
    entry_digest,
    is_epoch_mark,
    log_id,
)
from trustlog.statements import CLOSE_PAYLOAD, open_payload
from trustlog.tpm import chain
from trustlog.tpm.chain import ATTEST_SIZE, PROOF_SIZE, TpmPins

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "tpm.json").read_text())
KEY = bytes.fromhex(VECTORS["public_key"])
CONTEXT = bytes.fromhex(VECTORS["context"])
PINS = TpmPins.decode(bytes.fromhex(VECTORS["pins"]))
IDENTITY = LogIdentity(VerifyingKey.from_bytes(KEY), BackendKind.TPM, PINS.epoch, PINS)
HEADS = [bytes.fromhex(head) for head in VECTORS["heads"]]


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def group(number):
    said = {name: bytes.fromhex(value) for name, value in VECTORS["groups"][number].items() if name != "payloads"}
    payloads = [bytes.fromhex(payload) for payload in VECTORS["groups"][number]["payloads"]]
    attestation = Attestation(said["statement"], said["attest"] + said["signature"])
    return said, attestation, [entry_digest(payload) for payload in payloads], payloads


def test_the_committed_log_is_read_over_both_epochs():
    reader = Reader(IDENTITY)
    for number in range(5):
        assert reader.head == HEADS[number]
        _, attestation, digests, _ = group(number)
        reader.read(attestation, digests)
    assert (reader.last, reader.head) == (6, HEADS[5])


def test_layouts_by_hand():
    pcr, epochs = PINS.base, [7 << 32 | 2] * 3 + [8 << 32] * 2
    for number, first in enumerate((1, 2, 4, 5, 6)):
        said, attestation, digests, _ = group(number)
        numbers = struct.pack(">QH", first, len(digests))
        event = sha(b"trustlog/group\0\0", log_id(KEY), numbers, CONTEXT, *digests)
        pcr = sha(PINS.base if number == 3 else pcr, event)
        assert (event, pcr) == (said["event"], said["pcr"])
        assert said["statement"][138:] == pcr
        assert len(said["attest"]) == ATTEST_SIZE == PROOF_SIZE - 64 == len(attestation.signature) - 64
        assert said["attest"][44:76] == sha(said["statement"]), "the extra data"
        assert said["attest"][-32:] == sha(pcr), "the digest over one PCR"
        closed = struct.pack(">Q?", epochs[number], number == 2)
        assert HEADS[number + 1] == sha(b"trustlog/pcr\0\0\0\0", closed, pcr)
    assert group(2)[3] == [b"\x08trustlog/close\0\0"]
    assert group(3)[3] == [b"\x09trustlog/open\0\0\0" + struct.pack(">Q", 4) + HEADS[3]]
    pinned = struct.pack(">B32s34sQ", 14, PINS.base, PINS.signer, 7 << 32 | 2)
    assert PINS.encode() == pinned
    assert len(pinned) == TPM_PINS_SIZE == 75


@pytest.mark.parametrize("skipped", range(4))
def test_no_group_can_be_left_out(skipped):
    reader = Reader(IDENTITY)
    for number in range(5):
        if number == skipped:
            continue
        if number > skipped:
            with pytest.raises(NotNextError):
                reader.read(*group(number)[1:3])
            return
        reader.read(*group(number)[1:3])


@pytest.mark.parametrize(
    "other",
    [
        TpmPins(13, PINS.base, PINS.signer, PINS.epoch),
        TpmPins(14, PINS.base, PINS.signer[:-1] + b"?", PINS.epoch),
        TpmPins(14, PINS.base, PINS.signer, PINS.epoch + 1),
        TpmPins(14, PINS.base, PINS.signer, 9 << 32),
    ],
    ids=["another PCR", "another signer", "another first epoch", "a later epoch"],
)
def test_what_is_pinned_counts(other):
    identity = LogIdentity(IDENTITY.key, BackendKind.TPM, other.epoch, other)
    with pytest.raises(VerificationError):
        Reader(identity).read(*group(0)[1:3])


def test_another_base_is_another_log():
    other = TpmPins(14, bytes(32), PINS.signer, PINS.epoch)
    with pytest.raises(NotNextError):
        Reader(LogIdentity(IDENTITY.key, BackendKind.TPM, other.epoch, other)).read(*group(0)[1:3])


def test_which_epochs_may_follow():
    epoch = 7 << 32 | 2
    assert [PINS.accepts(e) for e in (epoch, epoch + 1, epoch - 1, 7 << 32, 6 << 32, 8 << 32, 8 << 32 | 1, 99 << 32)] == [
        True, False, False, False, False, True, False, True,
    ]  # fmt: skip
    assert PINS.before(8 << 32) == epoch
    assert PINS.before(9 << 32) == 8 << 32


def test_marks_are_known_by_their_form():
    assert is_epoch_mark(CLOSE_PAYLOAD)
    assert is_epoch_mark(open_payload(4, bytes(32)))
    for other in (
        b"",
        b"\x08",
        CLOSE_PAYLOAD + b"\0",
        open_payload(4, bytes(32))[:-1],
        b"\x09" + bytes(55),
    ):
        assert not is_epoch_mark(other)


def test_what_decides_on_a_verifiers_key_and_pins_is_counted_as_trusted():
    """The README's count of what verifies a TPM's log names the file of each of these."""
    root = Path(trustlog.__file__).parent
    command = next(
        line for line in (root / "README.md").read_text().splitlines() if "$ cat" in line and "/tpm/" in line
    )
    counted = {
        f"{folder}/{name}.py"
        for folder, names in re.findall(r"(\S+)/\{([^}]*)\}\.py", command)
        for name in names.split(",")
    }
    for decides in (chain.read_public_file, TpmPins, LogIdentity, chain.verify_group):
        assert decides.__module__.replace(".", "/") + ".py" in counted
