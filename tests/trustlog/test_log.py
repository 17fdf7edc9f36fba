from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.trustlog.service.support import process_log, serve_in_thread
from tests.trustlog.support import (
    CONTEXT,
    NONCE,
    OTHER_CONTEXT,
    add,
    digests_of,
    fixed_key,
    identity_of,
)
from trustlog import (
    AppendStatement,
    Attestation,
    AttestedLog,
    BackendKind,
    LogState,
    MisuseError,
    Outcome,
    SealedStateError,
    VerificationError,
    find_contradiction,
    fold,
    genesis_head,
    in_memory,
    verify_append,
    verify_end,
    verify_lookup,
    verify_truncate,
)
from trustlog.log import public_key_bytes
from trustlog.statements import U64_MAX, TruncateStatement


class Journal:
    """Keeps every saved state, and what was signed when; fails on request."""

    def __init__(self):
        self.events = []
        self.failing = False

    def save(self, state):
        if self.failing:
            raise OSError(28, "No space left on device")
        self.events.append(("saved", LogState.decode(state)))


class WatchedKey:
    """A private key that notes each signing."""

    def __init__(self, key, events):
        self._key = key
        self._events = events

    def sign(self, data, algorithm):
        self._events.append(("signed", data))
        return self._key.sign(data, algorithm)


def watched_log(log_class=AttestedLog):
    key, journal = fixed_key(), Journal()
    empty = LogState.empty(in_memory(key).log_id)
    log = log_class(key, BackendKind.SOFTWARE, empty, journal)
    log._private_key = WatchedKey(key, journal.events)
    return log, journal


def check_durable_before_signed(log_class):
    """Whatever an append or a truncate says was saved before it was signed, and never signed if it was not saved."""
    log, journal = watched_log(log_class)
    log.append(digests_of("1", "2"), context=CONTEXT)
    log.truncate(2, context=CONTEXT)
    log.append(digests_of("3"), context=CONTEXT)
    journal.failing = True
    for verb in (lambda: log.append(digests_of("4"), context=CONTEXT), lambda: log.truncate(3, context=CONTEXT)):
        with pytest.raises((OSError, MisuseError)):
            verb()
    saved = LogState.empty(log.log_id)
    signed = 0
    for event, content in journal.events:
        if event == "saved":
            saved = content
            continue
        signed += 1
        statement = {170: AppendStatement, 138: TruncateStatement}[len(content)].decode(content)
        assert statement.last <= saved.last, "signed an append that was not durable"
        if isinstance(statement, TruncateStatement):
            assert statement.low <= saved.low, "signed a truncation that was not durable"
    assert signed == 3


class SignsFirst(AttestedLog):
    """The planted fault: signs, then saves."""

    def _advance(self, new, statement):
        attestation = self._sign(statement)
        super()._advance(new, statement)
        return attestation


def test_durable_before_signed():
    check_durable_before_signed(AttestedLog)


def test_the_check_catches_a_log_that_signs_first():
    with pytest.raises(AssertionError, match="not durable"):
        check_durable_before_signed(SignsFirst)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_save_stops_the_log(error):
    log, journal = watched_log()
    group, digests = add(log, "1")
    state = log._state

    def fail(_state):
        raise error

    journal.save = fail
    with pytest.raises(type(error)):
        log.append(digests_of("2"), context=CONTEXT)
    del journal.save
    signed = len(journal.events)
    for verb in (
        lambda: log.append(digests_of("2"), context=CONTEXT),
        lambda: log.truncate(1, context=CONTEXT),
        lambda: log.end(nonce=NONCE, context=CONTEXT),
        lambda: log.lookup(1, nonce=NONCE, context=CONTEXT, group=(group, digests)),
        log.reissue,
    ):
        with pytest.raises(MisuseError, match="open it again"):
            verb()
    assert len(journal.events) == signed
    assert log._state == state


@pytest.fixture(params=["software", "process"])
def new_log(request):
    """Makes an empty log of a key: each backend must pass the same tests, the contract of the verbs."""
    with contextlib.ExitStack() as stack:
        if request.param == "software":
            yield lambda key: stack.enter_context(in_memory(key))
        else:
            yield lambda key: stack.enter_context(serve_in_thread(process_log(key)))


def test_an_empty_log(new_log):
    log = new_log(fixed_key())
    assert (log.low, log.last, log.epoch, log.last_group) == (1, 0, 0, None)
    assert log.head == genesis_head(log.log_id, 0)
    assert log.kind in {BackendKind.SOFTWARE, BackendKind.PROCESS}
    assert log.durability == "memory"
    assert log.public_key == public_key_bytes(fixed_key())
    statement = verify_end(identity_of(log), log.end(nonce=NONCE, context=CONTEXT), context=CONTEXT, nonce=NONCE)
    assert (statement.low, statement.last, statement.head) == (1, 0, log.head)
    with pytest.raises(MisuseError, match="empty"):
        log.reissue()


def test_append_advances_over_the_group(new_log):
    log = new_log(fixed_key())
    head = log.head
    for first, payloads in ((1, ["a"]), (2, ["b", "c", "d"]), (5, ["e"])):
        attestation, digests = add(log, *payloads)
        statement = verify_append(identity_of(log), attestation, digests, context=CONTEXT)
        assert (statement.first, statement.last) == (first, first + len(payloads) - 1) == log.last_group
        assert statement.head_before == head
        head = fold(head, first, digests)
        assert statement.head_after == log.head == head
    assert log.last == 5


def test_bounds_of_a_group(new_log):
    log = new_log(fixed_key())
    for bad in ([], digests_of("x") * 1025, [b"short"], [bytes(33)], [*digests_of("x"), b""]):
        with pytest.raises(MisuseError):
            log.append(bad, context=CONTEXT)
    assert log.last == 0
    log.append(digests_of("x") * 1024, context=CONTEXT)
    assert log.last == 1024


def test_reissue_is_the_same_statement(new_log):
    log = new_log(fixed_key())
    add(log, "1")
    attestation = log.append(digests_of("2", "3"), context=OTHER_CONTEXT)
    log.truncate(3, context=CONTEXT)
    again = log.reissue()
    assert again.statement == attestation.statement
    verify_append(identity_of(log), again, digests_of("2", "3"), context=OTHER_CONTEXT)
    assert find_contradiction(identity_of(log), again, digests_of("2", "3"), attestation, digests_of("2", "3")) is None


def ask(log, index, group=None, context=CONTEXT):
    answer = log.lookup(index, nonce=NONCE, context=context, group=group)
    return verify_lookup(identity_of(log), answer, context=context, nonce=NONCE, index=index)


def test_lookup_of_every_outcome(new_log):
    log = new_log(fixed_key())
    assert ask(log, 1).outcome is Outcome.UNASSIGNED
    add(log, "1")
    group = add(log, "2", "3")
    for index, payload in ((2, "2"), (3, "3")):
        answer = ask(log, index, group)
        assert (answer.outcome, answer.digest) == (Outcome.ASSIGNED, digests_of(payload)[0])
    assert ask(log, 4, group).outcome is Outcome.UNASSIGNED
    assert ask(log, U64_MAX).outcome is Outcome.UNASSIGNED
    log.truncate(3, context=CONTEXT)
    assert ask(log, 2, group).outcome is Outcome.FORGOTTEN
    assert ask(log, 3, group).outcome is Outcome.ASSIGNED
    log.truncate(4, context=CONTEXT)
    assert ask(log, 3, group).outcome is Outcome.FORGOTTEN
    assert ask(log, 4).outcome is Outcome.UNASSIGNED
    assert ask(log, 1).digest == bytes(32)


def test_lookup_in_a_group_of_another_context(new_log):
    log = new_log(fixed_key())
    digests = digests_of("1")
    group = (log.append(digests, context=OTHER_CONTEXT), digests)
    assert ask(log, 1, group, CONTEXT).digest == digests[0]


def test_lookup_refuses_groups_that_prove_nothing(new_log):
    log, other = new_log(fixed_key()), new_log(fixed_key(2))
    first, second = add(log, "1"), add(log, "2")
    foreign = add(other, "1")
    end = log.end(nonce=NONCE, context=CONTEXT)
    for group, reason in (
        (foreign, "wrong-log"),
        (second, "wrong-range"),
        ((first[0], second[1]), "wrong-head"),
        ((first[0], []), "wrong-count"),
        ((Attestation(first[0].statement, second[0].signature), first[1]), "bad-signature"),
        ((end, first[1]), "wrong-statement"),
    ):
        with pytest.raises(VerificationError) as caught:
            ask(log, 1, group)
        assert caught.value.reason == reason
    with pytest.raises(MisuseError, match="hand in"):
        ask(log, 1)


@pytest.mark.parametrize("index", [0, -1, U64_MAX + 1])
def test_indexes_that_are_none(new_log, index):
    with pytest.raises(MisuseError):
        ask(new_log(fixed_key()), index)


def test_truncate_is_monotone(new_log):
    log = new_log(fixed_key())
    add(log, "1", "2", "3")
    for index in (1, 2, 2, 4):
        statement = verify_truncate(identity_of(log), log.truncate(index, context=CONTEXT), context=CONTEXT)
        assert (statement.low, statement.last, statement.head) == (index, 3, log.head)
        assert log.low == index
    for index in (3, 0, -1, 5):
        with pytest.raises(MisuseError, match="choose 4 … 4"):
            log.truncate(index, context=CONTEXT)
    add(log, "4")
    assert (log.low, log.last) == (4, 4)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_sizes_of_contexts_and_nonces(new_log, size):
    log, bad = new_log(fixed_key()), bytes(size)
    for verb in (
        lambda: log.append(digests_of("1"), context=bad),
        lambda: log.truncate(1, context=bad),
        lambda: log.end(nonce=bad, context=CONTEXT),
        lambda: log.end(nonce=NONCE, context=bad),
        lambda: log.lookup(1, nonce=bad, context=CONTEXT, group=None),
        lambda: log.lookup(1, nonce=NONCE, context=bad, group=None),
    ):
        with pytest.raises(MisuseError, match="32 bytes"):
            verb()


def test_a_full_log_refuses():
    key = fixed_key()
    state = LogState(0, 1, U64_MAX - 2, U64_MAX - 2, bytes(32), bytes(32), CONTEXT)
    log = AttestedLog(key, BackendKind.SOFTWARE, state, Journal())
    with pytest.raises(MisuseError, match="full"):
        add(log, "1", "2")
    add(log, "1")
    with pytest.raises(MisuseError, match="full"):
        add(log, "2")
    log.truncate(U64_MAX, context=CONTEXT)


def test_another_curve_is_refused():
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(MisuseError, match="P-256"):
        AttestedLog(key, BackendKind.SOFTWARE, LogState.empty(bytes(32)), Journal())


def test_close_is_final_and_harmless_when_repeated():
    closed = []
    key = fixed_key()
    state = LogState.empty(in_memory(key).log_id)
    with AttestedLog(key, BackendKind.SOFTWARE, state, Journal(), on_close=lambda: closed.append(1)) as log:
        add(log, "1")
        assert log.durability == "disk"
    log.close()
    assert closed == [1]
    with pytest.raises(MisuseError, match="closed"):
        add(log, "2")


def test_threads_share_one_log(new_log):
    log = new_log(fixed_key())
    groups = []

    def work(name):
        groups.extend(add(log, f"{name} {turn}") for turn in range(20))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statements = [verify_append(identity_of(log), *group, context=CONTEXT) for group in groups]
    statements.sort(key=lambda statement: statement.first)
    assert [statement.first for statement in statements] == list(range(1, 161))
    head = genesis_head(log.log_id, 0)
    for statement in statements:
        assert statement.head_before == head
        head = statement.head_after


OWN_ID = in_memory(fixed_key()).log_id
EMPTY = LogState.empty(OWN_ID)
GROWN = LogState(0, 2, 5, 4, b"h" * 32, b"b" * 32, CONTEXT)


def test_state_layout():
    data = GROWN.encode()
    assert data == b"".join(n.to_bytes(8, "big") for n in (0, 2, 5, 4)) + b"h" * 32 + b"b" * 32 + CONTEXT
    assert LogState.decode(data) == GROWN
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(SealedStateError):
            LogState.decode(wrong)


@pytest.mark.parametrize(
    ("invariant", "state"),
    [
        (1, replace(GROWN, last=U64_MAX + 1)),
        (1, replace(GROWN, epoch=-1)),
        (2, replace(GROWN, low=0)),
        (2, replace(GROWN, low=7)),
        (3, replace(EMPTY, head=bytes(32))),
        (3, replace(EMPTY, context=CONTEXT)),
        (3, replace(EMPTY, first=1)),
        (4, replace(GROWN, first=6)),
        (4, replace(GROWN, first=0)),
        (4, replace(GROWN, last=2000, first=2000 - 1024)),
    ],
)
def test_broken_invariants_are_named(invariant, state):
    with pytest.raises(SealedStateError, match=f"invariant {invariant}"):
        state.check(OWN_ID)
    GROWN.check(OWN_ID)
    EMPTY.check(OWN_ID)
    replace(GROWN, last=2000, first=2000 - 1023).check(OWN_ID)
    with pytest.raises(SealedStateError):
        AttestedLog(fixed_key(), BackendKind.SOFTWARE, state, Journal())


def test_which_states_follow():
    later = LogState(0, 3, 6, 6, b"i" * 32, GROWN.head, CONTEXT)
    assert GROWN.follows(GROWN)
    assert replace(GROWN, low=3).follows(GROWN)
    assert later.follows(GROWN)
    assert not GROWN.follows(later)
    assert not replace(GROWN, low=1).follows(GROWN)
    assert not GROWN.follows(replace(GROWN, epoch=1))
    assert not replace(later, first=5).follows(GROWN)
    assert not replace(later, head_before=bytes(32)).follows(GROWN)
    assert not replace(GROWN, head=bytes(32)).follows(GROWN)
    assert not replace(GROWN, context=OTHER_CONTEXT).follows(GROWN)
