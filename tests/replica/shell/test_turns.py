"""Clients' turns of the event loop: by key, whatever number of connections a key has."""

import asyncio

import pytest

from replica.shell import turns
from replica.shell.turns import TURN_S, Turns
from tests.support.waiting import on_loop, until

FLOOD, QUIET, OTHER = b"flood", b"quiet", b"other"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Connection:
    """Has messages that take a while each, and asks before each, as a MessageProtocol does."""

    def __init__(self, world, key, cost=TURN_S) -> None:
        self.world, self.key, self.cost = world, key, cost
        self.messages, self.is_open = 0, True

    def take_turn(self) -> None:
        while self.messages and self.world.turns.has_turn(self.key, self):
            self.messages -= 1
            with self.world.turns.charged(self.key):
                self.world.clock.now += self.cost
                self.world.handled.append((self.world.turn, self.key))

    def receives(self, count) -> None:
        self.messages += count
        self.take_turn()


class World:
    def __init__(self) -> None:
        self.clock, self.handled, self.turn = Clock(), [], 0
        self.turns = Turns(self.clock)

    async def pass_turns(self, count=1) -> None:
        for _ in range(count):
            self.turn += 1
            await asyncio.sleep(0)

    def of(self, key) -> list[int]:
        return [turn for turn, whose in self.handled if whose == key]


@on_loop
async def test_while_there_is_time_messages_are_handled_as_they_come():
    world = World()
    Connection(world, FLOOD, TURN_S / 8).receives(8)
    assert world.of(FLOOD) == [0] * 8


@on_loop
async def test_a_turn_of_the_loop_takes_no_longer_than_it_may():
    world = World()
    for _ in range(10):
        Connection(world, FLOOD, TURN_S / 4).receives(4)
    await world.pass_turns(20)
    assert len(world.handled) == 40
    assert all(world.of(FLOOD).count(turn) <= 4 for turn in range(20))


@on_loop
async def test_a_key_with_many_connections_has_no_more_turns_than_one_with_one():
    world = World()
    for _ in range(100):
        Connection(world, FLOOD).receives(10)
    Connection(world, QUIET).receives(10)
    await world.pass_turns(25)
    assert len(world.of(QUIET)) == 10, "every other turn"


@on_loop
async def test_turns_are_by_time_and_not_by_messages():
    world = World()
    Connection(world, OTHER).receives(1)
    for _ in range(10):
        Connection(world, FLOOD, TURN_S).receives(10)
    Connection(world, QUIET, TURN_S / 10).receives(40)
    await world.pass_turns(12)
    assert len(world.of(QUIET)) == 40, "a tenth of a turn each, and not one for one of the flood's"


@on_loop
async def test_nobody_saves_up_what_he_did_not_use():
    world = World()
    flood = [Connection(world, FLOOD) for _ in range(10)]
    for connection in flood:
        connection.receives(100)
    await world.pass_turns(50)
    late, handled = Connection(world, QUIET), len(world.of(FLOOD))
    late.receives(100)
    await world.pass_turns(20)
    assert len(world.of(FLOOD)) - handled >= 9


@on_loop
async def test_a_connection_that_ended_is_passed_over():
    world = World()
    gone, other = Connection(world, FLOOD), Connection(world, FLOOD)
    for connection in (Connection(world, QUIET), gone, other):
        connection.receives(2)
    gone.is_open = False
    await world.pass_turns(10)
    assert (gone.messages, other.messages) == (2, 0)


@on_loop
async def test_what_keys_used_is_forgotten_when_nobody_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "KEYS_MAX", 5)
    world = World()
    flood = Connection(world, FLOOD)
    flood.receives(1000)
    for number in range(40):
        Connection(world, b"%d" % number, TURN_S / 10).receives(1)
        await world.pass_turns(2)
        assert len(world.turns._used) <= 8
    flood.messages = 0
    await until(lambda: not world.turns._used, "everything forgotten")
