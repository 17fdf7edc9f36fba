"""What a batch answers of what waits: found without looking through everything that waits."""

import pytest

from replica.apps import kv
from replica.apps.kv import KeyValue
from replica.core import execution
from replica.core.batch import make_batch
from replica.core.envelope import SessionId
from replica.core.execution import Executor
from replica.core.replays import answered_by
from replica.core.requests import RequestQueue
from tests.replica.core.harness import FakeClient, make_genesis

G = make_genesis()


@pytest.fixture
def looked(monkeypatch):
    """The numbers that are looked up, in order."""
    numbers, answer = [], execution.answer

    def counted(session, number, slot):
        numbers.append(number)
        return answer(session, number, slot)

    monkeypatch.setattr(execution, "answer", counted)
    return numbers


class Waits:
    """An executor with two sessions of one client, and a queue."""

    def __init__(self) -> None:
        self.executor, self.requests = Executor(KeyValue(), G), RequestQueue(G.limits)
        self.client = FakeClient(G)
        self.executor.execute(1, make_batch(0, (), [self.client.open(bytes([i]) * 16) for i in range(2)]))

    def asks(self, *operations, session=0, first=1, acknowledged=1):
        self.client.session = SessionId(1, session)
        return self.client.operations(*operations, first=first, acknowledged=acknowledged)

    def waits(self, *operations, session=0, first=1):
        return self.requests.add(self.asks(*operations, session=session, first=first), 0)

    def executes(self, *envelopes):
        batch = make_batch(0, (), list(envelopes))
        self.executor.execute(self.executor.slot + 1, batch)
        return answered_by(batch, self.requests, self.executor)


def test_numbers_that_have_an_answer_are_looked_at_once(looked):
    world = Waits()
    waiting = [world.waits(kv.get(b"%d" % i), *[kv.get(b"k")] * 15) for i in range(4)]
    for number in range(1, 16):
        looked.clear()
        assert world.executes(world.asks(kv.get(b"x"), first=number)) == []
        # Once to execute it; then each that waits, this number and the first without an answer.
        assert looked == [number, *[number, number + 1] * 4]
    assert world.executes(world.asks(kv.get(b"x"), first=16)) == waiting


def test_what_a_batch_acknowledged_is_answered():
    world = Waits()
    waiting = world.waits(kv.get(b"k"), kv.get(b"k"))
    assert world.executes(world.asks(kv.get(b"x"), first=3, acknowledged=3)) == [waiting]


def test_other_sessions_and_other_kinds_are_not_looked_at(looked):
    world = Waits()
    world.waits(kv.get(b"k"), session=0)
    world.requests.add(world.client.open(b"n" * 16), 0)
    looked.clear()
    assert world.executes(world.asks(kv.get(b"x"), session=1)) == []
    assert looked == [1], "the one executed"


def test_an_opening_that_another_envelope_executed_is_answered():
    world = Waits()
    waiting = world.requests.add(world.client.open(b"n" * 16, void_after=9), 0)
    assert world.executes(world.client.open(b"n" * 16, void_after=8)) == [waiting]
