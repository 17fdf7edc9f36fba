"""An executor and a client table made from what was transferred or stored go on exactly like the original."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from replica.application import Context, OperationError
from replica.core import sessions as module
from replica.core.batch import Batch, make_batch
from replica.core.envelope import Open, OpenReply, Operations, Result, SessionId, Status, decode_reply
from replica.core.execution import Executor
from replica.core.genesis import Limits
from replica.core.layout import LayoutError
from replica.core.sessions import ClientTable, Session, record_bytes_max
from replica.core.state import BucketedMap
from replica.core.tree import with_values
from tests.replica.core.harness import FakeClient, make_genesis
from tests.replica.core.support import examples

LIMITS = Limits(
    checkpoint_interval=1,
    window=2,
    envelope_operations_max=8,
    sessions_max=4,
    sessions_per_client_max=2,
    session_window=8,
)
GENESIS = replace(make_genesis(), limits=LIMITS)
CLIENTS = [FakeClient(GENESIS, 100 + i) for i in range(3)]


class Sized:
    """Answers with as many bytes as asked for, and remembers how often; a size of 9 is refused."""

    def apply(self, operation: bytes, context: Context) -> bytes:
        times = (context.state.get(operation) or b"") + b"."
        context.state.put(operation, times)
        if operation == b"9":
            raise OperationError("no")
        if len(times) > 3:
            context.state.delete(operation)
        return operation * int(operation) + times


openings = st.tuples(st.just("open"), st.integers(0, 2), st.integers(0, 5), st.integers(-1, 9))
requests = st.tuples(
    st.just("ask"),
    st.integers(0, 2),
    st.sampled_from([0, 0, 0, 0, 1, 2]),
    st.integers(1, 10),
    st.sampled_from([0, 1, 1, 1, 1, 2, 5, 11]),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
batches = st.lists(st.lists(openings | requests, max_size=4), min_size=4, max_size=20)


class Course:
    """Batches made from drawn actions; sessions are chosen among those that the client last opened, or tried to."""

    def __init__(self) -> None:
        self.opened = [[SessionId(1, place)] for place in range(len(CLIENTS))]

    def openings(self) -> Batch:
        return make_batch(0, (), [client.open(b"f" * 16, 4) for client in CLIENTS])

    def batch(self, slot: int, actions: list) -> Batch:
        return make_batch(slot % 5, (), [self.envelope(slot, *action) for action in actions])

    def envelope(self, slot: int, kind: str, who: int, *rest):
        client = CLIENTS[who]
        if kind == "open":
            nonce, ahead = rest
            return client.open(bytes([nonce]) * 16, max(slot + ahead, 0))
        which, first, acknowledged, sizes = rest
        opened = self.opened[who]
        client.session = opened[-1 - which % len(opened)]
        operations = [b"%d" % size for size in sizes]
        return client.operations(*operations, first=first, acknowledged=min(acknowledged, first))

    def note(self, batch: Batch, replies: list[bytes]) -> None:
        for envelope, raw in zip(batch.envelopes, replies, strict=True):
            reply = decode_reply(raw, LIMITS)
            opened = self.opened[[client.key for client in CLIENTS].index(envelope.client)]
            if isinstance(reply, OpenReply) and reply.status is Status.OK and reply.session not in opened:
                opened.append(reply.session)


def through_records(original: Executor) -> Executor:
    """What a replica makes of the stored or transferred pairs; in another order, which must not matter."""
    state, records = original.state, original.table.records
    copies = [BucketedMap(reversed(list(source.scan()))) for source in (state, records)]
    return Executor.restored(Sized(), GENESIS, original.slot, original.time_ms, *copies)


def lockstep(course: list, cut: int) -> None:
    """Execute, restore a copy after `cut` batches, and go on with both."""
    sequence = Course()
    original = Executor(Sized(), GENESIS)
    original.execute(1, sequence.openings())
    copy: Executor | None = None
    for slot, actions in enumerate(course, 2):
        if slot == cut + 1:
            roots = original.roots()
            original.take_changes()
            copy = through_records(original)
            assert copy.roots() == roots
            assert copy.take_changes() == ([], []), "what was restored is no change"
        batch = sequence.batch(slot, actions)
        replies = [e.raw for e in original.execute(slot, batch)]
        sequence.note(batch, replies)
        if copy is None:
            continue
        assert [e.raw for e in copy.execute(slot, batch)] == replies
        assert [copy.known_reply(e) for e in batch.envelopes] == [original.known_reply(e) for e in batch.envelopes]
        if slot % 2:
            assert copy.roots() == original.roots()
            assert (copy.digest(), copy.time_ms) == (original.digest(), original.time_ms)
            assert [*map(dict, copy.take_changes())] == [*map(dict, original.take_changes())]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(module, "SESSION_RESULT_BYTES_MAX", 12)
    monkeypatch.setattr(module, "OPENINGS_MAX", 5)
    monkeypatch.setattr(module, "OPENINGS_PER_CLIENT_MAX", 3)
    return monkeypatch


def search(how: settings) -> None:
    @how
    @given(batches, st.integers(2, 12))
    def run(course: list, cut: int) -> None:
        lockstep(course, min(cut, len(course)))

    run()


def test_a_restored_executor_goes_on_like_the_original(small: pytest.MonkeyPatch):
    search(examples(150))


def break_session(change: Callable[[Session], None]):
    right = Session.decode

    def wrong(session: SessionId, raw: bytes) -> Session:
        decoded = right(session, raw)
        change(decoded)
        return decoded

    return lambda patch: patch.setattr(Session, "decode", staticmethod(wrong))


def sort_results(session: Session) -> None:
    session.results = dict(sorted(session.results.items()))


def forget_openings_voids(table: ClientTable, key: bytes, value: bytes) -> None:
    slot, place, void_after = struct.unpack(">QIQ", value)
    table._openings[key[1:]] = module._Opening(SessionId(slot, place), void_after)


BROKEN = {
    "results in another order": break_session(sort_results),
    "no bytes counted": break_session(lambda session: setattr(session, "result_bytes", 0)),
    "idle since the beginning": break_session(lambda session: setattr(session, "last_slot", session.id.slot)),
    "nothing acknowledged": break_session(lambda session: setattr(session, "acknowledged", 1)),
    "openings never void": lambda patch: patch.setattr(ClientTable, "_restore_opening", forget_openings_voids),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_comparison_notices(name: str, small: pytest.MonkeyPatch):
    BROKEN[name](small)
    with pytest.raises(AssertionError):
        # One difference is enough: it need not be the smallest.
        search(settings(examples(600), phases=[Phase.generate], report_multiple_bugs=False))


def record(*results: tuple[int, int, bytes], last_slot: int = 9, acknowledged: int = 3, count: int | None = None):
    head = CLIENTS[0].key + struct.pack(">QQI", last_slot, acknowledged, len(results) if count is None else count)
    return head + b"".join(struct.pack(">QBQI", n, status, 5, len(v)) + v for n, status, v in results)


def test_a_sessions_record_is_read_as_it_was_written():
    raw = record((7, 0, b"seven"), (3, 1, b""), (4, 7, b"x" * 100))
    session = Session.decode(SessionId(5, 1), raw)
    assert session.encode() == raw
    assert list(session.results) == [7, 3, 4]
    assert session.results[3] == Result(Status.ERROR, 5, b"")
    assert (session.last_slot, session.acknowledged, session.result_bytes) == (9, 3, 105)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        record()[:-1],
        record() + b"x",
        record((7, 0, b"seven"))[:-1],
        record((7, 0, b"seven"), count=2),
        record((7, 0, b"seven"), count=0),
        record((7, 0, b""), (7, 0, b"")),
        record((2, 0, b"")),
        record((7, max(Status) + 1, b"")),
        record(last_slot=4),
        record(acknowledged=0),
    ],
)
def test_sessions_records_that_no_session_has(raw: bytes):
    with pytest.raises(LayoutError):
        Session.decode(SessionId(5, 1), raw)


def session_key(slot: int, place: int = 0) -> bytes:
    return b"s" + struct.pack(">QI", slot, place)


OPENING_KEY = b"o" + CLIENTS[0].key + bytes(16)


@pytest.mark.parametrize(
    "items",
    [
        [(b"x", b"")],
        [(b"s", record())],
        [(session_key(5) + b"x", record())],
        [(session_key(5), record()[:-1])],
        [(OPENING_KEY[:-1], bytes(20))],
        [(OPENING_KEY, bytes(19))],
        [(b"p" + OPENING_KEY[1:], bytes(20))],
        [(session_key(slot), record()) for slot in (1, 2, 3)],
        [(session_key(i), CLIENTS[i // 2].key + record()[65:]) for i in range(5)],
        [(OPENING_KEY[:-1] + bytes([i]), bytes(20)) for i in range(6)],
    ],
)
def test_records_that_no_table_has(items: list[tuple[bytes, bytes]], small: pytest.MonkeyPatch):
    with pytest.raises(LayoutError):
        ClientTable.restored(LIMITS, BucketedMap(items))


def test_the_largest_record_is_within_its_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SESSION_RESULT_BYTES_MAX", 100)
    session = Session(SessionId(1, 0), CLIENTS[0].key, 1)
    largest = 0
    for number, size in enumerate([90, 10, 0, 7, 120, 1, 100, 99], 1):
        session.keep(number, Result(Status.OK, 1, bytes(size)))
        largest = max(largest, len(session.encode()))
    assert largest <= record_bytes_max(Limits(session_window=8, envelope_operations_max=8)) - 6 * 2**20 + 120


def test_the_record_map_is_the_table_after_a_root():
    executor = Executor(Sized(), GENESIS)
    envelope = CLIENTS[0].open(bytes(16), 5)
    executor.execute(1, make_batch(0, (), [envelope]))
    root = executor.roots()[1]
    assert isinstance(envelope.content, Open)
    assert {key[:1] for key, _ in executor.table.records.scan()} == {b"s", b"o"}
    assert BucketedMap(executor.table.records.scan()).root() == root
    changes = executor.take_changes()[1]
    assert list(with_values(changes)) == list(executor.table.records.scan())
    CLIENTS[0].session = SessionId(1, 0)
    asked = CLIENTS[0].operations(b"3", first=1)
    assert isinstance(asked.content, Operations)
    executor.execute(2, make_batch(0, (), [asked]))
    ((key, value),) = with_values(executor.take_changes()[1])
    assert Session.decode(SessionId(1, 0), value or b"").results[1].value == b"333."
    assert key == session_key(1)
    executor.roots()
    assert executor.take_changes() == ([], [])
