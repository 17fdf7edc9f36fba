"""Hostile connections to the primary of a real cluster while a normal client works: refused by name, within bounds."""

import asyncio
import contextlib
import random
import ssl
import struct

import msgpack
import pytest

from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.core.envelope import Operations, SessionId, encode_operations
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    HANDSHAKE_FRAME_BYTES_MAX,
    Challenge,
    Fetch,
    GroupMessage,
    Notice,
    Ping,
    Pong,
    Refused,
    Reply,
    Request,
    StatusQuery,
    Subscribe,
    Welcome,
)
from tests.support.cluster import Processes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire, silent_socket

pytestmark = pytest.mark.cluster

# What all of this module's attacks together may leave behind in the replica's memory, and a normal client's wait.
RSS_GROWTH_MAX = 96 * 1024 * 1024
LATENCY_S_MAX = 5.0
STRANGERS_MAX = 256  # as in replica.shell.server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("hostile") / "c") as processes:
        processes.start_and_wait()
        yield processes


@pytest.fixture(autouse=True)
def _show_logs(cluster, request):
    before = len(cluster.log_text(0))
    yield
    print(cluster.log_text(0)[before:][-3000:])


class Bystander:
    """A normal client that works all the time; the longest that it waited is kept."""

    def __init__(self, cluster) -> None:
        self.cluster, self.count, self.longest_s = cluster, 0, 0.0

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.client.put("bystander", str(self.count))
            self.longest_s = max(self.longest_s, loop.time() - began)
            self.count += 1
            await asyncio.sleep(0.01)

    async def refused(self) -> dict[str, int]:
        return (await self.cluster.reports(self.client))[0]["refused"]

    async def __aenter__(self):
        self.client = self.cluster.client()
        await self.client.__aenter__()
        await self.client.put("bystander", "first")
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, kind, *_):
        enough = self.count + 2
        with contextlib.suppress(AssertionError):
            await until(lambda: self.count >= enough or self._task.done(), "the bystander goes on")
        self._task.cancel()
        (ended,) = await asyncio.gather(self._task, return_exceptions=True)
        await self.client.close()
        if kind is None:
            assert isinstance(ended, asyncio.CancelledError), ended
            assert self.count >= enough, "the bystander was stopped"
            assert self.longest_s < LATENCY_S_MAX


@contextlib.asynccontextmanager
async def counted(cluster, *names: str, at_least: int = 1):
    """Have a bystander work, and demand that the primary counted what happened under one of these names."""
    async with Bystander(cluster) as bystander:
        before = await bystander.refused()

        async def total():
            after = await bystander.refused()
            return sum(after.get(name, 0) - before.get(name, 0) for name in names) >= at_least

        yield bystander
        await until(total, f"{at_least} refusals counted as {names}", 15)


async def welcomed(wire) -> None:
    assert isinstance(await wire.hello(), Welcome)


# Bytes that are no messages.


@on_loop
async def test_bytes_that_are_not_tls(cluster):
    chance = random.Random(1)
    async with counted(cluster, "tls-failed", at_least=5):
        for size in (1, 5, 100, 5000, 100_000):
            async with Wire(cluster, tls=False) as wire:
                wire.write(chance.randbytes(size))
                wire.writer.write_eof()
                await wire.ended()


@on_loop
async def test_random_bytes_inside_tls(cluster):
    chance = random.Random(2)
    async with counted(cluster, "oversized-frame", "malformed-message", at_least=20):
        for after_hello in [False] * 10 + [True] * 10:
            async with Wire(cluster) as wire:
                if after_hello:
                    await welcomed(wire)
                    body = chance.randbytes(200)
                    wire.frame(body)
                else:
                    wire.write(chance.randbytes(200))
                await wire.ended()


@pytest.mark.parametrize("after_hello", [False, True])
@on_loop
async def test_length_prefix_of_4_gib(cluster, after_hello):
    rss = cluster.rss_bytes(0)
    async with counted(cluster, "oversized-frame", at_least=50):
        for _ in range(50):
            async with Wire(cluster) as wire:
                if after_hello:
                    await welcomed(wire)
                wire.write(b"\xff\xff\xff\xff" + b"x" * 100)
                await wire.ended()
    assert cluster.rss_bytes(0) - rss < RSS_GROWTH_MAX


@pytest.mark.parametrize(("after_hello", "size"), [(False, HANDSHAKE_FRAME_BYTES_MAX + 1), (True, FRAME_BYTES_MAX + 1)])
@on_loop
async def test_frame_one_byte_above_the_limit(cluster, after_hello, size):
    async with counted(cluster, "oversized-frame"), Wire(cluster) as wire:
        if after_hello:
            await welcomed(wire)
        wire.write(struct.pack(">I", size))
        await wire.ended()


def nested(depth: int) -> bytes:
    return b"\x91" * depth


BODIES = {
    "nested arrays": nested(64 * 1024),
    "nested arrays in a field": b"\x92\x0f" + nested(64 * 1024),
    "many arrays": b"\x92\x0f\xdd\x00\x01\x00\x00" + b"\x90" * 0x10000,
    "array length without content": b"\xdd\xff\xff\xff\xff",
    "text length without content": b"\x92\x0f\xdb\xff\xff\xff\xff",
    "map": b"\x92\x0f\x81\x01\x01",
    "extension": b"\x92\x0f" + msgpack.packb(msgpack.ExtType(5, b"x")),
    "timestamp": b"\x92\x0f\xd6\xff\x00\x00\x00\x00",
    "float": msgpack.packb((15, 1.5)),
    "bool": msgpack.packb((15, True)),
    "nil": msgpack.packb((15, None)),
    "negative": msgpack.packb((15, -1)),
    "text for bytes": msgpack.packb((9, "text")),
    "bad utf-8": b"\x93\x11\xa1\xff\xa1a",
    "never used": b"\xc1",
    "empty": b"",
    "empty array": b"\x90",
    "unknown code": msgpack.packb((99, 1)),
    "code is a bool": msgpack.packb((True, 1)),
    "one field too many": msgpack.packb((15, 1, 1)),
    "one field too few": msgpack.packb((15,)),
    "trailing bytes": msgpack.packb((15, 1)) + b"\x00",
    "two messages in a frame": msgpack.packb((15, 1)) * 2,
}


@on_loop
async def test_bodies_that_are_no_message(cluster):
    async with counted(cluster, "malformed-message", at_least=len(BODIES)):
        for name, body in BODIES.items():
            async with Wire(cluster) as wire:
                await welcomed(wire)
                wire.frame(body)
                wire.send(Ping(7))
                try:
                    await wire.ended()
                except TimeoutError:
                    pytest.fail(f"{name}: the connection stays")


@on_loop
async def test_messages_of_the_wrong_role(cluster):
    to_a_client_only = [Welcome(1, 0), Reply(b"x"), Refused("a", "b"), Pong(1), Notice("a", "b")]
    replicas_only = [Subscribe(1), Fetch(0, 1), GroupMessage(0, b"x")]
    first = [Request(b"x"), Ping(1), StatusQuery(1), Subscribe(1), Welcome(0, 0)]
    async with counted(cluster, "malformed-message", at_least=len(to_a_client_only + replicas_only + first) + 1):
        for message in to_a_client_only + replicas_only:
            async with Wire(cluster) as wire:
                await welcomed(wire)
                wire.send(message)
                await wire.ended()
        for message in first:  # nothing is served before the hello
            async with Wire(cluster) as wire:
                await wire.challenged()
                wire.send(message)
                await wire.ended()
        async with Wire(cluster) as wire:
            challenge = await wire.challenged()
            wire.send(Challenge(*challenge))
            await wire.ended()


# Wrong proofs.


async def refusal(wire, answer) -> str:
    assert isinstance(answer, Refused)
    await wire.ended()
    return answer.code


@on_loop
async def test_hellos_that_prove_nothing(cluster):
    async with counted(cluster, "hello-bad-signature", at_least=4):
        async with Wire(cluster) as wire:
            assert await refusal(wire, await wire.hello(signature=bytes(64))) == "bad-signature"
        async with Wire(cluster) as wire:
            assert await refusal(wire, await wire.hello(signature=b"\xff" * 64)) == "bad-signature"
        async with Wire(cluster) as one, Wire(cluster) as other:
            # A signature over another connection's nonce.
            await one.challenged()
            await other.challenged()
            one.challenge, mine = other.challenge, one.challenge
            assert one.challenge.nonce != mine.nonce
            assert await refusal(one, await one.hello()) == "bad-signature"
        async with Wire(cluster, 0) as wire:
            # Replica 1 passed this challenge on to a client of its own, who signed it for replica 1's certificate.
            certificate = cluster.cluster.replicas[1].certificate_der
            assert await refusal(wire, await wire.hello(certificate=certificate)) == "bad-signature"
    async with counted(cluster, "hello-not-that-replica", at_least=3):
        async with Wire(cluster) as wire:  # no certificate
            assert await refusal(wire, await wire.replica_hello(1)) == "not-that-replica"
        async with Wire(cluster, as_replica=1) as wire:
            assert await refusal(wire, await wire.replica_hello(2)) == "not-that-replica"
        async with Wire(cluster, as_replica=0) as wire:  # its own
            assert await refusal(wire, await wire.replica_hello(0)) == "not-that-replica"
    async with counted(cluster, "hello-other-cluster"), Wire(cluster) as wire:
        assert await refusal(wire, await wire.hello(cluster_id=bytes(32))) == "other-cluster"


@on_loop
async def test_old_tls(cluster):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with counted(cluster, "tls-failed"):
        with pytest.raises((ssl.SSLError, OSError)):
            async with Wire(cluster, context=context):
                pass


def envelope(cluster, key, cluster_id=None) -> bytes:
    content = Operations(SessionId(1, 0), 1, 1, (b"x",))
    unsigned = encode_operations(cluster_id or cluster.cluster.cluster_id, key.public_key, content)
    return unsigned + key.sign(unsigned)


@on_loop
async def test_envelopes_that_are_not_the_clients(cluster):
    key, other = ClientKey.generate(), ClientKey.generate()
    good = envelope(cluster, key)
    cases = {
        "foreign-envelope": [envelope(cluster, other)],
        "bad-envelope-signature": [
            good[:-1] + bytes([good[-1] ^ 1]),
            good[:-65] + bytes([good[-65] ^ 1]) + good[-64:],  # the operation
            good[:-64] + other.sign(good[:-64]),
        ],
        "malformed-envelope": [
            envelope(cluster, key, bytes(32)),
            good + b"\0",
            good[:-1],
            b"",
            b"\1" + good[1:],
            b"x" * (2 * 1024 * 1024 + 1),
        ],
    }
    for name, raws in cases.items():
        async with counted(cluster, name, at_least=len(raws)), Wire(cluster) as wire:
            assert isinstance(await wire.hello(key), Welcome)
            for raw in raws:
                wire.send(Request(raw))
                notice = await wire.receive()
                assert isinstance(notice, Notice)
                assert notice.code == name
    # Every bit of an envelope, at one go.
    async with counted(cluster, *cases, at_least=8 * len(good)), Wire(cluster) as wire:
        await wire.hello(key)
        for bit in range(8 * len(good)):
            altered = bytearray(good)
            altered[bit // 8] ^= 1 << bit % 8
            wire.send(Request(bytes(altered)))
        codes = {(await wire.receive(Notice)).code for _ in range(8 * len(good))}
        assert codes == set(cases)


# Slow ones, and many of them.


async def drip(cluster, tls: bool) -> None:
    """Send a byte a second, for as long as the replica takes them."""
    with contextlib.suppress(OSError):
        async with Wire(cluster, tls=tls) as wire:
            for byte in struct.pack(">I", 4000) + bytes(100):
                wire.write(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    await wire.ended(1.0)
                    return
            pytest.fail("the replica listens to one byte a second for ever")


async def hold(cluster) -> None:
    """Complete TLS, then say nothing."""
    async with Wire(cluster) as wire:
        await wire.ended(15)


@on_loop
async def test_slow_and_silent_ones_meet_a_deadline(cluster):
    sockets = [silent_socket(cluster.cluster.replicas[0]) for _ in range(20)]
    try:
        async with counted(cluster, "handshake-timeout", "tls-failed", at_least=60):
            await asyncio.gather(
                *(drip(cluster, tls=True) for _ in range(10)),
                *(drip(cluster, tls=False) for _ in range(10)),
                *(hold(cluster) for _ in range(20)),
            )
    finally:
        for one in sockets:
            one.close()


@on_loop
async def test_more_strangers_than_there_are_places(cluster):
    rss = cluster.rss_bytes(0)
    sockets = []
    try:
        async with counted(cluster, "too-many-strangers", at_least=50):
            for _ in range(STRANGERS_MAX + 100):
                sockets.append(silent_socket(cluster.cluster.replicas[0]))
                await asyncio.sleep(0)
            # Everybody's places are taken now. A client and a replica still get in.
            async with asyncio.timeout(4.0):
                async with Wire(cluster) as wire:
                    await welcomed(wire)
                async with Wire(cluster, as_replica=2) as wire:
                    assert isinstance(await wire.replica_hello(2), Welcome)
                    wire.send(Subscribe(1))
                    assert isinstance(await wire.receive(GroupMessage), GroupMessage)
        # A replica that was away joins again in the middle of it.
        cluster.kill(2)
        cluster.start(2)
        await cluster.wait_ready(seconds=20)
    finally:
        for one in sockets:
            one.close()
    assert cluster.rss_bytes(0) - rss < RSS_GROWTH_MAX


# Clients that cost more than they should.


@on_loop
async def test_a_flood_of_questions_from_one_that_does_not_read(cluster):
    rss = cluster.rss_bytes(0)
    async with Bystander(cluster), Wire(cluster) as wire:
        await wire.hello(ClientKey.generate())
        questions = b"".join(struct.pack(">I", 3) + msgpack.packb((13, number % 100)) for number in range(20_000))
        wire.write(questions)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await wire.drain()
        assert cluster.rss_bytes(0) - rss < RSS_GROWTH_MAX


@on_loop
async def test_a_flood_of_large_stale_reads_from_one_that_does_not_read(cluster):
    rss = cluster.rss_bytes(0)
    async with Bystander(cluster) as bystander, Wire(cluster) as wire:
        await bystander.client.put("large", bytes(900_000))
        await wire.hello(ClientKey.generate())
        body = msgpack.packb((11, 1, kv.get(b"large")))
        wire.write((struct.pack(">I", len(body)) + body) * 3000)  # they ask for 2.7 GB
        peak = 0

        async def watch():
            nonlocal peak
            while True:
                peak = max(peak, cluster.rss_bytes(0))
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        enough = bystander.count + 100
        await until(lambda: bystander.count >= enough, "the bystander goes on")
        watching.cancel()
        assert peak - rss < RSS_GROWTH_MAX


def test_the_whole_cost_is_bounded(cluster):
    assert cluster.rss_bytes(0) < 53 * 1024 * 1024 + 2 * RSS_GROWTH_MAX


@pytest.mark.parametrize(
    "message", [Fetch(2, 2**63), Subscribe(2**63), Subscribe(2**64 - 1), Fetch(2**64 - 1, 1), Fetch(2, 2**63 - 1)]
)
@on_loop
async def test_no_number_from_a_faulty_replica_stops_the_primary(cluster, message):
    """Fetching from an index beyond what a store can count once ended every correct replica."""
    async with Wire(cluster, as_replica=2) as wire:
        await wire.replica_hello(2)
        wire.send(message)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, EOFError):
            wire.send(Ping(1))
            await wire.receive(Pong)
    async with cluster.client() as client:
        await client.put("still", "here")
    assert cluster.is_running(0)
