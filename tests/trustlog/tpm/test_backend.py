"""The log in a real software TPM: what it attests, how it goes on after crashes, and what its files may lose."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from tests.trustlog.support import CONTEXT, NONCE, OTHER_CONTEXT, OTHER_NONCE, digests_of, flip
from tests.trustlog.tpm.support import Reader, add
from trustlog import (
    AppendStatement,
    Attestation,
    BackendKind,
    LogIdentity,
    MisuseError,
    SealedStateError,
    VerificationError,
    entry_digest,
    verify_append,
    verify_end,
    verify_lookup,
    verify_truncate,
)
from trustlog.sealed import Files, SealedJournal
from trustlog.tpm import chain
from trustlog.tpm.backend import RestartedError, TpmLog
from trustlog.tpm.chain import CLOSE_DIGEST, PROOF_SIZE, TpmPins, read_public_file
from trustlog.tpm.client import Tpm
from trustlog.tpm.enrol import create
from trustlog.tpm.folder import CLOSE_FILE, CONFIG_FILE, PUBLIC_KEY_FILE, TpmConfig, TpmState
from trustlog.tpm.opening import check_key, open_log
from trustlog.tpm.structures import ALG_ECC
from trustlog.tpm.wire import TpmError


def test_groups_are_read_in_order_from_the_pinned_base(folder):
    with open_log(folder) as log:
        reader = Reader(log.identity)
        for count in (1, 3, 1024):
            reader.read(*add(log, *map(str, range(count))))
        assert (reader.last, reader.head) == (log.last, log.head) == (1028, log.head)
        assert log.last_group == (5, 1028)
        assert (log.kind, log.low, log.durability) == (BackendKind.TPM, 1, "disk")
        assert log.epoch == log.config.pins.epoch == 1 << 32


def test_what_verifiers_need_stands_in_the_public_file(folder):
    key, pins = read_public_file(folder / PUBLIC_KEY_FILE)
    with open_log(folder) as log:
        attestation, digests = add(log, "one")
        assert (key, pins, key.raw) == (log.identity.key, log.config.pins, log.public_key)
        assert log.client.address == log.config.address
    identity = LogIdentity(key, BackendKind.TPM, tpm=pins)
    verify_append(identity, attestation, digests, context=CONTEXT)
    with pytest.raises(VerificationError, match="pinned at its enrolment"):
        verify_append(LogIdentity(key, BackendKind.TPM), attestation, digests, context=CONTEXT)
    assert TpmPins.decode(pins.encode()) == pins


def test_every_altered_bit_of_a_group_is_refused(folder):
    with open_log(folder) as log:
        add(log, "zero")
        attestation, digests = add(log, "one", "two")
    assert len(attestation.signature) == PROOF_SIZE
    assert Attestation.of_group(attestation.raw + b"payloads") == attestation
    verify_append(log.identity, attestation, digests, context=CONTEXT)
    for bit in range(8 * len(attestation.raw)):
        altered = flip(attestation.raw, bit)
        with pytest.raises(VerificationError):
            verify_append(log.identity, Attestation(altered[:170], altered[170:]), digests, context=CONTEXT)
    for wrong in (digests[::-1], digests[:1], [*digests, digests[0]], [flip(digests[0], 0), digests[1]]):
        with pytest.raises(VerificationError):
            verify_append(log.identity, attestation, wrong, context=CONTEXT)
    with pytest.raises(VerificationError, match="another context"):
        verify_append(log.identity, attestation, digests, context=OTHER_CONTEXT)


def test_a_replayed_quote_proves_no_other_group(folder):
    with open_log(folder) as log:
        one, _ = add(log, "one")
        two, digests = add(log, "two")
        with pytest.raises(VerificationError, match="another question"):
            verify_append(log.identity, Attestation(two.statement, one.signature), digests, context=CONTEXT)


def test_end_is_fresh_and_names_the_head(folder):
    with open_log(folder) as log:
        add(log, "one")
        attestation = log.end(nonce=NONCE, context=CONTEXT)
        said = verify_end(log.identity, attestation, context=CONTEXT, nonce=NONCE)
        assert chain.head(said.epoch, said.head) == log.head
        with pytest.raises(VerificationError, match="another question"):
            verify_end(log.identity, attestation, context=CONTEXT, nonce=OTHER_NONCE)
        for bit in range(0, 8 * len(attestation.raw), 7):
            altered = flip(attestation.raw, bit)
            with pytest.raises(VerificationError):
                verify_end(log.identity, Attestation(altered[:170], altered[170:]), context=CONTEXT, nonce=NONCE)


def test_what_a_tpm_cannot_attest_is_not_claimed(folder):
    with open_log(folder) as log:
        add(log, "one", "two")
        with pytest.raises(MisuseError, match="attests no lookup"):
            log.lookup(1, nonce=NONCE, context=CONTEXT, group=None)
        assert log.truncate(2, context=CONTEXT) is None
        assert log.low == 2
        with pytest.raises(MisuseError, match="choose 2 … 3"):
            log.truncate(1, context=CONTEXT)
        key = log.identity.key
    with open_log(folder) as log:
        assert log.low == 2
    header = (BackendKind.TPM, CONTEXT, key.log_id, log.epoch)
    from trustlog import LookupStatement, Outcome, TruncateStatement

    for statement, check in [
        (TruncateStatement(*header, 1, 1, bytes(32)), lambda a: verify_truncate(log.identity, a, context=CONTEXT)),
        (
            LookupStatement(*header, NONCE, 5, Outcome.UNASSIGNED, bytes(32), 1, 1),
            lambda a: verify_lookup(log.identity, a, context=CONTEXT, nonce=NONCE, index=5),
        ),
    ]:
        with pytest.raises(VerificationError, match="nothing else"):
            check(Attestation(statement.encode(), bytes(PROOF_SIZE)))


def test_misuse_changes_nothing(folder):
    with open_log(folder) as log:
        with pytest.raises(MisuseError, match="nothing to close"):
            log.close_epoch()
        with pytest.raises(MisuseError, match="no last group"):
            log.reissue()
        for digests in ([], [bytes(31)], digests_of("x") * 1025):
            with pytest.raises(MisuseError):
                log.append(digests, context=CONTEXT)
        with pytest.raises(MisuseError, match="context must be 32 bytes"):
            log.append(digests_of("x"), context=b"")
        assert log.last == 0
        with pytest.raises(MisuseError, match="in use by another process"):
            open_log(folder)
    with pytest.raises(MisuseError, match="open it again"):
        log.append(digests_of("x"), context=CONTEXT)


class CrashError(Exception):
    pass


@pytest.mark.parametrize("step", ["save", "pcr_extend", "quote"])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_step_of_an_append_loses_nothing_that_was_said(folder, monkeypatch, step, after):
    with open_log(folder) as log:
        reader = Reader(log.identity)
        reader.read(*add(log, "one"))
        target = log._journal if step == "save" else log._tpm
        real = getattr(target, step)

        def crash(*arguments):
            if after:
                real(*arguments)
            raise CrashError

        monkeypatch.setattr(target, step, crash)
        with pytest.raises(CrashError):
            add(log, "two", "three")
        with pytest.raises(MisuseError, match="repair the cause and open it again"):
            add(log, "other")
    with open_log(folder) as log:
        if (step, after) != ("save", False):
            assert log.last_group == (2, 3)
            reader.read(log.reissue(), digests_of("two", "three"))
        assert log.last == reader.last
        reader.read(*add(log, "four"))


def test_a_tpm_that_vanishes_stops_the_log_and_it_goes_on_when_the_service_is_back(folder, machine):
    """A lost connection, not a reboot: the TPM itself stays on."""
    with open_log(folder) as log:
        reader = Reader(log.identity)
        reader.read(*add(log, "one"))
        log._tpm.close()
        with pytest.raises(TpmError, match="cannot be reached"):
            add(log, "two")
        with pytest.raises(MisuseError, match="because the TPM or the disk failed"):
            add(log, "other")
    with open_log(folder) as log:
        reader.read(log.reissue(), digests_of("two"))
        reader.read(*add(log, "three"))


def test_creating_leaves_nothing_behind_when_it_fails(machine, tpm, tmp_path, monkeypatch):
    tpm.close()
    for pcr in (16, 17, 22, 23, -1, 24):
        with pytest.raises(MisuseError, match="cannot hold a log"):
            create(tmp_path / "log", address=machine.address, pcr=pcr)

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(SealedJournal, "create", fail)
    with pytest.raises(OSError, match="disk"):
        create(tmp_path / "log", address=machine.address)
    monkeypatch.undo()
    assert not (tmp_path / "log").exists()
    with machine.connect() as again:
        assert again.handles(0x81000000) == []
    create(tmp_path / "log", address=machine.address, pcr=9, endorsement_kind=ALG_ECC).close()
    with pytest.raises(MisuseError, match="exists already"):
        create(tmp_path / "log", address=machine.address)
    with pytest.raises(TpmError, match="cannot be opened"):
        create(tmp_path / "other", address=str(tmp_path / "no-tpm"))
    with open_log(tmp_path / "log") as log:
        Reader(log.identity).read(*add(log, "one"))
        assert (log.config.pins.pcr, log.config.endorsement_kind) == (9, ALG_ECC)


def test_files_that_are_damaged_or_missing_are_named(folder, tmp_path):
    def damaged(name, content, error, match):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        with pytest.raises(error, match=match):
            open_log(copy)
        shutil.rmtree(copy)

    for name in ("tpm.json", "log.pub", "log.state", "seal.key"):
        damaged(name, None, MisuseError, name)
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    for change in ({"pcr": 23}, {"base": "00" * 32 + "1"}, {"pins": "00"}, {"format": 2}, {"endorsement_key": "dsa"}):
        damaged(CONFIG_FILE, json.dumps(config | change).encode(), SealedStateError, "tpm.json")
    other = bytearray.fromhex(config["pins"])
    other[5] ^= 1
    changed = config | {"pins": other.hex(), "base": other[1:33].hex()}
    damaged(CONFIG_FILE, json.dumps(changed).encode(), SealedStateError, "its pins are not those")
    damaged("log.pub", b"zz\n", SealedStateError, "no public key")
    state = (folder / "log.state").read_bytes()
    damaged("log.state", flip(state, 4200), SealedStateError, "damaged at offset 512")
    damaged("log.state", flip(state, 2), SealedStateError, "damaged at offset 0")


def test_layouts_are_the_documented_ones(folder):
    digests = [bytes([i]) * 32 for i in range(1, 6)]
    state = TpmState(1, 2, 3, 3, 0, *digests[:4])
    numbers = b"".join(n.to_bytes(8, "big") for n in (1, 2, 3, 3))
    assert state.encode() == numbers + b"\0" + b"".join(digests[:4])
    assert TpmState.decode(state.encode()) == state
    for wrong in (state.encode()[:-1], numbers + b"\3" + b"".join(digests[:4])):
        with pytest.raises(SealedStateError):
            TpmState.decode(wrong)
    config = TpmConfig.load(folder / CONFIG_FILE)
    assert config.dump() == (folder / CONFIG_FILE).read_bytes()
    for wrong in (b"", config.pins.encode()[:-1], b"\x17" + config.pins.encode()[1:]):
        with pytest.raises(VerificationError):
            TpmPins.decode(wrong)


def test_a_group_of_another_log_or_an_unknown_version_is_refused(folder):
    with open_log(folder) as log:
        attestation, digests = add(log, "one")
        statement = AppendStatement.decode(attestation.statement)
        assert statement.kind is BackendKind.TPM
        for proof in (b"", bytes(PROOF_SIZE), attestation.signature + b"\0", attestation.signature[:64]):
            with pytest.raises(VerificationError):
                verify_append(log.identity, Attestation(attestation.statement, proof), digests, context=CONTEXT)
        wrong = LogIdentity(log.identity.key, BackendKind.SOFTWARE, log.epoch, log.config.pins)
        with pytest.raises(VerificationError, match="do not count here"):
            verify_append(wrong, attestation, digests, context=CONTEXT)


def test_a_disk_that_fails_stops_the_log_before_the_tpm_is_touched(folder):
    class Full(Files):
        broken = False

        def sync(self, fd):
            if self.broken:
                raise OSError("no space left")

    files = Full()
    with open_log(folder, files=files) as log:
        add(log, "one")
        before = log._tpm.pcr_read([14])
        files.broken = True
        with pytest.raises(OSError, match="no space"):
            add(log, "two")
        assert log._tpm.pcr_read([14]) == before
        with pytest.raises(MisuseError, match="could not be saved"):
            add(log, "two")


@pytest.mark.parametrize("step", ["journal", "extend", "quote", "file"])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_step_of_close_or_open_is_made_good(folder, machine, monkeypatch, step, after):
    """Both CLOSE and the OPEN after the reboot: what was begun is finished, and said once."""
    with open_log(folder) as log:
        reader = Reader(log.identity)
        reader.read(*add(log, "one"))

    def crash_in(owner, name):
        real = getattr(owner, name)

        def crash(*arguments):
            if after:
                real(*arguments)
            raise CrashError

        monkeypatch.setattr(owner, name, crash)

    targets = {"journal": (SealedJournal, "save"), "extend": (Tpm, "pcr_extend"), "file": (TpmLog, "_keep_close")}
    with open_log(folder) as log:
        crash_in(*targets.get(step, (TpmLog, "_attest")))
        with pytest.raises(CrashError):
            log.close_epoch()
        monkeypatch.undo()
    with open_log(folder) as log:
        if (step, after) == ("journal", False):
            assert log.last == 1
            log.close_epoch()
        assert log.last == 2
        ((_, close),) = log.epoch_groups()
    reader.read(close, [CLOSE_DIGEST])
    machine.reboot()
    if step != "file":
        crash_in(*targets.get(step, (TpmLog, "_attest")))
        with pytest.raises(CrashError):
            open_log(folder)
        monkeypatch.undo()
    with open_log(folder) as log:
        (_, again), (payloads, opened) = log.epoch_groups()
        assert again == close
        reader.read(opened, [entry_digest(payload) for payload in payloads])
        reader.read(*add(log, "two"))
        assert (reader.last, reader.head) == (log.last, log.head)


def test_a_damaged_close_file_is_quoted_again_in_the_same_epoch_and_lost_in_the_next(folder, machine):
    with open_log(folder) as log:
        add(log, "one")
        log.close_epoch()
    whole = (folder / CLOSE_FILE).read_bytes()
    (folder / CLOSE_FILE).write_bytes(whole[:100])
    with open_log(folder) as log:
        assert len(log.epoch_groups()) == 1
    assert (folder / CLOSE_FILE).read_bytes()[:170] == whole[:170]
    (folder / CLOSE_FILE).unlink()
    machine.reboot()
    with pytest.raises(RestartedError, match=r"was closed before, but close\.group"):
        open_log(folder)


def test_a_log_whose_indexes_are_used_up_says_so(folder):
    with open_log(folder) as log:
        log._state = dataclasses.replace(log._state, last=2**64 - 2, first=1)
        with pytest.raises(MisuseError, match="the log is full"):
            add(log, "one")


def test_a_tpm_with_quotes_of_another_size_is_refused(folder, monkeypatch):
    """Its statements could not be of the fixed layout."""
    with open_log(folder) as log:
        real = log._tpm.quote
        monkeypatch.setattr(log._tpm, "quote", lambda key, pcrs, _: real(key, pcrs, b""))
        with pytest.raises(TpmError, match="quotes have 113 bytes instead of 145"):
            add(log, "one")


def test_another_key_at_the_logs_handle_is_refused(folder, machine, tmp_path):
    handle = TpmConfig.load(folder / CONFIG_FILE).handle
    with machine.connect() as tpm:
        tpm.evict_control(handle, handle)
    create(tmp_path / "other", address=machine.address).close()
    with pytest.raises(TpmError, match="has another key than this log's at 0x81017400"):
        open_log(folder)
    with pytest.raises(TpmError, match="cannot be reached"):
        check_key(_Gone(), TpmConfig.load(folder / CONFIG_FILE), None)


class _Gone:
    def read_public(self, _):
        raise TpmError("cannot be reached")
