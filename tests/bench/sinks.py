"""What the load generator puts into: a client of each system, and no more of it than a put needs.

Every system is spoken to by what costs the generator least: etcd by gRPC with the bytes of the request written by hand,
Redis by hiredis, trustlog by its own client.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import hiredis

from client.api import Client
from client.measure import ClientSink, with_more_clients

OPENING_S = 60.0
PUT_METHOD = "/etcdserverpb.KV/Put"
# In a PutResponse the header is field 1 and always there.
RESPONSE_HEADER = b"\x0a"


def varint(number: int) -> bytes:
    """Encode a number as Protocol Buffers do: seven bits to a byte, the lowest first."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def put_request(key: bytes, value: bytes) -> bytes:
    """etcdserverpb.PutRequest: field 1 is the key, field 2 the value, both of wire type 2."""
    return b"\x0a" + varint(len(key)) + key + b"\x12" + varint(len(value)) + value


class EtcdSink:
    """One gRPC channel, that is one connection, to one etcd server."""

    def __init__(self, address: str) -> None:
        import grpc.aio

        # Without its own pool channels to the same address would share one connection.
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._put = self.channel.unary_unary(PUT_METHOD)

    def put(self, key, value):
        return self._put(put_request(key, value))

    @staticmethod
    def check(outcome):
        if not outcome.startswith(RESPONSE_HEADER):
            raise RuntimeError(f"etcd answered {outcome!r}")


class RedisSink(asyncio.Protocol):
    """One connection; several puts under way are pipelined, and sent with one write per turn of the loop."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future] = deque()
        self._to_send: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._transport = None

    def connection_made(self, transport):
        self._transport = transport

    def connection_lost(self, exc):
        for outcome in self._waiting:
            if not outcome.done():
                outcome.set_exception(exc or ConnectionError("Redis ended the connection"))

    def data_received(self, data):
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not False:
            self._waiting.popleft().set_result(answer)

    def put(self, key, value):
        if not self._to_send:
            self._loop.call_soon(self._flush)
        self._to_send.append(hiredis.pack_command((b"SET", key, value)))
        outcome = self._loop.create_future()
        self._waiting.append(outcome)
        return outcome

    def _flush(self):
        self._transport.write(b"".join(self._to_send))
        self._to_send.clear()

    def close(self):
        self._transport.close()

    @staticmethod
    def check(outcome):
        if outcome != b"OK":
            raise RuntimeError(f"Redis answered {outcome!r}")


@asynccontextmanager
async def open_sinks(system: str, where: str, count: int) -> AsyncIterator[list]:
    """Connect `count` times to a system, each time anew; `where`: its address, or a cluster's directory."""
    if system == "etcd":
        sinks = [EtcdSink(where) for _ in range(count)]
        try:
            yield sinks
        finally:
            for sink in sinks:
                await sink.channel.close()
    elif system == "redis":
        host, _, port = where.rpartition(":")
        loop = asyncio.get_running_loop()
        opened = [await loop.create_connection(RedisSink, host, int(port)) for _ in range(count)]
        try:
            yield [sink for _, sink in opened]
        finally:
            for _, sink in opened:
                sink.close()
    else:
        async with (
            Client.from_dir(Path(where), deadline_s=OPENING_S) as first,
            with_more_clients(first, count, OPENING_S) as clients,
        ):
            yield [ClientSink(client) for client in clients]
