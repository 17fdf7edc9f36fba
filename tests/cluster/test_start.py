"""Real replicas that cannot start or must stop: what they print, how they exit, what the others say."""

import asyncio
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess

import pytest
import uvloop

from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.provision import init_cluster
from tests.support.cluster import Processes, environment, replica_command
from tests.support.waiting import on_loop, until, wait_for
from trustlog import open_log

pytestmark = pytest.mark.cluster


def run(folder, *options, seconds=20):
    done = subprocess.run(
        replica_command(folder, *options),
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(),
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def directory(tmp_path):
    init_cluster(tmp_path / "c", base_port=0)
    return tmp_path / "c"


def test_port_in_use(directory):
    place = load_cluster_file(directory).replicas[0]
    with socket.socket() as taken:
        taken.bind((place.host, place.port))
        taken.listen()
        done = run(directory / "replica-0")
        assert done.returncode == 2
        assert f"cannot listen at {place.address}" in done.stderr
        assert "already" in done.stderr
        in_json = run(directory / "replica-0", "-o", "json")
        assert in_json.returncode == 2
        assert "cannot listen at" in json.loads(in_json.stdout)["error"]["message"]


def test_the_same_replica_twice(directory):
    with Processes(directory) as cluster:
        cluster.start(0)
        cluster.wait_logged(0, "listening")
        done = run(directory / "replica-0")
        assert done.returncode == 2
        assert "in use by another process" in done.stderr
        assert cluster.is_running(0)


def test_keys_of_another_cluster(directory, tmp_path):
    other = tmp_path / "other"
    init_cluster(other, base_port=0)
    shutil.copy(other / "replica-0" / "tls.crt", directory / "replica-0" / "tls.crt")
    done = run(directory / "replica-0")
    assert done.returncode == 2
    assert "this certificate has SHA-256" in done.stderr
    assert len(set(re.findall(r"[0-9a-f]{64}", done.stderr))) == 2


def test_an_application_that_is_missing(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, application="no.such.module:App")
    done = run(tmp_path / "c" / "replica-0")
    assert done.returncode == 2
    assert "no.such.module:App" in done.stderr
    assert "PYTHONPATH" in done.stderr


def test_a_damaged_store_is_named_and_made_good(directory):
    with Processes(directory) as cluster:
        cluster.start_and_wait()
        load(cluster, 5)
        assert cluster.kill(1, signal.SIGTERM) == 0
        db = sqlite3.connect(cluster.folder(1) / "store.sqlite")
        with db:
            db.execute("update groups set payloads = zeroblob(length(payloads)) where log = 0")
        db.close()
        cluster.start(1)
        cluster.wait_logged(1, "damage in the store; peers are asked for what is missing")
        text = cluster.log_text(1)
        assert "store.sqlite: the group 1 to" in text
        assert "of log 0 is damaged" in text
        uvloop.run(cluster.wait_ready())
        load(cluster, 2)
        reports = uvloop.run(cluster.wait_equal())
        assert {report["mute"] for report in reports.values()} == {None}


def test_a_store_that_is_no_database(directory):
    with Processes(directory) as cluster:
        cluster.start_and_wait()
        load(cluster, 2)
        assert cluster.kill(1, signal.SIGTERM) == 0
        (cluster.folder(1) / "store.sqlite").write_bytes(b"x" * 8192)
        cluster.start(1)
        cluster.wait_logged(1, "log store salvaged")
        assert "store.sqlite.damaged-1" in cluster.log_text(1)
        uvloop.run(cluster.wait_ready())
        uvloop.run(cluster.wait_equal())


@pytest.mark.parametrize("what", ["the whole folder", "the trusted log"])
def test_a_folder_of_yesterday(directory, tmp_path, what):
    """A restored backup: the replica ends by itself, says why, and its trusted log signs nothing."""
    with Processes(directory) as cluster:
        cluster.start_and_wait()
        load(cluster, 3)
        assert cluster.kill(1, signal.SIGTERM) == 0
        folder = cluster.folder(1)
        shutil.copytree(folder, tmp_path / "old")
        cluster.start(1)
        uvloop.run(cluster.wait_ready())
        load(cluster, 3)
        uvloop.run(cluster.wait_equal())
        assert cluster.kill(1, signal.SIGTERM) == 0
        if what == "the whole folder":
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "old", folder)
        else:
            shutil.rmtree(folder / "log")
            shutil.copytree(tmp_path / "old" / "log", folder / "log")
        with open_log(folder / "log") as log:
            last = log.last
        cluster.log_path(1).write_bytes(b"")
        cluster.start(1)
        load(cluster, 2)  # the others go on, and would have it vote
        if what == "the whole folder":
            # Only its peers know, so it found out when it ran.
            assert cluster.exit_status(1) == 1
            lines = [json.loads(line) for line in cluster.log_text(1).splitlines()]
            (reason,) = (line["reason"] for line in lines if line["level"] == "critical")
        else:
            assert cluster.exit_status(1) == 2
            reason = cluster.log_text(1)
            assert "resuming would deny what was said" in reason
        assert "rolled back" in reason
        assert f"ends at {last}" in reason
        assert "Traceback" not in cluster.log_text(1)
        with open_log(folder / "log") as log:
            assert log.last == last
        reports = uvloop.run(cluster.wait_equal(0, 2))
        assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])


def load(cluster, count: int) -> None:
    @on_loop
    async def work():
        async with cluster.client() as client:
            for number in range(count):
                await client.put(f"key-{number}", str(number))

    work()


def test_a_replica_with_another_cluster_file_is_refused_by_both(directory):
    """Defect 18: the first run fails because two machines have different configuration."""
    original = (directory / "cluster.toml").read_bytes()
    with Processes(directory) as cluster:
        ours = cluster.cluster.cluster_id.hex()
        # Replica 2's machine has a file with another agreed value.
        changed = directory / "changed.toml"
        changed.write_bytes(original.replace(b"checkpoint_interval = 128", b"checkpoint_interval = 64"))
        theirs = load_cluster_file(changed).cluster_id.hex()
        settings = cluster.folder(2) / "replica.toml"
        settings.write_text(settings.read_text().replace("../cluster.toml", "../changed.toml"))
        cluster.start()
        for number in (0, 1, 2):
            wait_for(
                lambda number=number: ours in cluster.log_text(number) and theirs in cluster.log_text(number),
                f"replica {number} names both cluster ids",
            )
            assert "different cluster.toml files" in cluster.log_text(number)
        # The two that agree form a cluster.

        uvloop.run(cluster.wait_ready(0, 1))
        load(cluster, 2)
        assert cluster.is_running(2)


def test_a_file_that_differs_outside_its_agreed_part_is_named_and_works(directory):
    with Processes(directory) as cluster:
        changed = directory / "changed.toml"
        changed.write_bytes((directory / "cluster.toml").read_bytes() + b"# a comment\n")
        settings = cluster.folder(2) / "replica.toml"
        settings.write_text(settings.read_text().replace("../cluster.toml", "../changed.toml"))
        cluster.start_and_wait()
        digests = {cluster.cluster.digest.hex(), load_cluster_file(changed).digest.hex()}
        assert len(digests) == 2
        for number in (0, 2):
            cluster.wait_logged(number, "differs outside its agreed part")
            assert all(digest in cluster.log_text(number) for digest in digests)


def test_a_certificate_that_is_not_in_the_others_file(directory, tmp_path):
    """Replica 2 has new TLS keys, and a file that knows them; the others have the old one."""
    other = tmp_path / "other"
    init_cluster(other, base_port=0)
    with Processes(directory) as cluster:
        for name in ("tls.crt", "tls.key"):
            shutil.copy(other / "replica-2" / name, cluster.folder(2) / name)
        old = (directory / "cluster.toml").read_text()
        certificate = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", re.DOTALL)
        theirs = certificate.findall((other / "cluster.toml").read_text())[2]
        (directory / "changed.toml").write_text(old.replace(certificate.findall(old)[2], theirs))
        settings = cluster.folder(2) / "replica.toml"
        settings.write_text(settings.read_text().replace("../cluster.toml", "../changed.toml"))
        cluster.start()
        # The others' dialling fails on its certificate, its own dialling is refused by them.
        for number in (0, 1):
            wait_for(
                lambda number=number: "presents a certificate with SHA-256" in cluster.log_text(number),
                f"replica {number} says that the certificate is wrong",
            )

        uvloop.run(cluster.wait_ready(0, 1))

        @on_loop
        async def refused():
            async with cluster.client() as client:
                await client.put("a", "b")

                async def counted():
                    reports = await cluster.reports(client)
                    return reports[0]["refused"].get("tls-failed") and not reports[0]["peers"][1]["connected"]

                await until(counted, "the refusal counted")

        refused()


def test_a_full_disk_stops_one_replica_and_loses_nothing(directory):
    """The files of replica 1 cannot grow beyond a limit; the system says EFBIG as it would say ENOSPC."""
    with Processes(directory) as cluster:
        cluster.start(0, 2)
        cluster.start(1, file_bytes_max=400_000)

        @on_loop
        async def fill():
            await cluster.wait_ready()
            async with cluster.client() as client:
                for number in range(400):
                    if not cluster.is_running(1):
                        break
                    await asyncio.gather(*(client.put(f"{number}-{i}", "x" * 1000) for i in range(10)))
                await client.put("after", "1")

        fill()
        assert cluster.exit_status(1) == 1
        text = cluster.log_text(1)
        assert "cannot make its log durable" in text
        assert "Traceback" not in text
        # With room on the disk it goes on where it stood.
        cluster.start(1)

        @on_loop
        async def again():
            reports = await cluster.wait_equal()
            assert reports[1]["executed"] == reports[0]["executed"] > 1
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])

        again()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_replica_in_order(directory, how):
    with Processes(directory) as cluster:
        cluster.start(0)
        cluster.wait_logged(0, "listening")
        assert cluster.kill(0, how) == 0
        lines = [json.loads(line) for line in cluster.log_text(0).splitlines()]
        assert [line["event"] for line in lines if line["event"] in {"listening", "stopping", "stopped"}] == [
            "listening",
            "stopping",
            "stopped",
        ]
