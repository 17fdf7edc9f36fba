"""Members of a running cluster are replaced, added and removed, by the commands that an operator types."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from client import Client
from client.receipts import verify
from client.watch import WatchGone
from replica.cli.dev import member_folder
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.keys import load_client_key
from replica.cluster.memberlists import encode_place, load_present_cluster, members_path, read_links, seat_of
from replica.cluster.provision import OPERATOR_NAME, load_public_part, make_client
from replica.core.genesis import Limits
from replica.core.members import MemberList, Seat
from replica.operations.changing import ChangeError, Council, change
from tests.support.cluster import Processes, environment
from tests.support.ports import free_port
from tests.support.waiting import on_loop, on_loop_for, until, wait_for
from trustlog import VerificationError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
LIMITS = Limits(checkpoint_interval=16, window=32)
DEADLINE_S = 60.0


class Changing(Processes):
    """A cluster whose replicas may have other folders than the first ones; `present` is what its members are now."""

    def __init__(self, directory, **options) -> None:
        self.moved: dict[int, str] = {}
        super().__init__(directory, limits=LIMITS, **options)

    def folder(self, number):
        return self.directory / self.moved.get(number, f"replica-{number}")

    @property
    def file(self):
        return self.directory / "cluster.toml"

    def present(self):
        return load_present_cluster(self.file)

    def make(self, number, name):
        """Make a new replica's folder as an operator does; return its public file."""
        self.moved[number] = name
        port = free_port()
        done = self.command("keygen", self.directory / name, "--number", number, "--address", f"127.0.0.1:{port}")
        assert done.returncode == 0, done.stderr
        return self.directory / name / f"replica-{number}.public.toml"

    def command(self, *words):
        command = [sys.executable, "-m", "replica.cli.main", *map(str, words)]
        return subprocess.run(command, check=False, env=environment(), capture_output=True, text=True, timeout=120)

    def make_two(self, first):
        """Make the replicas with this number and the next one, so that they may be added; return their public files."""
        return [self.make(number, f"new-{number}") for number in (first, first + 1)]

    def member(self, *words, expected=0):
        done = self.command("member", *words)
        assert done.returncode == expected, done.stdout + done.stderr
        return done

    def audit(self, *numbers):
        """Nobody is faulty, and no folder is damaged."""
        done = self.command("audit", *(self.folder(number) for number in numbers))
        assert done.returncode == 0, done.stdout + done.stderr

    def listed(self):
        return json.loads(self.member("list", self.directory, "-o", "json").stdout)

    async def until_all_are_over(self, number):
        async def over():
            listed = await asyncio.to_thread(self.listed)
            return listed["list"] == number and all(one["works_under_list"] == number for one in listed["replicas"])

        await until(over, f"all members work under list {number}", DEADLINE_S)

    async def until_they_left(self, numbers, number_of_list):
        """Those who stay go over; those who were removed say so, and stop when they are told to."""
        await self.until_all_are_over(number_of_list)
        for number in numbers:
            self.wait_logged(number, "no member any more")
            await asyncio.to_thread(says_that_it_left, self, number, number_of_list)
        for number in numbers:
            assert self.kill(number, signal.SIGTERM) == 0

    def client_now(self, **options) -> Client:
        return Client(self.present(), self.key(), deadline_s=30.0, **options)


class Load:
    """Clients that count up, one number after the other; whatever fails ends the test."""

    def __init__(self, client, name) -> None:
        self.total = 0
        self._client, self._name = client, name
        self._ended = asyncio.Event()

    async def work(self):
        while not self._ended.is_set():
            assert await self._client.incr(self._name) == self.total + 1
            self.total += 1

    async def more(self, count=20):
        wanted = self.total + count
        await until(lambda: self.total >= wanted, f"{count} more are done", 60)

    def end(self):
        self._ended.set()


async def under_load(cluster, script, count=2, watch=None):
    """Run `script` in a thread while clients, who know of the first list only, count up; nothing may fail.

    watch: called with their client, and awaited at the end.
    """
    async with cluster.client(deadline_s=30.0) as client:
        watching = None if watch is None else asyncio.ensure_future(watch(client))
        loads = [Load(client, f"counter-{i}") for i in range(count)]
        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(load.work())
            for load in loads:
                await load.more()
            await asyncio.to_thread(script)
            for load in loads:
                await load.more()
                load.end()
        if watching is not None:
            await watching
    return [load.total for load in loads]


def test_who_lost_everything_is_back_with_three_commands(tmp_path):
    """Under load, and no request fails; then the new replica bears the fault of an old one."""
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        cluster.kill(2)
        shutil.rmtree(cluster.folder(2))

        def repair():
            public = cluster.make(2, "new-2")
            words = ("replace", cluster.directory, public, "--reason", "its disk is gone")
            cluster.member(*words)
            # Whoever was interrupted before the files were written gives the same command again.
            written = [members_path(cluster.file), cluster.folder(2) / "members.toml"]
            for path in written:
                path.unlink()
            again = cluster.member(*words)
            assert "nothing is changed: replica 2 has the log of" in again.stderr
            assert all(path.exists() for path in written)
            cluster.start(2)

        receipts = []

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            async with cluster.client_now() as client:
                receipts.append((await client.with_receipt(lambda calls: calls.put("k", "old")))[1])
            totals = await under_load(cluster, repair)
            await cluster.until_all_are_over(1)
            cluster.kill(0)
            async with cluster.client_now() as client:
                for i, total in enumerate(totals):
                    assert await client.incr(f"counter-{i}") == total + 1
                # With replica 0 away, the new log is one of the two that attest it.
                receipts.append((await client.with_receipt(lambda calls: calls.put("k", "new")))[1])
            cluster.start(0)
            await cluster.until_all_are_over(1)

        use()
        listed = cluster.listed()
        assert [one["since_list"] for one in listed["replicas"]] == [0, 0, 1]
        assert {entry.member for entry in receipts[1].entries} == {1, 2}
        for receipt in receipts:
            verify(receipt.encode(), cluster.file)
        shutil.copy(cluster.file, tmp_path)
        with pytest.raises(VerificationError):
            verify(receipts[1].encode(), tmp_path / "cluster.toml")
        cluster.audit(0, 1, 2)
        # cluster.toml, and with it the cluster's id, stays as it was.
        assert load_cluster_file(cluster.file).cluster_id == cluster.present().cluster_id
        assert load_cluster_file(cluster.file).genesis != cluster.present().genesis


@pytest.mark.long
def test_a_client_that_stays_connected_outlives_the_replicas_that_it_knew(tmp_path):
    """All three are replaced, one after the other, under load; no operation fails, and a watch is told by the new ones."""
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        seen = []

        async def watch(client):
            while b"end" not in seen:
                # Whoever went over tells nothing from before, and says so.
                with contextlib.suppress(WatchGone):
                    async with client.watch("watched", deadline_s=30.0) as changes:
                        seen.append((await anext(changes)).value)

        def replace_all():
            for number_of_list, number in ((1, 2), (2, 1), (3, 0)):
                cluster.kill(number)
                public = cluster.make(number, f"new-{number}")
                cluster.member("replace", cluster.directory, public)
                cluster.start(number)
                asyncio.run(cluster.until_all_are_over(number_of_list))
            asyncio.run(say_until_it_is_seen())

        async def say_until_it_is_seen():
            async with cluster.client_now() as client:

                async def said():
                    await client.put("watched", "end")
                    return seen

                await until(said, "the watch is told", DEADLINE_S)

        @on_loop_for(DEADLINE_S * 5)
        async def use():
            totals = await under_load(cluster, replace_all, watch=watch)
            async with cluster.client_now() as client:
                for i, total in enumerate(totals):
                    assert await client.incr(f"counter-{i}") == total + 1

        use()
        assert seen == [b"end"]
        assert [one["since_list"] for one in cluster.listed()["replicas"]] == [3, 2, 1]


@pytest.mark.long
def test_two_more_and_two_less(tmp_path):
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        def grow():
            publics = cluster.make_two(3)
            cluster.member("add", cluster.directory, *publics)
            for path in (members_path(cluster.file), cluster.folder(4) / "members.toml"):
                path.unlink()
            again = cluster.member("add", cluster.directory, *publics)
            assert "nothing is changed: replicas 3 and 4 have the logs" in again.stderr
            cluster.start(3, 4)

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            totals = await under_load(cluster, grow)
            await cluster.until_all_are_over(1)
            await asyncio.to_thread(cluster.audit, *range(5))
            # Two faults are borne now.
            for number in (0, 3):
                cluster.kill(number)
            async with cluster.client_now() as client:
                assert await client.incr("counter-0") == totals[0] + 1
            cluster.start(0, 3)
            await cluster.until_all_are_over(1)
            await asyncio.to_thread(cluster.member, "remove", cluster.directory, 4, 3)
            again = await asyncio.to_thread(cluster.member, "remove", cluster.directory, 3, 4)
            assert "nothing is changed: replicas 3 and 4 are members no more" in again.stderr
            await cluster.until_they_left((3, 4), 2)
            cluster.kill(1)
            async with cluster.client_now() as client:
                assert await client.incr("counter-0") == totals[0] + 2
            # The folders of those that went know nothing of the list without them.
            await asyncio.to_thread(cluster.audit, *range(5))

        use()
        assert cluster.listed()["f"] == 1


def says_that_it_left(cluster, number, number_of_list):
    """Health, status and doctor: it waits for nobody, and may be stopped."""
    left = f"is no member any more since list {number_of_list} of members"
    health = cluster.command("health", cluster.folder(number))
    assert (health.returncode, left in health.stdout) == (1, True), health.stdout
    row = cluster.command("status", cluster.folder(number), "-o", "plain").stdout.splitlines()[number]
    assert f"not ready: it {left}" in row
    found = json.loads(cluster.command("doctor", cluster.folder(number), "-o", "json").stdout)["findings"]
    (own,) = [one for one in found if one["check"] == "replica"]
    assert (own["severity"], left in own["text"], "stop it for good" in own["remedy"]) == ("warning", True, True)
    assert not [one for one in found if one["severity"] == "problem"]


@pytest.mark.long
def test_who_was_away_finds_the_new_list_and_its_state(tmp_path):
    """Others forgot what it lacks, so it begins anew under today's list; a client's folder can be brought up to date."""
    with Changing(tmp_path / "c", f=2) as cluster:
        cluster.set(retain_mib=0)
        cluster.start_and_wait()
        cluster.kill(1)
        cluster.kill(4)
        shutil.rmtree(cluster.folder(4))

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            public = await asyncio.to_thread(cluster.make, 4, "new-4")
            await asyncio.to_thread(cluster.member, "replace", cluster.directory, public)
            cluster.start(4)
            async with cluster.client_now() as client:
                # Milestones are every eighth checkpoint: what was before the second one is gone.
                for number in range(16 * 8 * 3):
                    await client.put(f"key-{number}", f"{number}")
            cluster.start(1)
            await cluster.until_all_are_over(1)
            assert "beginning anew" in cluster.log_text(1)
            # Now it counts: without it, and two others, nothing would be decided.
            for number in (0, 2):
                cluster.kill(number)
            async with cluster.client_now() as client:
                assert await client.get("key-7") == b"7"

        use()
        elsewhere = tmp_path / "a client"
        elsewhere.mkdir()
        shutil.copy(cluster.file, elsewhere)
        make_client(elsewhere / "client")
        cluster.start(0)
        cluster.member("list", elsewhere, "--update")
        assert read_links(members_path(elsewhere / "cluster.toml")) == cluster.present().links


def test_all_killed_while_they_go_over(tmp_path):
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        public = cluster.make(2, "new-2")
        child = subprocess.Popen(
            [sys.executable, "-m", "replica.cli.main", "member", "replace", str(cluster.directory), str(public)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        @on_loop_for(DEADLINE_S * 4)
        async def use():
            own = [cluster.directory / f"replica-{i}" / "members.toml" for i in (0, 1)]
            await until(lambda: any(path.exists() for path in own), "one of them goes over", 60)
            for number in (0, 1, 2):
                os.kill(cluster.pid(number), signal.SIGKILL)
            cluster.stop()
            cluster.start(0, 1)
            assert await asyncio.to_thread(child.wait, 90) == 0
            cluster.start(2)
            await cluster.until_all_are_over(1)
            async with cluster.client_now() as client:
                assert await client.incr("n") == 1

        try:
            use()
            # So `dev` starts the members of today, and not who was replaced and whose folder is still there.
            members = [member_folder(cluster.directory, cluster.present(), number).name for number in range(3)]
            assert members == ["replica-0", "replica-1", "new-2"]
        finally:
            child.kill()
            child.wait(timeout=20)


def test_a_replica_moves_to_another_address(tmp_path):
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        port = free_port()
        wrong = cluster.present().replicas[0].address
        words = ("move", cluster.directory, "--number", 1, "--address")
        assert "have one address" in cluster.member(*words, wrong, expected=2).stderr
        cluster.member(*words, f"127.0.0.1:{port}")
        assert "nothing is changed: replica 1 is at" in cluster.member(*words, f"127.0.0.1:{port}").stderr

        @on_loop_for(DEADLINE_S * 2)
        async def use():
            await cluster.until_all_are_over(1)
            cluster.kill(0)
            async with cluster.client_now() as client:
                assert await client.incr("n") == 1

        use()
        assert cluster.listed()["replicas"][1]["address"] == f"127.0.0.1:{port}"
        assert [one["since_list"] for one in cluster.listed()["replicas"]] == [0, 0, 0]


def seats_of(cluster, public_file=None):
    """Return who the members are, with the replica of this file among them, whatever it is."""
    present = cluster.present()
    seats = [seat_of(present, number) for number in range(present.genesis.n)]
    if public_file is not None:
        part = load_public_part(public_file)
        seats[part.place.number] = Seat(
            replace(part.member, since=present.genesis.list_number + 1), encode_place(part.place)
        )
    return seats


async def refusal(cluster, seats):
    """Order a list with these members without the commands' own checks; return what the replicas say of it."""
    present = cluster.present()
    wanted = MemberList(present.genesis.list_number + 1, 0, tuple(seats))
    key = load_client_key(cluster.directory / OPERATOR_NAME)
    with pytest.raises(ChangeError) as refused:
        await change(present, key, wanted, deadline_s=DEADLINE_S, say=print)
    return str(refused.value)


def test_who_gave_up_waiting_goes_on_with_the_same_command(tmp_path):
    """Nothing else is ordered, so the list that is agreed would never be in force."""
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        present, port = cluster.present(), free_port()
        key = load_client_key(cluster.directory / "operator")
        seats = [seat_of(present, number) for number in range(3)]
        moved = replace(present.replicas[1], host="127.0.0.1", port=port)
        seats[1] = Seat(present.genesis.members[1], encode_place(moved))

        @on_loop
        async def order():
            async with Council(present, key) as council:
                await council.order(MemberList(1, 0, tuple(seats)).encode())

        assert cluster.listed()["following"] is None
        order()
        wait_for(lambda: cluster.listed()["following"], "f + 1 replicas say what follows")
        listed = cluster.listed()
        assert listed["list"] == 0
        assert listed["following"] == {"list": 1, "after": 48}
        said = cluster.member("list", cluster.directory).stderr
        assert "list 1 of members is agreed and not yet in force; it will be after slot 48" in said
        other = cluster.member("remove", cluster.directory, 1, 2, expected=2)
        assert "2f + 1" in other.stderr
        other = cluster.member("move", cluster.directory, "--number", 0, "--address", "127.0.0.1:9", expected=2)
        assert "repeat the command that made it" in other.stderr
        cluster.member("move", cluster.directory, "--number", 1, "--address", f"127.0.0.1:{port}")
        assert cluster.listed()["following"] is None
        assert cluster.listed()["list"] == 1


def test_a_new_folder_without_its_list_is_told_what_it_lacks(tmp_path):
    cluster = Changing(tmp_path / "c")
    for number in (2, 3):
        cluster.make(number, f"new-{number}")
        done = cluster.command("run", cluster.folder(number))
        assert done.returncode == 2
        assert f"{cluster.folder(number) / 'members.toml'} is missing; copy today's" in done.stderr


def test_what_is_refused(tmp_path):
    with Changing(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        public = cluster.make(2, "new-2")
        make_client(tmp_path / "somebody")
        done = cluster.member("replace", cluster.directory, public, "--operator", tmp_path / "somebody", expected=2)
        assert "no operator's" in done.stderr
        far = cluster.make(3, "new-3")
        assert "there is no replica 3" in cluster.member("replace", cluster.directory, far, expected=2).stderr
        assert "numbers 3 and 4" in cluster.member("add", cluster.directory, public, far, expected=2).stderr
        done = cluster.member("remove", cluster.directory, 1, 2, expected=2)
        assert "2f + 1" in done.stderr
        taken = cluster.present().replicas[0].address
        twice = cluster.directory / "twice"
        assert cluster.command("keygen", twice, "--number", 2, "--address", taken).returncode == 0
        done = cluster.member("replace", cluster.directory, twice / "replica-2.public.toml", expected=2)
        assert "replicas 0 and 2 have one address" in done.stderr
        # Who asks for it without these commands is refused by the replicas, and nothing stops.
        assert "have one address" in asyncio.run(refusal(cluster, seats_of(cluster, twice / "replica-2.public.toml")))
        assert cluster.listed()["list"] == 0
        cluster.moved.clear()
        cluster.kill(1)
        done = cluster.member("replace", cluster.directory, public, expected=1)
        assert "1 of the replicas that stay answer, 2 must" in done.stderr
        assert not members_path(cluster.file).exists()
        cluster.kill(0)
        done = cluster.member("list", cluster.directory, "--deadline", "2", expected=2)
        assert "within 2 s" in done.stderr
        assert "replica 0" in done.stderr
