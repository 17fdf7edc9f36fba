"""Real replicas whose logs are processes of their own: killed under load, away for long, through a view change."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from replica.cluster.provision import assemble, keygen, make_client, plan_addresses, public_file_name
from replica.cluster.replicatoml import TrustedLogSettings
from tests.support.cluster import Processes
from tests.support.load import Load, check_acknowledged
from tests.support.waiting import on_loop, until
from tests.trustlog.service.support import Service, public_folder
from trustlog import BackendKind

pytestmark = pytest.mark.cluster


async def log_of(cluster, client, number) -> dict:
    return (await cluster.reports(client))[number]["log"]


def test_log_services_killed_under_load_and_a_view_change(tmp_path):
    """kill -9 of each replica's log service, of the primary's among them; then of the primary itself."""
    with Processes(tmp_path / "c", log_kind=BackendKind.PROCESS) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client(patience_ms=300) as client, Load(client) as load:
                for number in (2, 1, 0):
                    await load.more(10)
                    before = await log_of(cluster, client, number)
                    assert before["backend"] == "process"
                    os.kill(before["service"]["pid"], signal.SIGKILL)
                    await load.more(10)

                    async def back(number=number, pid=before["service"]["pid"]):
                        log = await log_of(cluster, client, number)
                        return log["service"]["pid"] != pid and log["trouble"] is None

                    await until(back, "the log is back", 30)
                    assert "trusted log away" in cluster.log_text(number)
                    await until(
                        lambda number=number: "trusted log is back" in cluster.log_text(number), "its word for it"
                    )
            reports = await cluster.wait_equal()
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])
            primary = reports[0]["primary"]
            others = [number for number in range(3) if number != primary]
            cluster.kill(primary)
            async with cluster.client() as client:
                async with Load(client) as more:
                    await more.more(20)
                views = {report["view"] for report in (await cluster.reports(client)).values()}
                assert min(views) > reports[0]["view"]
                sample = dict(list((load.acknowledged | more.acknowledged).items())[::5])
                await check_acknowledged(client, sample)
                cluster.start(primary)
                await cluster.wait_equal()
                # The one that was away for a moment is the second of two again.
                cluster.kill(others[0])
                await check_acknowledged(client, dict(list(sample.items())[::3]))

        use()
        assert all(cluster.kill(number, signal.SIGTERM) == 0 for number in range(3) if cluster.is_running(number))


def with_external_log(directory: Path, service: Service) -> None:
    """Make a cluster whose replica 2 takes its log from `service`, as on a machine where systemd runs it."""
    files = []
    for number, (host, port) in enumerate(plan_addresses(1, ["127.0.0.1"], 0)):
        settings = TrustedLogSettings(BackendKind.PROCESS, service.socket if number == 2 else None)
        folder = directory / f"replica-{number}"
        keygen(folder, number, host, port, settings)
        files.append(folder / public_file_name(number))
    assemble(files, directory / "cluster.toml")
    make_client(directory / "client")


def test_a_service_that_stays_away(tmp_path):
    """The replica says nothing, says so, reads on; and speaks again when its service is back."""
    with public_folder() as folder, Service(folder) as service:
        with_external_log(tmp_path / "c", service)
        with Processes(tmp_path / "c") as cluster:
            cluster.start_and_wait()

            @on_loop
            async def use():
                async with cluster.client(patience_ms=300) as client:
                    await client.put("before", "x")
                    await cluster.wait_equal()
                    log = await log_of(cluster, client, 2)
                    assert (log["service"]["pid"], log["service"]["uid"]) == (service.process.pid, service.uid)
                    service.kill()

                    async def away():
                        report = (await cluster.reports(client))[2]
                        return report["log"]["trouble"] and report

                    report = await until(away, "it says that its log is away")
                    assert report["mute"] == report["log"]["trouble"]
                    assert f"trustlog serve --socket {service.socket}" in report["mute"]
                    for number in range(20):
                        await client.put(f"meanwhile {number}", "y")

                    async def reads():
                        found = await cluster.reports(client)
                        return found[2]["peers"][0]["read"] == found[0]["log"]["last"] and found[2]

                    report = await until(reads, "it reads on")
                    assert report["log"]["last"] == log["last"], "and says nothing"
                    await asyncio.to_thread(lambda: service.start().wait_ready())

                    async def speaks():
                        found = (await cluster.reports(client))[2]
                        return found["mute"] is None and found["log"]["last"] > log["last"]

                    await until(speaks, "it speaks again")
                    await cluster.wait_equal()
                    # It is needed now.
                    cluster.kill(1)
                    await client.put("after", "z")
                    assert await client.get("meanwhile 7") == b"y"

            use()


def test_a_service_rolled_back_while_it_was_away_is_refused(tmp_path):
    with public_folder() as folder, Service(folder) as service:
        with_external_log(tmp_path / "c", service)
        old = {path: path.read_bytes() for path in service.state.iterdir()}
        with Processes(tmp_path / "c") as cluster:
            cluster.start_and_wait()

            @on_loop
            async def use():
                async with cluster.client(patience_ms=300) as client:
                    await client.put("before", "x")
                    await cluster.wait_equal()
                    service.kill()
                    for path, content in old.items():
                        path.write_bytes(content)
                    await asyncio.to_thread(lambda: service.start().wait_ready())

                    async def refused():
                        report = (await cluster.reports(client))[2]
                        return report["mute"] and "never be used again" in report["mute"]

                    await until(refused, "the rolled back log is refused")
                    await client.put("the others go on", "x")

            use()
            assert cluster.exit_status(2) == 1  # it had to say something, and stopped instead
            cluster.start(2)
            assert cluster.exit_status(2) == 2
            assert "rolled back" in cluster.log_text(2)
