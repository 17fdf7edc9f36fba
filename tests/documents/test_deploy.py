"""The files in deploy/ agree with each other and with the project, as far as reading them shows it; make test-compose runs them."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.documents.test_commands import ROOT, commands

DEPLOY = ROOT / "deploy"
DOCKER, CHART = DEPLOY / "docker", DEPLOY / "helm" / "trustlog"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """A lock's packages: their version and hashes."""
    found = {}
    for block in re.split(r"\n(?=\S)", path.read_text().strip()):
        name, version = re.match(r"([a-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+)", block).groups()
        found[name] = version, frozenset(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block))
    return found


def named(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9-]+", one)[0].lower() for one in requirements}


@pytest.mark.parametrize("name", ["runtime", "tracing", "build"])
def test_the_images_locks_are_the_projects(name):
    """The same versions, with hashes: what is tested is what the image runs."""
    main, lock = locked(ROOT / "requirements.lock"), locked(DOCKER / f"{name}.lock")
    for package, (version, hashes) in lock.items():
        assert hashes, package
        assert main[package][0] == version, f"{package}: run make lock"
        assert hashes <= main[package][1]
    extras = PROJECT["project"]["optional-dependencies"]
    if name != "build":
        assert named(PROJECT["project"]["dependencies"]) <= set(lock)
        assert not named(extras["dev"]) & set(lock), "nothing that only tests need"
        traced = named(extras["tracing"]) & set(lock)
        assert traced == (named(extras["tracing"]) if name == "tracing" else set())
    else:
        assert named(PROJECT["build-system"]["requires"]) <= set(lock)


def test_the_chart_has_the_projects_version():
    version = PROJECT["project"]["version"]
    lines = (CHART / "Chart.yaml").read_text().splitlines()
    assert f'appVersion: "{version}"' in lines
    # A mended chart of the same programs has a later patch of its own.
    (own,) = [line.removeprefix("version: ") for line in lines if line.startswith("version: ")]
    parts, projects = [[int(part) for part in text.split(".")] for text in (own, version)]
    assert parts[:2] == projects[:2]
    assert parts >= projects


def test_the_image_is_built_of_what_it_copies():
    """What the Dockerfile copies passes .dockerignore, and what is a package of the wheel is copied."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    sources = {word for line in copied for word in line.split()}
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in allowed), source
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= sources


def services() -> dict[str, str]:
    """The compose file's services, by name, as text."""
    text = (DOCKER / "docker-compose.yml").read_text().split("\nservices:\n")[1].split("\nvolumes:\n")[0]
    return dict(re.findall(r"^  ([a-z0-9-]+):\n((?:    .*\n|\n)+)", f"{text}\n", re.MULTILINE))


def test_a_log_and_its_replica_have_nothing_in_common_but_the_socket():
    found = services()
    for number in range(3):
        volumes = {
            name: set(re.findall(r'"([a-z0-9-]+):/', found[f"{name}-{number}"])) for name in ("log", "keys", "replica")
        }
        assert volumes["log"] == {f"log-state-{number}", f"log-socket-{number}"}
        assert volumes["keys"] == volumes["replica"] == {f"replica-{number}", f"log-socket-{number}", "cluster"}
        assert f"log-socket-{number}:/run/trustlog-log:ro" in found[f"replica-{number}"]
        assert f'"replica-{number}:7100"' in found[f"keys-{number}"]
        assert f"log-{number}" in found[f"keys-{number}"].split("depends_on")[1]


def test_whatever_is_published_is_on_loopback():
    ports = [
        port
        for text in services().values()
        for line in re.findall(r"ports: \[(.*)\]", text)
        for port in line.split(",")
    ]
    assert len(ports) == 4
    assert all(port.strip().startswith('"127.0.0.1:') for port in ports)


def test_what_prometheus_and_grafana_read_is_where_they_look():
    mounts = dict(re.findall(r"- (\.\.?/\S+?):(/\S+?):ro", (DOCKER / "docker-compose.yml").read_text()))
    assert len(mounts) == 4
    assert all((DOCKER / source).exists() for source in mounts)
    rules = re.search(r"rule_files: \[(\S+)\]", (DOCKER / "prometheus.yml").read_text())[1]
    assert mounts["../monitoring/alerts.yml"] == f"/etc/prometheus/{rules}"
    provider = (DOCKER / "grafana" / "dashboards" / "trustlog.yml").read_text()
    folder = re.search(r"path: ([^}]+)}", provider)[1]
    assert Path(mounts["../monitoring/grafana/trustlog.json"]).parent == Path(folder)
    # The alert rules count the replicas of a job whose name begins so.
    assert "job_name: trustlog\n" in (DOCKER / "prometheus.yml").read_text()


def test_the_pages_commands_exist():
    page = (DEPLOY / "README.md").read_text()
    targets = set(re.findall(r"`make ([a-z-]+)`", page))
    makefile = (ROOT / "Makefile").read_text()
    assert {"test-compose", "test-net", "test-chart"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
    operator_key, assemble = commands("deploy/README.md")
    notes = (CHART / "templates" / "NOTES.txt").read_text()
    shown_in_both = (
        "--reuse-values --set-file cluster=cluster.toml",
        "-c cluster > replica-$n.public.toml",
        operator_key,
    )
    for shown in (*shown_in_both, "--operator $(cat operator/client.pub) --out cluster.toml"):
        assert shown in page
        assert shown in notes
    assert assemble.endswith("--out cluster.toml")
    assert "deploy/README.md" in (ROOT / "README.md").read_text()
