"""HTTP/JSON on the gateway: every answer parses, every failure says what is known."""

import asyncio
import contextlib
import io
import json

import aiohttp
import pytest

from client.gateway.http import GatewayHttp, _as_error
from client.gateway.server import Gateway
from client.watch import Position, WatchGone
from replica.application import Right
from replica.core.clients import Allow, Permission, Revoke
from replica.wire.http import BODY_BYTES_MAX, CONNECTIONS_MAX
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio


class Caller:
    def __init__(self, session, base, door):
        self.session, self.base, self.door = session, base, door

    async def __call__(self, method, path, body=None, **headers):
        """Return status and JSON."""
        status, raw, kind = await self.raw(method, path, body, **headers)
        assert kind == "application/json", (path, kind, raw)
        return status, json.loads(raw)

    async def raw(self, method, path, body=None, **headers):
        from yarl import URL

        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(
            method, URL(self.base + path, encoded=True), data=io.BytesIO(body or b""), headers=named
        ) as found:
            return found.status, await found.read(), found.content_type


@contextlib.asynccontextmanager
async def door(fleet, password=None, deadline_s=5.0):
    async with fleet.client(deadline_s=deadline_s) as client, aiohttp.ClientSession() as session:
        served = Gateway(client, password)
        http = GatewayHttp(served)
        host, port = await http.door.start("127.0.0.1", 0)
        try:
            yield Caller(session, f"http://{host}:{port}", http.door)
        finally:
            await http.door.close()


async def test_what_the_gateways_key_may_not_do(fleet):
    async with fleet, door(fleet) as call:
        key = fleet.client().public_key
        assert (await call("PUT", "/v1/keys/a", b"one"))[0] == 201
        fleet.order(Allow(1, key, "", (Permission(Right.READ, b"a"),)))
        assert (await call("GET", "/v1/keys/a"))[0] == 200
        status, found = await call("PUT", "/v1/keys/a", b"two")
        assert (status, found["error"]["code"]) == (403, "not-permitted")
        assert found["error"]["message"] == 'this key may not write "a"'
        fleet.order(Revoke(2, key))
        assert (await call("GET", "/v1/keys/a"))[0] == 504  # it may have been executed before
        status, found = await call("GET", "/v1/keys/a")
        assert (status, found["error"]["code"]) == (403, "not-allowed")


async def test_keys(fleet):
    async with fleet, door(fleet) as call:
        assert await call("GET", "/v1/keys/a") == (
            404,
            {"error": {"code": "absent", "message": "this key has no value"}},
        )
        assert await call("PUT", "/v1/keys/a", b"one") == (201, {"key": "a", "replaced": False})
        assert await call("PUT", "/v1/keys/a", b"two") == (200, {"key": "a", "replaced": True})
        assert await call("GET", "/v1/keys/a") == (200, {"key": "a", "value": "two"})
        assert (await call("PUT", "/v1/keys/a?if=absent", b"x"))[0] == 412
        assert (await call("PUT", "/v1/keys/b?if=present", b"x"))[0] == 412
        assert await call("PUT", "/v1/keys/b?if=absent", b"x") == (201, {"key": "b", "replaced": False})
        assert await call("PUT", "/v1/keys/b?if=present", b"y") == (200, {"key": "b", "replaced": True})
        assert (await call("PUT", "/v1/keys/b?if=else", b"y"))[0] == 400
        assert await call("DELETE", "/v1/keys/b") == (200, {"key": "b", "deleted": True})
        assert (await call("DELETE", "/v1/keys/b"))[0] == 404


async def test_any_bytes_are_keys_and_values(fleet):
    async with fleet, door(fleet) as call:
        for path, shown in (
            ("/v1/keys/a%2Fb%20c", {"key": "a/b c"}),
            ("/v1/keys/a/b", {"key": "a/b"}),
            ("/v1/keys/%FF%00", {"key_base64": "/wA="}),
            ("/v1/keys/%E2%82%AC?if=absent", {"key": "€"}),
        ):
            assert await call("PUT", path, bytes(range(256))) == (201, {**shown, "replaced": False})
            status, raw, kind = await call.raw("GET", path, Accept="application/octet-stream")
            assert (status, raw, kind) == (200, bytes(range(256)), "application/octet-stream")
            assert "value_base64" in (await call("GET", path))[1]
        listed = await call("GET", "/v1/keys?limit=2")
        assert listed == (200, {"keys": [{"key": "a/b"}, {"key": "a/b c"}], "more": True})
        after = await call("GET", "/v1/keys?after=a%2Fb%20c&values=1")
        assert [sorted(item) for item in after[1]["keys"]] == [["key", "value_base64"], ["key_base64", "value_base64"]]
        assert (await call("GET", "/v1/keys?prefix=%FF"))[1]["keys"] == [{"key_base64": "/wA="}]


async def test_incr(fleet):
    async with fleet, door(fleet) as call:
        kind = {"Content_Type": "application/json"}
        assert await call("POST", "/v1/incr/n", b"", **kind) == (200, {"key": "n", "number": 1})
        assert await call("POST", "/v1/incr/n", b'{"amount": -3}', **kind) == (200, {"key": "n", "number": -2})
        # What a page of another origin may send without asking is not taken.
        assert (await call("POST", "/v1/incr/n", b"{}", Content_Type="text/plain"))[0] == 415
        for body in (b"[]", b'{"amount": 1.5}', b'{"amount": true}', b"{", b"[" * 100_000):
            assert (await call("POST", "/v1/incr/n", body, **kind))[0] == 400
        await call("PUT", "/v1/keys/n", b"text")
        status, found = await call("POST", "/v1/incr/n", b"", **kind)
        assert (status, found["error"]["code"]) == (409, "refused")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/livez", 405),
        ("GET", "/v1/keys/", 404),
        ("GET", "/v1/keys?limit=0", 400),
        ("GET", "/v1/keys?limit=100000", 400),
        ("GET", "/v1/keys/" + "k" * 5000, 400),
        ("GET", "/v1/keys/" + "k" * 40_000, 400),
    ],
)
async def test_what_is_wrong_is_said_in_json(fleet, method, path, status):
    async with fleet, door(fleet) as call:
        found = await call(method, path)
        assert found[0] == status
        assert set(found[1]["error"]) == {"code", "message"}


async def test_bodies_are_bounded(fleet):
    async with fleet, door(fleet) as call:
        status, found = await call("PUT", "/v1/keys/a", bytes(BODY_BYTES_MAX + 1))
        assert (status, found["error"]["code"]) == (413, "request-entity-too-large")
        status, found = await call("PUT", "/v1/keys/a", bytes(1024 * 1024))
        assert status in {400, 409}
        assert (await call("GET", "/v1/keys/a"))[0] == 404


async def test_probes_status_and_metrics(fleet):
    async with fleet, door(fleet) as call:
        await call("PUT", "/v1/keys/a", b"1")
        assert await call("GET", "/livez") == (200, {"live": True})
        status, ready = await call("GET", "/readyz")
        assert (status, ready["ready"], ready["needed"]) == (200, True, 2)
        _, found = await call("GET", "/status")
        assert [replica["reachable"] for replica in found["replicas"]] == [True] * 3
        assert found["serves"] is True
        code, raw, kind = await call.raw("GET", "/metrics")
        assert (code, kind) == (200, "text/plain")
        assert b"\ntrustlog_gateway_ready 1.0\n" in raw


async def test_a_dead_cluster(fleet):
    async with door(fleet, deadline_s=0.2) as call:
        assert (await call("GET", "/livez"))[0] == 200
        status, ready = await call("GET", "/readyz")
        assert (status, ready["ready"], ready["connected"]) == (503, False, [])
        status, found = await call("PUT", "/v1/keys/a", b"1")
        assert (status, found["error"]["code"]) == (503, "not-executed")
        assert (await call("GET", "/status"))[1]["serves"] is False
        assert b"\ntrustlog_gateway_ready 0.0\n" in (await call.raw("GET", "/metrics"))[1]


async def test_an_unknown_outcome(fleet):
    async with fleet, door(fleet, deadline_s=0.4) as call:
        await call("PUT", "/v1/keys/a", b"1")
        for replica in fleet.replicas:
            replica.manners.add("silent")
        status, found = await call("PUT", "/v1/keys/a", b"2")
        assert (status, found["error"]["code"]) == (504, "undecided")
        assert "outcome unknown" in found["error"]["message"]


async def test_a_password(fleet):
    async with fleet, door(fleet, password=b"secret") as call:
        assert (await call("GET", "/livez"))[0] == 200
        assert (await call("GET", "/readyz"))[0] in {200, 503}
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for path in ("/v1/keys/a", "/status", "/metrics"):
                status, found = await call("GET", path, **given)
                assert (status, found["error"]["code"]) == (401, "unauthorized")
        assert (await call("PUT", "/v1/keys/a", b"1", Authorization="Bearer secret"))[0] == 201


async def test_another_host_is_not_answered_for(fleet):
    """A page whose name leads to this machine (DNS rebinding) names its own host."""
    async with fleet, door(fleet) as call:
        assert (await call("GET", "/v1/keys", Host="evil.example"))[0] == 403
        for host in ("localhost", "localhost:8080", "[::1]:1", "127.0.0.1"):
            assert (await call("GET", "/v1/keys", Host=host))[0] == 200


async def send(call, raw):
    """Send bytes on a connection of its own, and return its two ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(call.base.rpartition(":")[2]))
    writer.write(raw)
    return reader, writer


async def say(call, raw):
    """Send bytes and return what comes until the connection ends: status and JSON."""
    reader, writer = await send(call, raw)
    found = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("verb", ["GET", "PUT", "DELETE", "POST"])
async def test_a_path_never_means_another_key(fleet, verb):
    """The absolute form, as sent through a proxy, means the same key; a prefix in another spelling is refused."""
    async with fleet, door(fleet) as call:
        prefix = "/v1/incr/" if verb == "POST" else "/v1/keys/"
        value = b"{}" if verb == "POST" else b"7"
        await call("PUT", "/v1/keys/bar", b"7")
        head = "HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        rest = f"{head}Content-Length: {len(value)}\r\n\r\n".encode() + value
        for spelled in (prefix.replace("keys", "%6beys").replace("incr", "%69ncr"), prefix.replace("v1", "v%31")):
            status, found = await say(call, f"{verb} {spelled}bar ".encode() + rest)
            assert (status, found["error"]["code"]) == (400, "bad-request"), found
        assert (await say(call, f"{verb} {prefix}bar#x ".encode() + rest))[0] == 400
        status, found = await say(call, f"{verb} http://localhost:80{prefix}bar?x=1 ".encode() + rest)
        assert (status, found["key"]) == (200, "bar")
        # Nothing else was written.
        assert [item["key"] for item in (await call("GET", "/v1/keys"))[1]["keys"]] == ["bar"] * (verb != "DELETE")
        assert (await say(call, f"{verb} http://evil.example{prefix}bar ".encode() + rest))[0] == 403
        status, found = await say(call, b"GET http://localhost/v1/keys?prefix=z HTTP/1.0\r\n\r\n")
        assert (status, found["keys"]) == (200, [])


async def test_what_is_no_request_is_answered_in_json(fleet):
    async with fleet, door(fleet) as call:
        for raw in (
            "GET /v1/keys?prefix=\u20ac HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
            b"GET /" + b"k" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        ):
            status, found = await say(call, raw)
            assert (status, set(found["error"])) == (400, {"code", "message"})
        # Probes of load balancers may name no host; a browser always does.
        assert await say(call, b"GET /livez HTTP/1.0\r\n\r\n") == (200, {"live": True})
        assert (await say(call, b"GET /livez HTTP/1.0\r\nHost:\r\n\r\n"))[0] == 403


@pytest.mark.parametrize("text", ["false", "0", "true", "1", "no", "False", "2", ""])
async def test_flags_are_yes_or_no(fleet, text):
    async with fleet, door(fleet) as call:
        await call("PUT", "/v1/keys/a", b"x")
        status, found = await call("GET", f"/v1/keys?values={text}")
        if text not in {"false", "0", "true", "1"}:
            assert (status, found["error"]["code"]) == (400, "bad-request")
        else:
            assert found["keys"] == [{"key": "a", "value": "x"} if text in {"true", "1"} else {"key": "a"}]


async def test_connections_that_say_nothing_make_room(fleet):
    async with fleet, door(fleet) as call:
        held = [await send(call, b"GET /liv") for _ in range(CONNECTIONS_MAX)]
        assert await say(call, LIVEZ) == (200, {"live": True})
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(held[0][0].read(), 10) == b""
        held[-1][1].write(LIVEZ.removeprefix(b"GET /liv"))
        assert b'{"live": true}' in await asyncio.wait_for(held[-1][0].read(), 10)
        for _, one in held:
            one.close()


async def test_connections_are_bounded(fleet, monkeypatch):
    """What is being answered does not make room."""
    monkeypatch.setattr("replica.wire.http.CONNECTIONS_MAX", 3)
    async with fleet, door(fleet) as call:
        for replica in fleet.replicas:
            replica.manners.add("silent")
        asked = [await send(call, b"GET /v1/keys/a HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(3)]
        await until(lambda: [one.idle_since for one in call.door.connections] == [None] * 3, "three are under way")
        reader, writer = await send(call, LIVEZ)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        assert len(call.door.connections) == 3
        for _, one in [*asked, (reader, writer)]:
            one.close()


async def test_a_request_must_come_whole_in_time(fleet, monkeypatch):
    monkeypatch.setattr("replica.wire.httpconnection.HEAD_S", 0.2)
    monkeypatch.setattr("replica.wire.http.BODY_S", 0.2)
    async with fleet, door(fleet) as call:
        head = b"PUT /v1/keys/a HTTP/1.1\r\nHost: localhost\r\n"
        for first, raw in ((b"", b""), (b"", head), (LIVEZ.replace(b"Connection: close\r\n", b""), head)):
            reader, writer = await send(call, first)
            if first:
                await asyncio.wait_for(reader.readuntil(b"true}\n"), 10)
            writer.write(raw)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        reader, writer = await send(call, head + b"Content-Length: 10\r\n\r\n12345")
        found = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
        assert found.startswith(b"HTTP/1.1 408")
        assert b"request-timeout" in found
        writer.close()
        assert (await call("GET", "/v1/keys/a"))[0] == 404


async def test_an_answer_that_nobody_reads_ends_its_connection(fleet, monkeypatch):
    monkeypatch.setattr("replica.wire.httpconnection.UNREAD_S", 0.2)
    async with fleet, door(fleet) as call:
        await call("PUT", "/v1/keys/a", bytes(500_000))
        get = b"GET /v1/keys/a HTTP/1.1\r\nHost: localhost\r\n\r\n"
        before = set(call.door.connections)
        reader, writer = await send(call, get * 30)
        reader._transport.pause_reading()
        await until(lambda: set(call.door.connections) - before, "the connection is there")
        await until(lambda: not set(call.door.connections) - before, "the connection has ended", 10)
        writer.close()


async def test_what_a_watch_lost_is_410():
    found = _as_error(WatchGone(Position(5), Position(90)))
    assert (found.status, found.code) == (410, "gone")
    assert "only those after 90" in str(found)


async def test_a_watch_that_cannot_begin(fleet):
    async with door(fleet, deadline_s=0.2) as call:
        status, found = await call("GET", "/v1/watch?prefix=a&after=5")
        assert (status, found["error"]["code"]) == (503, "not-executed")
        assert (await call("GET", "/v1/watch?after=x"))[0] == 400
