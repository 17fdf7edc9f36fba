"""A replica's read-only HTTP, and when it calls itself ready; three nodes in this loop."""

import asyncio
import contextlib
import json

import aiohttp
from yarl import URL

from replica.application import Right
from replica.core.clients import Allow, Mode, Permission, Revoke, SetMode
from replica.shell.http import ReplicaHttp
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until


class Caller:
    def __init__(self, session, base):
        self.session, self.base = session, base

    async def raw(self, path, method="GET", **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, URL(self.base + path, encoded=True), headers=named) as found:
            return found.status, await found.read()

    async def __call__(self, path, method="GET", **headers):
        status, raw = await self.raw(path, method, **headers)
        return status, json.loads(raw)


@contextlib.asynccontextmanager
async def door(node):
    http = ReplicaHttp(node).door
    host, port = await http.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        try:
            yield Caller(session, f"http://{host}:{port}")
        finally:
            await http.close()


async def absolute(call, path):
    """Return the value at a path that is asked for as through a proxy."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(call.base.rpartition(":")[2]))
    writer.write(f"GET http://localhost{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    found = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return json.loads(found.partition(b"\r\n\r\n")[2])["value"]


def test_keys_status_and_metrics(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client, door(nodes.nodes[1]) as call:
                await client.put("a/b", "1")
                await client.put(b"\xff\x00", bytes(range(256)))
                await client.put("c", "x")
                await nodes.wait_quiet()
                status, found = await call("/v1/keys/a%2Fb")
                assert (status, found["value"], found["replica"], found["vouched_by"]) == (200, "1", 1, 1)
                assert (await call("/v1/keys/%FF%00"))[1]["key_base64"] == "/wA="
                binary = await call.raw("/v1/keys/%FF%00", Accept="application/octet-stream")
                assert binary == (200, bytes(range(256)))
                assert (await call("/v1/keys/none"))[0] == 404
                # A prefix in another spelling would otherwise be part of the key.
                await client.put("/v1/%6beys/c", "y")
                await client.put("/v1/keys/c", "y")
                assert (await call("/v1/%6beys/c"))[0] == 400
                assert await absolute(call, "/v1/keys/c") == "x"
                assert (await client.delete("/v1/%6beys/c"), await client.delete("/v1/keys/c")) == (True, True)
                await nodes.wait_quiet()
                listed = (await call("/v1/keys?limit=2"))[1]
                assert (listed["keys"], listed["more"]) == ([{"key": "a/b"}, {"key": "c"}], True)
                assert (await call("/v1/keys?after=c"))[1]["keys"] == [{"key_base64": "/wA="}]
                assert (await call("/v1/keys?prefix=%FF"))[1]["keys"] == [{"key_base64": "/wA="}]
                assert (await call("/v1/keys?limit=x"))[0] == 400
                assert (await call("/status"))[1]["replica"] == 1
                text = (await call.raw("/metrics"))[1]
                assert b"\ntrustlog_keys 3.0\n" in text
                assert b'trustlog_log_trusted{log="0",verdict="trusted"} 1.0' in text

    use()


def test_nothing_can_be_changed_and_nobody_else_is_answered_for(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start(0)
            async with door(nodes.nodes[0]) as call:
                for method in ("PUT", "POST", "DELETE", "PATCH"):
                    status, found = await call("/v1/keys/a", method)
                    assert (status, found["error"]["code"]) == (405, "method-not-allowed")
                assert (await call("/nothing"))[0] == 404
                assert (await call("/status", Host="evil.example"))[0] == 403

    use()


def test_the_stores_own_records_are_not_shown(tmp_path):
    from replica.apps import kv_groups
    from replica.apps.kv_layout import RESERVED

    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client, door(nodes.nodes[0]) as call:
                await client.put("k", "1")
                await client.execute(kv_groups.versions([b"k"]))
                await nodes.wait_quiet()
                own = [key for key, _ in nodes.nodes[0].core.executor.state.scan(RESERVED)]
                assert own
                assert (await call("/v1/keys"))[1]["keys"] == [{"key": "k"}]
                path = "/v1/keys/" + "".join(f"%{byte:02X}" for byte in own[0])
                assert (await call(path))[0] == 404

    use()


def test_ready_means_open_connected_and_caught_up(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start(0)
            async with door(nodes.nodes[0]) as call:
                assert (await call("/livez"))[0] == 200
                status, found = await call("/readyz")
                assert (status, found["ready"]) == (503, False)
                assert found["problem"]
                nodes.start(1)

                async def becomes(wanted, words=""):
                    status, found = await call("/readyz")
                    assert (status == 200) is (found["problem"] is None)
                    return status == wanted and words in (found["problem"] or "")

                await until(lambda: becomes(200), "ready with one other")
                # It hears that a peer holds what it has not read itself: twice, as what was said last may be too new.
                node = nodes.nodes[0]
                ahead = tuple((index + 1000, head) for index, head in node.core.heads())
                for _ in range(2):
                    node.readiness.heard(1, ahead)
                assert await becomes(503, "caught up with 0 other replicas, 1 are needed")
                await nodes.stop(1)
                await until(lambda: becomes(503, "0 other replicas are connected"), "not ready alone")

    use()


def test_a_peer_that_claims_too_much_does_not_make_a_replica_unready(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            node = nodes.nodes[0]
            await until(lambda: node.readiness.problem() is None, "ready")
            await until(lambda: len(node.readiness._heads) == 2, "both were heard")
            node.readiness._heads[2].clear()
            node.readiness.heard(2, tuple((2**60, bytes(32)) for _ in range(3)))
            assert node.readiness.problem() is None

    use()


async def events(response, count):
    """The next events of a stream: (name, data, id)."""
    found, event = [], {}
    while len(found) < count:
        line = (await asyncio.wait_for(response.content.readline(), 20)).decode().rstrip("\n")
        name, _, value = line.partition(": ")
        if name in {"id", "event", "data"}:
            event[name] = value
        elif not line and event:
            found.append((event["event"], json.loads(event["data"]), event.get("id")))
            event = {}
    return found


def test_changes_as_server_sent_events(tmp_path, monkeypatch):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client, door(nodes.nodes[1]) as call:
                await client.put("other", "x")
                url = call.base + "/v1/watch?prefix=k"
                async with call.session.get(url) as response:
                    assert response.content_type == "text/event-stream"
                    assert [name for name, _, _ in await events(response, 1)] == ["begin"]
                    await client.put("k1", "1")
                    await client.put("other", "y")
                    await client.put("k2", bytes([255]))
                    await client.delete("k1")
                    found = await events(response, 3)
                kinds = [(name, data.get("key"), data.get("value")) for name, data, _ in found]
                assert kinds == [("put", "k1", "1"), ("put", "k2", None), ("delete", "k1", None)]
                assert found[1][1]["value_base64"] == "/w=="
                async with call.session.get(url, headers={"Last-Event-ID": found[0][2]}) as response:
                    assert (await events(response, 3))[1:] == found[1:]
                assert (await call("/v1/watch?after=x"))[0] == 400
                monkeypatch.setattr("replica.shell.changes.AHEAD_PATIENCE_S", 0.1)
                status, ahead = await call("/v1/watch?after=1000000")
                assert (status, ahead["error"]["code"]) == (400, "ahead")
                watches = nodes.nodes[1].watches
                watches.begin(watches.history.executed)
                status, gone = await call("/v1/watch?after=0")
                assert (status, gone["error"]["code"]) == (410, "gone")

    use()


def test_a_stream_whose_next_changes_are_forgotten_says_so(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client, door(nodes.nodes[0]) as call:
                await client.put("k", "1")
                async with call.session.get(call.base + "/v1/watch") as response:
                    await events(response, 1)
                    nodes.nodes[0].watches.begin(nodes.nodes[0].core.executed + 1000)
                    assert [name for name, _, _ in await events(response, 1)] == ["gone"]

    use()


def test_keys_are_shown_to_strangers_only_while_everybody_may_read_everything(tmp_path):
    key = bytes([4]) + bytes(64)
    somebody = [SetMode(4, Mode.LISTED), Allow(4, key, "", (Permission(Right.READ, b"a"),))]

    async def refuses(nodes, command):
        policy = nodes.nodes[0].core.executor.clients
        everybody = [SetMode(1, Mode.OPEN), Allow(2, nodes.key().public_key), Revoke(3, key)]
        async with nodes.client() as client, door(nodes.nodes[0]) as call:
            await client.put("k", "1")
            await nodes.wait_quiet()
            for other in everybody:
                policy._apply(other, 1)
                assert [(await call(path))[0] for path in ("/v1/keys", "/v1/keys/k")] == [200, 200]
            async with call.session.get(call.base + "/v1/watch") as response:
                await client.put("k", "shown")
                assert [name for name, _, _ in await events(response, 2)] == ["begin", "put"]
                policy._apply(command, 1)
                await client.put("k", "hidden")
                assert [name for name, _, _ in await events(response, 1)] == ["gone"]
            for path in ("/v1/keys", "/v1/keys/k", "/v1/keys/none", "/v1/watch"):
                status, found = await call(path)
                assert (status, found["error"]["code"]) == (403, "not-public")
                assert "trustlog-client get" in found["error"]["message"]
            assert (await call("/livez"))[0] == (await call("/status"))[0] == 200

    @on_loop
    async def use():
        for number, command in enumerate(somebody):
            async with Nodes(tmp_path / str(number)) as nodes:
                nodes.start()
                await refuses(nodes, command)

    use()
