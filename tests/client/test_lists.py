"""A running client learns of other members by itself, from whoever proves it, and goes on among them."""

import asyncio
from contextlib import closing
from dataclasses import replace

import pytest

from client.errors import Unreachable
from client.lists import MemberLists
from client.queries import StaleRound
from replica.apps import kv
from replica.cluster.clusterfile import ClusterFile
from replica.cluster.memberlists import encode_place, seat_of
from replica.cluster.provision import init_cluster, replica_folder_name
from replica.core.chain import Link
from replica.core.checkpoint import Header, encode_certificate
from replica.core.entries import Checkpoint
from replica.core.genesis import Member
from replica.core.members import MemberList, Seat
from replica.core.proof import EntryProof
from replica.wire.messages import MembersShown, StaleResult, StatusReport
from tests.client.fake_cluster import FakeFleet, FakeReplica, until
from tests.client.harness import Harness, make_genesis, open_reply, reply_to
from trustlog import entry_digest, in_memory, open_log


class Change:
    """Replica 2 of a fleet is replaced by `new`: another certificate, log and address."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.fleet = fleet
        cluster = fleet.cluster
        self.folder = fleet.directory.with_name("elsewhere")
        other = init_cluster(self.folder, base_port=0)
        self.place = other.replicas[2]
        slot = cluster.genesis.limits.checkpoint_interval
        seat = Seat(Member(2, 1, in_memory().public_key, b"", 1), encode_place(self.place))
        self.members = MemberList(1, slot, (seat_of(cluster, 0), seat_of(cluster, 1), seat))
        digests = (b"l" * 32,) * 3
        self.header = Header(slot, 5, b"a" * 32, b"t" * 32, (1, 1, 1), digests, digests, 0, self.members.digest)
        self.new = FakeReplica(fleet, 2, self.place)

    def link(self, *authors: int) -> bytes:
        """Return what shows the change, attested by these logs."""
        payload = Checkpoint(self.header.slot, self.header.digest).encode()
        digests = (entry_digest(payload),)
        proofs = {}
        for author in authors:
            with closing(open_log(self.fleet.directory / replica_folder_name(author) / "log")) as log:
                attestation = log.append(digests, context=self.fleet.cluster.genesis.contexts()[author])
            proofs[author] = EntryProof(attestation, digests, 0, payload)
        return Link(self.header.encode(), encode_certificate(proofs), self.members.encode()).encode()

    async def happen(self) -> None:
        """Switch replica 2 off and start the new one, of which replica 1 knows; whoever goes over hangs up."""
        await self.fleet.replicas[2].stop()
        await self.new.start(self.folder / replica_folder_name(2))
        self.fleet.replicas[2] = self.new
        self.fleet.replicas[1].links[0] = self.link(0, 1)
        await hang_up(self.fleet.replicas[1])


async def hang_up(replica: FakeReplica) -> None:
    for connection in list(replica.connections):
        connection.abort()


@pytest.mark.asyncio
async def test_a_client_that_is_connected_goes_on_among_the_new_members(fleet):
    async with fleet, fleet.client() as client:
        assert await client.incr("n") == 1
        await until(lambda: client.driver.core.connected == {0, 1, 2})
        kept = client.driver.links[:2]
        change = Change(fleet)
        await change.happen()
        await until(lambda: client.cluster.genesis.list_number == 1)
        assert client.driver.links[:2] == kept, "connections to those who stay stand"
        assert client.cluster.replicas[2] == change.place
        await fleet.replicas[0].stop()
        assert [await client.incr("n") for _ in range(3)] == [2, 3, 4]
        assert client.driver.core.connected == {1, 2}
        assert not client.driver.lists.refused
    assert client.cluster.genesis.list_number == 1, "and when it is opened again it begins there"


@pytest.mark.asyncio
async def test_what_waits_is_answered_by_the_new_members(fleet):
    async with fleet, fleet.client(deadline_s=10.0) as client:
        assert await client.incr("n") == 1
        for replica in fleet.replicas:
            replica.manners.add("silent")
        waiting = asyncio.ensure_future(client.incr("n"))
        stale = asyncio.ensure_future(client.stale(kv.get(b"n")))
        await until(lambda: client.driver.core.in_flight)
        change = Change(fleet)
        await fleet.replicas[0].stop()
        fleet.replicas[1].manners.clear()
        await change.happen()
        assert await waiting == 2
        assert (await stale).value
        assert fleet.executed == 3, "the session, and two operations, once each"


@pytest.mark.parametrize("lie", ["one log", "rubbish", "another list"])
@pytest.mark.asyncio
async def test_one_replica_alone_moves_no_client(fleet, lie):
    async with fleet, fleet.client() as client:
        assert await client.incr("n") == 1
        change = Change(fleet)
        shown = {"one log": change.link(1), "rubbish": b"x", "another list": b""}[lie]
        fleet.replicas[1].links[0] = shown
        await hang_up(fleet.replicas[1])
        asked = fleet.replicas[1].seen["AskMembers"]
        await until(lambda: fleet.replicas[1].seen["AskMembers"] > asked)
        assert await client.incr("n") == 2
        await until(lambda: client.driver.core.connected == {0, 1, 2})
        assert client.cluster.genesis.list_number == 0
        assert client.driver.lists.refused["members-refused"] == (lie != "another list")


def test_an_answer_that_nobody_asked_for_is_not_looked_at(fleet):
    change = Change(fleet)
    lists = MemberLists(fleet.cluster)
    shown = MembersShown(0, change.link(0, 1))
    assert not lists.shown(1, shown)
    assert lists.refused == {"members-unasked": 1}
    lists.question(1)
    assert not lists.shown(1, MembersShown(0, b"x"))
    assert not lists.shown(1, shown)
    assert lists.refused == {"members-refused": 1, "members-unasked": 2}, "one answer to one question"
    lists.question(1)
    lists.left(1)
    assert not lists.shown(1, shown)
    lists.question(1)
    assert not lists.shown(1, MembersShown(1, shown.link)), "of another list"
    lists.question(1)
    lists.question(0)
    assert lists.shown(1, shown)
    assert lists.cluster.genesis.list_number == 1
    assert not lists.shown(0, shown)
    assert lists.refused == {"members-refused": 1, "members-unasked": 4}


@pytest.mark.asyncio
async def test_all_are_asked_again_now_and_then(fleet, monkeypatch):
    monkeypatch.setattr("client.driver.ASK_S", 0.02)
    async with fleet, fleet.client() as client:
        assert await client.incr("n") == 1
        change = Change(fleet)
        fleet.replicas[1].links[0] = change.link(0, 1)
        await until(lambda: client.cluster.genesis.list_number == 1)


@pytest.mark.asyncio
async def test_who_reaches_too_few_is_told_that_the_members_may_have_changed(fleet):
    await fleet.replicas[0].start()
    async with fleet.client(deadline_s=0.3) as client:
        with pytest.raises(Unreachable, match=r"since list 0, .* put today's cluster\.members\.toml beside"):
            await client.incr("n")
    await fleet.replicas[0].stop()


class TestCore:
    """The core, among other replicas: `f` faulty ones of each list are no quorum together."""

    def test_what_former_members_said_counts_no_more(self):
        h = Harness().ready()
        h.submit("a")
        ((_, envelope),) = h.decoded()
        h.reply(2, reply_to(envelope, prefix=b"lie"))
        h.take(h.core.adopt(h.genesis, (0, 1)))
        h.flush()
        assert h.asked == 1, "in which view they are, which is not the former list's"
        assert [replicas for replicas, _ in h.decoded()] == [(0, 1)], "sent again to those who stay"
        h.reply(1, reply_to(envelope, prefix=b"lie"))
        assert not h.outcomes
        assert h.core.connected == {0, 1}
        h.connect(2)
        assert [replicas for replicas, _ in h.decoded()] == [(2,)], "and to who comes in"
        h.reply(0, reply_to(envelope))
        h.reply(2, reply_to(envelope))
        assert h.outcomes["a"].value == b"a"

    def test_an_opening_goes_on_too(self):
        h = Harness()
        h.submit("a")
        ((_, opening),) = h.decoded()
        h.reply(0, open_reply(opening))
        h.take(h.core.adopt(make_genesis(2), (0, 1, 2)))
        h.flush()
        assert h.core.session is None
        h.reply(0, open_reply(opening))
        h.reply(1, open_reply(opening))
        assert h.core.session is None, "three are needed now"
        h.reply(2, open_reply(opening))
        assert h.core.session is not None

    def test_notices_of_former_members_are_shown_no_more(self):
        h = Harness()
        h.core.on_notice(1, "busy", "one")
        h.core.on_notice(2, "busy", "two")
        h.core.adopt(h.genesis, (0, 1))
        assert h.core.notices == {1: ("busy", "one")}


def test_the_new_list_is_what_the_link_says(fleet):
    change = Change(fleet)
    lists = MemberLists(fleet.cluster)
    lists.question(0)
    assert lists.shown(0, MembersShown(0, change.link(0, 1)))
    found: ClusterFile = lists.cluster
    assert found.genesis.members[2].since == 1
    assert replace(found.genesis.members[2], since=0) != fleet.cluster.genesis.members[2]
    assert found.cluster_id == fleet.cluster.cluster_id


class WatchNoted:
    """A watch that notes what the driver tells it."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def renew(self) -> None:
        self.noted.append("renewed")

    def connected(self, replica: int) -> None:
        self.noted.append(f"connected {replica}")

    def disconnected(self, replica: int) -> None:
        self.noted.append(f"disconnected {replica}")

    async def close(self) -> None:
        pass


@pytest.mark.asyncio
async def test_a_former_member_that_runs_on_is_hung_up_on_and_heard_no_more(fleet):
    async with fleet, fleet.client() as client:
        assert await client.incr("n") == 1
        await until(lambda: client.driver.core.connected == {0, 1, 2})
        former, left = fleet.replicas[2], client.driver.links[2]
        change = Change(fleet)
        fleet.replicas[1].links[0] = change.link(0, 1)
        read, lie = StaleRound(2), StaleResult(99, 0, 5, b"lie")
        client.driver.queries.stale[99] = read
        watch = WatchNoted()
        client.driver.watches[watch] = None
        client.driver.link_message(2, lie)
        await hang_up(fleet.replicas[1])
        await until(lambda: client.cluster.genesis.list_number == 1)
        client.driver.link_message(1, lie)
        assert watch.noted[-3:] == ["renewed", "connected 0", "connected 1"]
        assert not read.future.done(), "what it answered counts no more"
        left.owner.link_message(2, StatusReport(0, b"{}"))
        left.owner.link_up(2, 10**9, 7)
        assert 2 not in client.driver.core.connected
        await until(lambda: not former.connections)
        assert not left.send_frame(b"")
        assert await client.incr("n") == 2


@pytest.mark.asyncio
async def test_a_stale_read_is_not_answered_by_liars_of_two_lists():
    waiting, lie = StaleRound(2), StaleResult(1, 0, 5, b"lie")
    waiting.on_result(2, lie)
    waiting.begin_anew(2)
    waiting.on_result(1, lie)
    assert not waiting.future.done()
    waiting.on_result(2, lie)
    assert waiting.future.done()
