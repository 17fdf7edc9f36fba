"""A PBFT cluster's daemons: operations, a primary that stops, one that lies, forged messages, and what is refused."""

import asyncio

import pytest

from client import ClientError, NotOffered
from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.cluster.pbft import NO_LOGS
from replica.core.batch import make_batch
from replica.core.envelope import Status
from replica.pbft.layout import Codec, Signatures
from replica.pbft.machine import HISTORY
from replica.pbft.messages import NewView, Prepare, PrePrepare, Signed, ViewChange
from replica.pbft.pending import BatchProposal
from replica.wire.messages import AskReceipt, Notice, PbftParcel, Subscribe, Watch
from tests.replica.pbft.daemons import Daemons
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire

TALKS = {"patience_ms": 200}
# So that no patience ends on a slow machine, where no view should change.
NEVER_MS = 600_000


async def put_many(cluster: Daemons, clients: int, each: int, name: str) -> list[str]:
    """Count a number up by so many clients at once; return the keys that they wrote besides."""

    async def one(client: int) -> list[str]:
        keys = []
        async with cluster.client(key=ClientKey.generate(), **TALKS) as own:
            for number in range(each):
                await own.incr(name)
                keys.append(f"{name}/{client}/{number}")
                await own.put(keys[-1], str(number))
        return keys

    return [key for keys in await asyncio.gather(*(one(number) for number in range(clients))) for key in keys]


async def check(cluster: Daemons, keys: list[str], name: str, count: int) -> None:
    async with cluster.client(**TALKS) as client:
        assert await client.get(name) == str(count).encode()
        for key in keys:
            assert await client.get(key) == key.rsplit("/", 1)[1].encode()


def same_state(cluster: Daemons, *numbers: int) -> bool:
    nodes = [cluster.nodes[number] for number in numbers]
    return len({(node.executor.slot, node.executor.digest()) for node in nodes}) == 1


@on_loop
async def _many(tmp_path, f: int) -> None:
    async with Daemons(tmp_path / "c", f, NEVER_MS) as cluster:
        cluster.start()
        await cluster.wait_ready()
        keys = await put_many(cluster, 5, 12, "n")
        await check(cluster, keys, "n", 60)
        await until(lambda: same_state(cluster, *cluster.nodes), "all executed the same")
        assert [node.refusals for node in cluster.nodes.values() if node.refusals] == []


@pytest.mark.parametrize("f", [1, 2])
def test_operations_of_several_clients_are_executed_once_everywhere(tmp_path, f) -> None:
    _many(tmp_path, f)


@on_loop
async def test_a_primary_that_stops_is_replaced_and_nothing_acknowledged_is_lost(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        before = await put_many(cluster, 3, 10, "n")
        work = asyncio.create_task(put_many(cluster, 4, 20, "m"))
        await until(lambda: cluster.nodes[1].executor.operations > 90, "work under way")
        await cluster.stop(0)
        keys = await work
        await check(cluster, before, "n", 30)
        await check(cluster, keys, "m", 80)
        await until(lambda: same_state(cluster, 1, 2, 3), "those left executed the same")
        assert all(node.core.view >= 1 for node in cluster.nodes.values())


@on_loop
async def test_with_two_of_four_nothing_is_decided_and_nothing_wrong_is_said(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(**TALKS) as client:
            await client.put("a", "1")
        await cluster.stop(2)
        await cluster.stop(3)
        async with cluster.client(**TALKS) as client:
            with pytest.raises(ClientError):
                await client.put("a", "2", deadline_s=2)
            assert await client.stale_get("a") == b"1"


@on_loop
async def test_one_that_comes_late_is_told_what_was_decided(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start(0, 1, 2)
        await cluster.wait_ready(0, 1, 2)
        keys = await put_many(cluster, 1, 60, "n")
        slot = cluster.nodes[0].core.executed
        assert 2 * cluster.cluster.genesis.limits.checkpoint_interval < slot < HISTORY
        cluster.start(3)
        await until(lambda: cluster.nodes[3].core.executed >= slot, "replica 3 executed it, too")
        await until(lambda: same_state(cluster, *cluster.nodes), "all executed the same")
        await check(cluster, keys, "n", 60)


@on_loop
async def test_a_primary_that_says_two_things_divides_nobody(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        liar = cluster.nodes[0]
        honest = liar._broadcast
        lies = []

        def two_tongues(effect):
            body = effect.message.body
            if not isinstance(body, PrePrepare) or len(lies) > 3:
                return honest(effect)
            # For one backup the same slot holds a batch of another time: as good as any, and another digest.
            batch = body.request.batch
            other = PrePrepare.of(body.view, body.slot, BatchProposal(make_batch(1, (), batch.envelopes)))
            lies.append(other)
            for number, link in liar.links.items():
                said = other if number == 1 + len(lies) % 3 else body
                message = Signed(0, said, liar.signatures.sign(0, said))
                link.send(_parcel(liar, message))
            return None

        liar._broadcast = two_tongues
        keys = await put_many(cluster, 3, 15, "n")
        assert lies
        await check(cluster, keys, "n", 45)
        await until(lambda: same_state(cluster, 1, 2, 3), "the correct ones executed the same")


def _parcel(node, message):
    return PbftParcel(node.codec.encode(message))


@on_loop
async def test_forged_and_altered_messages_are_counted_and_change_nothing(tmp_path):
    async with Daemons(tmp_path / "c", patience_ms=NEVER_MS) as cluster:
        cluster.start()
        await cluster.wait_ready()
        victim, liar = cluster.nodes[1], cluster.nodes[3]
        stranger = Signatures(
            cluster.cluster.genesis, Codec(cluster.cluster.genesis, liar.verify_envelope), ClientKey.generate()
        )
        forged = [
            Signed(3, Prepare(0, 1, b"d" * 32), stranger.sign(3, Prepare(0, 1, b"d" * 32))),  # by another key
            Signed(2, Prepare(0, 1, b"d" * 32), liar.signatures.sign(2, Prepare(0, 1, b"d" * 32))),  # in 2's name
            Signed(0, ViewChange(1, ()), liar.signatures.sign(0, ViewChange(1, ()))),
        ]
        for message in forged:
            liar.links[1].send(_parcel(liar, message))
        real = liar.codec.encode(Signed(3, Prepare(0, 1, b"d" * 32), liar.signatures.sign(3, Prepare(0, 1, b"d" * 32))))
        for altered in (real[:-70] + b"\xff" + real[-69:], real[:-1], b"", b"\xff" * 100):
            liar.links[1].send(PbftParcel(altered))
        # What it may say, and is no reason for anything: a view that nobody else wants, and a view of its own making.
        for body in (ViewChange(9, ()), NewView(1, (), ())):
            liar.links[1].send(_parcel(liar, Signed(3, body, liar.signatures.sign(3, body))))
        await until(lambda: victim.refusals["parcel-refused"] == 7, "the seven refused")
        keys = await put_many(cluster, 2, 5, "n")
        await check(cluster, keys, "n", 10)
        assert all(node.core.view == 0 for node in cluster.nodes.values())
        assert any("message refused" in text for text in cluster.logged.texts())


@on_loop
async def test_what_a_pbft_cluster_lacks_is_refused_and_the_connection_goes_on(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            for ask in (
                lambda: client.with_receipt(lambda calls: calls.put("a", "1")),
                lambda: client.watch("a").__aenter__(),
            ):
                with pytest.raises(NotOffered, match="no trusted logs"):
                    await ask()
            assert await client.get("a") is None  # refused before anything was sent
        # A client of another make, that asks all the same.
        async with Wire(cluster, 0) as wire:
            await wire.hello()
            for question in (AskReceipt(1, 1, 1, bytes(32)), Watch(1, b"", 0, 0)):
                wire.send(question)
                assert await wire.receive(Notice) == Notice("no-trusted-logs", NO_LOGS)
            wire.send(Subscribe(1))
            with pytest.raises(asyncio.IncompleteReadError):
                await wire.receive()
        assert cluster.nodes[0].refusals["not-in-pbft"] == 2


@on_loop
async def test_one_whose_state_is_another_stops_instead_of_answering(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        cluster.nodes[2].executor.state.begin()
        cluster.nodes[2].executor.state.put(b"n", b"1000")
        cluster.nodes[2].executor.state.commit()
        keys = await put_many(cluster, 1, 20, "n")
        await until(lambda: 2 in cluster.stopped, "it stops")
        assert "another state after slot" in cluster.stopped.pop(2)
        await check(cluster, keys, "n", 20)


@on_loop
async def test_operations_above_the_limit_and_results(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        most = cluster.cluster.genesis.limits.operation_bytes_max
        async with cluster.client(**TALKS) as client:
            await asyncio.gather(*(client.put(f"k{number}", b"v" * (most - 100)) for number in range(30)))
            assert len(await client.get("k7")) == most - 100
            with pytest.raises(ValueError, match="limit"):
                await client.put("k", b"v" * most)
            result = await client.submit(kv.cas(b"k7", b"no", b"x"))
            assert result.status is Status.OK


@on_loop
async def test_its_status_says_what_it_is(tmp_path):
    async with Daemons(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            report = (await cluster.reports(client))[2]
        assert (report["ordering"], report["durability"], report["log"]["backend"]) == ("pbft", "memory", "none")
        assert "no trusted log" in report["log"]["protects"]
        assert report["not_ready"] is None
        await cluster.stop(0)
        await cluster.stop(1)
        await until(cluster.nodes[2].not_ready, "it notices")
        assert cluster.nodes[2].not_ready() == "connected to 1 other replicas, 2 are needed"
