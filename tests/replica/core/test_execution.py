"""Execution: exactly once, the same everywhere, and nothing that a batch holds can break it."""

from __future__ import annotations

import itertools
import random

import pytest

from replica.application import Context, OperationError
from replica.apps import kv
from replica.apps.kv import KeyValue
from replica.core import sessions
from replica.core.batch import Batch, make_batch
from replica.core.envelope import Envelope, OperationsReply, Result, SessionId, Status, decode_reply
from replica.core.execution import ERROR_TEXT_BYTES_MAX, Executor
from replica.core.genesis import Genesis, Limits
from tests.replica.core.harness import FakeClient, make_genesis

G = make_genesis()


class Naughty:
    """An application that does whatever the operation says, after having changed its state."""

    def apply(self, operation: bytes, context: Context) -> bytes:
        verb, _, argument = operation.partition(b" ")
        context.state.put(b"touched", argument or b"-")
        context.state.delete(b"precious")
        if verb == b"raise":
            raise {b"key": KeyError("secret"), b"zero": ZeroDivisionError(), b"deep": RecursionError()}[argument]
        if verb == b"refuse":
            raise OperationError(argument.decode(errors="surrogateescape"))
        if verb == b"memory":
            raise MemoryError
        if verb == b"return":
            return {b"text": "text", b"none": None, b"array": bytearray(b"x"), b"true": True}[argument]  # type: ignore[return-value]
        if verb == b"size":
            return bytes(int(argument))
        if verb == b"put":
            context.state.put(b"precious", argument)
        if verb == b"who":
            return b"%d %d " % (context.slot, context.time_ms) + context.client[1:2]
        return b"done"


class World:
    """One executor and clients with open sessions; every call is the next slot."""

    def __init__(self, application: object | None = None, genesis: Genesis = G, clients: int = 1) -> None:
        self.executor = Executor(application or KeyValue(), genesis)  # type: ignore[arg-type]
        self.genesis = genesis
        self.clients = [FakeClient(genesis, 100 + i) for i in range(clients)]
        self.raw = self.run(*(client.open(void_after=8) for client in self.clients))
        for place, client in enumerate(self.clients):
            client.session = SessionId(1, place)

    @property
    def client(self) -> FakeClient:
        return self.clients[0]

    def batch(self, *envelopes: Envelope, time_ms: int = 0) -> Batch:
        return make_batch(time_ms, (), envelopes)

    def run(self, *envelopes: Envelope, time_ms: int = 0) -> list[bytes]:
        executed = self.executor.execute(self.executor.slot + 1, self.batch(*envelopes, time_ms=time_ms))
        assert [e.client for e in executed] == [e.client for e in envelopes]
        return [e.raw for e in executed]

    def results(self, envelope: Envelope, time_ms: int = 0) -> list[Result]:
        reply = decode_reply(self.run(envelope, time_ms=time_ms)[0], self.genesis.limits)
        assert isinstance(reply, OperationsReply)
        return list(reply.results)

    def result(self, *operations: bytes, first: int | None = None, acknowledged: int = 1) -> Result:
        return self.results(self.client.operations(*operations, first=first, acknowledged=acknowledged))[0]

    def value(self, key: bytes) -> bytes | None:
        return self.executor.state.get(key)


def test_a_request_is_executed_once_and_answered_alike_ever_after():
    w = World()
    envelope = w.client.operations(kv.incr(b"n"), kv.incr(b"n", 5))
    first = w.run(envelope)
    for _ in range(3):
        assert w.run(envelope) == first
    assert w.run(envelope, envelope) == first * 2
    assert w.executor.known_reply(envelope) == first[0]
    assert w.value(b"n") == b"6"
    assert w.executor.operations == 2


def test_a_duplicate_within_one_batch_is_executed_once():
    w = World()
    envelope = w.client.operations(kv.incr(b"n"))
    one, two = w.run(envelope, envelope)
    assert one == two
    assert w.value(b"n") == b"1"


def test_numbers_that_arrive_out_of_order_are_all_executed_once():
    for order in itertools.permutations(range(3)):
        w = World()
        envelopes = [w.client.operations(kv.put(b"%d" % i, b"v"), kv.incr(b"n")) for i in range(3)]
        replies = {i: w.run(envelopes[i])[0] for i in order}
        for i in order[::-1]:
            assert w.run(envelopes[i])[0] == replies[i]
        assert w.value(b"n") == b"3"


def test_envelopes_that_overlap_execute_each_number_once():
    w = World()
    w.run(w.client.operations(kv.incr(b"n"), kv.incr(b"n"), first=1))
    results = w.results(w.client.operations(kv.incr(b"n", 100), kv.incr(b"n", 10), first=2))
    assert [kv.read_number(r.value) for r in results] == [2, 12]
    assert [r.slot for r in results] == [2, 3]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_number_with_two_operations_executes_the_one_ordered_first_everywhere(order: tuple[int, int]):
    digests = set()
    for _ in range(3):
        w = World()
        envelopes = [w.client.operations(kv.put(b"k", value), first=1) for value in (b"one", b"two")]
        replies = [w.run(envelopes[i])[0] for i in order]
        assert replies[0] == replies[1]
        assert w.value(b"k") == (b"one", b"two")[order[0]]
        assert w.executor.known_reply(envelopes[0]) == w.executor.known_reply(envelopes[1])
        digests.add(w.executor.digest())
    assert len(digests) == 1


def test_acknowledged_numbers_are_forgotten_and_never_run_again():
    w = World()
    old = w.client.operations(kv.incr(b"n"))
    w.run(old)
    w.run(w.client.operations(kv.get(b"n"), acknowledged=2))
    assert w.results(old) == [Result(Status.FORGOTTEN, 0, b"")]
    assert w.value(b"n") == b"1"
    skipped = w.client.operations(kv.incr(b"n"), first=10, acknowledged=10)
    w.run(skipped)
    late = w.results(w.client.operations(kv.incr(b"n"), first=5))
    assert late[0].status is Status.FORGOTTEN, "never executed, but acknowledged: it will not be"
    assert w.value(b"n") == b"2"


def test_numbers_beyond_the_window_are_not_executed_until_the_window_moves():
    limits = Limits(checkpoint_interval=4, window=8, envelope_operations_max=4, session_window=4)
    w = World(genesis=Genesis(G.name, G.nonce, 1, G.ordering, G.application, limits, G.members))
    far = w.client.operations(kv.incr(b"n"), kv.incr(b"n"), first=4)
    results = w.results(far)
    assert [r.status for r in results] == [Status.OK, Status.OUT_OF_WINDOW]
    assert w.value(b"n") == b"1"
    assert w.executor.known_reply(far) is None, "not executed as a whole"
    moved = w.client.operations(kv.incr(b"n"), first=5, acknowledged=2)
    assert w.results(moved)[0].status is Status.OK
    assert [r.status for r in w.results(far)] == [Status.OK, Status.OK]
    assert w.value(b"n") == b"2"


def test_sessions_that_do_not_exist_or_belong_to_others_execute_nothing():
    w = World(clients=2)
    mine, theirs = w.clients
    for session in (SessionId(0, 0), SessionId(1, 7), theirs.session, SessionId(2**64 - 1, 2**32 - 1)):
        w.client.session = session
        envelope = w.client.operations(kv.incr(b"n"), kv.incr(b"n"), first=1)
        assert w.results(envelope) == [Result(Status.EXPIRED, w.executor.slot, b"")] * 2
        assert w.executor.known_reply(envelope) is None
    assert w.value(b"n") is None
    assert mine.key != theirs.key


def test_an_evicted_sessions_envelopes_run_no_second_time():
    limits = Limits(checkpoint_interval=4, window=8, sessions_per_client_max=2)
    w = World(genesis=Genesis(G.name, G.nonce, 1, G.ordering, G.application, limits, G.members))
    envelope = w.client.operations(kv.incr(b"n"))
    w.run(envelope)
    for number in (1, 2):
        w.run(w.client.open(nonce=number.to_bytes(16, "big"), void_after=20))
    assert w.results(envelope)[0].status is Status.EXPIRED
    w.run(w.client.open(void_after=8))  # the first opening, replayed
    assert w.results(envelope)[0].status is Status.EXPIRED
    assert w.value(b"n") == b"1"


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (b"raise key", b"operation failed: KeyError"),
        (b"raise zero", b"operation failed: ZeroDivisionError"),
        (b"refuse not so", b"not so"),
        (b"refuse " + b"x" * 5000, b"x" * ERROR_TEXT_BYTES_MAX),
        (b"return text", b"the application did not return bytes"),
        (b"return none", b"the application did not return bytes"),
        (b"return array", b"the application did not return bytes"),
        (b"size 2000000", b"the result is too large"),
    ],
)
def test_an_operation_that_fails_is_an_error_result_and_changes_nothing(operation: bytes, text: bytes):
    w = World(Naughty())
    assert w.result(b"put gold").status is Status.OK
    before = dict(w.executor.state.scan())
    root = w.executor.state.root()
    slot = w.executor.slot + 1
    envelope = w.client.operations(operation)
    reply = w.run(envelope)
    result = decode_reply(reply[0], w.genesis.limits).results[0]  # type: ignore[union-attr]
    assert result == Result(Status.ERROR, slot, text)
    assert dict(w.executor.state.scan()) == before
    assert w.executor.state.root() == root
    w.executor.state.check()
    assert w.run(envelope) == reply, "an error is a result as well: kept, and not tried again"
    assert w.result(b"put silver").status is Status.OK, "and what follows is not affected"


def test_a_refusal_whose_text_is_not_unicode_is_an_error_result_too():
    w = World(Naughty())
    result = w.result(b"refuse caf\xe9")
    assert result.status is Status.ERROR
    assert result.value.decode().startswith("caf")


def test_running_out_of_memory_is_no_result():
    w = World(Naughty())
    with pytest.raises(MemoryError):
        w.run(w.client.operations(b"memory"))


def test_the_results_of_one_envelope_fit_a_frame():
    size = 900_000
    w = World(Naughty())
    envelope = w.client.operations(*[b"size %d" % size] * 10)
    results = w.results(envelope)
    good = G.limits.group_bytes_max // size
    assert [r.status for r in results] == [Status.OK] * good + [Status.TOO_LARGE] * (10 - good)
    assert w.results(envelope) == results, "what was refused is not executed by a replay either"
    assert sum(len(r.value) for r in results) <= G.limits.group_bytes_max


def test_an_application_is_told_that_nobody_ordered_what_is_peeked_at():
    class Told:
        def apply(self, operation, context):
            if operation == b"fail":
                raise OperationError("no")
            return b"ordered" if context.ordered else b"peeked"

    w = World(Told())
    assert w.executor.peek(b"").value == b"peeked"
    assert w.executor.peek(b"fail").status is Status.ERROR
    assert w.result(b"").value == b"ordered"


def test_a_session_forgets_results_above_its_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "SESSION_RESULT_BYTES_MAX", 1000)
    w = World(Naughty())
    envelopes = [w.client.operations(b"size 600") for _ in range(3)]
    for envelope in envelopes:
        assert w.results(envelope)[0].status is Status.OK
    assert [w.results(e)[0].status for e in envelopes] == [Status.FORGOTTEN, Status.FORGOTTEN, Status.OK]
    assert w.executor.operations == 3


def test_peeking_changes_nothing():
    w = World()
    w.result(kv.put(b"k", b"v"))
    digest = w.executor.digest()
    assert w.executor.peek(kv.get(b"k")).value == b"\x01v"
    assert w.executor.peek(kv.put(b"k", b"other")).status is Status.OK
    assert w.executor.peek(kv.incr(b"n")).status is Status.OK
    assert w.executor.peek(b"\xff").status is Status.ERROR
    assert w.executor.digest() == digest
    assert (w.value(b"k"), w.value(b"n")) == (b"v", None)
    w.executor.state.check()
    assert w.executor.operations == 1


def test_agreed_time_never_goes_back():
    w = World(Naughty())
    seen = []
    for time_ms in (5, 9, 3, 0, 9, 2**64 - 1, 7):
        slot, time, who = w.results(w.client.operations(b"who"), time_ms)[0].value.split(b" ")
        assert (int(slot), who) == (w.executor.slot, w.client.key[1:2])
        seen.append(int(time))
    assert seen == [5, 9, 9, 9, 9, 2**64 - 1, 2**64 - 1]


def test_slots_are_executed_one_after_the_other():
    w = World()
    for slot in (1, 3):
        with pytest.raises(RuntimeError, match=f"slot {slot} executed after slot 1"):
            w.executor.execute(slot, w.batch())
    w.executor.execute(2, w.batch())


def test_the_digest_covers_slot_time_state_and_sessions():
    digests = []
    for step in (
        lambda w: w.run(),
        lambda w: w.run(time_ms=1),
        lambda w: w.run(w.client.operations(kv.put(b"k", b"v"))),
        lambda w: w.run(w.client.operations(kv.put(b"k", b"w"))),
        lambda w: w.run(w.client.operations(kv.get(b"k"))),
        lambda w: (w.run(), w.run()),
    ):
        w = World()
        step(w)
        digests.append(w.executor.digest())
    assert len(set(digests)) == len(digests)


def test_the_same_batches_give_the_same_digest_whatever_was_asked_on_the_way():
    rng = random.Random(5)
    plain, asked = World(clients=3), World(clients=3)
    for _ in range(40):
        envelopes = []
        for _ in range(rng.randrange(3)):
            who, key, first = rng.randrange(3), rng.choice([b"a", b"b", b"c"]), rng.randrange(1, 12)
            operation = rng.choice([kv.incr(key), kv.put(key, b"1"), kv.delete(key), b"junk", kv.cas(key, b"1", b"2")])
            envelopes.append((who, operation, first, rng.randrange(0, first + 1)))
        raws = []
        for w in (plain, asked):
            built = [w.clients[who].operations(op, first=first, acknowledged=ack) for who, op, first, ack in envelopes]
            raws.append(w.run(*built))
            if w is asked:
                w.executor.digest()
                for envelope in built:
                    w.executor.known_reply(envelope)
                    w.executor.peek(kv.scan())
        assert raws[0] == raws[1]
    assert plain.executor.digest() == asked.executor.digest()


def test_an_opening_is_answered_from_memory_only_after_it_was_ordered():
    w = World()
    opening = w.client.open(nonce=b"another session!", void_after=9)
    assert w.executor.known_reply(opening) is None
    (reply,) = w.run(opening)
    assert w.executor.known_reply(opening) == reply
