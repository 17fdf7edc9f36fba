"""Real replicas with `http` in their settings, asked with curl as a probe does."""

import json
import socket
import subprocess

import pytest

from tests.support.cluster import Processes, replica_command
from tests.support.ports import free_ports
from tests.support.tools import tool
from tests.support.waiting import on_loop, wait_for

pytestmark = pytest.mark.cluster


def curl(url: str) -> tuple[int, str]:
    done = subprocess.run(
        [tool("curl"), "-sS", "--max-time", "20", "-w", "\n%{http_code}", url],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status or 0), body


def test_probes_follow_what_happens(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        ports = free_ports(3)
        for number, port in enumerate(ports):
            with (cluster.folder(number) / "replica.toml").open("a") as settings:
                settings.write(f'http = "127.0.0.1:{port}"\n')
        cluster.start_and_wait()
        bases = [f"http://127.0.0.1:{port}" for port in ports]

        @on_loop
        async def write():
            async with cluster.client() as client:
                await client.put("a", "1")

        write()
        for base in bases:
            wait_for(lambda base=base: curl(base + "/readyz")[0] == 200, "ready")
            assert curl(base + "/livez")[0] == 200
            wait_for(lambda base=base: curl(base + "/v1/keys/a")[0] == 200, "the write is there")
            assert json.loads(curl(base + "/status")[1])["not_ready"] is None
            assert "trustlog_ready 1.0" in curl(base + "/metrics")[1]
        cluster.kill(0)
        cluster.kill(2)
        wait_for(lambda: curl(bases[1] + "/readyz")[0] == 503, "not ready without a quorum")
        assert "other replicas are connected" in json.loads(curl(bases[1] + "/readyz")[1])["problem"]
        assert curl(bases[1] + "/livez")[0] == 200
        cluster.start(0)
        wait_for(lambda: curl(bases[1] + "/readyz")[0] == 200, "ready again")


def test_a_port_that_is_taken_is_said(tmp_path):
    with Processes(tmp_path / "c") as cluster, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            replica_command(cluster.folder(0), "--http", f"127.0.0.1:{port}"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert f"cannot listen for HTTP at 127.0.0.1:{port}" in done.stderr
        assert "choose another address for `http` in replica.toml" in done.stderr
