"""Replicas that order nothing but speak the real wire protocol over real TLS on loopback, well or badly."""

import asyncio
import json
import os
from collections import Counter
from pathlib import Path

from client import Client
from client.connection import Timing
from client.events import Settings
from replica.apps.kv import KeyValue
from replica.cluster.clusterfile import ClusterFile
from replica.cluster.home import TLS_CERTIFICATE_NAME, TLS_KEY_NAME
from replica.cluster.keys import ClientKey, load_client_key
from replica.cluster.provision import init_cluster, replica_folder_name
from replica.core.batch import make_batch
from replica.core.envelope import (
    Administer,
    Envelope,
    Status,
    decode_envelope,
    decode_reply,
    encode_administer,
)
from replica.core.execution import Executor
from replica.wire.frames import MessageProtocol
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    WIRE_VERSION,
    AskMembers,
    Challenge,
    ClientHello,
    MembersShown,
    Message,
    Notice,
    Ping,
    Pong,
    Reply,
    Request,
    StaleRead,
    StaleResult,
    StatusQuery,
    StatusReport,
    Welcome,
)
from replica.wire.tls import server_context

FAST = Timing(connect_s=2.0, backoff_first_s=0.01, backoff_s_max=0.05, ping_after_s=0.05, dead_after_s=0.3)


class FakeConnection(MessageProtocol):
    """What a client is connected to. Its replica's `manners` say how it behaves."""

    def __init__(self, replica):
        super().__init__()
        self.replica = replica
        self.client = b""

    def opened(self):
        self.replica.connections.add(self)
        if "mute" not in self.replica.manners:
            cluster = self.replica.fleet.cluster
            cluster_id = bytes(32) if "other-cluster" in self.replica.manners else cluster.cluster_id
            number = 9 if "other-number" in self.replica.manners else self.replica.number
            self.send(Challenge(WIRE_VERSION, cluster_id, cluster.digest, number, os.urandom(32)))

    def closed(self, reason):
        self.replica.connections.discard(self)

    def message_received(self, message: Message):
        self.replica.seen[type(message).__name__] += 1
        fleet, manners = self.replica.fleet, self.replica.manners
        if isinstance(message, ClientHello):
            self.frame_bytes_max = FRAME_BYTES_MAX
            self.client = message.public_key
            self.send(Welcome(fleet.executor.slot, fleet.view))
            if "babble" in manners:
                self._flush()
                self.transport.write(b"\x00\x00\x00\x05hello")
            elif "oversized" in manners:
                self._flush()
                self.transport.write(b"\xff\xff\xff\xff")
            elif "welcome-twice" in manners:
                self.send(Welcome(0, 0))
        elif "half-open" in manners:
            return
        elif isinstance(message, Ping):
            self.send(Pong(message.number))
        elif isinstance(message, Request) and "busy" in manners:
            self.send(Notice("busy", "this client is over its quota: 5 operations per second"))
        elif isinstance(message, Request) and "silent" not in manners:
            fleet.on_request(self.replica, message.envelope)
        elif isinstance(message, AskMembers):
            self.send(MembersShown(message.number, self.replica.links.get(message.number, b"")))
        elif isinstance(message, StaleRead):
            result = fleet.executor.peek(message.operation, self.client)
            value = b"\x01lie" if "liar" in manners else result.value
            self.send(StaleResult(message.query, result.status, fleet.executor.slot, value))
        elif isinstance(message, StatusQuery):
            self.send(StatusReport(message.query, json.dumps(fleet.report(self.replica.number)).encode()))


class FakeReplica:
    def __init__(self, fleet, number, place=None):
        self.fleet, self.number = fleet, number
        self.place = place or fleet.cluster.replicas[number]
        self.links: dict[int, bytes] = {}  # by the list that they follow
        self.manners: set[str] = set()
        self.seen: Counter[str] = Counter()
        self.connections: set[FakeConnection] = set()
        self.server = None

    async def start(self, folder=None):
        place = self.place
        folder = folder or self.fleet.directory / replica_folder_name(self.number)
        context = server_context(folder / TLS_CERTIFICATE_NAME, folder / TLS_KEY_NAME, [place.certificate_der])
        self.server = await asyncio.get_running_loop().create_server(
            lambda: FakeConnection(self), place.host, place.port, ssl=context
        )

    async def stop(self):
        if self.server is not None:
            # Not closed before everything is gone: what is being accepted then would be left half made.
            for listener in self.server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            await until(self._all_gone)
            self.server.close()
            self.server = None

    def _all_gone(self):
        """Drop every connection; those too whose TLS handshake is not over, of which no protocol knows yet."""
        for connection in list(self.connections):
            connection.abort()
        accepting = [task for task in asyncio.all_tasks() if "_accept_connection2" in repr(task.get_coro())]
        return not accepting and self.server._active_count == 0


class FakeFleet:
    """One shared state that every honest replica answers from; whoever gets a request has it executed."""

    def __init__(self, directory: Path, cluster: ClusterFile):
        self.directory, self.cluster = directory, cluster
        self.executor = Executor(KeyValue(), cluster.genesis)
        self.view = 0
        self.executed = 0
        self.replicas = [FakeReplica(self, place.number) for place in cluster.replicas]
        self._replies: dict[bytes, bytes] = {}

    def on_request(self, receiver, raw):
        reply = self._replies.get(raw)
        if reply is None:
            envelope: Envelope = decode_envelope(raw, self.cluster.cluster_id, self.cluster.genesis.limits)
            (executed,) = self.executor.execute(self.executor.slot + 1, make_batch(0, (), [envelope]))
            reply = self._replies[raw] = executed.raw
            self.executed += 1
        for replica in self.replicas:
            if not replica.manners & {"silent", "half-open"}:
                sent = reply[:-1] + bytes([reply[-1] ^ 1]) if "liar" in replica.manners else reply
                for connection in replica.connections:
                    connection.send(Reply(sent))

    def order(self, command) -> None:
        """Have a command about clients executed."""
        genesis, cluster_id = self.cluster.genesis, self.cluster.cluster_id
        raw = encode_administer(cluster_id, genesis.operators[0], Administer(2**63, command.encode())) + bytes(64)
        batch = make_batch(0, (), [decode_envelope(raw, cluster_id, genesis.limits)])
        (executed,) = self.executor.execute(self.executor.slot + 1, batch)
        assert decode_reply(executed.raw, genesis.limits).status is Status.OK

    def report(self, number):
        log = {"backend": "software", "protects": "in process: not against this host's own program"}
        return {"number": number, "view": self.view, "executed": self.executor.slot, "stable": 0, "log": log}

    async def __aenter__(self):
        for replica in self.replicas:
            await replica.start()
        return self

    async def __aexit__(self, *_):
        for replica in self.replicas:
            await replica.stop()

    def client(self, deadline_s=5.0, timing=FAST, **settings) -> Client:
        key: ClientKey = load_client_key(self.directory / "client")
        chosen = Settings(**{"patience_ms": 50, "opening_wait_ms": 50, **settings})
        return Client(self.cluster, key, deadline_s=deadline_s, settings=chosen, timing=timing)


def make_fleet(directory: Path, f: int = 1) -> FakeFleet:
    return FakeFleet(directory, init_cluster(directory, f=f, base_port=0))


async def until(condition, seconds=10.0):
    """Let the loop run until `condition()` holds; TimeoutError if it never does."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - any condition at all
            await asyncio.sleep(0.001)


__all__ = ["FAST", "FakeFleet", "FakeReplica", "make_fleet", "until"]
