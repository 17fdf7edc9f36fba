"""What a host with full power over its machine can do with a TPM log, and what comes of it: the README's promises.

The attacker is root: it speaks to the TPM without the backend, extends what it likes, has anything quoted, reboots,
restores files. `Attacker.say` makes a group like the backend would, from any value of the PCR, whatever stands in it.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.swtpm import software_tpm
from tests.trustlog.support import CONTEXT, digests_of
from tests.trustlog.tpm.attacker import Attacker, attacker_on
from tests.trustlog.tpm.support import NotNextError, Reader, add
from trustlog import (
    BackendKind,
    LogIdentity,
    MisuseError,
    VerificationError,
    VerifyingKey,
    entry_digest,
    find_contradiction,
    software,
    verify_append,
)
from trustlog.cli.documents import Expectation, contradiction_document, document, verify_document
from trustlog.tpm.backend import RestartedError
from trustlog.tpm.chain import CLOSE_DIGEST, TpmPins
from trustlog.tpm.opening import open_log
from trustlog.tpm.structures import RH_ENDORSEMENT, attestation_key_template
from trustlog.tpm.wire import TpmError


def epoch_of(resets, restarts=0):
    return resets << 32 | restarts


def test_the_pcr_cannot_be_reset(folder, machine):
    with machine.connect() as tpm:
        for pcr in range(16):
            with pytest.raises(TpmError, match="not possible at this locality"):
                tpm.pcr_reset(pcr)
        tpm.pcr_reset(23)


def test_a_quote_of_a_pcr_that_can_be_reset_does_not_pass(folder, machine):
    log = open_log(folder)
    log.close()
    root = attacker_on(machine, log)
    root.tpm.pcr_reset(23)
    attestation, digests = root.say(1, digests_of("never said"), epoch=log.epoch, pcr=23)
    with pytest.raises(VerificationError, match="other PCRs: sha256:23"):
        verify_append(log.identity, attestation, digests, context=CONTEXT)


def test_a_foreign_extend_ends_the_log_before_anything_wrong_is_said(folder, machine):
    log = open_log(folder)
    reader = Reader(log.identity)
    reader.read(*add(log, "one"))
    log._tpm.close()  # swtpm serves one connection
    with machine.connect() as tpm:
        tpm.pcr_extend(14, bytes(32))
    log._tpm = machine.connect()
    with pytest.raises(TpmError, match=r"PCR 14 .* was extended by something else"):
        add(log, "two")
    with pytest.raises(MisuseError, match="has ended"):
        add(log, "three")
    log._tpm.close()
    log.close()
    with pytest.raises(MisuseError, match="something else extended it, or the folder is an older copy"):
        open_log(folder)


def test_a_group_after_a_foreign_extend_is_valid_alone_and_continues_nothing(folder, machine):
    log = open_log(folder)
    reader = Reader(log.identity)
    reader.read(*add(log, "one"))
    log.close()
    root = attacker_on(machine, log)
    stood = root.value()
    root.tpm.pcr_extend(14, bytes(32))
    again = root.say(2, digests_of("two"), epoch=log.epoch)
    verify_append(log.identity, *again, context=CONTEXT)
    with pytest.raises(NotNextError):
        reader.read(*again)
    claimed = root.say(2, digests_of("two"), epoch=log.epoch, head_before=stood)
    with pytest.raises(VerificationError, match="do not lead to the attested value"):
        verify_append(log.identity, *claimed, context=CONTEXT)


def test_an_index_said_twice_shows_a_lying_host_and_no_broken_tpm(folder, machine):
    """The TPM knows no indexes: only one of the two continues what readers have, and nobody is framed."""
    log = open_log(folder)
    reader = Reader(log.identity)
    one = add(log, "one")
    log.close()
    other = attacker_on(machine, log).say(1, digests_of("other"), epoch=log.epoch)
    reader.read(*one)
    verify_append(log.identity, *other, context=CONTEXT)
    with pytest.raises(NotNextError):
        reader.read(*other)
    with pytest.raises(NotNextError):
        Reader(log.identity).read(*other)
    assert find_contradiction(log.identity, *one, *other) is None
    assert find_contradiction(LogIdentity(log.identity.key, BackendKind.TPM), *one, *other) is None


def test_a_hidden_prefix_is_noticed_because_the_base_is_pinned(folder, machine):
    log = open_log(folder)
    log.close()
    root = attacker_on(machine, log)
    root.say(1, digests_of("hidden"), epoch=log.epoch)
    shown = root.say(1, digests_of("shown"), epoch=log.epoch)
    verify_append(log.identity, *shown, context=CONTEXT)
    with pytest.raises(NotNextError):
        Reader(log.identity).read(*shown)


def test_one_group_by_itself_is_verified_with_a_reservation(folder, machine):
    """The host has any payload attested at any index: only of entry 1 one group shows that it is the log's beginning."""
    log = open_log(folder)
    first = add(log, "pay alice")
    log.close()
    root = attacker_on(machine, log)
    again = root.say(1, digests_of("pay mallory"), epoch=log.epoch)
    more = root.say(2, digests_of("x", "y"), epoch=log.epoch)

    def verified(attestation, digests=()):
        shown = json.dumps(document(attestation, digests=digests)).encode()
        return verify_document(shown, log.identity, Expectation(CONTEXT))

    assert "that this is the log's entry 1 (only replaying the log" in str(verified(*first)["not_proven"])
    assert "that this is the log's entry 2 to 3 (only replaying the log" in str(verified(*more)["not_proven"])
    with pytest.raises(VerificationError, match="does not begin at the base that was pinned"):
        verified(*again)
    root.tpm.close()
    with software.create(folder.parent / "software") as other:
        attestation, digests = add(other, "one")
        shown = json.dumps(document(attestation, digests=digests)).encode()
        said = verify_document(
            shown, LogIdentity.published(VerifyingKey.from_bytes(other.public_key), None), Expectation(CONTEXT)
        )
        assert "not_proven" not in said


def test_a_reboot_with_a_hidden_tail_ends_the_log(folder, machine):
    log = open_log(folder)
    reader = Reader(log.identity)
    reader.read(*add(log, "one"))
    stood = log._state.pcr
    add(log, "a vote that nobody was shown")
    log.close()
    machine.cut_power()
    machine.start()
    with pytest.raises(RestartedError, match="not closed before: nothing proves that entry 2 was its last"):
        open_log(folder)
    root = attacker_on(machine, log)
    epoch = epoch_of(2)
    # What root can make in the new epoch: the same index again, on the base, on the value that stood, or as OPEN.
    again = root.say(2, digests_of("another vote"), epoch=epoch)
    with pytest.raises(NotNextError):
        reader.read(*again)
    with pytest.raises(VerificationError):
        verify_append(log.identity, *root.say(2, digests_of("x"), epoch=epoch, head_before=stood), context=CONTEXT)


def test_open_without_close_continues_nothing(folder, machine):
    log = open_log(folder)
    reader = Reader(log.identity)
    reader.read(*add(log, "one"))
    stood = log._state.pcr
    add(log, "hidden")
    log.close()
    machine.reboot()
    opened = attacker_on(machine, log).open(1, log.epoch, stood, epoch=epoch_of(2))
    verify_append(log.identity, *opened, context=CONTEXT)
    with pytest.raises(NotNextError):
        reader.read(*opened)


def test_a_closed_epoch_is_continued_by_the_next_boot(folder, machine):
    with open_log(folder) as log:
        reader = Reader(log.identity)
        reader.read(*add(log, "one"))
        reader.read(log.close_epoch(), [CLOSE_DIGEST])
        with pytest.raises(MisuseError, match="goes on after the next boot"):
            add(log, "two")
        closed = log.head
    with open_log(folder) as log:  # the service was only restarted
        assert log.head == closed
        assert len(log.epoch_groups()) == 1
        with pytest.raises(MisuseError, match="goes on after the next boot"):
            add(log, "two")
    for boot in (2, 3):
        machine.reboot()
        with open_log(folder) as log:
            assert log.epoch == epoch_of(boot)
            groups = log.epoch_groups()
            for payloads, attestation in groups[-1:]:
                reader.read(attestation, [entry_digest(payload) for payload in payloads])
            reader.read(*add(log, "more"))
            assert (reader.last, reader.head) == (log.last, log.head)
            assert log.epoch_groups() == []
            reader.read(log.close_epoch(), [CLOSE_DIGEST])


def test_groups_that_the_log_said_itself_are_handed_to_a_host_that_lacks_them(folder, machine):
    with open_log(folder) as log:
        reader = Reader(log.identity)
        reader.read(*add(log, "one"))
        log.close_epoch()
    machine.reboot()
    with open_log(folder) as log:
        groups = log.epoch_groups()
        assert [payloads[0][1:15] for payloads, _ in groups] == [b"trustlog/close", b"trustlog/open\0"]
        for payloads, attestation in groups:
            reader.read(attestation, [entry_digest(payload) for payload in payloads])
        assert reader.head == log.head


def test_nothing_but_open_continues_a_close(folder, machine):
    log = open_log(folder)
    reader = Reader(log.identity)
    reader.read(*add(log, "one"))
    reader.read(log.close_epoch(), [CLOSE_DIGEST])
    log.close()
    after = attacker_on(machine, log).say(3, digests_of("a hidden tail"), epoch=log.epoch)
    verify_append(log.identity, *after, context=CONTEXT)
    with pytest.raises(NotNextError):
        reader.read(*after)


def test_two_reboots_make_no_two_successors(folder, machine):
    log = open_log(folder)
    reader, other = Reader(log.identity), Reader(log.identity)
    one = add(log, "one")
    close = (log.close_epoch(), [CLOSE_DIGEST])
    for one_reader in (reader, other):
        one_reader.read(*one)
        one_reader.read(*close)
    closed = (log.last, log.epoch, log._state.pcr)
    log.close()
    machine.reboot()
    root = attacker_on(machine, log)
    first = root.open(*closed, epoch=epoch_of(2))
    root.tpm.close()
    reader.read(*first)
    machine.reboot()
    root = attacker_on(machine, log)
    last, closed_epoch, closed_pcr = closed
    second = root.open(last, closed_epoch, closed_pcr, epoch=epoch_of(3))
    with pytest.raises(VerificationError, match="do not lead to the attested value"):
        other.read(*second)
    root.tpm.close()
    machine.reboot()
    root = attacker_on(machine, log)
    third = root.open(last, epoch_of(3), closed_pcr, epoch=epoch_of(4))
    with pytest.raises(NotNextError):
        other.read(*third)
    root.tpm.close()
    with pytest.raises(RestartedError, match="started more than once"):
        open_log(folder)


@pytest.mark.parametrize("resume", [False, True])
def test_a_restart_that_is_no_reset_makes_no_successor(folder, machine, resume):
    """Suspend (the PCR is kept) and restart (it is emptied) raise the restart count only: (n, 1) never counts."""
    log = open_log(folder)
    reader = Reader(log.identity)
    reader.read(*add(log, "one"))
    reader.read(log.close_epoch(), [CLOSE_DIGEST])
    closed = (log.last, log.epoch, log._state.pcr)
    log.close()
    machine.shut_down(clear=False)
    machine.start(resume=resume)
    opened = attacker_on(machine, log).open(*closed, epoch=epoch_of(1, 1))
    with pytest.raises(VerificationError, match="does not count"):
        verify_append(log.identity, *opened, context=CONTEXT)


def test_a_suspended_machine_is_told_so(folder, machine):
    log = open_log(folder)
    add(log, "one")
    log._tpm.close()
    machine.shut_down(clear=False)
    machine.start(resume=True)
    log._tpm = machine.connect()
    with pytest.raises(TpmError, match="the machine was suspended"):
        add(log, "two")
    log._tpm.close()


def test_an_epoch_cannot_be_claimed(folder, machine):
    log = open_log(folder)
    log.close()
    said = attacker_on(machine, log).say(1, digests_of("x"), epoch=epoch_of(5))
    with pytest.raises(VerificationError, match=r"made in another epoch, 1\.0,"):
        verify_append(log.identity, *said, context=CONTEXT)


def test_a_base_that_changed_with_the_firmware_is_named(folder, machine):
    with open_log(folder) as log:
        add(log, "one")
        log.close_epoch()
    machine.reboot()
    with machine.connect() as tpm:
        tpm.pcr_extend(14, bytes(32))
    with pytest.raises(RestartedError, match="another value at boot than at the log's enrolment"):
        open_log(folder)


def test_clearing_the_tpm_destroys_the_key(folder, machine):
    log = open_log(folder)
    add(log, "one")
    log._tpm.clear()
    log.close()
    with pytest.raises(TpmError, match="has no key at 0x81017400 any more: was it cleared"):
        open_log(folder)
    machine.reboot()
    with pytest.raises(TpmError, match="was it cleared"):
        open_log(folder)


def test_why_the_key_is_a_child(machine):
    """With a primary key, clearing the TPM gives a second history that nobody can tell from the first.

    Enrolment refuses such a key (test_enrol); here one is pinned all the same.
    """

    def speak(payload):
        with machine.connect() as tpm:
            handle, public = tpm.create_primary(RH_ENDORSEMENT, attestation_key_template())
            with tpm.loaded(handle):
                signer = tpm.read_public(handle)[1]
                key = VerifyingKey.from_bytes(public.key)
                identity = LogIdentity(key, BackendKind.TPM, tpm=TpmPins(14, bytes(32), signer, epoch_of(1)))
                return identity, Attacker(tpm, identity, handle).say(1, digests_of(payload), epoch=epoch_of(1))

    identity, first = speak("one history")
    with machine.connect() as tpm:
        tpm.clear()
    machine.cut_power()
    machine.start()
    same, second = speak("another")
    assert same == identity
    Reader(identity).read(*first)
    Reader(identity).read(*second)


def test_an_older_copy_of_the_folder_is_refused(folder, tmp_path):
    with open_log(folder) as log:
        add(log, "one")
    shutil.copytree(folder, tmp_path / "copy")
    with open_log(folder) as log:
        add(log, "two")
    with pytest.raises(MisuseError, match="or the folder is an older copy of itself"):
        open_log(tmp_path / "copy")
    with open_log(folder) as log:
        add(log, "three")


def test_a_copied_software_tpm_is_a_perfect_fork(folder, machine, tmp_path):
    """What cannot be prevented: whoever can copy a TPM's state has two of it. A chip's state cannot be copied.

    Both copies start, count the same reset, and say different things at one index; each alone verifies, and only who
    sees both knows: they are evidence that this trusted part is broken.
    """
    with open_log(folder) as log:
        one = add(log, "one")
        close = log.close_epoch()
    identity = log.identity
    machine.shut_down()
    shutil.copytree(machine.state, tmp_path / "copied-state", ignore=shutil.ignore_patterns(".lock"))
    shutil.copytree(folder, tmp_path / "copied-log")
    machine.start()
    with open_log(folder) as log:
        _, opened = log.epoch_groups()
        here = add(log, "here")
    with software_tpm(tmp_path / "copied-state") as copied:
        config = tmp_path / "copied-log" / "tpm.json"
        config.write_text(config.read_text().replace(machine.address, copied.address))
        with open_log(tmp_path / "copied-log") as log:
            there = add(log, "there")
    for history in (here, there):
        reader = Reader(identity)
        reader.read(*one)
        reader.read(close, [CLOSE_DIGEST])
        reader.read(opened[1], [entry_digest(opened[0][0])])
        reader.read(*history)
    expected = "went on from one value in two ways in one epoch"
    assert expected in find_contradiction(identity, *here, *there)
    # Who holds the evidence needs the key alone.
    assert expected in find_contradiction(LogIdentity(identity.key, BackendKind.TPM), *here, *there)
    document = json.dumps(contradiction_document(*here, *there)).encode()
    said = verify_document(document, LogIdentity.published(identity.key, identity.tpm), Expectation(bytes(32)))
    assert expected in said["contradiction"]
    with pytest.raises(VerificationError, match="what was pinned"):
        verify_document(document, LogIdentity.published(identity.key, None), Expectation(bytes(32)))
    assert find_contradiction(identity, *one, *here) is None
    assert find_contradiction(identity, *here, *here) is None


def test_a_restored_state_of_a_software_tpm_is_the_same_fork(folder, machine, tmp_path):
    with open_log(folder) as log:
        handle = log.config.handle
    machine.shut_down()
    shutil.copytree(machine.state, tmp_path / "old-state", ignore=shutil.ignore_patterns(".lock"))
    machine.start()
    pins = TpmPins(14, bytes(32), log.config.pins.signer, epoch_of(2))
    identity = LogIdentity(log.identity.key, BackendKind.TPM, tpm=pins)
    root = Attacker(machine.connect(), identity, handle)
    first = root.say(1, digests_of("first"), epoch=epoch_of(2))
    root.tpm.close()
    machine.cut_power()
    shutil.rmtree(machine.state)
    shutil.copytree(tmp_path / "old-state", machine.state)
    machine.start()
    root = Attacker(machine.connect(), identity, handle)
    second = root.say(1, digests_of("second"), epoch=epoch_of(2))
    Reader(identity).read(*first)
    Reader(identity).read(*second)
    assert find_contradiction(identity, *first, *second) is not None


def test_a_contradiction_needs_one_pcr_that_cannot_be_reset(folder, machine):
    """Else anybody could frame a log: reset PCR 23, say one thing; reset it, say another."""
    log = open_log(folder)
    log.close()
    root = attacker_on(machine, log)
    said = []
    for payload in ("one", "two"):
        root.tpm.pcr_reset(23)
        said.append(root.say(1, digests_of(payload), epoch=log.epoch, pcr=23))
    with pytest.raises(VerificationError, match="PCR 0 … 15"):
        find_contradiction(LogIdentity(log.identity.key, BackendKind.TPM), *said[0], *said[1])
    with pytest.raises(VerificationError, match="other PCRs"):
        find_contradiction(log.identity, *said[0], *said[1])
    fine = [root.say(1, digests_of("x"), epoch=log.epoch, pcr=pcr) for pcr in (12, 13)]
    with pytest.raises(VerificationError, match="other PCRs"):
        find_contradiction(LogIdentity(log.identity.key, BackendKind.TPM), *fine[0], *fine[1])
