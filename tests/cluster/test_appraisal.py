"""Real replicas appraise each other's evidence: software TPMs, log processes, and what `status` prints of it."""

import re
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.cluster.test_tpm import TpmCluster
from tests.support.cluster import Processes, environment
from tests.support.waiting import on_loop, until
from trustlog import BackendKind
from trustlog.measurement import own_measurement

pytestmark = pytest.mark.cluster


def demand(cluster, text):
    path = cluster.directory / "cluster.toml"
    path.write_text(f"{path.read_text()}\n[appraisal]\n{text}\n")


async def appraisals(cluster, client, reporters=(0, 1, 2)):
    """Wait until the reporters have appraised every other replica; return what they say, by reporter and peer.

    One that is refused may be sent away before it has seen the other side's evidence, each time.
    """

    async def all_said():
        reports = await cluster.reports(client)
        said = {
            (number, peer["replica"]): peer["appraisal"]
            for number, report in reports.items()
            for peer in report["peers"]
            if number in reporters
        }
        return said if len(said) == 2 * len(reporters) and all(said.values()) else None

    return await until(all_said, "all appraised")


def test_a_cluster_that_demands_a_tpm_of_everybody(tmp_path):
    own = own_measurement(BackendKind.TPM).hex()
    with ExitStack() as stack:
        cluster = TpmCluster(tmp_path / "t", (0, 1, 2), stack, enrolled=(0, 1, 2)).processes
        demand(cluster, f'minimum_evidence = "tpm"\naccepted_measurements = ["{own}"]')
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert await client.incr("n") == 1
                for result in (await appraisals(cluster, client)).values():
                    assert result["text"] == f"tpm, measured {own[:8]}…, AK enrolled"
                    assert "a TPM's attestation key" in result["root"]

        use()
        command = [sys.executable, "-m", "client.cli.main", "-c", str(cluster.directory), "status", "-o", "table"]
        shown = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False).stdout
        assert f"replica-2: tpm, measured {own[:8]}…, AK enrolled (says 0, 1)" in shown


def test_a_cluster_that_demands_a_tpm_refuses_who_has_none(tmp_path):
    with ExitStack() as stack:
        cluster = TpmCluster(tmp_path / "t", (0, 1), stack, enrolled=(0, 1)).processes
        demand(cluster, 'minimum_evidence = "tpm"')
        cluster.start(0, 1, 2)

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert await client.incr("n") == 1
                said = await appraisals(cluster, client, (0, 1))
                for number in (0, 1):
                    assert said[number, 2]["text"].startswith("refused: the policy demands 'tpm'")
                    assert said[number, 1 - number]["evidence"] == "tpm"
                reports = await cluster.reports(client)
                assert reports[0]["refused"]["evidence-insufficient-evidence"] >= 1
                peers = {peer["replica"]: peer for peer in reports[0]["peers"]}
                assert (peers[1]["connected"], peers[2]["connected"]) == (True, False)

        use()


def test_a_tpm_whose_enrolment_nobody_was_shown_is_its_own_word(tmp_path):
    """Replica 2 says "tpm" in its public file: so could a key in no TPM. Shown as such, and refused where one is demanded."""
    with ExitStack() as stack:
        cluster = TpmCluster(tmp_path / "t", (0, 1, 2), stack, enrolled=(0, 1)).processes
        demand(cluster, 'minimum_evidence = "tpm"')
        cluster.start(0, 1, 2)

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert await client.incr("n") == 1
                said = await appraisals(cluster, client, (0, 1))
                for number in (0, 1):
                    assert said[number, 2]["text"].startswith("refused: the policy demands 'tpm'")
                    assert "that the key is in a TPM: AK listed, enrolment not shown" in said[number, 2]["text"]
                    assert said[number, 1 - number]["evidence"] == "tpm"

        use()


def test_logs_in_processes_of_their_own(tmp_path):
    own = own_measurement(BackendKind.PROCESS).hex()
    with Processes(tmp_path / "c", log_kind=BackendKind.PROCESS) as cluster:
        demand(cluster, f'minimum_evidence = "self-asserted"\naccepted_measurements = ["{own}"]')
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert await client.incr("n") == 1
                for result in (await appraisals(cluster, client)).values():
                    assert re.fullmatch(r"self-asserted, measured [0-9a-f]{8}…", result["text"])
                    assert any("process of its own" in one for one in result["not_proven"])

        use()
