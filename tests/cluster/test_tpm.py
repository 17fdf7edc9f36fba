"""Clusters whose replicas keep their logs in software TPMs: they serve, survive a view change, restarts and a reboot."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from replica.cluster.provision import (
    TpmPlace,
    assemble,
    keygen,
    make_client,
    plan_addresses,
    public_file_name,
    replica_folder_name,
)
from replica.cluster.replicatoml import TrustedLogSettings
from tests.replica.cluster.test_tpm_members import accepted
from tests.support.cluster import Processes, environment
from tests.support.swtpm import require_tools, software_tpm
from tests.support.waiting import on_loop
from trustlog import BackendKind

pytestmark = pytest.mark.cluster


class TpmCluster:
    """Three replicas, those in `numbers` with a machine (a software TPM) of their own; some of them `enrolled`."""

    def __init__(self, directory, numbers, stack, *, enrolled=(), encrypt_store=False):
        require_tools()
        directory.mkdir()
        self.machines = {}
        for number, (host, port) in enumerate(plan_addresses(1, ["127.0.0.1"], 0)):
            folder = directory / "c" / replica_folder_name(number)
            if number in numbers:
                machine = stack.enter_context(software_tpm(directory / f"tpm-{number}"))
                self.machines[number] = machine
                trusted = TrustedLogSettings(BackendKind.TPM, encrypt_store=encrypt_store)
                keygen(folder, number, host, port, trusted, TpmPlace(machine.address))
            else:
                keygen(folder, number, host, port)
        parts = [directory / "c" / replica_folder_name(n) / public_file_name(n) for n in range(3)]
        seen = {}
        for number in enrolled:
            log = directory / "c" / replica_folder_name(number) / "log"
            seen[number] = accepted(self.machines[number], log, directory / f"accepted-{number}.pub")
        assemble(parts, directory / "c" / "cluster.toml", enrolled=seen)
        make_client(directory / "c" / "client")
        self.processes = stack.enter_context(Processes(directory / "c"))

    def close_epoch(self, number):
        """What the machine does before it is switched off, after its replica ended."""
        command = [sys.executable, "-m", "replica.cli.main", "close", str(self.processes.folder(number)), "-o", "json"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.mark.parametrize("numbers", [(0,), (0, 1, 2)], ids=["one", "all"])
def test_a_cluster_with_tpm_logs_serves_and_survives_a_view_change(tmp_path, numbers):
    with ExitStack() as stack:
        cluster = TpmCluster(tmp_path / "t", numbers, stack).processes
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                for expected in range(1, 11):
                    assert await client.incr("n") == expected
                reports = await cluster.reports(client)
                for number, report in reports.items():
                    assert report["log"]["backend"] == ("tpm" if number in numbers else "software")
                assert "TPM 2.0" in reports[0]["log"]["protects"]
                cluster.kill(0)  # the primary of view 0
                assert await client.incr("n") == 11
                reports = await cluster.reports(client)
                assert {report["view"] for report in reports.values()} == {1}
            cluster.start(0)
            await cluster.wait_ready()
            async with cluster.client() as client:
                assert await client.incr("n") == 12
            reports = await cluster.wait_equal()
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])

        use()


def test_a_replica_goes_on_after_a_reboot_that_was_announced_and_not_after_one_that_was_not(tmp_path):
    with ExitStack() as stack:
        whole = TpmCluster(tmp_path / "t", (2,), stack)
        cluster, machine = whole.processes, whole.machines[2]
        cluster.start_and_wait()

        @on_loop
        async def use(expected):
            async with cluster.client() as client:
                assert await client.incr("n") == expected
            reports = await cluster.wait_equal()
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])

        use(1)
        assert cluster.kill(2, signal.SIGTERM) == 0
        said = whole.close_epoch(2)
        assert said["closed_at"] == said["last"]
        machine.reboot()
        cluster.start(2)
        use(2)
        text = subprocess.run(
            [
                sys.executable,
                "-m",
                "replica.cli.main",
                "inspect",
                str(cluster.folder(0)),
                "--log",
                "2",
                "--index",
                str(said["last"] + 1),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "the log's epoch ends or begins" in text

        cluster.kill(2)
        machine.cut_power()
        machine.start()
        cluster.start(2)
        assert cluster.exit_status(2) != 0
        assert "the machine was started again" in cluster.log_text(2)
        assert "must be admitted to the cluster by an ordered change of members" in cluster.log_text(2)


def test_an_older_copy_of_a_replica_is_refused_by_its_tpm(tmp_path):
    with ExitStack() as stack:
        cluster = TpmCluster(tmp_path / "t", (1,), stack).processes
        cluster.start_and_wait()

        @on_loop
        async def use(expected):
            async with cluster.client() as client:
                assert await client.incr("n") == expected

        use(1)
        assert cluster.kill(1, signal.SIGTERM) == 0
        shutil.copytree(cluster.folder(1), tmp_path / "copy")
        cluster.start_and_wait(1)
        use(2)
        assert cluster.kill(1, signal.SIGTERM) == 0
        shutil.rmtree(cluster.folder(1))
        shutil.copytree(tmp_path / "copy", cluster.folder(1))
        cluster.start(1)
        assert cluster.exit_status(1) != 0
        assert "or the folder is an older copy of itself" in cluster.log_text(1)


def test_a_replica_whose_tpm_fails_stops_with_the_reason_and_the_others_go_on(tmp_path):
    with ExitStack() as stack:
        whole = TpmCluster(tmp_path / "t", (2,), stack)
        cluster = whole.processes
        cluster.start_and_wait()
        whole.machines[2].cut_power()

        @on_loop
        async def use():
            async with cluster.client() as client:
                for expected in range(1, 4):
                    assert await client.incr("n") == expected

        use()
        assert cluster.exit_status(2) != 0
        assert "the TPM cannot be reached" in cluster.log_text(2)


def test_a_register_that_something_else_extends_ends_the_replica_before_it_says_anything_wrong(tmp_path):
    with ExitStack() as stack:
        whole = TpmCluster(tmp_path / "t", (2,), stack)
        cluster = whole.processes
        cluster.start_and_wait(0, 1)
        with whole.machines[2].connect() as tpm:
            tpm.pcr_extend(14, bytes(32))
        cluster.start(2)
        assert cluster.exit_status(2) != 0
        assert "something else extended it" in cluster.log_text(2)


SECRET = "a secret operation"


def everything(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_replica_whose_store_is_sealed_by_its_tpm(tmp_path):
    """It has its data after a restart and a reboot; without the key it says why, and begins anew from its peers."""
    with ExitStack() as stack:
        whole = TpmCluster(tmp_path / "t", (2,), stack, encrypt_store=True)
        cluster, machine, folder = whole.processes, whole.machines[2], whole.processes.folder(2)
        cluster.start_and_wait()

        @on_loop
        async def use(*, write=False):
            async with cluster.client() as client:
                if write:
                    await client.put("name", SECRET)
                assert await client.get("name") == SECRET.encode()
            reports = await cluster.wait_equal()
            assert {number: report["payloads_at_rest"] for number, report in reports.items()}[2] == "sealed"
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])

        use(write=True)
        assert cluster.kill(2, signal.SIGTERM) == 0
        whole.close_epoch(2)
        machine.reboot()
        cluster.start(2)
        use()

        assert cluster.kill(2, signal.SIGTERM) == 0
        assert SECRET.encode() not in everything(folder)
        assert SECRET.encode() in everything(cluster.folder(0)), "the search finds what is in the clear"
        sealed = folder / "log" / "store.sealed"
        content = bytearray(sealed.read_bytes())
        content[-1] ^= 1
        sealed.write_bytes(content)
        cluster.start(2)
        assert cluster.exit_status(2) != 0
        assert "the TPM does not release the key" in cluster.log_text(2)
        assert "Traceback" not in cluster.log_text(2)

        for path in (sealed, *folder.glob("store.sqlite*"), *folder.glob("state.sqlite*")):
            path.unlink()
        command = [sys.executable, "-m", "trustlog.cli.main", "tpm", "reseal", str(folder / "log"), "--new-key"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        cluster.start(2)
        use()
        assert cluster.kill(2, signal.SIGTERM) == 0
        assert SECRET.encode() not in everything(folder)
