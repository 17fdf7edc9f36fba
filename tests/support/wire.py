"""A dialler that speaks the wire protocol as badly as a test wants."""

import asyncio
import contextlib
import socket
import ssl
import struct

from replica.cluster.home import TLS_CERTIFICATE_NAME, TLS_KEY_NAME
from replica.cluster.keys import ClientKey
from replica.wire.handshake import connect_statement
from replica.wire.messages import WIRE_VERSION, ClientHello, Message, ReplicaHello, decode_message, encode_frame
from replica.wire.tls import client_context


class Wire(contextlib.AbstractAsyncContextManager):
    """One connection to replica `number` of a cluster (of `tests.support`); TLS unless told otherwise."""

    def __init__(self, cluster, number=0, *, tls=True, as_replica=None, context=None) -> None:
        self.cluster, self.number = cluster, number
        self.place = cluster.cluster.replicas[number]
        self._context: ssl.SSLContext | None = None
        if tls:
            folder = None if as_replica is None else cluster.folder(as_replica)
            own = (None, None) if folder is None else (folder / TLS_CERTIFICATE_NAME, folder / TLS_KEY_NAME)
            self._context = context or client_context(self.place.certificate_der, *own)
        self.challenge = None

    async def __aenter__(self):
        name = {"server_hostname": ""} if self._context else {}
        self.reader, self.writer = await asyncio.open_connection(
            self.place.host, self.place.port, ssl=self._context, **name
        )
        return self

    async def __aexit__(self, *_):
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def frame(self, body: bytes) -> None:
        """Send a body with its right length."""
        self.writer.write(struct.pack(">I", len(body)) + body)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.writer.write(encode_frame(message))

    async def receive(self, kind=None) -> Message:
        """Return the next message, or the next of a kind; IncompleteReadError at the end."""
        while True:
            (size,) = struct.unpack(">I", await self.reader.readexactly(4))
            message = decode_message(await self.reader.readexactly(size))
            if kind is None or isinstance(message, kind):
                return message

    async def challenged(self):
        if self.challenge is None:
            self.challenge = await self.receive()
        return self.challenge

    async def hello(
        self, key: ClientKey | None = None, *, certificate: bytes | None = None, signature=None, cluster_id=None
    ):
        """Answer the challenge as a client, and return what the replica says to that."""
        challenge = await self.challenged()
        key = key or self.cluster.key()
        signed = connect_statement(challenge, certificate or self.place.certificate_der)
        self.send(
            ClientHello(WIRE_VERSION, cluster_id or challenge.cluster_id, key.public_key, signature or key.sign(signed))
        )
        return await self.receive()

    async def replica_hello(self, number: int):
        challenge = await self.challenged()
        self.send(ReplicaHello(WIRE_VERSION, challenge.cluster_id, challenge.cluster_file_digest, number))
        return await self.receive()

    async def ended(self, seconds=10.0) -> None:
        """Wait until the replica has hung up."""
        async with asyncio.timeout(seconds):
            with contextlib.suppress(OSError, ssl.SSLError):
                while await self.reader.read(65536):
                    pass

    async def drain(self) -> None:
        with contextlib.suppress(OSError):
            await self.writer.drain()


def silent_socket(place) -> socket.socket:
    """Connect without a word and without TLS."""
    return socket.create_connection((place.host, place.port))
