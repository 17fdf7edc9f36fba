"""One client key that asks for too much: links between correct replicas stand, and others have their turn."""

import pytest

from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.core import requests as requests_module
from replica.core.envelope import Operations, SessionId, encode_operations
from replica.wire.messages import Notice, Request, Welcome
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire


def signed(cluster, key, session, first, *operations, acknowledged=1):
    """Return an envelope of this key's, as it is sent."""
    content = Operations(session, first, acknowledged, operations)
    raw = encode_operations(cluster.cluster.cluster_id, key.public_key, content)
    return raw + key.sign(raw)


def readers(node):
    """Return the connections on which other replicas read this one's log."""
    return [connection for connection in node.server._connections if connection.role == "replica"]


@on_loop
async def test_a_full_queue_ends_no_link_between_correct_replicas(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests_module, "REQUESTS_PER_CLIENT_MAX", 4)
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        nodes, key = cluster.nodes, ClientKey.generate()
        # The primary hears no votes: what it has, waits, and what backups relay finds its queue full.
        for link in nodes[0].links.values():
            link.hold_back(pause=True)
        async with Wire(cluster, 0) as at_primary, Wire(cluster, 1) as at_backup:
            for number, wire in enumerate((at_primary, at_backup)):
                assert isinstance(await wire.hello(key), Welcome)
                put = kv.put(b"k", b"v")
                wire.send(*(Request(signed(cluster, key, SessionId(1, 0), 1 + 10 * number + i, put)) for i in range(4)))
            await until(lambda: nodes[0].core.refusals["relay-queue-full"], "a relay that finds no room")
            at_primary.send(Request(signed(cluster, key, SessionId(1, 0), 90, put)))
            assert (await at_primary.receive(Notice)).code == "busy", "its own client is told"
        assert all(link.is_up for node in nodes.values() for link in node.links.values())
        assert not any(
            node.refusals[why] for node in nodes.values() for why in ("unexpected-message", "notice-from-peer")
        )


@on_loop
async def test_a_link_bears_a_notice(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        for connection in readers(cluster.nodes[0]):
            connection.send(Notice("busy", "nothing that concerns a reader"))
        await until(lambda: all(cluster.nodes[i].refusals["notice-from-peer"] for i in (1, 2)), "the notices read")
        assert all(cluster.nodes[i].links[0].is_up for i in (1, 2))
        assert not any(cluster.nodes[i].refusals["unexpected-message"] for i in (1, 2))
        async with cluster.client() as client:
            await client.put("k", "v")
