"""One TCP connection of the Redis gateway: bytes in, bytes out, within bounds.

Reading pauses while commands wait to be carried out, and answering while answers wait to be read. A command must come
whole, and answers must be taken, within a deadline.
"""

import asyncio
from typing import TYPE_CHECKING, Final, cast

from client.gateway.resp import CommandReader, ErrorReply, ProtocolError, encode
from client.gateway.session import Session

if TYPE_CHECKING:
    from client.gateway.server import Gateway

# With commands at hand, reading pauses above this.
READ_AHEAD: Final = 256 * 1024
WRITE_BUFFER_HIGH: Final = 1024 * 1024
# After commands of so many bytes, other connections have their turn.
TURN_BYTES: Final = 8 * 1024


class RespConnection(asyncio.Protocol):
    """A connection; a task of its own carries its commands out."""

    def __init__(self, gateway: "Gateway") -> None:
        self.gateway = gateway
        self.session: Session | None = None
        # Since when a command has not come whole, and since when answers have not been taken; None: not so.
        self.incomplete_since: float | None = None
        self.unread_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = CommandReader()
        self._counted = 0
        self._paused = self._busy = self._ended_reading = False
        self._closing: asyncio.TimerHandle | None = None
        self._more = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._worker: asyncio.Task[None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH)
        number = self.gateway.admit(self)
        if number is None:
            self.end("ERR max number of clients reached")
            return
        self.session = Session(self.gateway, number, self._write, authenticated=self.gateway.password is None)
        self._worker = self._loop.create_task(self._work(self.session))
        self._worker.add_done_callback(self._ended)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's interface
        """See asyncio.Protocol. What is under way is carried out; nobody hears of it."""
        self._transport = None
        if self._closing is not None:
            self._closing.cancel()
        self._more.set()
        self._writable.set()
        self.gateway.count_buffered(-self._counted)
        self._counted = 0
        self.gateway.leave(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._transport is None or self._transport.is_closing():
            return
        self._reader.feed(data)
        if not self._count():
            self.gateway.refusals["buffers-full"] += 1
            self.end("ERR this gateway's buffers are full; try again later")
            return
        self._more.set()
        if len(self._reader) > READ_AHEAD and self._busy and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """See asyncio.Protocol. What was said is answered before the connection ends."""
        self._ended_reading = True
        self._more.set()
        return True

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self.unread_since = self._loop.time()
        self._writable.clear()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self.unread_since = None
        self._writable.set()

    # The gateway's side

    def end(self, error: str = "") -> None:
        """Close the connection, after an error if there is one."""
        if self._transport is not None and not self._transport.is_closing():
            if error:
                protocol = self.session.protocol if self.session else 2
                self._transport.write(encode(ErrorReply(error), protocol))
            self._transport.close()
            # Closed is what is left only when it has been taken.
            self._closing = self._loop.call_later(self.gateway.limits.unread_s, self.abort)

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def worker(self) -> asyncio.Task[None] | None:
        """The task that carries the commands out, if the connection was admitted."""
        return self._worker

    # The worker

    async def _work(self, session: Session) -> None:
        handled = 0
        while self._transport is not None and not session.closing:
            self._more.clear()
            is_last = self._ended_reading
            self._reader.stranger = not session.authenticated
            try:
                words = self._reader.next()
            except ProtocolError as error:
                await session.idle()
                self.gateway.refusals["protocol"] += 1
                self.end(f"ERR {error}")
                return
            if words is not None:
                self._busy, self.incomplete_since = True, None
                await session.handle(words)
                handled += sum(map(len, words))
                if handled > TURN_BYTES:
                    handled = 0
                    await asyncio.sleep(0)
                continue
            await session.idle()
            if is_last:
                break
            await self._wait_for_more()
        await session.idle()
        self.end()

    async def _wait_for_more(self) -> None:
        self._count()
        self._busy = False
        if len(self._reader) and self.incomplete_since is None:
            self.incomplete_since = self._loop.time()
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        await self._more.wait()

    async def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)
        await self._writable.wait()
        # Answers that cost nothing must not keep everybody else from their turn.
        await asyncio.sleep(0)

    def _count(self) -> bool:
        """Tell the gateway how much is buffered here; say whether that is too much for all together."""
        transaction = self.session.transaction if self.session else None
        now = len(self._reader) + (transaction.size if transaction else 0)
        fits = self.gateway.count_buffered(now - self._counted)
        self._counted = now
        return fits

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        # A mistake in this program, or a cluster that answers what is no key-value store's.
        self.gateway.failed(task.exception())
        self.end("ERR the gateway failed; whether this was executed is unknown; see its log")
