"""Watching replicas in processes of their own: the primary killed, the command in a pipe, server-sent events."""

import asyncio
import json
import signal
import subprocess
import sys

import pytest

from client import SyncClient
from tests.support.cluster import Processes, environment
from tests.support.gateway import GatewayProcess
from tests.support.tools import tool
from tests.support.waiting import on_loop

pytestmark = pytest.mark.cluster


async def take(changes, count):
    found = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found.append(await anext(changes))
    return found


def test_the_primary_is_killed_while_somebody_watches(tmp_path):
    """Real processes: SIGKILL for the primary, then a restart; a watcher of its own, and the command in a pipe."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        command = [sys.executable, "-m", "client.cli.main", "-c", str(cluster.directory), "watch", "n", "-o", "json"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
        ) as process:
            try:
                assert process.stderr.readline().startswith("watching from ")

                @on_loop
                async def use():
                    async with cluster.client(patience_ms=200) as client, client.watch("n") as changes:
                        for _ in range(20):
                            await client.incr("n")
                        cluster.kill(0)
                        for _ in range(20):
                            await client.incr("n")
                        cluster.start(0)
                        await cluster.wait_ready()
                        for _ in range(20):
                            await client.incr("n")
                        assert [int(change.value) for change in await take(changes, 60)] == list(range(1, 61))

                use()
                lines = [json.loads(process.stdout.readline()) for _ in range(60)]
                assert [int(line["value"]) for line in lines] == list(range(1, 61))
                assert {line["change"] for line in lines} == {"put"}
                # Resuming in the middle, from a position that it printed.
                done = subprocess.run(
                    [*command[:-2], "--after", lines[29]["position"], "--count", "5", "-o", "plain"],
                    capture_output=True,
                    text=True,
                    env=environment(),
                    timeout=60,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
                assert [line.split("\t")[3] for line in done.stdout.splitlines()] == ["31", "32", "33", "34", "35"]
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=20)
        assert process.returncode == 130


def test_the_synchronous_twin(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        with SyncClient.from_dir(cluster.directory) as client:
            with client.watch("n") as changes:
                for _ in range(3):
                    client.incr("n")
                assert [next(changes).value for _ in range(3)] == [b"1", b"2", b"3"]
                position = changes.position
            client.incr("n")
            with client.watch("n", after=position) as changes:
                assert next(iter(changes)).value == b"4"


def test_server_sent_events_of_the_gateway_and_of_a_replica(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        with GatewayProcess(cluster.directory) as gateway, SyncClient.from_dir(cluster.directory) as client:
            url = f"http://127.0.0.1:{gateway.http}/v1/watch?prefix=sse/"
            found = listen(url, lambda: [client.put("sse/a", "1"), client.delete("sse/a"), client.put("sse/b", "2")], 3)
            assert [(name, data["key"], data.get("value")) for name, data, _ in found] == [
                ("put", "sse/a", "1"),
                ("delete", "sse/a", None),
                ("put", "sse/b", "2"),
            ]
            resumed = listen(url, lambda: None, 2, "-H", f"Last-Event-ID: {found[0][2]}")
            assert resumed == found[1:]
            done = subprocess.run(
                [tool("curl"), "-sS", "-w", "\n%{http_code}", url + "&after=x"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            body, _, status = done.stdout.rpartition("\n")
            assert (status, json.loads(body)["error"]["code"]) == ("400", "bad-request")


def listen(url, act, count, *options):
    """Events from curl: (name, data, id), after the one that says where the stream begins."""
    found = []
    with subprocess.Popen([tool("curl"), "-sSN", *options, url], stdout=subprocess.PIPE, text=True) as curl:
        try:
            event = {}
            while len(found) < count:
                line = curl.stdout.readline()
                assert line, "the stream ended"
                name, _, value = line.rstrip("\n").partition(": ")
                if name in {"id", "event", "data"}:
                    event[name] = value
                elif not name and event:
                    if event["event"] == "begin":
                        act()
                    else:
                        found.append((event["event"], json.loads(event["data"]), event.get("id")))
                    event = {}
        finally:
            curl.terminate()
    return found


def test_watching_a_dead_cluster_ends_with_3(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        base = [sys.executable, "-m", "client.cli.main", "-c", str(cluster.directory), "--deadline", "0.5", "watch"]
        for options in ([], ["--after", "5"]):
            done = subprocess.run(
                [*base, *options, "-o", "json"],
                capture_output=True,
                text=True,
                env=environment(),
                timeout=60,
                check=False,
            )
            assert done.returncode == 3
            assert json.loads(done.stdout)["error"]["code"] == "unreachable"
        done = subprocess.run(
            [*base, "--after", "x"], capture_output=True, text=True, env=environment(), timeout=60, check=False
        )
        assert done.returncode == 2
