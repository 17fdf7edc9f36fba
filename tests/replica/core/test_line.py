"""The line: what is costly waits for few rounds and is paid for afterwards, and a new view takes nothing back."""

from __future__ import annotations

from itertools import pairwise

import pytest

from replica.apps import kv
from replica.core import line as module
from replica.core.envelope import Envelope
from replica.core.genesis import Limits
from replica.core.line import TURN_MAX, cost_of
from replica.core.patience import Patience
from replica.core.requests import RequestQueue
from replica.core.rooms import REQUESTS_PER_CLIENT_MAX
from tests.replica.core.harness import FakeClient, make_genesis

G = make_genesis()
ONE_BY_ONE = Limits(batch_envelopes_max=1)


def sent(client: int, count: int, operations: int = 1) -> list[Envelope]:
    source = FakeClient(G, client)
    return [source.operations(*[kv.get(b"k")] * operations) for _ in range(count)]


def queue_of(*envelopes: Envelope, limits: Limits = ONE_BY_ONE) -> RequestQueue:
    queue = RequestQueue(limits)
    for envelope in envelopes:
        queue.add(envelope, 0)
    return queue


def owner_of_next(queue: RequestQueue) -> int:
    """Serve and execute the next request; return whose it was."""
    (envelope,) = queue.take_batch()
    queue.executed(envelope)
    return envelope.client[1]


def served(queue: RequestQueue, count: int) -> list[int]:
    return [owner_of_next(queue) for _ in range(count)]


def test_what_is_costly_waits_for_few_rounds():
    queue = queue_of(*sent(101, 200), *sent(100, 1, 1024))
    assert served(queue, TURN_MAX + 1).index(100) in {TURN_MAX - 1, TURN_MAX}


def test_and_is_paid_for_afterwards():
    queue = queue_of(*sent(100, 2, 100), *sent(100, 1), *sent(101, 250))
    order = served(queue, 230)
    costly = [place for place, owner in enumerate(order) if owner == 100]
    # Each owes the rest of its 100 rounds, and the small one comes when both are paid for.
    assert [later - earlier for earlier, later in pairwise(costly)] == [101, 38]
    assert costly[0] in {TURN_MAX - 1, TURN_MAX}


def test_a_lane_owes_also_while_nothing_of_its_waits():
    queue = queue_of(*sent(100, 1, 100), *sent(101, 250))
    assert 100 in served(queue, TURN_MAX + 1)
    queue.add(FakeClient(G, 100).operations(kv.get(b"k"), first=1000), 0)
    assert served(queue, 60).index(100) in range(100 - TURN_MAX - 1, 100 - TURN_MAX + 2)
    # Also if it had waited and was executed otherwise, in another primary's batch.
    queue = queue_of(*sent(100, 1, 100), *sent(101, 250))
    assert 100 in served(queue, TURN_MAX + 1)
    one, two = (FakeClient(G, 100).operations(kv.get(b"k"), first=first) for first in (1000, 1001))
    queue.add(one, 0)
    queue.executed(one)
    queue.add(two, 0)
    assert served(queue, 60).index(100) >= 100 - TURN_MAX - 1


def test_what_is_owed_is_remembered_of_few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DEBTS_MAX", 3)
    queue = queue_of(*[envelope for client in range(6) for envelope in sent(100 + client, 1, 200)])
    served(queue, 6)
    assert [lane[0][1] for lane in queue._line.debts] == [103, 104, 105]
    queue.add(sent(104, 1)[0], 0)
    assert [lane[0][1] for lane in queue._line.debts] == [103, 105]


def test_over_time_everybody_is_served_alike():
    queue = queue_of(*sent(100, 20, 300), *sent(101, 60, 100), *sent(102, 250, 24))
    units = dict.fromkeys((100, 101, 102), 0)
    while all(queue.of(FakeClient(G, client).key) for client in units):
        (envelope,) = queue.take_batch()
        queue.executed(envelope)
        units[envelope.client[1]] += cost_of(envelope)
        assert max(units.values()) - min(units.values()) <= 2 * 300
    assert min(units.values()) > 5000


def test_a_new_view_takes_back_nothing_that_was_waited_for():
    queue = queue_of(*sent(100, 1, 60), *sent(101, 200))
    order: list[int] = []
    for _ in range(12):
        order += served(queue, 10)
        queue.begin_view(())
    assert order.index(100) in {59, 60}


def test_nor_what_is_owed():
    queue = queue_of(*sent(100, 2, 100), *sent(101, 250))
    assert 100 in served(queue, TURN_MAX + 1)
    queue.begin_view(())
    assert 100 not in served(queue, 90)


def test_what_is_to_be_served_again_is_not_paid_for_twice():
    queue = queue_of(*sent(100, 1, 100), *sent(101, 250))
    while queue.take_batch()[0].client[1] != 100:
        pass
    queue.begin_view(())
    assert served(queue, TURN_MAX + 1).index(100) in {TURN_MAX - 1, TURN_MAX}


@pytest.mark.parametrize(("rate", "floods"), [(2000, 20), (4000, 28), (10_000, 28)])
def test_floods_of_small_envelopes_do_not_keep_a_costly_one_waiting_from_view_to_view(rate: int, floods: int):
    """Executing takes its time; when the costly one has waited for a patience, the next view begins."""
    queue, patience, now, left = RequestQueue(Limits()), Patience(), 1.0, 0
    sources = [FakeClient(G, 110 + i) for i in range(floods)]
    costly = sent(100, 1, 1024)[0]
    under_way: list[list[Envelope]] = []

    def refill() -> None:
        for source in sources:
            while len(queue.of(source.key)) < REQUESTS_PER_CLIENT_MAX:
                queue.add(source.operations(kv.get(b"k")), int(now))

    refill()
    queue.add(costly, 1)
    patience.executed(None)
    patience.enter_view(1)
    while queue.find(costly) is not None:
        while batch := queue.take_batch():
            under_way.append(batch)
            refill()
        batch = under_way.pop(0)
        now += 1000 * sum(map(cost_of, batch)) / rate
        for envelope in batch:
            patience.executed(queue.executed(envelope, int(now)))
        refill()
        if queue.find(costly) is not None and patience.has_ended(1, int(now)):
            left += 1
            assert left <= 3
            patience.enter_view(int(now))
            queue.begin_view(envelope for batch in under_way for envelope in batch)
    assert now < 8000
