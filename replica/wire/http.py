"""JSON over HTTP: what the gateway's door and a replica's own have in common.

Every answer that is not a stream, metrics or a raw value is one JSON object; an error is {"error": {"code", "message"}}
with a fitting status.

Listeners are plain and bounded, and made for loopback: a page in a browser on the same machine must not reach them, so
on loopback the host that a request names must be loopback's own, and nothing that changes anything is a "simple
request" in the sense of CORS. (A request that names no host is no browser's.) When all places are taken, the connection
that has been idle longest makes room, so that probes are answered whoever holds connections open.
"""

import asyncio
import base64
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from replica.cluster.clusterfile import is_loopback
from replica.wire.changes import Change, Position, parse_position
from replica.wire.httpconnection import HttpConnection

CONNECTIONS_MAX: Final = 256
BODY_BYTES_MAX: Final = 2 * 1024 * 1024
# Within which a request's body must have come.
BODY_S: Final = 30.0
SHUTDOWN_S: Final = 1.0
# A stream of events says something at least so often.
COMFORT_S: Final = 15.0
STREAMS_MAX: Final = 128
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_FLAGS: Final = {"1": True, "true": True, "0": False, "false": False}
_ABSOLUTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpError(Exception):
    """A request is not carried out: status, a code for programs, a text for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def answer(content: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON object as a response."""
    return web.Response(
        text=json.dumps(content, allow_nan=False) + "\n",
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


def show(name: str, data: bytes) -> dict[str, str]:
    """Return bytes as a JSON field: `name` if they are UTF-8, else `name`_base64."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def number_in(request: web.Request, name: str, default: int, highest: int) -> int:
    """Return a number of the query, from 1 to `highest`; HttpError if it is none."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= highest):
        raise HttpError(400, "bad-request", f"{name} must be a number from 1 to {highest}")
    return int(text)


def flag_in(request: web.Request, name: str) -> bool:
    """Return whether a flag of the query is set; HttpError if it says neither yes nor no."""
    text = request.query.get(name, "0")
    if text not in _FLAGS:
        raise HttpError(400, "bad-request", f"{name} must be 1 or true, 0 or false")
    return _FLAGS[text]


def key_in(request: web.Request, prefix: str) -> bytes:
    """Return the key after `prefix` in the path, as it was sent: decoded, what is not UTF-8 would be lost.

    A route matches the decoded path, so a path that does not begin with `prefix` as it was sent is an HttpError: what
    is cut off it would be another key.
    """
    path = _target(request).partition("?")[0]
    if not path.startswith(prefix):
        raise HttpError(400, "bad-request", f"write {prefix} in the path as it stands, without percent-encoding")
    if "#" in path:
        raise HttpError(400, "bad-request", "a # in a key is sent as %23")
    return unquote_to_bytes(path.removeprefix(prefix))


def _target(request: web.Request) -> str:
    """Return path and query as they were sent; the absolute form (RFC 9112, section 3.2.2) names the host before."""
    return _ABSOLUTE.sub("", request.raw_path, count=1)


def bytes_in(request: web.Request, name: str) -> bytes:
    """Return a byte string of the query, nothing if it is not there."""
    query = dict(parse_qsl(_target(request).partition("?")[2], keep_blank_values=True, encoding="latin-1"))
    return query.get(name, "").encode("latin-1", "replace")


def metrics(collector: Collector) -> web.Response:
    """Return what a collector finds now, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return web.Response(body=generate_latest(registry), headers={"Content-Type": METRICS_TYPE})


class HttpDoor:
    """A plain HTTP listener. `routes` as aiohttp has them; `public` are paths that need no password.

    as_error gives an expected exception its answer; failed is told of one that nobody expected.
    """

    def __init__(
        self,
        routes: list[web.RouteDef],
        *,
        password: bytes | None = None,
        public: frozenset[str] = frozenset(),
        as_error: Callable[[Exception], HttpError | None] = lambda _: None,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._password, self._public = password, public
        self._as_error, self._failed = as_error, failed
        self._hosts: set[str] = set()
        self._server: asyncio.Server | None = None

        @web.middleware
        async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._around(request, handler)

        application = web.Application(middlewares=[around], client_max_size=BODY_BYTES_MAX)
        application.add_routes(routes)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S)
        # Oldest first.
        self.connections: dict[HttpConnection, None] = {}

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; return the address. OSError if it cannot be had."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._protocol, host, port)
        except BaseException:
            await self._runner.cleanup()
            raise
        address = self._server.sockets[0].getsockname()
        # Who listens for other machines cannot know by which names they call this one.
        self._hosts = {host.lower(), "localhost", "127.0.0.1", "::1"} if is_loopback(host) else set()
        return address[0], address[1]

    async def close(self) -> None:
        """Stop listening and end what is under way."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    def _protocol(self) -> asyncio.Protocol:
        server = self._runner.server
        if server is None or not self._has_place():
            return _NoPlace()
        connection = HttpConnection(server, _no_request, lambda lost: self.connections.pop(lost, None))
        self.connections[connection] = None
        return connection

    def _has_place(self) -> bool:
        """Say whether there is a place, after dropping the connection that has been idle longest if need be."""
        if len(self.connections) < CONNECTIONS_MAX:
            return True
        idle = [
            (one.idle_since, place, one) for place, one in enumerate(self.connections) if one.idle_since is not None
        ]
        if not idle:
            return False
        oldest = min(idle)[2]
        del self.connections[oldest]
        oldest.drop()
        return True

    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn whatever goes wrong into a JSON error."""
        connection = request.protocol
        try:
            if isinstance(connection, HttpConnection):
                connection.head_came()
            self._check(request)
            await _read_body(request)
            if isinstance(connection, HttpConnection):
                connection.request_came()
            return await handler(request)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - it is said, and the door goes on
            failure = self._failure(error, request)
            content = {"error": {"code": failure.code, "message": str(failure)}}
            return answer(content, failure.status, failure.headers)

    def _failure(self, error: Exception, request: web.Request) -> HttpError:
        if isinstance(error, HttpError):
            return error
        if isinstance(error, web.HTTPException):
            # aiohttp's own: no such path, method not allowed, body too large.
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            code = error.reason.lower().replace(" ", "-")
            return HttpError(error.status, code, f"{request.method} {request.path}: {error.reason}", headers)
        known = self._as_error(error)
        if known is not None:
            return known
        self._failed(error)
        return HttpError(500, "internal", f"this program failed: {type(error).__name__}; see its log")

    def _check(self, request: web.Request) -> None:
        if self._password is None:
            absolute = _ABSOLUTE.match(request.raw_path)
            named = [*request.headers.getall("Host", ()), *(absolute.groups() if absolute else ())]
            if self._hosts and any(_host_of(name) not in self._hosts for name in named):
                raise HttpError(403, "wrong-host", "this is not the host that this listener answers for")
        elif request.path not in self._public:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, b"Bearer " + self._password):
                raise HttpError(
                    401, "unauthorized", "say Authorization: Bearer PASSWORD", {"WWW-Authenticate": "Bearer"}
                )


class _NoPlace(asyncio.Protocol):
    """What a connection gets for which there is no place."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        transport.close()


def _no_request(status: int, message: str) -> web.Response:
    return answer({"error": {"code": "bad-request" if status < 500 else "internal", "message": message}}, status)


async def _read_body(request: web.Request) -> None:
    """Have the body come before anything is done; handlers find it read. HttpError if it does not come in time."""
    try:
        async with asyncio.timeout(BODY_S):
            await request.read()
    except TimeoutError:
        raise HttpError(408, "request-timeout", f"the body did not come within {BODY_S:.0f} s") from None
    except web.RequestPayloadError:
        raise HttpError(400, "bad-request", "the body does not come as its headers say") from None


def _host_of(header: str) -> str:
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def change_event(change: Change) -> tuple[str, dict[str, object]]:
    """Return name and data of the event that tells a change."""
    data: dict[str, object] = {"slot": change.slot, **show("key", change.key)}
    if change.value is not None:
        data.update(show("value", change.value))
    elif not change.deleted:
        data["size"] = change.size
    return ("delete" if change.deleted else "put"), data


def resume_at(request: web.Request) -> Position | None:
    """Return where a stream of events resumes: Last-Event-ID, or `after` in the query; None: from now on."""
    text = request.headers.get("Last-Event-ID") or request.query.get("after")
    if not text:
        return None
    try:
        return parse_position(text)
    except ValueError as error:
        raise HttpError(400, "bad-request", str(error)) from None


class EventStream:
    """A response of server-sent events (HTML standard, section 9.2): an id, a name, a JSON object as data."""

    def __init__(self) -> None:
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
        )

    async def begin(self, request: web.Request) -> web.StreamResponse:
        """Send the headers; return the response, to be returned from the handler."""
        await self.response.prepare(request)
        await self.response.write(b": open\n\n")
        return self.response

    async def send(self, name: str, data: Mapping[str, Any], event_id: str = "") -> None:
        """Send an event, and wait until there is room for more."""
        identity = f"id: {event_id}\n" if event_id else ""
        text = f"{identity}event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
        await self.response.write(text.encode())

    async def comfort(self) -> None:
        """Send a comment, so that a dead connection is noticed on both sides."""
        await self.response.write(b": \n\n")
