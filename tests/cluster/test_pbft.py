"""A PBFT cluster of real processes, made and used by the commands that users have."""

import asyncio
import json
import signal
import subprocess
import sys

import pytest

from replica.cluster.clusterfile import load_any_cluster_file
from replica.cluster.pbft import PBFT
from tests.support.cluster import Processes, environment, replica_command
from tests.support.waiting import on_loop, until

pytestmark = pytest.mark.cluster


def command(module: str, *arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env=environment(), check=False)


def replica(*arguments: object) -> subprocess.CompletedProcess:
    return command("replica.cli.main", *arguments)


def client(directory, *arguments: object) -> subprocess.CompletedProcess:
    return command("client.cli.main", "-c", directory, *arguments)


@pytest.mark.timeout(300)  # a dozen commands and four replicas, on a machine that may do other things
def test_four_processes_a_killed_primary_and_no_way_back(tmp_path):
    directory = tmp_path / "c"
    made = replica("init", directory, "--ordering", "pbft", "--base-port", 0)
    assert made.returncode == 0, made.stderr
    assert "baseline for measuring and teaching" in made.stderr
    assert load_any_cluster_file(directory).genesis.ordering is PBFT
    with Processes(directory) as cluster:
        cluster.start_and_wait()
        assert "baseline" in cluster.log_text(2)
        assert client(directory, "put", "greeting", "hello").returncode == 0
        assert client(directory, "get", "greeting").stdout == "hello"
        assert client(directory, "get", "--stale", "greeting").stdout == "hello"
        for shown in (client(directory, "status", "-o", "table"), replica("status", directory, "-o", "table")):
            assert shown.returncode == 0
            assert "no trusted log: PBFT" in shown.stdout.replace("\n", " ")

        @on_loop
        async def kill_the_primary_at_work():
            async with cluster.client(deadline_s=30, patience_ms=200) as one:

                async def count(times: int) -> list[int]:
                    return [await one.incr("n") for _ in range(times)]

                async def begun() -> bool:
                    return int(await one.stale_get("n") or 0) >= 3

                work = [asyncio.create_task(count(20)) for _ in range(5)]
                await until(begun, "work has begun")
                assert not any(task.done() for task in work)
                cluster.kill(0)
                seen = [number for task in work for number in await task]
                # Each increment once, whatever was sent again.
                assert sorted(seen) == list(range(1, 101))
                assert await one.get("n") == b"100"
                reports = await cluster.reports(one)
                assert set(reports) == {1, 2, 3}
                assert {report["view"] for report in reports.values()} == {1}

        kill_the_primary_at_work()
        assert replica("health", cluster.folder(2)).returncode == 0
        # What it promised is forgotten, so it may not come back.
        back = subprocess.run(
            replica_command(cluster.folder(0)),
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(),
            check=False,
        )
        assert back.returncode == 2
        assert "this replica ran before" in back.stderr
        measured = client(directory, "bench", "--runs", 1, "--seconds", 0.3, "--concurrency", 10, "-o", "json")
        assert measured.returncode == 0, measured.stderr
        document = json.loads(measured.stdout)
        assert document["cluster"]["ordering"] == "pbft"
        assert document["levels"][0]["ops_per_second"] > 0
        cluster.kill(3, signal.SIGKILL)
        # Two of four order nothing, and status says so.
        assert client(directory, "status").returncode == 3
        assert replica("status", directory).returncode == 3
    again = replica("dev", directory)
    assert again.returncode == 2
    assert "ran before" in again.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("pbft") / "c"
    assert replica("init", made, "--ordering", "pbft", "--base-port", 0).returncode == 0
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit", "{}"),
        ("backup", "{}/replica-1", "{}-backup"),
        ("inspect", "{}/replica-1"),
        ("debug", "dump", "{}/replica-1", "{}-dump"),
        ("close", "{}/replica-1"),
        ("evidence", "list", "{}/replica-1"),
        ("evidence", "verify", "{}/cluster.toml", "--cluster", "{}/cluster.toml"),
        ("lab", "serve", "--attach", "{}"),
        ("doctor", "{}/replica-1"),
        ("dev", "{}", "--http-base-port", "9000"),
    ],
    ids=" ".join,
)
def test_what_needs_a_trusted_log_says_that_there_is_none(directory, arguments):
    done = replica(*(argument.format(directory) for argument in arguments))
    assert done.returncode in {1, 2}
    assert 'this cluster has no trusted logs (ordering = "pbft")' in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("put", "a", "1", "--receipt", "{}-r.json"), ("watch", "a")], ids=" ".join)
def test_clients_are_told_too(directory, arguments):
    done = client(directory, *(argument.format(directory) for argument in arguments))
    assert (done.returncode, "no trusted logs" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--log-backend", "software"), "belongs to trusted logs"),
        (("--encrypt-store",), "belongs to trusted logs"),
        (("--f", "4"), "from 1 to 3"),
    ],
)
def test_options_of_what_it_lacks_are_refused(tmp_path, arguments, says):
    done = replica("init", tmp_path / "c", "--ordering", "pbft", *arguments)
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "says"), [(("--durability", "disk"), 'durability = "disk"'), (("--http", "127.0.0.1:1"), "http")]
)
def test_settings_of_what_it_lacks_are_refused(directory, options, says):
    done = replica("run", directory / "replica-0", *options)
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert not (directory / "replica-0" / "started").exists()
