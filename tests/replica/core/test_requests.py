"""Requests wait in turn, within bounds, once each; nothing is left of what was executed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.apps import kv
from replica.core import claims, rooms
from replica.core import requests as module
from replica.core.batch import BATCH_OVERHEAD_MAX, make_batch
from replica.core.envelope import Envelope
from replica.core.genesis import Limits
from replica.core.line import STALE_MAX, cost_of
from replica.core.requests import QueueFullError, RequestQueue
from tests.replica.core.harness import FakeClient, make_genesis
from tests.replica.core.support import examples

G = make_genesis()
LIMITS = Limits(batch_envelopes_max=6)


def envelopes(client: int, count: int, value: bytes = b"v") -> list[Envelope]:
    source = FakeClient(G, client)
    return [source.operations(kv.put(b"k", value)) for _ in range(count)]


def owners(taken: list[Envelope]) -> list[int]:
    return [envelope.client[1] for envelope in taken]


def empty(queue: RequestQueue) -> bool:
    return not (
        len(queue)
        or queue._line.lanes
        or queue._line.turns
        or queue._under_way
        or queue._by_client
        or queue._rooms.count
        or queue._rooms.bytes
        or queue._rooms._by_count._of
        or queue._rooms._by_bytes._at
        or len(queue.claims)
        or queue.claims._held
        or queue.claims._others
        or queue.claims._line
        or queue.claims._bytes
        or queue.unproposed
    )


def test_clients_are_served_in_turn():
    queue = RequestQueue(LIMITS)
    flood, quiet, other = envelopes(100, 10), envelopes(101, 1), envelopes(102, 2)
    for envelope in (*flood, *quiet, *other):
        queue.add(envelope, 0)
    first = queue.take_batch()
    assert owners(first) == [100, 101, 102, 100, 102, 100]
    assert [e for e in first if e.client[1] == 100] == flood[:3], "one client's requests in order of arrival"
    queue.add(envelopes(103, 1)[0], 0)
    assert owners(queue.take_batch()) == [100, 103, 100, 100, 100, 100], "a newcomer waits one turn, not for the flood"


def test_the_turn_goes_on_where_the_last_batch_ended():
    queue = RequestQueue(Limits(batch_envelopes_max=2))
    for client in (100, 101, 102):
        for envelope in envelopes(client, 2):
            queue.add(envelope, 0)
    assert [owners(queue.take_batch()) for _ in range(4)] == [[100, 101], [102, 100], [101, 102], []]


def large(client: int, count: int, operations: int) -> list[Envelope]:
    source = FakeClient(G, client)
    return [source.operations(*[kv.put(b"k", b"v")] * operations) for _ in range(count)]


def test_turns_are_worth_the_same_in_operations():
    queue = RequestQueue(Limits(batch_envelopes_max=1))
    for envelope in (*large(100, 3, 8), *envelopes(101, 32)):
        queue.add(envelope, 0)
    order = [owners(queue.take_batch())[0] for _ in range(32)]
    # Round 8 is the first in which the flood can pay for an envelope; the place in the line decides who comes first.
    assert order == [*[101] * 7, 100, *[101] * 8, 100, *[101] * 8, 100, *[101] * 6]
    assert order.count(101) >= 8 * order.count(100)


def test_turns_are_worth_the_same_in_bytes():
    queue = RequestQueue(Limits(batch_envelopes_max=1))
    for envelope in (*envelopes(100, 3, bytes(3000)), *envelopes(101, 12)):
        queue.add(envelope, 0)
    order = [owners(queue.take_batch())[0] for _ in range(12)]
    assert cost_of(envelopes(100, 1, bytes(3000))[0]) == 4
    assert order == [101, 101, 101, 100, 101, 101, 101, 101, 100, 101, 101, 101]


def test_whoever_had_nothing_waiting_saved_nothing_up_and_pays_no_debt():
    queue = RequestQueue(Limits(batch_envelopes_max=1))
    for envelope in large(100, 4, 8):
        queue.add(envelope, 0)
    assert [owners(queue.take_batch()) for _ in range(2)] == [[100], [100]], "alone, it need not wait for its rounds"
    for envelope in (*large(101, 2, 8), *envelopes(102, 2)):
        queue.add(envelope, 0)
    taken = []
    while one := queue.take_batch():
        taken += owners(one)
    assert taken == [102, 102, 100, 101, 100, 101]


def test_what_comes_after_an_executed_request_is_paid_for_too():
    queue = RequestQueue(Limits(batch_envelopes_max=1))
    source = FakeClient(G, 100)
    small, big = source.operations(kv.get(b"k")), source.operations(*[kv.get(b"k")] * 8)
    queue.add(small, 0)
    queue.add(big, 0)
    for envelope in envelopes(101, 8):
        queue.add(envelope, 0)
    queue.executed(small)
    assert [owners(queue.take_batch())[0] for _ in range(9)] == [*[101] * 7, 100, 101]


def test_a_batch_holds_few_enough_operations_or_one_envelope(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH_OPERATIONS_MAX", 20)
    queue = RequestQueue(Limits())
    for envelope in (*large(100, 3, 8), *large(101, 1, 30), *envelopes(102, 1)):
        queue.add(envelope, 0)
    assert [owners(queue.take_batch()) for _ in range(4)] == [[102, 100, 100], [100], [101], []]


def test_no_more_is_taken_while_enough_is_under_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "UNDER_WAY_MAX", 10)
    queue = RequestQueue(Limits(batch_envelopes_max=1))
    flood = large(100, 4, 8)
    for envelope in flood:
        queue.add(envelope, 0)
    assert [queue.take_batch() for _ in range(3)] == [[flood[0]], [flood[1]], []]
    quiet = envelopes(101, 1)[0]
    queue.add(quiet, 0)
    queue.executed(flood[0])
    assert [queue.take_batch() for _ in range(3)] == [[quiet], [flood[2]], []], (
        "whoever came meanwhile waits for its turn only"
    )
    queue.begin_view([flood[1], flood[2]])
    assert queue.take_batch() == []
    queue.executed(flood[2])
    assert queue.take_batch() == [quiet]
    for envelope in (*flood, quiet):
        queue.executed(envelope)
    assert empty(queue)


def test_the_line_stays_as_short_as_what_waits():
    """A backup takes no batches: clients come and go in its line, and others serve them."""
    queue = RequestQueue(Limits())
    pool = [envelope for client in range(3) for envelope in envelopes(100 + client, 200)]
    for envelope in pool:
        queue.add(envelope, 0)
        queue.executed(envelope)
        assert len(queue._line.heap) <= STALE_MAX + 2
    assert empty(queue)


@examples(60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 1, 2, 5, 16])), min_size=8, max_size=60),
    st.integers(1, 4),
)
def test_who_always_waits_is_served_alike(sent: list[tuple[int, int]], batch: int):
    """Between any two clients that both still wait, what they were served differs by no more than two envelopes' cost.

    Every client's requests come out in their order, and all of them.
    """
    queue = RequestQueue(Limits(batch_envelopes_max=batch))
    sources = {client: FakeClient(G, 100 + client) for client in range(4)}
    waiting: dict[bytes, list[Envelope]] = {}
    for client, operations in sent:
        envelope = sources[client].operations(*[kv.get(b"k")] * operations)
        waiting.setdefault(envelope.client, []).append(envelope)
        queue.add(envelope, 0)
    served = dict.fromkeys(waiting, 0)
    while taken := queue.take_batch():
        for envelope in taken:
            assert waiting[envelope.client].pop(0) == envelope
            served[envelope.client] += cost_of(envelope)
            busy = [served[client] for client, left in waiting.items() if left]
            assert not busy or max(busy) - min(busy) <= 2 * 16
    assert not any(waiting.values())


def test_a_batch_keeps_the_agreed_size():
    limits = Limits(operation_bytes_max=3000, envelope_bytes_max=8000, batch_bytes_max=12096)
    assert not limits.problems()
    queue = RequestQueue(limits)
    waiting = envelopes(100, 8, bytes(2800))
    for envelope in waiting:
        queue.add(envelope, 0)
    sizes = []
    while taken := queue.take_batch():
        raw = make_batch(0, (0,) * 64, taken).raw
        sizes.append(len(taken))
        assert len(raw) <= limits.batch_bytes_max
    assert sizes == [(limits.batch_bytes_max - BATCH_OVERHEAD_MAX) // (len(waiting[0].raw) + 4)] * 2 + [2]


def test_the_largest_envelope_always_fits():
    limits = Limits(operation_bytes_max=1000, envelope_bytes_max=2024, batch_bytes_max=2024 + 4096)
    queue = RequestQueue(limits)
    size = limits.envelope_bytes_max - len(envelopes(100, 1, b"")[0].raw)
    envelope = envelopes(100, 1, bytes(size))[0]
    assert len(envelope.raw) == limits.envelope_bytes_max
    queue.add(envelope, 0)
    assert queue.take_batch() == [envelope]


def test_the_same_bytes_wait_once():
    queue = RequestQueue(LIMITS)
    envelope = envelopes(100, 1)[0]
    waiting = queue.add(envelope, 7)
    assert waiting is not None
    assert queue.find(envelope) is waiting
    assert queue.add(envelope, 8) is None
    assert (len(queue), list(queue)) == (1, [waiting])
    assert queue.take_batch() == [envelope]
    assert queue.add(envelope, 9) is None, "proposed, and not proposed again"
    assert not queue.unproposed
    queue.executed(envelope)
    assert empty(queue)


def test_one_client_cannot_take_all_the_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_PER_CLIENT_MAX", 3)
    monkeypatch.setattr(rooms, "REQUESTS_MAX", 5)
    queue = RequestQueue(LIMITS)
    flood = envelopes(100, 4)
    for envelope in flood[:3]:
        queue.add(envelope, 0)
    with pytest.raises(QueueFullError, match="this client"):
        queue.add(flood[3], 0)
    for envelope in envelopes(101, 2):
        queue.add(envelope, 0)
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(envelopes(102, 1)[0], 0)
    assert len(queue) == 5
    assert queue.add(flood[0], 0) is None, "known ones are no news, even when it is full"
    queue.executed(flood[0])
    queue.add(flood[3], 0)


def test_bytes_are_bounded_per_client_and_over_all(monkeypatch: pytest.MonkeyPatch):
    size = len(envelopes(100, 1)[0].raw)
    monkeypatch.setattr(rooms, "REQUEST_BYTES_PER_CLIENT_MAX", 2 * size)
    monkeypatch.setattr(rooms, "REQUEST_BYTES_MAX", 3 * size)
    queue = RequestQueue(LIMITS)
    mine = envelopes(100, 3)
    queue.add(mine[0], 0)
    queue.add(mine[1], 0)
    with pytest.raises(QueueFullError, match="this client"):
        queue.add(mine[2], 0)
    queue.add(envelopes(101, 1)[0], 0)
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(envelopes(102, 1)[0], 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "REQUESTS_MAX": 12,
        "REQUESTS_PER_CLIENT_MAX": 6,
        "REQUEST_BYTES_MAX": 400 * 1024,
        "REQUEST_BYTES_PER_CLIENT_MAX": 200 * 1024,
        "OPERATOR_REQUESTS_MAX": 2,
        "OPERATOR_BYTES_MAX": 50 * 1024,
    }.items():
        monkeypatch.setattr(rooms, name, value)
    monkeypatch.setattr(claims, "CLAIMS_PER_CLIENT_MAX", 1)


def test_two_keys_cannot_shut_others_out(small: None):
    queue = RequestQueue(LIMITS)
    floods = [envelopes(client, 6) for client in (100, 101)]
    for envelope in (*floods[0], *floods[1]):
        queue.add(envelope, 0, source=envelope.client[1])
    for client in range(102, 108):
        queue.add(envelopes(client, 1)[0], 0)
        assert len(queue) == 12
    gone = queue.take_gone()
    assert [waiting.source for waiting in gone] == [100, 101, 100, 101, 100, 101], "of whoever has most, in turn"
    assert [waiting.envelope for waiting in gone[::2]] == floods[0][:2:-1], "the newest first"
    assert queue.take_gone() == []
    assert {len(queue.of(flood[0].client)) for flood in floods} == {3}


def test_what_gives_way_is_of_somebody_who_has_more(small: None):
    queue = RequestQueue(LIMITS)
    for client in range(100, 106):
        for envelope in envelopes(client, 2):
            queue.add(envelope, 0)
    newcomer = envelopes(106, 2)
    queue.add(newcomer[0], 0)
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(newcomer[1], 0)
    assert queue.take_gone() == [], "nobody is told whose source is not known"


def test_nor_can_keys_that_take_all_bytes(small: None):
    queue = RequestQueue(LIMITS)
    large = [envelope for client in (100, 101) for envelope in envelopes(client, 2, bytes(99_000))]
    for envelope in (*large, *envelopes(102, 4)):
        queue.add(envelope, 0, source=envelope.client[1])
    queue.add(envelopes(103, 1, bytes(60_000))[0], 0)
    assert [waiting.envelope for waiting in queue.take_gone()] == [large[1]], "many small ones would not help"
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(envelopes(104, 1, bytes(199_000))[0], 0)
    assert queue.take_gone() == [], "nobody takes more than that"


def test_what_is_proposed_or_has_a_claim_does_not_give_way(small: None):
    queue = RequestQueue(Limits(batch_envelopes_max=5))
    flood = envelopes(100, 6)
    for envelope in flood:
        queue.add(envelope, 0, source=1)
    assert queue.take_batch() == flood[:5]
    for client in range(101, 107):
        queue.add(envelopes(client, 1)[0], 0)
    queue.add(envelopes(107, 1)[0], 0)
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(envelopes(108, 1)[0], 0)
    assert [waiting.envelope for waiting in queue.take_gone()] == [flood[5]]
    queue.begin_view(())
    queue.add(envelopes(108, 1)[0], 0)
    waiting = queue.find(flood[0])
    assert waiting is not None
    assert waiting.claimed_ms is not None


def test_operators_have_room_in_reserve(small: None):
    operator = FakeClient(G, 120)
    queue = RequestQueue(LIMITS, [operator.key])
    for client in range(100, 112):
        queue.add(envelopes(client, 1, bytes(30_000))[0], 0)
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(envelopes(112, 1)[0], 0)
    for _ in range(2):
        queue.add(operator.operations(kv.put(b"k", bytes(20_000))), 0)
    with pytest.raises(QueueFullError, match="this replica"):
        queue.add(operator.operations(kv.get(b"k")), 0)
    assert len(queue) == 14


def test_a_new_view_proposes_anew_what_is_neither_executed_nor_carried():
    queue = RequestQueue(Limits(batch_envelopes_max=2))
    executed, carried, lost, young = envelopes(100, 4)
    for since, envelope in enumerate((executed, carried, lost, young)):
        queue.add(envelope, since)
    assert queue.take_batch() == [executed, carried]
    assert queue.executed(executed) == 0
    queue.begin_view([carried])
    assert queue.take_batch() == [lost, young]
    assert queue.take_batch() == []
    oldest = queue.oldest()
    assert oldest is not None
    assert oldest.envelope == carried
    for envelope in (carried, lost, young):
        queue.executed(envelope)
    assert empty(queue)


def test_executing_what_never_waited_changes_nothing():
    queue = RequestQueue(LIMITS)
    a, b = envelopes(100, 2)
    queue.executed(a)
    queue.add(a, 0)
    queue.executed(b)
    assert queue.find(a) is not None
    assert queue.find(b) is None


@examples(80)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "relayed by 1", "relayed by 2", "take", "execute", "view"]), st.integers(0, 11)
        ),
        max_size=60,
    )
)
def test_nothing_leaks_in_any_order_of_events(steps: list[tuple[str, int]]):
    pool = [envelope for client in (100, 101, 102) for envelope in envelopes(client, 4)]
    queue = RequestQueue(LIMITS)
    proposed: list[Envelope] = []
    for now, (step, which) in enumerate(steps):
        if step == "add":
            queue.add(pool[which], now)
        elif step.startswith("relayed"):
            queue.add(pool[which], now, peer=int(step[-1]))
        elif step == "take":
            proposed += queue.take_batch()
        elif step == "execute":
            queue.executed(pool[which])
        else:
            queue.begin_view([pool[which]])
        assert sum(map(len, queue._by_client.values())) == len(queue)
        for peer in (rooms.DIRECT, 1, 2):
            sizes = [len(w.envelope.raw) for w in queue if w.peer == peer]
            assert (queue._rooms.count[peer], queue._rooms.bytes[peer]) == (len(sizes), sum(sizes))
        assert len(queue.claims) == sum(w.claimed_ms is not None for w in queue) == len(queue)
        assert sum(map(len, queue._line.lanes.values())) == sum(not w.proposed for w in queue)
        assert all(queue._line.lanes.values())
        assert queue._line.turns.keys() == queue._line.lanes.keys()
        assert queue._under_way == sum(cost_of(w.envelope) for w in queue if w.proposed)
    for envelope in pool:
        queue.executed(envelope)
    assert empty(queue)
