"""One HTTP connection: aiohttp's, with deadlines for what may otherwise take a place for ever.

A request's head must come whole within HEAD_S, its body within BODY_S (replica.wire.http), and answers must be taken
within UNREAD_S. Until a request is whole, and between requests, a connection is idle: nothing is lost if it is dropped
for another one.
"""

import asyncio
from collections.abc import Callable
from typing import Final, cast

from aiohttp import web

# From the first byte of a head, or from the connection's begin, to the head's end.
HEAD_S: Final = 10.0
# For how long a connection is kept without a request.
KEEP_ALIVE_S: Final = 75.0
# For how long more than the transport's buffer may wait to be taken.
UNREAD_S: Final = 60.0
LINE_BYTES_MAX: Final = 16 * 1024


class HttpConnection(web.RequestHandler):
    """One connection. `error` makes the answer to what is no request; `lost` is called when the connection is gone."""

    def __init__(
        self,
        server: web.Server,
        error: Callable[[int, str], web.StreamResponse],
        lost: Callable[["HttpConnection"], None],
    ) -> None:
        self._clock = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=self._clock,
            keepalive_timeout=KEEP_ALIVE_S,
            access_log=None,  # type: ignore[arg-type] # None is "no access log"
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
        )
        self._error, self._lost = error, lost
        self._tcp: asyncio.Transport | None = None
        self._answering = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self.idle_since: float | None = self._clock.time()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._tcp = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self._stop_head_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)
        self._lost(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if data and not self._answering:
            self._expect_head()
        super().data_received(data)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._unread_timer = self._clock.call_later(UNREAD_S, self.drop)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._stop_unread_timer()
        super().resume_writing()

    # aiohttp's side

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's interface
    ) -> web.StreamResponse:
        """Answer what is no request, or what failed where nobody expected it; the connection ends after it."""
        if status >= 500:
            self.log_exception("HTTP request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = self._error(status, "the request is not HTTP, or a line of it is too long or not encoded")
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the rest of an answer; then the connection is idle."""
        self._stop_head_timer()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answering = False
            self.idle_since = self._clock.time()

    # The door's side

    def head_came(self) -> None:
        """Take in that a request's head is whole; its body may be missing."""
        self._answering = True
        self._stop_head_timer()

    def request_came(self) -> None:
        """Take in that a request is whole: from now on it may be carried out, and is not given up for another."""
        self.idle_since = None

    def drop(self) -> None:
        """End the connection at once."""
        if self._tcp is not None:
            self._tcp.abort()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self._clock.call_later(HEAD_S, self.drop)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
