"""Places for clients' connections: few keys cannot take all of them, and an operator always gets in."""

from __future__ import annotations

import contextlib

from replica.cluster.keys import ClientKey, load_client_key
from replica.cluster.provision import OPERATOR_NAME
from replica.shell import accepting
from replica.wire.messages import Ping, Pong, Refused, Welcome
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire


class Door(contextlib.AsyncExitStack):
    """One node of a cluster, and connections to it."""

    def __init__(self, tmp_path, monkeypatch, **limits: int) -> None:
        super().__init__()
        for name, value in limits.items():
            monkeypatch.setattr(accepting, name, value)
        self._cluster = Nodes(tmp_path / "c")

    async def __aenter__(self):
        await super().__aenter__()
        await self.enter_async_context(self._cluster)
        self._cluster.start()
        self.node = self._cluster.nodes[0]
        return self

    async def knock(self, key: ClientKey) -> Wire | None:
        """Connect with this key; None if it is refused."""
        wire = await self.enter_async_context(Wire(self._cluster))
        said = await wire.hello(key)
        if isinstance(said, Welcome):
            return wire
        assert isinstance(said, Refused)
        assert said.code == "too-many-clients"
        return None

    async def welcomed(self, key: ClientKey, count: int = 1) -> list[Wire]:
        wires = [await self.knock(key) for _ in range(count)]
        assert all(wires)
        return [wire for wire in wires if wire is not None]

    def taken(self, key: ClientKey) -> int:
        return len(self.node.server.clients.get(key.public_key, ()))


async def gave_way(wire: Wire) -> bool:
    said = await wire.receive()
    return isinstance(said, Refused) and said.code == "too-many-clients"


@on_loop
async def test_the_newest_connection_of_who_has_most_gives_way_to_who_has_fewer(tmp_path, monkeypatch):
    async with Door(tmp_path, monkeypatch, CLIENTS_MAX=6) as door:
        many, some, new, late = (ClientKey.generate() for _ in range(4))
        first = await door.welcomed(many, 4)
        second = await door.welcomed(some, 2)
        assert await door.knock(many) is None, "who has most gets no more"
        await door.welcomed(new)
        assert await gave_way(first[3])
        assert (door.taken(many), door.node.server.client_count) == (3, 6)
        await door.welcomed(late)
        assert await gave_way(first[2])
        assert await door.knock(some) is None, "nobody has more than it would have then"
        assert door.node.refusals["client-gave-way"] == 2
        for wire in (first[0], first[1], *second):
            wire.send(Ping(1))
            assert isinstance(await wire.receive(), Pong)
    assert door.node.server.client_count == 0


@on_loop
async def test_keys_that_may_ask_for_nothing_get_few_places_and_lose_them_first(tmp_path, monkeypatch):
    async with Door(tmp_path, monkeypatch, CLIENTS_MAX=5, UNWELCOME_MAX=2) as door:
        unlisted = [ClientKey.generate() for _ in range(3)]
        monkeypatch.setattr(door.node, "is_allowed", lambda key: key not in {one.public_key for one in unlisted})
        outside = [(await door.welcomed(key))[0] for key in unlisted[:2]]
        assert await door.knock(unlisted[2]) is None
        many, new = ClientKey.generate(), ClientKey.generate()
        await door.welcomed(many, 3)
        await door.welcomed(new)
        assert await gave_way(outside[0])
        await door.welcomed(many)
        assert await gave_way(outside[1])
        assert await door.knock(unlisted[2]) is None, "who has most of those that may ask does not give way to it"
        assert door.taken(many) == 4


@on_loop
async def test_an_operator_gets_in_when_all_places_are_taken(tmp_path, monkeypatch):
    async with Door(tmp_path, monkeypatch, CLIENTS_MAX=2, OPERATOR_CONNECTIONS_MAX=1, UNWELCOME_MAX=0) as door:
        operator = load_client_key(tmp_path / "c" / OPERATOR_NAME)
        monkeypatch.setattr(door.node, "is_allowed", lambda key: key != operator.public_key)
        for _ in range(2):
            await door.welcomed(ClientKey.generate())
        assert await door.knock(ClientKey.generate()) is None
        (wire,) = await door.welcomed(operator)
        assert await door.knock(operator) is None
        wire.send(Ping(1))
        assert isinstance(await wire.receive(), Pong)


@on_loop
async def test_a_node_asks_what_was_executed_who_may_be_a_client(tmp_path, monkeypatch):
    async with Door(tmp_path, monkeypatch) as door:
        key = ClientKey.generate().public_key
        assert door.node.is_allowed(key)
        monkeypatch.setattr(door.node.core.executor.clients, "is_allowed", lambda _: False)
        assert not door.node.is_allowed(key)
        await until(lambda: door.node.server.client_count == 0, "nobody there")
