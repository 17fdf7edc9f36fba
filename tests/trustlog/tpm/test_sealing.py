"""The store's key in a real software TPM: released to the measured program alone, and never seen on the way."""

from __future__ import annotations

import pytest

from tests.support.swtpm import software_tpm
from tests.trustlog.tpm.support import add
from trustlog import MisuseError, SealedStateError, TrustLogError, VerificationError
from trustlog.statements import BackendKind
from trustlog.tpm import sealing
from trustlog.tpm.enrol import create
from trustlog.tpm.exchange import no_password
from trustlog.tpm.opening import open_log
from trustlog.tpm.registers import PROGRAM_PCR, PROGRAMS_FILE, ProgramEvent
from trustlog.tpm.sealing import SEALED_FILE, SealedKey, load, seal, unseal
from trustlog.tpm.wire import TpmError, Wire

KEY = bytes(range(32))
OTHER = b"\x66" * 32
POLICY_FAILS = 0x09D


@pytest.fixture
def folder(machine, tmp_path):
    with create(tmp_path / "log", address=machine.address) as log:
        log.create_store_key()
    return tmp_path / "log"


def key_of(folder):
    with open_log(folder) as log:
        return log.store_key()


def become(monkeypatch, measurement):
    """From now on another program opens logs, such as another version."""
    monkeypatch.setattr("trustlog.tpm.backend.own_measurement", lambda _: measurement)


def reboot(machine, folder):
    with open_log(folder) as log:
        if not log.last:
            add(log, "one")
        log.close_epoch()
    machine.reboot()


def test_the_key_comes_back_to_the_same_program_after_closing_and_a_reboot(machine, folder):
    key = key_of(folder)
    assert len(key) == 32
    assert key_of(folder) == key
    for _ in range(2):
        reboot(machine, folder)
        assert key_of(folder) == key
    assert (folder / SEALED_FILE).stat().st_mode & 0o777 == 0o600
    assert all(key not in path.read_bytes() for path in folder.iterdir())


def test_every_log_has_its_own_key(folder, tmp_path):
    with software_tpm(tmp_path / "second") as machine, create(tmp_path / "other", address=machine.address) as log:
        log.create_store_key()
        assert log.store_key() != key_of(folder)


def extended_with(tpm, *digests):
    for digest in digests:
        tpm.pcr_extend(PROGRAM_PCR, digest)


def test_the_tpm_refuses_every_other_value_of_the_register(machine, tmp_path):
    mine, another = (ProgramEvent(BackendKind.TPM, bytes(32), bytes([n]) * 32) for n in (1, 2))
    with machine.connect() as tpm:
        sealed = seal(tpm, KEY, PROGRAM_PCR, [mine.extended()])
    cases = {
        "nothing": (),
        "another program": (another.digest(),),
        "something else": (bytes(32),),
        "twice": (mine.digest(), mine.digest()),
        "more after it": (mine.digest(), another.digest()),
        "more before it": (another.digest(), mine.digest()),
    }
    for name, digests in cases.items():
        machine.reboot()
        with machine.connect() as tpm:
            extended_with(tpm, *digests)
            with pytest.raises(TpmError) as refused:
                unseal(tpm, sealed)
            assert refused.value.number == POLICY_FAILS, name
            # The policy is the only way: no password, and no register that the attacker chooses.
            with pytest.raises(TpmError):
                unseal(tpm, SealedKey(PROGRAM_PCR - 1, sealed.parent, sealed.objects))
    machine.reboot()
    with machine.connect() as tpm:
        extended_with(tpm, mine.digest())
        assert unseal(tpm, sealed) == KEY


def test_no_password_opens_what_is_sealed(machine):
    with machine.connect() as tpm:
        value = tpm.pcr_read([PROGRAM_PCR])[PROGRAM_PCR]
        sealed = seal(tpm, KEY, PROGRAM_PCR, [value])
        ((public, private),) = sealed.objects
        with (
            sealing._storage_key(tpm) as (parent, storage),
            tpm.loaded(tpm.load(parent, private, public, [no_password()])) as handle,
        ):
            for policy in (True, False):
                with tpm.salted_session(parent, storage, policy=policy) as session, pytest.raises(TpmError):
                    tpm.unseal(handle, sealing.name_of(public), session)
        assert unseal(tpm, sealed) == KEY


def test_something_else_in_the_register_and_what_to_do_is_said(machine, folder):
    reboot(machine, folder)
    with machine.connect() as tpm:
        extended_with(tpm, bytes(32))
    with open_log(folder) as log:
        add(log, "the log itself goes on")
        with pytest.raises(TpmError, match=r"does not release the key.*policy fails.*PCR 13.*nothing else") as refused:
            log.store_key()
        assert refused.value.number == POLICY_FAILS
    reboot(machine, folder)
    assert len(key_of(folder)) == 32


def test_an_upgrade_without_sealing_is_refused_and_can_be_taken_back(machine, folder, monkeypatch):
    key = key_of(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    become(monkeypatch, OTHER)
    for _ in range(2):
        with pytest.raises(MisuseError, match=f"not sealed for this program.*reseal .* --measurement {OTHER.hex()}"):
            open_log(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    assert key_of(folder) == key
    reboot(machine, folder)
    become(monkeypatch, OTHER)
    with pytest.raises(MisuseError, match="not sealed for this program"):
        open_log(folder)
    # Whoever pretends otherwise to the host's check asks the TPM, and is refused there.
    monkeypatch.setattr(SealedKey, "accepts", lambda *_: True)
    with open_log(folder) as log, pytest.raises(TpmError, match="policy fails"):
        log.store_key()


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "after a reboot"])
def test_an_upgrade_that_was_sealed_for(machine, folder, monkeypatch, at_once):
    key = key_of(folder)
    with open_log(folder) as log:
        log.reseal_store_key(OTHER)
        assert log.store_key() == key
    reboot(machine, folder)
    assert key_of(folder) == key, "the upgrade can wait"
    if not at_once:
        reboot(machine, folder)
    else:
        with open_log(folder) as log:
            log.reseal_store_key(OTHER)
    become(monkeypatch, OTHER)
    assert key_of(folder) == key
    reboot(machine, folder)
    with open_log(folder) as log:
        assert log.store_key() == key
        log.reseal_store_key()
    assert key_of(folder) == key
    reboot(machine, folder)
    monkeypatch.undo()
    with pytest.raises(MisuseError, match="not sealed for this program"):
        open_log(folder)


def test_every_altered_byte_of_the_file_is_refused(folder):
    path = folder / SEALED_FILE
    whole = path.read_bytes()
    with open_log(folder) as log:
        key = log.store_key()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(TrustLogError):
                log.store_key()
        for cut in (whole[:-1], whole + b"\0", b"", whole * 20):
            path.write_bytes(cut)
            with pytest.raises(SealedStateError, match="damaged"):
                log.store_key()
        path.unlink()
        with pytest.raises(MisuseError, match="missing"):
            log.store_key()
        path.write_bytes(whole)
        assert log.store_key() == key
        assert not log.client.handles(0x80000000), "nothing is left loaded"


def test_another_tpm_and_a_cleared_one_know_nothing(machine, tmp_path):
    with machine.connect() as tpm:
        value = tpm.pcr_read([PROGRAM_PCR])[PROGRAM_PCR]
        sealed = seal(tpm, KEY, PROGRAM_PCR, [value])
        with software_tpm(tmp_path / "second") as second, second.connect() as other:
            with pytest.raises(VerificationError, match="another TPM, or it was cleared"):
                unseal(other, sealed)
            with sealing._storage_key(other) as (_, storage):
                pretended = SealedKey(sealed.pcr, storage.name, sealed.objects)
            with pytest.raises(TpmError, match="integrity"):
                unseal(other, pretended)
        assert unseal(tpm, sealed) == KEY
        tpm.clear()
        with pytest.raises(VerificationError, match="another TPM, or it was cleared"):
            unseal(tpm, sealed)


def test_a_key_is_made_first_of_all_and_once(machine, folder, tmp_path):
    with open_log(folder) as log, pytest.raises(MisuseError, match="exists already"):
        log.create_store_key()
    with create(tmp_path / "second", address=machine.address) as log:
        with pytest.raises(MisuseError, match=r"another program extended it.*reboot"):
            log.create_store_key()
        with pytest.raises(MisuseError, match="keeps no key"):
            log.store_key()
    assert not (tmp_path / "second" / SEALED_FILE).exists()
    assert len(load(folder / SEALED_FILE).objects) == 1


def test_a_lost_list_of_programs_keeps_the_key_only_from_evidence(folder):
    key = key_of(folder)
    (folder / PROGRAMS_FILE).unlink()
    assert key_of(folder) == key


def test_whoever_reads_the_bus_reads_no_key(machine, monkeypatch):
    said = []
    exchange = Wire.exchange

    def tapped(self, command):
        response = exchange(self, command)
        said.extend((command, response))
        return response

    monkeypatch.setattr(Wire, "exchange", tapped)
    with machine.connect() as tpm:
        value = tpm.pcr_read([PROGRAM_PCR])[PROGRAM_PCR]
        sealed = seal(tpm, KEY, PROGRAM_PCR, [value])
        assert unseal(tpm, sealed) == KEY
    everything = b"".join(said)
    assert sealed.objects[0][1] in everything, "the tap works"
    assert KEY not in everything


@pytest.mark.parametrize("command", [0x153, 0x15E], ids=["Create", "Unseal"])
def test_whoever_changes_an_answer_on_the_bus_is_noticed(machine, monkeypatch, command):
    exchange = Wire.exchange
    with machine.connect() as tpm:
        value = tpm.pcr_read([PROGRAM_PCR])[PROGRAM_PCR]
        sealed = seal(tpm, KEY, PROGRAM_PCR, [value])

        def altered(self, sent):
            response = exchange(self, sent)
            if int.from_bytes(sent[6:10], "big") == command:
                assert response[6:10] == bytes(4)
                response = response[:30] + bytes([response[30] ^ 1]) + response[31:]
            return response

        monkeypatch.setattr(Wire, "exchange", altered)
        with pytest.raises(TpmError, match="changed on its way"):
            unseal(tpm, sealed) if command == 0x15E else seal(tpm, KEY, PROGRAM_PCR, [value])
