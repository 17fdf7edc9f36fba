"""The dashboard and the alert rules name metrics that real replicas show; the rules do what they say."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.cluster.test_http import curl
from tests.support.cluster import Processes
from tests.support.ports import free_ports
from tests.support.tools import tool
from tests.support.waiting import on_loop, wait_for

pytestmark = pytest.mark.cluster
MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
DOCKER = MONITORING.parent / "docker"
DASHBOARD = MONITORING / "grafana" / "trustlog.json"
REPLICA = MONITORING.parents[1] / "replica"
NAME = re.compile(r"\btrustlog_[a-z_]+\b")


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    return asked + re.findall(r"^ +expr: (.+)$", (MONITORING / "alerts.yml").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the replicas of a cluster show after some requests and a change of view: names, labels and values."""
    with Processes(tmp_path_factory.mktemp("m") / "c") as cluster:
        ports = free_ports(3)
        for number, port in enumerate(ports):
            with (cluster.folder(number) / "replica.toml").open("a") as settings:
                settings.write(f'http = "127.0.0.1:{port}"\n')
        cluster.start_and_wait()

        @on_loop
        async def work():
            async with cluster.client() as client:
                for number in range(20):
                    await client.put(f"k{number}", "v")
                cluster.kill(0)
                await client.put("after", "a change of view")

        work()
        for place in cluster.cluster.replicas[1:]:
            with socket.create_connection((place.host, place.port), timeout=20) as stranger:
                stranger.sendall(b"no TLS" * 100)
        counted = (r'trustlog_refused_total\{reason="tls-failed"\}', r'trustlog_suspicions_total\{peer="0"\}')
        for port in ports[1:]:
            for name in counted:

                def shows(port=port, name=name):
                    return re.search(rf"^{name} [1-9]", curl(f"http://127.0.0.1:{port}/metrics")[1], re.MULTILINE)

                wait_for(shows, f"{name} is counted", 40)
        return [curl(f"http://127.0.0.1:{port}/metrics")[1] for port in ports[1:]]


def values(text: str, name: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line)]


def test_every_metric_that_is_named_exists(shown):
    asked = queries()
    assert len(asked) > 30
    names = set(NAME.findall(" ".join(asked)))
    assert len(names) > 20
    for text in shown:
        missing = {name for name in names if not values(text, name)}
        assert missing == set()


def test_what_is_measured_counts(shown):
    for text in shown:
        for name in ("fsync", "attest", "verify", "client"):
            assert sum(values(text, f"trustlog_{name}_seconds_count")) > 0, name
            assert sum(values(text, f"trustlog_{name}_seconds_sum")) > 0, name
        assert values(text, "trustlog_view_changes_total")[0] >= 1
        assert values(text, "trustlog_client_operations_total")[0] >= 1
        batches, operations = (values(text, f"trustlog_batch_operations_{what}")[0] for what in ("count", "sum"))
        assert batches > 0
        assert operations == values(text, "trustlog_operations_total")[0] == 21
        assert 'trustlog_replica_info{backend="software"' in text
        assert values(text, "trustlog_peer_same_cluster_file") == [1.0, 1.0]


def test_what_was_never_refused_has_a_series_at_0(shown):
    source = "\n".join(path.read_text() for part in ("shell", "core") for path in (REPLICA / part).glob("*.py"))
    counted = set(re.findall(r'(?:refusals\[|_refuse_request\()"([a-z-]+)"', source))
    counted |= {f"hello-{code}" for code in re.findall(r'_refuse_hello\(\s*"([a-z-]+)"', source)}
    assert len(counted) > 30
    for text in shown:
        assert counted <= set(re.findall(r'^trustlog_refused_total\{reason="(.+)"\} ', text, re.MULTILINE))
        assert 'trustlog_refused_total{reason="request-over-quota"} 0.0' in text


def test_the_disk_and_the_certificate(shown):
    for text in shown:
        assert values(text, "trustlog_disk_free_bytes")[0] > 0
        assert values(text, "trustlog_certificate_expiry_timestamp_seconds")[0] > 2**32, "it does not expire"


def test_the_dashboard_is_one_that_grafana_imports():
    dashboard = json.loads(DASHBOARD.read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(places) == len(set(places)) > 15
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in dashboard["panels"])


@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")])
def test_promtool_accepts_the_rules(arguments):
    done = subprocess.run(
        [tool("promtool"), *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_what_the_compose_file_mounts(tmp_path):
    """In the container the rules lie beside the configuration."""
    compose = (DOCKER / "docker-compose.yml").read_text()
    for source, name in ((DOCKER / "prometheus.yml", "prometheus.yml"), (MONITORING / "alerts.yml", "alerts.yml")):
        assert re.search(rf"- \S*{source.name}:/etc/prometheus/{name}\b", compose)
        shutil.copy(source, tmp_path / name)
    done = subprocess.run(
        [tool("promtool"), "check", "config", "prometheus.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(re.findall('- alert:', (tmp_path / 'alerts.yml').read_text()))} rules found" in done.stdout
