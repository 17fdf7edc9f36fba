"""The lab's page, and what it asks for: scenarios, traces and, of a live cluster, what its replicas have said.

    GET /                          the page; /static/… its parts
    GET /api/scenarios             {scenarios: [{name, title, system}], systems: [{name, title, differs}], live}
    GET /api/trace/NAME?seed=N     a run as JSON lines (replica.lab.trace)
    GET /api/shiviz/NAME?seed=N    the same for ShiViz
    GET /api/play?system=NAME&replica=R&moves=JSON&seed=N     a visitor's play (replica.lab.play) as JSON lines
    GET /api/play/shiviz?…         the same for ShiViz
    GET /api/live                  with --attach: the cluster as it is now (replica.lab.live)

No request changes anything, and pages of other sites are answered none that costs something. Runs replace functions of
the core while they last (`replica.lab.systems`), so they take turns; the last ones are kept. The page needs nothing
from elsewhere, and its policy forbids it to ask.
"""

import asyncio
import contextlib
import signal
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from importlib.resources import files
from pathlib import Path
from typing import Final

from aiohttp import web

from replica.cluster.clusterfile import format_address
from replica.lab.live import LiveCluster
from replica.lab.play import PLAYERS, may_copy, play
from replica.lab.scenarios import SCENARIOS
from replica.lab.shiviz import shiviz
from replica.lab.systems import SYSTEMS
from replica.lab.trace import SEED_MAX, Trace
from replica.wire.http import HttpDoor, HttpError, answer
from trustlog.cli.contract import CommandError, Exit, Output

TRACES_KEPT: Final = 64
PARTS: Final = ("app.js", "breaker.js", "diagram.js", "icon.svg", "live.js", "panel.js", "style.css", "trace.js")
_TYPES: Final = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
# Drawings bring their own styles.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Runs:
    """Runs that were asked for, one at a time and off the event loop; the last TRACES_KEPT are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Trace] = OrderedDict()
        self._turn = asyncio.Lock()

    async def get(self, key: Hashable, run: Callable[[], Trace]) -> Trace:
        """Return what `run` gives, from before if it was asked for lately."""
        async with self._turn:
            if key not in self._kept:
                self._kept[key] = await asyncio.to_thread(run)
                while len(self._kept) > TRACES_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


class Lab:
    """What is served; `door` listens."""

    def __init__(self, live: LiveCluster | None = None) -> None:
        self._runs = Runs()
        self._live = live
        self.door = HttpDoor(
            [
                web.get("/", self._index),
                web.get("/static/{part}", self._part),
                web.get("/api/scenarios", self._scenarios),
                web.get("/api/trace/{name}", self._trace),
                web.get("/api/shiviz/{name}", self._shiviz),
                web.get("/api/play", self._play),
                web.get("/api/play/shiviz", self._play_shiviz),
                web.get("/api/live", self._look),
            ],
            failed=_report,
        )

    async def _index(self, _request: web.Request) -> web.Response:
        return _file("index.html")

    async def _part(self, request: web.Request) -> web.Response:
        name = request.match_info["part"]
        if name not in PARTS:
            raise HttpError(404, "not-found", f"the page has no part {name!r}")
        return _file(name)

    async def _scenarios(self, _request: web.Request) -> web.Response:
        scenarios = [{"name": s.name, "title": s.title, "system": s.system_name} for s in SCENARIOS.values()]
        systems = [
            {"name": s.name, "title": s.title, "differs": s.differs, "n": s.n(1), "may_copy": may_copy(s)}
            for s in SYSTEMS.values()
        ]
        return answer({"scenarios": scenarios, "systems": systems, "live": self._live is not None}, headers=_HEADERS)

    async def _trace(self, request: web.Request) -> web.Response:
        return _lines(await self._run(request))

    async def _shiviz(self, request: web.Request) -> web.Response:
        return web.Response(text=shiviz(await self._run(request)), headers=_HEADERS)

    async def _play(self, request: web.Request) -> web.Response:
        return _lines(await self._run_play(request))

    async def _play_shiviz(self, request: web.Request) -> web.Response:
        return web.Response(text=shiviz(await self._run_play(request)), headers=_HEADERS)

    async def _look(self, request: web.Request) -> web.Response:
        _refuse_other_sites(request)
        if self._live is None:
            raise HttpError(404, "not-found", "no cluster is attached; see: trustlog-replica lab serve --help")
        return answer(await self._live.look(), headers=_HEADERS)

    async def _run_play(self, request: web.Request) -> Trace:
        _refuse_other_sites(request)
        name, moves = request.query.get("system", ""), request.query.get("moves", "")
        player, seed = request.query.get("replica", ""), _seed(request)
        if name not in SYSTEMS:
            raise HttpError(404, "not-found", f"there is no system {name!r}")
        if player not in map(str, PLAYERS):
            raise HttpError(400, "bad-request", "you can play replica 0 or 1")
        try:
            return await self._runs.get(
                (name, player, moves, seed), lambda: play(SYSTEMS[name], int(player), moves, seed)
            )
        except ValueError as error:
            raise HttpError(400, "bad-request", str(error)) from error

    async def _run(self, request: web.Request) -> Trace:
        _refuse_other_sites(request)
        name = request.match_info["name"]
        if name not in SCENARIOS:
            raise HttpError(404, "not-found", f"there is no scenario {name!r}; see: trustlog-replica lab list")
        seed = _seed(request)
        return await self._runs.get((name, seed), lambda: SCENARIOS[name].run(seed))


def _refuse_other_sites(request: web.Request) -> None:
    """Run nothing because another page says so: it could not read the answer, but could keep this machine busy."""
    if request.headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"}:
        raise HttpError(403, "other-site", "only the lab's own page, or a person, may ask for this")


def _report(error: Exception) -> None:
    """Say what nobody expected: the answer only says that there was something."""
    sys.stderr.write("".join(traceback.format_exception(error)))


def _seed(request: web.Request) -> int:
    text = request.query.get("seed", "1")
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(SEED_MAX)) and int(text) <= SEED_MAX):
        raise HttpError(400, "bad-request", f"the seed must be a number from 0 to {SEED_MAX}")
    return int(text)


def _lines(trace: Trace) -> web.Response:
    return web.Response(text=trace.json_lines(), content_type="application/x-ndjson", headers=_HEADERS)


def _file(name: str) -> web.Response:
    content = files("replica.lab").joinpath("page", name).read_bytes()
    kind = _TYPES[name.rpartition(".")[2]]
    return web.Response(body=content, content_type=kind, charset="utf-8", headers=_HEADERS)


async def serve(host: str, port: int, attach: Path | None, output: Output) -> None:
    """Serve until SIGINT or SIGTERM. CommandError: the address cannot be had; ConfigError: `attach` is no cluster's."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        live = None if attach is None else await stack.enter_async_context(LiveCluster(attach))
        door = Lab(live).door
        try:
            at = await door.start(host, port)
        except OSError as error:
            raise CommandError(
                f"cannot listen at {format_address(host, port)}: {error.strerror or error}",
                "choose another port with --port; 0 takes any that is free",
                Exit.USAGE,
                code="address",
            ) from error
        stack.push_async_callback(door.close)
        where = f"http://{format_address(*at)}/"
        output.result({"event": "listening", "url": where}, [f"the lab is at {where}", "Ctrl-C ends it."])
        sys.stdout.flush()
        await stop.wait()
