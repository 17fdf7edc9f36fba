"""What a host with full power over its machine can do with a TPM log, and what comes of it: the README's promises.

The attacker is root: it speaks to the TPM without the backend, extends what it likes, has anything quoted, reboots,
restores files. `Attacker.say` makes a group like the backend would, from any value of the PCR, whatever stands in it.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from replica.cli.evidence import _proven_fork
from tests.support.swtpm import software_tpm
from tests.trustlog.support import CONTEXT, NONCE, digests_of
from tests.trustlog.tpm.support import NotNextError, Reader, add, sign_anything
from trustlog import (
    AppendStatement,
    Attestation,
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
from trustlog.appraisal import appraise, load_policy
from trustlog.appraisal.evidence import Evidence
from trustlog.cli.contract import CommandError
from trustlog.cli.documents import Expectation, contradiction_document, document, verify_document
from trustlog.hashing import fold, genesis_head
from trustlog.statements import EndStatement, LookupStatement, Outcome, QuoteStatement, TruncateStatement, open_payload
from trustlog.tpm import chain
from trustlog.tpm.backend import RestartedError
from trustlog.tpm.chain import CLOSE_DIGEST, TpmPins
from trustlog.tpm.enrol import create
from trustlog.tpm.opening import open_log
from trustlog.tpm.structures import RH_ENDORSEMENT, attestation_key_template
from trustlog.tpm.wire import TpmError


class Attacker:
    """Root on the log's machine, without the backend's manners."""

    def __init__(self, tpm, identity, handle):
        self.tpm = tpm
        self.identity = identity
        self.handle = handle

    def value(self, pcr=None):
        return self.tpm.pcr_read([pcr or self.identity.tpm.pcr])[pcr or self.identity.tpm.pcr]

    def say(self, first, digests, *, epoch, head_before=None, pcr=None, before=None):
        """Extend the PCR by a group and have it quoted; `head_before`: what the statement says stood there."""
        pcr = self.identity.tpm.pcr if pcr is None else pcr
        before = self.value(pcr) if before is None else before
        log_id = self.identity.key.log_id
        event = chain.event_digest(log_id, first, CONTEXT, digests)
        self.tpm.pcr_extend(pcr, event)
        after = chain.extended(before, event)
        last = first + len(digests) - 1
        header = (BackendKind.TPM, CONTEXT, log_id, epoch)
        statement = AppendStatement(*header, first, last, head_before or before, after).encode()
        signed = self.tpm.quote(self.handle, [pcr], chain.asked(statement))
        return Attestation(statement, signed.attest + signed.signature), digests

    def open(self, last, closed_epoch, closed_pcr, *, epoch):
        """Say OPEN after a CLOSE, in whatever epoch this is."""
        payload = open_payload(last, chain.head(closed_epoch, closed_pcr, closed=True))
        return self.say(last + 1, [entry_digest(payload)], epoch=epoch, head_before=closed_pcr)


@pytest.fixture
def folder(machine, tmp_path):
    create(tmp_path / "log", address=machine.address).close()
    return tmp_path / "log"


def attacker_on(machine, log):
    return Attacker(machine.connect(), log.identity, log.config.handle)


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


def forged_append(root, kind, *payloads):
    """An append of another kind of backend that the TPM's key signed, as its host asked."""
    log_id, digests = root.identity.key.log_id, digests_of(*payloads)
    before = genesis_head(log_id, 0)
    after = fold(before, 1, digests)
    said = AppendStatement(kind, CONTEXT, log_id, 0, 1, len(digests), before, after).encode()
    return Attestation(said, sign_anything(root.tpm, root.handle, said)), digests


@pytest.fixture
def root(folder, machine):
    log = open_log(folder)
    log.close()
    return attacker_on(machine, log)


def test_a_restricted_key_signs_what_its_host_hands_in_unless_it_looks_like_a_quote(root):
    """TPM2_Hash gives the ticket, TPM2_Sign the signature: so no bare signature of this key means anything."""
    root.identity.key.verify(sign_anything(root.tpm, root.handle, b"anything"), b"anything")
    with pytest.raises(AssertionError):  # TPM_RC_TICKET
        sign_anything(root.tpm, root.handle, b"\xffTCG and what a quote would say")


@pytest.mark.parametrize("kind", [BackendKind.SOFTWARE, BackendKind.PROCESS])
def test_a_tpms_key_attests_nothing_of_another_backend(root, kind):
    key, log_id = root.identity.key, root.identity.key.log_id
    head = bytes(32)
    one = forged_append(root, kind, "pay alice")
    signed = [
        EndStatement(kind, CONTEXT, log_id, 0, NONCE, 1, 77, head),
        LookupStatement(kind, CONTEXT, log_id, 0, NONCE, 1, Outcome.ASSIGNED, head, 1, 1),
        TruncateStatement(kind, CONTEXT, log_id, 0, 1, 1, head),
    ]
    shown = [document(one[0], digests=one[1])]
    shown += [
        document(Attestation(said.encode(), sign_anything(root.tpm, root.handle, said.encode()))) for said in signed
    ]
    for content in shown:
        raw = json.dumps(content).encode()
        # What is signed is well-formed and the signature is right: who takes the key for a program's believes it.
        verify_document(raw, LogIdentity.published(key, None), Expectation(CONTEXT))
        for identity in (LogIdentity.published(key, root.identity.tpm), root.identity):
            with pytest.raises(VerificationError) as refused:
                verify_document(raw, identity, Expectation(CONTEXT))
            assert refused.value.reason == "wrong-kind"
    with pytest.raises(VerificationError, match="do not count here"):
        verify_append(LogIdentity(key, frozenset(BackendKind), tpm=root.identity.tpm), *one, context=CONTEXT)


def test_nobody_is_framed_with_what_a_tpms_key_signed_for_its_host(root):
    sides = [forged_append(root, BackendKind.SOFTWARE, payload) for payload in ("pay alice", "pay mallory")]
    raw = json.dumps(contradiction_document(*sides[0], *sides[1])).encode()
    key, pins = root.identity.key, root.identity.tpm
    assert "attested twice" in str(verify_document(raw, LogIdentity.published(key, None), Expectation(CONTEXT)))
    with pytest.raises(VerificationError, match="do not count here"):
        verify_document(raw, LogIdentity.published(key, pins), Expectation(CONTEXT))
    member = SimpleNamespace(log_public_key=key.raw, log_kind=BackendKind.TPM, log_pins=pins.encode(), since=0)
    genesis = SimpleNamespace(limits=None, context=lambda since: CONTEXT, members=[member])
    with pytest.raises(CommandError, match="proves nothing: statements of the software backend do not count here"):
        _proven_fork(raw, genesis)


def test_evidence_that_a_tpms_key_signed_for_its_host_is_refused(root, tmp_path):
    key = root.identity.key
    header = (BackendKind.PROCESS, CONTEXT, key.log_id, 0)
    said = QuoteStatement(*header, NONCE, bytes(32), key.raw).encode()
    evidence = Evidence(said, signature=sign_anything(root.tpm, root.handle, said))
    policies = {"any": "", "enrolled": f'[tpm]\nattestation_keys = ["{key.raw.hex()}"]\n'}
    for name, table in policies.items():
        (tmp_path / name).write_text(f'format = 1\nminimum_evidence = "self-asserted"\n{table}')
    unknown, listed = (load_policy(tmp_path / name) for name in policies)
    assert appraise(evidence, unknown, nonce=NONCE).level_names == "self-asserted"
    for policy, known in (
        (listed, {}),
        (unknown, {"enrolled": frozenset({key.raw})}),
        (unknown, {"pins": root.identity.tpm}),
    ):
        with pytest.raises(VerificationError, match="a bare signature is its host's word"):
            appraise(evidence, policy, nonce=NONCE, **known)
