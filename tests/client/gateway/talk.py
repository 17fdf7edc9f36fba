"""A gateway in this process before the fake fleet, and a connection that sends bytes and reads replies."""

import asyncio
import contextlib

import hiredis

from client.gateway.server import Gateway, GatewayLimits


class Talk:
    """A connection in Redis' protocol."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self._replies = hiredis.Reader(notEnoughData=NotImplemented)

    async def __call__(self, *words):
        """Send one command and return its reply."""
        self.send(*words)
        return await self.reply()

    def send(self, *words):
        self.writer.write(hiredis.pack_command(words))

    async def reply(self):
        """Return the next reply; None if the connection ended."""
        while (found := self._replies.gets()) is NotImplemented:
            data = await asyncio.wait_for(self.reader.read(65536), 20)
            if not data:
                return None
            self._replies.feed(data)
        return found

    async def replies(self, count):
        return [await self.reply() for _ in range(count)]

    async def ended(self):
        """Wait until the other side has closed; return what came before."""
        return await asyncio.wait_for(self.reader.read(), 20)

    def close(self):
        self.writer.close()


@contextlib.asynccontextmanager
async def gateway(fleet, password=None, deadline_s=5.0, **limits):
    """Yield a gateway and a function that connects to it."""
    async with fleet.client(deadline_s=deadline_s) as client, contextlib.AsyncExitStack() as stack:
        served = Gateway(client, password, GatewayLimits(**limits))
        address = await served.start("127.0.0.1", 0)
        stack.push_async_callback(served.close)

        async def connect():
            talk = Talk(*await asyncio.open_connection(*address))
            stack.callback(talk.close)
            return talk

        yield served, connect


def text(error) -> str:
    assert isinstance(error, hiredis.ReplyError), error
    return str(error)
