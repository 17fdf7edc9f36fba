"""A replica's read-only HTTP: its own word, on its own port, plain, for probes and people.

    GET /livez                               the program runs and has not halted
    GET /readyz                              503 unless in a view, connected to a quorum and caught up; says why not
    GET /metrics                             for Prometheus
    GET /status                              as `trustlog-client status` shows it
    GET /v1/keys?prefix=&after=&limit=       keys of the state that this replica holds now
    GET /v1/keys/KEY                         a value, as JSON; with Accept: application/octet-stream its bytes
    GET /v1/watch?prefix=&after=             changes as server-sent events; Last-Event-ID resumes like `after`

Nobody says here who he is. So keys, values and changes are shown only as long as operators let everybody read
everything: where clients are listed, or one of them has permissions, it is 403, and a watch ends with `gone`.

One replica may lie and may be behind: what must be right is asked for through a client or a gateway. Nothing here
changes anything, and no answer is larger than a page of 1000 keys or a value of 1 MiB.
"""

import asyncio
from typing import TYPE_CHECKING, Final

from aiohttp import web

from replica.shell import changes
from replica.shell.changes import TURN_SLOTS_MAX, looked_to
from replica.shell.metrics import ReplicaMetrics
from replica.wire.changes import Position, decode_changes
from replica.wire.http import (
    COMFORT_S,
    STREAMS_MAX,
    EventStream,
    HttpDoor,
    HttpError,
    answer,
    bytes_in,
    change_event,
    key_in,
    metrics,
    number_in,
    resume_at,
    show,
)

if TYPE_CHECKING:
    from replica.shell.node import Node

LIST_LIMIT: Final = 100
LIST_LIMIT_MAX: Final = 1000
BINARY: Final = "application/octet-stream"
NOT_PUBLIC: Final = (
    "operators of this cluster say who may read what, and nobody says here who he is: "
    "read through a client whose key is allowed (trustlog-client get) or a gateway"
)
_KEYS = "/v1/keys/"


class ReplicaHttp:
    """The handlers; `door` is the listener."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._streams = 0
        routes = [
            web.get("/livez", self._livez),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._metrics),
            web.get("/status", self._status),
            web.get("/v1/keys", self._list),
            web.get(_KEYS + "{key:.+}", self._get),
            web.get("/v1/watch", self._watch),
        ]
        self.door = HttpDoor(routes, failed=self._failed)

    async def _livez(self, _: web.Request) -> web.Response:
        halted = self._node.core.halted
        return answer({"live": halted is None, "problem": halted}, 200 if halted is None else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        problem = self._node.readiness.problem()
        return answer({"ready": problem is None, "problem": problem}, 200 if problem is None else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return metrics(ReplicaMetrics(self._node))

    async def _status(self, _: web.Request) -> web.Response:
        return web.Response(body=self._node.status_json() + b"\n", content_type="application/json")

    async def _list(self, request: web.Request) -> web.Response:
        self._refuse_unless_public()
        prefix, after = bytes_in(request, "prefix"), bytes_in(request, "after")
        limit = number_in(request, "limit", LIST_LIMIT, LIST_LIMIT_MAX)
        found: list[dict[str, str]] = []
        more = False
        hidden = self._node.application.internal_prefix
        for key, _ in self._node.core.executor.state.scan(prefix, after or None, hidden):
            if len(found) == limit:
                more = True
                break
            found.append(show("key", key))
        return answer({"keys": found, "more": more, **self._whose_word()})

    async def _get(self, request: web.Request) -> web.Response:
        self._refuse_unless_public()
        key = key_in(request, _KEYS)
        value = None if self._is_internal(key) else self._node.core.executor.state.get(key)
        if value is None:
            raise HttpError(404, "absent", "this key has no value here")
        if BINARY in request.headers.get("Accept", ""):
            return web.Response(body=value, content_type=BINARY, headers={"X-Content-Type-Options": "nosniff"})
        return answer({**show("key", key), **show("value", value), **self._whose_word()})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self._refuse_unless_public()
        if self._streams >= STREAMS_MAX:
            raise HttpError(503, "too-many-streams", f"{STREAMS_MAX} streams are open already", {"Retry-After": "5"})
        history = self._node.watches.history
        position = resume_at(request) or Position(history.executed)
        if not history.has(position):
            raise HttpError(410, "gone", f"only changes after {history.floor} are kept; read the keys anew")
        self._streams += 1
        try:
            await self._wait_for(position)
            return await self._tell(request, bytes_in(request, "prefix"), position)
        finally:
            self._streams -= 1

    async def _wait_for(self, position: Position) -> None:
        watches = self._node.watches
        try:
            async with asyncio.timeout(changes.AHEAD_PATIENCE_S):
                while position.slot > watches.history.executed:
                    await watches.news(watches.history.executed)
        except TimeoutError:
            executed = watches.history.executed
            raise HttpError(400, "ahead", f"there is no such position: {executed} is the last slot here") from None

    async def _tell(self, request: web.Request, prefix: bytes, position: Position) -> web.StreamResponse:
        watches = self._node.watches
        stream = EventStream()
        response = await stream.begin(request)
        await stream.send("begin", {"position": str(position), **self._whose_word()}, str(position))
        looked = looked_to(position)
        while looked >= watches.history.floor:
            for slot, link in watches.history.links(position, prefix, looked):
                looked = slot
                if link is None and slot % TURN_SLOTS_MAX:
                    continue
                if link is None:
                    await asyncio.sleep(0)  # others have their turn
                    break
                for change in decode_changes(link.changes, link.end.slot, link.end):
                    if not self._is_public():
                        await stream.send("gone", {"message": NOT_PUBLIC})
                        return response
                    await stream.send(*change_event(change), str(change.position))
                position, looked = link.end, looked_to(link.end)
                # While that was sent, what comes next may have been forgotten.
                break
            else:
                try:
                    async with asyncio.timeout(COMFORT_S):
                        await watches.news(watches.history.executed)
                except TimeoutError:
                    await stream.comfort()
        await stream.send("gone", {"message": f"only changes after {watches.history.floor} are kept"})
        return response

    def _is_public(self) -> bool:
        return self._node.core.executor.clients.is_public

    def _refuse_unless_public(self) -> None:
        if not self._is_public():
            raise HttpError(403, "not-public", NOT_PUBLIC)

    def _is_internal(self, key: bytes) -> bool:
        prefix: bytes | None = self._node.application.internal_prefix
        return prefix is not None and key.startswith(prefix)

    def _whose_word(self) -> dict[str, object]:
        return {"replica": self._node.number, "executed": self._node.core.executed, "vouched_by": 1}

    def _failed(self, error: Exception) -> None:
        self._node.refusals["http-failed"] += 1
        self._node.log.error("HTTP request failed", error=f"{type(error).__name__}: {error}")
