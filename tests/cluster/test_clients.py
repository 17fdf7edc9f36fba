"""Who may be a client of a running cluster, by the commands that an operator types."""

import asyncio
import json
import subprocess
import sys

import pytest

from client import Client, NoLongerAllowed, NotAllowed, NotPermitted, Position, Undecided
from client.api import CLIENT_FOLDER
from replica.application import Right
from replica.apps import kv
from replica.cluster.keys import ClientKey, load_client_key
from replica.cluster.provision import OPERATOR_NAME, make_client
from replica.core.clients import Allow, Permission
from replica.core.envelope import Status
from replica.core.genesis import Limits
from replica.operations.changing import Council
from tests.support.cluster import Processes, environment
from tests.support.waiting import on_loop_for, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
LIMITS = Limits(checkpoint_interval=16, window=32)
DEADLINE_S = 240.0


class Policed(Processes):
    """A cluster, and what an operator and clients type; `mine` is the key that `init` made, `other` another one."""

    def __init__(self, directory) -> None:
        super().__init__(directory, limits=LIMITS)
        self.mine, self.other = self.key(), make_client(directory / "other")

    def typed(self, module, *words, expected=0):
        command = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(command, check=False, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == expected, done.stdout + done.stderr
        return done

    def clients(self, verb, *words, expected=0):
        return self.typed("replica.cli.main", "clients", verb, self.directory, *words, expected=expected)

    def listed(self):
        return json.loads(self.clients("list", "-o", "json").stdout)

    def trustlog_client(self, *words, expected=0):
        return self.typed("client.cli.main", "-c", self.directory, *words, expected=expected)

    def of(self, key: ClientKey, **settings) -> Client:
        return self.client(deadline_s=30.0, key=key, **settings)


def test_only_listed_keys_and_their_prefixes(tmp_path):
    with Policed(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        assert cluster.listed()["mode"] == "open"
        cluster.trustlog_client("put", "b/1", "secret")
        cluster.clients("mode", "listed")
        done = json.loads(cluster.trustlog_client("put", "a/1", "x", "-o", "json", expected=1).stdout)
        assert done["error"]["code"] == "not-allowed"
        assert "clients list" in done["error"]["hint"]
        public = cluster.directory / CLIENT_FOLDER / "client.pub"
        cluster.clients("allow", public, "--name", "meter", "--read", "a/", "--write", "a/", "--read", "c")
        cluster.trustlog_client("put", "a/1", "x")
        assert cluster.trustlog_client("get", "a/1", "--stale").stdout == "x"
        for words in (("put", "b/1", "x"), ("get", "b/1"), ("get", "b/1", "--stale"), ("scan",), ("put", "c", "x")):
            done = cluster.trustlog_client(*words, expected=1)
            assert "this key may not" in done.stderr, words
        done = json.loads(cluster.trustlog_client("get", "b/1", "-o", "json", expected=1).stdout)
        assert done["error"]["code"] == "not-permitted"

        @on_loop_for(DEADLINE_S)
        async def use():
            async with cluster.of(cluster.mine) as client:
                # What is permitted goes on beside what is not, in one envelope too.
                calls = [client.incr("a/n"), client.put("b/2", "x"), client.incr("a/n")]
                first, second, third = await asyncio.gather(*calls, return_exceptions=True)
                assert (first, third) == (1, 2)
                assert isinstance(second, NotPermitted)
                assert second.reason == 'this key may not write "b/2"'
                async with client.watch("a/") as changes:
                    await client.put("a/seen", "1")
                    assert (await anext(changes)).key == b"a/seen"
                    with pytest.raises(NotAllowed, match="may not watch"):
                        async with client.watch("b/", after=changes.position):
                            pass
                _, receipt = await client.with_receipt(lambda calls: calls.put("a/2", "y"))
                assert receipt.outcome.result == b"\x00"

        use()
        (row,) = cluster.listed()["keys"]
        assert (row["key"], row["name"], row["state"]) == (cluster.mine.public_key.hex(), "meter", "allowed")
        assert row["permissions"] == [
            {"rights": "read and write", "prefix": "a/"},
            {"rights": "read", "prefix": "c"},
        ]
        cluster.clients("mode", "open")
        cluster.clients("allow", public)
        assert cluster.trustlog_client("get", "b/1").stdout == "secret"


def test_a_listed_key_may_be_called_by_its_name_and_tables_are_readable(tmp_path):
    with Policed(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        mine, other = cluster.mine.public_key.hex(), cluster.other.public_key.hex()
        cluster.clients("allow", mine, "--name", "meter")
        cluster.clients("allow", other, "--name", "meter")
        said = cluster.clients("revoke", "meter", expected=2).stderr
        assert mine in said
        assert other in said
        assert "clients list" in cluster.clients("revoke", "metre", expected=2).stderr
        cluster.clients("allow", other, "--name", "shop")
        assert json.loads(cluster.clients("revoke", "meter", "-o", "json").stdout)["key"] == mine
        table = cluster.clients("list", "-o", "table").stdout.splitlines()
        assert max(map(len, table)) <= 80
        (line,) = [line for line in table if "shop" in line]
        assert line.split()[0] == f"{other[:16]}…"
        assert "allowed" in line
        done = json.loads(cluster.clients("quota", line.split()[0], "--envelopes", 3, "-o", "json").stdout)
        assert done["key"] == other
        table = cluster.typed("replica.cli.main", "member", "list", cluster.directory, "-o", "table").stdout
        assert all(place.address in table for place in cluster.cluster.replicas)
        assert max(map(len, table.splitlines())) <= 80


def test_a_revoked_key_is_refused_at_once_and_stays_so(tmp_path):
    """Under load of another client, over a replay, a state transfer and a restart of all."""
    with Policed(tmp_path / "c") as cluster:
        cluster.set(retain_mib=0)
        cluster.start_and_wait()
        mine, other = cluster.mine, cluster.other
        cluster.clients("allow", mine.public_key.hex())
        cluster.clients("allow", cluster.directory / "other", "--name", "other")
        cluster.clients("mode", "listed")
        operator = load_client_key(cluster.directory / OPERATOR_NAME)

        async def refused(key, after):
            async with cluster.of(key) as client:
                with pytest.raises(NotAllowed, match=key.public_key.hex()):
                    await client.put("refused", "1")
                with pytest.raises(NotAllowed, match="not read"):
                    await client.stale_get("n")
                with pytest.raises(NotAllowed, match="may not watch"):
                    async with client.watch(after=after):
                        pass

        async def count(client, total, ended):
            while not ended.is_set():
                total[0] += 1
                assert await client.incr("n") == total[0]

        @on_loop_for(DEADLINE_S)
        async def revoke():
            ended, total = asyncio.Event(), [0]
            async with cluster.of(mine) as client, cluster.of(other) as going_on, asyncio.TaskGroup() as group:
                group.create_task(count(going_on, total, ended))
                watching = await client.watch().__aenter__()
                operation = kv.put(b"mine", b"1")
                said = (await client.driver.execute(operation, 30.0)).outcome(mine.public_key, operation)
                assert (await client.driver.receipt(said, 30.0)).outcome == said
                await asyncio.to_thread(cluster.clients, "revoke", mine.public_key.hex())
                with pytest.raises((NotAllowed, NoLongerAllowed)):
                    await client.put("mine", "2")
                with pytest.raises(NotAllowed):
                    await client.put("mine", "3")
                with pytest.raises(NotAllowed, match="may not watch"):
                    async for _ in watching:
                        pass
                with pytest.raises(Undecided, match="key is not allowed"):
                    await client.driver.receipt(said, 30.0)
                await refused(mine, watching.position)
                wanted = total[0] + 20
                await until(lambda: total[0] >= wanted, "the other client goes on", 60)
                ended.set()
            # A captured command, sent by whoever has it: the same bytes, were it not for the signature.
            async with Council(cluster.cluster, operator) as council:
                reply = await council.order(Allow(1, mine.public_key).encode())
            assert reply.status is Status.ERROR
            assert "the next one is 5" in reply.text
            await refused(mine, watching.position)
            async with cluster.of(other) as client:
                assert await client.get("mine") == b"1"

        revoke()
        before = cluster.listed()
        assert [row["state"] for row in before["keys"]].count("revoked") == 1

        # One that was away gets it with the state, and one that starts again has it on disk.
        cluster.kill(2)

        @on_loop_for(DEADLINE_S)
        async def much():
            async with cluster.of(other) as client:
                for number in range(16 * 8 * 3):
                    await client.put("k", bytes([number % 256]) * 60_000)

        much()
        cluster.start_and_wait(2)

        @on_loop_for(DEADLINE_S)
        async def transferred():
            reports = await cluster.wait_equal()
            assert all(report["client_keys"] == reports[0]["client_keys"] for report in reports.values())
            assert reports[2]["client_keys"] == {"mode": "listed", "commands": 4, "listed": 2}

        transferred()
        assert "state installed" in cluster.log_text(2)
        for number in range(3):
            cluster.kill(number)
        cluster.start_and_wait(1, 2)
        after = cluster.listed()
        assert (after["mode"], after["command"], after["keys"]) == (before["mode"], before["command"], before["keys"])

        @on_loop_for(DEADLINE_S)
        async def still():
            async with cluster.of(other) as client:
                position = await client.slot()
                assert await client.get("mine") == b"1"
            await refused(mine, Position(position))

        still()


def test_what_is_refused(tmp_path):
    with Policed(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        somebody = make_client(tmp_path / "somebody")
        done = cluster.clients("mode", "listed", "--operator", tmp_path / "somebody", expected=2)
        assert "no operator's" in done.stderr
        for bad in ("00" * 65, "04" + "00" * 64):
            assert "not a client's public key" in cluster.clients("revoke", bad, expected=2).stderr
        assert "nowhere" in cluster.clients("revoke", tmp_path / "nowhere", expected=2).stderr
        digits = somebody.public_key.hex()
        assert "at most 200 bytes" in cluster.clients("allow", digits, "--name", "x" * 201, expected=2).stderr
        assert "at most 256 bytes" in cluster.clients("allow", digits, "--read", "x" * 257, expected=2).stderr
        many = [word for number in range(17) for word in ("--read", number)]
        assert "at most 16 prefixes" in cluster.clients("allow", digits, *many, expected=2).stderr
        assert cluster.listed()["command"] == 0

        # Two operators at a time: who comes second is told.
        @on_loop_for(60)
        async def two():
            operator = load_client_key(cluster.directory / OPERATOR_NAME)
            async with Council(cluster.cluster, operator) as council:
                first = Allow(1, somebody.public_key, "one").encode()
                assert (await council.order(first)).status is Status.OK
                second = Allow(1, somebody.public_key, "two", (Permission(Right.READ, b""),)).encode()
                assert "the next one is 2" in (await council.order(second)).text
                assert (await council.order(first)).status is Status.OK, "what is in force, again"

        two()
        (row,) = cluster.listed()["keys"]
        assert (row["name"], row["command"]) == ("one", 1)
        cluster.kill(0)
        cluster.kill(1)
        done = cluster.clients("revoke", digits, "--deadline", "2", expected=2)
        assert "within 2 s" in done.stderr
