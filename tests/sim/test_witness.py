"""Every checker can fail: hand-made events that each kind of violation must be found in."""

import struct

import pytest

from replica.apps import kv
from replica.core import events
from replica.core.batch import encode_batch
from replica.core.envelope import Open, Operations, SessionId, encode_open, encode_operations
from replica.core.group import VerifiedGroup
from replica.core.rules import Violation
from replica.sim.oracle import OK, Oracle, key_value
from replica.sim.witness import LOOK_EVERY, Witness

CLUSTER = bytes(32)
CLIENT = b"\x04" + bytes(64)
SIGNATURE = bytes(64)
INCR = kv.incr(b"k", 5)
FIVE = struct.pack(">q", 5)
FIRST_SESSION = SessionId(1, 0)


def opening(nonce: bytes = bytes(16), void_after: int = 8) -> bytes:
    return encode_open(CLUSTER, CLIENT, Open(nonce, void_after)) + SIGNATURE


def request(*operations: bytes, first: int = 1, acknowledged: int = 1, session: SessionId = FIRST_SESSION) -> bytes:
    return encode_operations(CLUSTER, CLIENT, Operations(session, first, acknowledged, operations)) + SIGNATURE


def batch(*envelopes: bytes) -> bytes:
    return encode_batch(0, (), envelopes)


@pytest.fixture
def witness() -> Witness:
    found = Witness(CLUSTER, 3, frozenset({0, 1}), Oracle(4, 64, 4), {"slots": 10})
    for replica in (0, 1):
        found.born(replica)
    return found


def kinds(witness: Witness) -> list[str]:
    return [violation.kind for violation in witness.violations]


def play(witness: Witness, replica: int, *batches: bytes, carries_out: tuple[tuple[int, bytes], ...] = ()) -> None:
    for slot, raw in enumerate(batches, 1):
        for at, operation in carries_out:
            if at == slot:
                witness.applied(replica, slot, CLIENT, operation)
        witness.executed(replica, slot, raw)


def test_a_good_run_is_clean(witness):
    batches = (batch(opening()), batch(request(INCR)))
    for replica in (0, 1):
        play(witness, replica, *batches, carries_out=((2, INCR),))
        witness.state_digest(replica, 2, b"same")
    witness.acknowledged(CLIENT, INCR, OK, 2, FIVE)
    witness.settle({0: (2, {b"k": b"5"}), 1: (2, {b"k": b"5"})})
    assert not witness.violations


def test_different_batches_at_one_slot(witness):
    play(witness, 0, batch())
    play(witness, 1, batch(opening()))
    assert kinds(witness) == ["agreement"]


def test_a_skipped_slot(witness):
    witness.executed(0, 2, batch())
    assert kinds(witness) == ["agreement"]


def test_different_states(witness):
    witness.state_digest(0, 4, b"a")
    witness.state_digest(1, 4, b"b")
    assert kinds(witness) == ["state"]


def test_another_state_than_the_model(witness):
    play(witness, 0, batch(opening()), batch(request(INCR)), carries_out=((2, INCR),))
    witness.settle({0: (2, {b"k": b"10"})})
    assert kinds(witness) == ["state"]


def test_an_operation_carried_out_twice(witness):
    twice = (batch(opening()), batch(request(INCR)), batch(request(INCR)))
    play(witness, 0, *twice, carries_out=((2, INCR), (3, INCR)))
    witness.settle({})
    assert kinds(witness) == ["exactly-once"]


def test_an_operation_not_carried_out(witness):
    play(witness, 0, batch(opening()), batch(request(INCR)))
    witness.settle({})
    assert kinds(witness) == ["exactly-once"]


@pytest.mark.parametrize(
    ("slot", "value"), [(2, struct.pack(">q", 6)), (3, FIVE)], ids=["another result", "another slot"]
)
def test_an_answer_that_the_agreed_order_does_not_give(witness, slot, value):
    play(witness, 0, batch(opening()), batch(request(INCR)), batch(), carries_out=((2, INCR),))
    witness.acknowledged(CLIENT, INCR, OK, slot, value)
    witness.settle({})
    assert kinds(witness) == ["durability"]


def test_two_answers_for_one_execution(witness):
    play(witness, 0, batch(opening()), batch(request(INCR)), carries_out=((2, INCR),))
    for _ in range(2):
        witness.acknowledged(CLIENT, INCR, OK, 2, FIVE)
    witness.settle({})
    assert kinds(witness) == ["durability"]


def test_a_history_without_explanation(witness):
    operation = witness.history.invoke(1, b"k", kv.get(b"k"), 0)
    operation.returned, operation.value = 1, b"\x01never written"
    witness.settle({})
    assert kinds(witness) == ["linearizability"]


def test_two_values_at_one_index(witness):
    witness.saw_group(VerifiedGroup(2, 1, 1, b"h", b"a", (b"one",), b""))
    witness.saw_group(VerifiedGroup(2, 1, 1, b"h", b"b", (b"two",), b""))
    assert kinds(witness) == ["log-conflict"]


GROUP = VerifiedGroup(0, 1, 1, b"h", b"a", (b"one",), b"")
ACCUSATIONS = [
    events.Exposed(0, 1, Violation("wrong-view", ""), GROUP),
    events.Lied(0, 1, ""),
    events.Forked(0, 1, GROUP),
]


@pytest.mark.parametrize("effect", ACCUSATIONS, ids=lambda effect: type(effect).__name__)
def test_a_correct_replica_accused(witness, effect):
    witness.heard(1, effect)
    assert "accuracy" in kinds(witness)


def test_a_faulty_replica_may_be_accused(witness):
    witness.heard(1, events.Exposed(2, 1, Violation("wrong-view", ""), GROUP))
    witness.heard(1, events.Lied(2, 1, ""))
    assert not witness.violations


def test_a_fork_is_named(witness):
    witness.heard(1, events.Forked(2, 7, GROUP))
    assert [(v.kind, "log 2 is forked at 7" in v.text) for v in witness.violations] == [("forked", True)]


def test_a_halt(witness):
    witness.heard(0, events.Halt("why"))
    assert kinds(witness) == ["halted"]


def test_a_replica_that_was_rolled_back_must_stop_and_say_so(witness):
    witness.excuse(0)
    witness.heard(0, events.Halt("its trusted state was rolled back"))
    assert not witness.violations
    assert witness.counts["rollbacks-refused"] == 1
    witness.heard(0, events.Halt("why"))
    witness.heard(1, events.Halt("its trusted state was rolled back"))
    assert kinds(witness) == ["halted", "halted"]


def test_a_collection_that_grows(witness):
    class Core:
        def sizes(self):
            return {"slots": 11, "unlimited": 10**9}

    for _ in range(LOOK_EVERY):
        witness.look_at(0, Core())
    assert kinds(witness) == ["bounds"]


# The model.


def executed(oracle: Oracle, *batches: bytes) -> list[list[bytes]]:
    return [[done.operation for done in oracle.execute(slot, raw)] for slot, raw in enumerate(batches, 1)]


def test_model_executes_every_number_once():
    again = request(INCR)
    assert executed(Oracle(4, 64, 4), batch(opening()), batch(again, again), batch(again)) == [[], [INCR], []]


def test_model_forgets_what_is_acknowledged_and_minds_the_window():
    late, far = request(INCR, first=1), request(INCR, first=69, acknowledged=5)
    assert executed(Oracle(4, 64, 4), batch(opening()), batch(far), batch(late)) == [[], [], []]


def test_model_knows_sessions_by_client_and_openings_by_nonce():
    foreign = request(INCR, session=SessionId(9, 9))
    done = executed(Oracle(4, 64, 4), batch(opening()), batch(opening(), foreign), batch(request(INCR)))
    assert done == [[], [], [INCR]]


def test_model_evicts_the_longest_idle_session():
    openings = [batch(opening(bytes([i]) * 16, 40)) for i in range(4)]
    use_first = batch(request(INCR, session=SessionId(1, 0)))
    fifth = batch(opening(b"5" * 16, 40))
    evicted = batch(request(INCR, session=SessionId(2, 0)))
    kept = batch(request(INCR, session=SessionId(1, 0), first=2))
    oracle = Oracle(16, 64, 4)
    assert executed(oracle, *openings, use_first, fifth, evicted, kept)[4:] == [[INCR], [], [], [INCR]]


def test_model_refuses_void_openings():
    assert executed(Oracle(4, 64, 4), batch(opening(void_after=0)), batch(request(INCR))) == [[], []]
    assert executed(Oracle(4, 64, 4), batch(opening(void_after=34)), batch(request(INCR))) == [[], []]


def test_model_of_the_key_value_store():
    state: dict[bytes, bytes] = {}
    steps = [
        (kv.put(b"a", b"1"), b"\0"),
        (kv.put(b"a", b"2"), b"\1"),
        (kv.get(b"a"), b"\x012"),
        (kv.cas(b"a", b"9", b"3"), b"\0\x012"),
        (kv.cas(b"a", b"2", b"3"), b"\1"),
        (kv.incr(b"a", -5), struct.pack(">q", -2)),
        (kv.delete(b"a"), b"\1"),
        (kv.delete(b"a"), b"\0"),
        (kv.cas(b"a", None, b"x"), b"\1"),
    ]
    for operation, expected in steps:
        assert key_value(state, operation) == (OK, expected)
    assert state == {b"a": b"x"}
