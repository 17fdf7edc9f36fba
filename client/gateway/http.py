"""HTTP/JSON on the gateway: probes, metrics, status, and keys, each answer one that f+1 replicas gave alike.

    GET    /livez                        this program runs
    GET    /readyz                       503 unless f+1 replicas are connected
    GET    /metrics                      for Prometheus
    GET    /status                       every replica's own word on itself
    GET    /v1/keys?prefix=&after=&limit=&values=1     a page of keys
    GET    /v1/keys/KEY                  a value, as JSON; with Accept: application/octet-stream its bytes
    PUT    /v1/keys/KEY?if=absent        the body is the value; if= absent or present is a condition (412 if not so)
    DELETE /v1/keys/KEY
    GET    /v1/watch?prefix=&after=      changes as server-sent events; Last-Event-ID resumes like `after`
    POST   /v1/incr/KEY                  the body is {"amount": 1}, its type application/json

KEY is percent-encoded and may be any bytes. Errors say in `code` what is known of the operation: "undecided" (504) is
unknown, "not-executed" (503) and "refused" (409, it changed nothing) are certain.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Final

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from client.errors import ClientError, NotAllowed, NotExecuted, NotPermitted, OperationFailed, Undecided
from client.gateway.server import Gateway
from client.watch import Watch, WatchAhead, WatchGone
from replica.apps import kv, kv_groups
from replica.wire.http import (
    COMFORT_S,
    STREAMS_MAX,
    EventStream,
    HttpDoor,
    HttpError,
    answer,
    bytes_in,
    change_event,
    flag_in,
    key_in,
    metrics,
    number_in,
    resume_at,
    show,
)

STATUS_S: Final = 2.0
LIST_LIMIT: Final = 100
BINARY: Final = "application/octet-stream"
PUBLIC: Final = frozenset({"/livez", "/readyz"})
_KEYS = "/v1/keys/"
_INCR = "/v1/incr/"


class GatewayHttp:
    """The handlers; `door` is the listener."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._streams = 0
        routes = [
            web.get("/livez", self._livez),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._metrics),
            web.get("/status", self._status),
            web.get("/v1/keys", self._list),
            web.get(_KEYS + "{key:.+}", self._get),
            web.put(_KEYS + "{key:.+}", self._put),
            web.delete(_KEYS + "{key:.+}", self._delete),
            web.post(_INCR + "{key:.+}", self._incr),
            web.get("/v1/watch", self._watch),
        ]
        self.door = HttpDoor(
            routes, password=gateway.password, public=PUBLIC, as_error=_as_error, failed=_print_exception
        )

    async def _livez(self, _: web.Request) -> web.Response:
        return answer({"live": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        gateway = self._gateway
        content = {
            "ready": gateway.ready,
            "connected": sorted(gateway.client.driver.core.connected),
            "needed": gateway.client.cluster.genesis.quorum,
        }
        return answer(content, 200 if gateway.ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return metrics(_Metrics(self._gateway))

    async def _status(self, _: web.Request) -> web.Response:
        client = self._gateway.client
        found = await client.status(deadline_s=STATUS_S)
        replicas = [
            {"number": one.number, "address": one.address, "reachable": one.reachable, "problem": one.problem}
            | {"report": one.report}
            for one in found
        ]
        genesis = client.cluster.genesis
        content = {
            "cluster": genesis.name,
            "cluster_id": client.cluster.cluster_id.hex(),
            "needed": genesis.quorum,
            "serves": sum(one.reachable for one in found) >= genesis.quorum,
            "gateway": self._gateway.info(),
            "replicas": replicas,
        }
        return answer(content)

    async def _list(self, request: web.Request) -> web.Response:
        prefix, after = bytes_in(request, "prefix"), bytes_in(request, "after")
        limit = number_in(request, "limit", LIST_LIMIT, kv.SCAN_LIMIT_MAX)
        if flag_in(request, "values"):
            page = kv.read_scan(await self._gateway.client.execute(kv.scan(prefix, limit, after)))
            items = [{**show("key", key), **show("value", value)} for key, value in page.items]
            return answer({"keys": items, "more": page.more})
        found = kv_groups.read_keys(await self._gateway.client.execute(kv_groups.keys(prefix, limit, after)))
        return answer({"keys": [show("key", key) for key in found.keys], "more": found.more})

    async def _get(self, request: web.Request) -> web.Response:
        key = key_in(request, _KEYS)
        value = kv.read_value(await self._gateway.client.execute(kv.get(key)))
        if value is None:
            raise HttpError(404, "absent", "this key has no value")
        if BINARY in request.headers.get("Accept", ""):
            return web.Response(body=value, content_type=BINARY, headers={"X-Content-Type-Options": "nosniff"})
        return answer({**show("key", key), **show("value", value)})

    async def _put(self, request: web.Request) -> web.Response:
        key, value = key_in(request, _KEYS), await request.read()
        conditions = {"": 0, "absent": kv_groups.IF_ABSENT, "present": kv_groups.IF_PRESENT}
        wanted = request.query.get("if", "")
        if wanted not in conditions:
            raise HttpError(400, "bad-request", "if must be absent or present")
        if not wanted:
            replaced = kv.read_flag(await self._gateway.client.execute(kv.put(key, value)))
            return answer({**show("key", key), "replaced": replaced}, 200 if replaced else 201)
        operation = kv_groups.set_key(key, value, conditions[wanted])
        if not kv_groups.read_set(await self._gateway.client.execute(operation)).done:
            raise HttpError(412, "condition", f"the key is not {wanted}; nothing was changed")
        replaced = wanted == "present"
        return answer({**show("key", key), "replaced": replaced}, 200 if replaced else 201)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= STREAMS_MAX:
            raise HttpError(503, "too-many-streams", f"{STREAMS_MAX} streams are open already", {"Retry-After": "5"})
        self._streams += 1
        try:
            async with self._gateway.client.watch(bytes_in(request, "prefix"), after=resume_at(request)) as changes:
                return await self._tell(request, changes)
        finally:
            self._streams -= 1

    async def _tell(self, request: web.Request, changes: Watch) -> web.StreamResponse:
        stream = EventStream()
        response = await stream.begin(request)
        await stream.send("begin", {"position": str(changes.position)}, str(changes.position))
        coming = asyncio.ensure_future(anext(changes))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=COMFORT_S)
                if not done:
                    await stream.comfort()
                    continue
                try:
                    change = coming.result()
                except StopAsyncIteration:
                    return response
                except ClientError as error:
                    failure = _as_error(error) or HttpError(500, "failed", str(error))
                    await stream.send("error", {"code": failure.code, "message": str(failure)})
                    return response
                await stream.send(*change_event(change), str(change.position))
                coming = asyncio.ensure_future(anext(changes))
        finally:
            coming.cancel()

    async def _delete(self, request: web.Request) -> web.Response:
        key = key_in(request, _KEYS)
        if not kv.read_flag(await self._gateway.client.execute(kv.delete(key))):
            raise HttpError(404, "absent", "this key has no value")
        return answer({**show("key", key), "deleted": True})

    async def _incr(self, request: web.Request) -> web.Response:
        # This type makes a browser ask before it sends the request for a page of another origin.
        if request.content_type != "application/json":
            raise HttpError(415, "unsupported-media-type", 'send application/json, such as {"amount": 1}')
        try:
            body = json.loads(await request.read() or b"{}")
        except (ValueError, RecursionError):
            raise HttpError(400, "bad-request", "the body is not JSON") from None
        amount = body.get("amount", 1) if isinstance(body, dict) else None
        if type(amount) is not int:
            raise HttpError(400, "bad-request", "amount must be a whole number")
        key = key_in(request, _INCR)
        number = kv.read_number(await self._gateway.client.execute(kv.incr(key, amount)))
        return answer({**show("key", key), "number": number})


def _as_error(error: Exception) -> HttpError | None:
    if isinstance(error, WatchGone):
        return HttpError(410, "gone", str(error))
    if isinstance(error, WatchAhead):
        return HttpError(400, "ahead", str(error))
    if isinstance(error, NotPermitted):
        return HttpError(403, "not-permitted", error.reason)
    if isinstance(error, NotAllowed):
        return HttpError(403, "not-allowed", str(error))
    if isinstance(error, OperationFailed):
        return HttpError(409, "refused", error.reason)
    if isinstance(error, Undecided):
        return HttpError(504, "undecided", str(error))
    if isinstance(error, NotExecuted):
        return HttpError(503, "not-executed", str(error), {"Retry-After": "1"})
    if isinstance(error, ClientError):
        return HttpError(500, "failed", str(error))
    if isinstance(error, ValueError):
        return HttpError(400, "bad-request", str(error))
    return None


def _print_exception(error: Exception) -> None:
    traceback.print_exception(error, file=sys.stderr)


class _Metrics(Collector):
    """What the gateway counted, as metrics."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        gateway = self._gateway
        gauges: dict[str, tuple[str, Any]] = {
            "trustlog_gateway_ready": ("1 if f+1 replicas are connected", int(gateway.ready)),
            "trustlog_gateway_connections": ("Open connections in Redis' protocol", gateway.connected),
            "trustlog_gateway_buffered_bytes": ("Commands that wait in the gateway", gateway.buffered),
            "trustlog_gateway_replicas_connected": (
                "Replicas that are connected",
                len(gateway.client.driver.core.connected),
            ),
            "trustlog_gateway_uptime_seconds": ("Seconds since the start", gateway.uptime_s()),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, label, counts in (
            ("trustlog_gateway_commands", "Commands in Redis' protocol, by name", "command", gateway.commands),
            ("trustlog_gateway_failures", "Operations without a result, by what is known", "outcome", gateway.outcomes),
            ("trustlog_gateway_refusals", "What was refused, by reason", "reason", gateway.refusals),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for key, count in sorted(counts.items()):
                family.add_metric([key], count)
            yield family
