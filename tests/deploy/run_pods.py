"""The chart's pods are run, as far as containers can show it: `make test-compose`. No Kubernetes is at hand for tests.

What a kubelet would do with the rendered StatefulSet is done by hand: volumes that belong to root and fsGroup, init containers
one after the other, the probes' commands. What is not shown: scheduling, the real volumes, network policies, rolling updates.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chart import NAMESPACE, RELEASE, render
from tests.support.cluster import environment
from tests.support.engine import IMAGE, Engine, build_image
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(1200)
READY_S = 240
NETWORK = "pods"
PASSPHRASE = "correct horse battery staple"
FILES = {"cluster": "cluster", "members": "cluster.members"}
VALUES = {"passphrase": {"secret": "words"}}
PAGE = Path(__file__).parents[2] / "deploy" / "README.md"


class Pods:
    """The StatefulSet's pods, each a holder of the network and the containers that share it."""

    def __init__(self, engine, directory: Path, values: dict) -> None:
        self._engine, self._directory = engine, directory
        found = render(values)
        self.count = found["StatefulSet"]["spec"]["replicas"]
        self._spec = found["StatefulSet"]["spec"]["template"]["spec"]
        self._group = self._spec["securityContext"]["fsGroup"]
        self._claims = {one["metadata"]["name"] for one in found["StatefulSet"]["spec"]["volumeClaimTemplates"]}
        self._service = found["Service"]["metadata"]["name"]
        self._containers = {one["name"]: one for one in self._spec["initContainers"] + self._spec["containers"]}

    def volume(self, pod: int, name: str) -> Path:
        """Return a volume's folder; as a kubelet makes it, if it is new."""
        path = self._directory / f"{name}-{pod}"
        if not path.exists():
            path.mkdir()
            is_config = name in {"cluster", "secret"}
            os.chown(path, 0, 0 if is_config else self._group)
            path.chmod(0o755 if is_config else 0o2775 if name in self._claims else 0o2777)
            if name == "secret":
                # Root's, and its group's to read: a kubelet sees to that where there is an fsGroup.
                (path / "passphrase").write_text(f"{PASSPHRASE}\n")
                os.chown(path / "passphrase", 0, self._group)
                (path / "passphrase").chmod(0o440)
        return path

    def name(self, pod: int, container: str) -> str:
        return f"{RELEASE}-{pod}-{container}"

    def hold(self, pod: int) -> None:
        """Start what holds the pod's network, under the name that the headless service gives it."""
        alias = f"{RELEASE}-{pod}.{self._service}.{NAMESPACE}.svc"
        options = ("--detach", "--name", self.name(pod, "holder"), "--network", NETWORK, "--network-alias", alias)
        self._engine.docker("run", *options, "--no-healthcheck", IMAGE, "sleep", "infinity")

    def run(self, pod: int, container: str, *, detach: bool) -> None:
        one = self._containers[container]
        security = one["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        options = ["--name", self.name(pod, container), "--network", f"container:{self.name(pod, 'holder')}"]
        options += ["--user", f"{security['runAsUser']}:{security['runAsGroup']}", "--group-add", str(self._group)]
        options += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--no-healthcheck"]
        pod_name = f"{RELEASE}-{pod}"
        for variable in one.get("env", []):
            options += ["--env", f"{variable['name']}={variable.get('value', pod_name)}"]
        for mount in one["volumeMounts"]:
            mode = ":ro" if mount.get("readOnly") else ""
            options += ["--volume", f"{self.volume(pod, mount['name'])}:{mount['mountPath']}{mode}"]
        command = [word.replace("$(POD_NAME)", pod_name) for word in one["command"]]
        self._engine.docker("run", *(["--detach"] if detach else []), *options, IMAGE, *command, seconds=120)

    def within(self, pod: int, container: str, *command: str) -> None:
        self._engine.docker("exec", self.name(pod, container), *command)

    def probe(self, pod: int, container: str, kind: str) -> None:
        command = self._containers[container][kind]["exec"]["command"]
        name = self.name(pod, container)

        def passes() -> bool:
            return self._engine.docker("exec", name, *command, check=False).returncode == 0

        try:
            wait_for(passes, f"{name}'s {kind} passes", READY_S)
        except AssertionError:
            print(self._engine.docker("logs", "--tail", "40", name, check=False))
            raise

    def start_keys(self, pod: int) -> None:
        self.hold(pod)
        self.run(pod, "log", detach=True)
        self.probe(pod, "log", "startupProbe")
        self.run(pod, "keys", detach=False)
        self.run(pod, "cluster", detach=True)

    def public_file(self, pod: int, awaited="END CERTIFICATE") -> str:
        """Return what `kubectl logs` of the container `cluster` shows, when this is in it."""

        def shown() -> str:
            done = self._engine.docker("logs", self.name(pod, "cluster"))
            return (done.stdout + done.stderr) if awaited in done.stdout else ""

        return wait_for(shown, "the public file is shown", READY_S)

    def start_replica(self, pod: int) -> None:
        assert self._engine.docker("wait", self.name(pod, "cluster"), seconds=READY_S).stdout.strip() == "0"
        self.run(pod, "replica", detach=True)
        self.probe(pod, "replica", "startupProbe")

    def delete(self, pod: int) -> None:
        """Stop the containers as a kubelet does: the sidecar last. Their volumes stay, but not the empty directory."""
        for container in ("replica", "log"):
            self._engine.docker("stop", "--time", "30", self.name(pod, container))
        names = [self.name(pod, container) for container in ("holder", *self._containers)]
        self._engine.docker("rm", "--force", *names)
        for name in ("socket", "passphrase"):
            subprocess.run(["rm", "-r", self.volume(pod, name)], check=True)

    def lose(self, pod: int) -> None:
        """Delete its claims, and with them what is in their volumes."""
        for name in sorted(self._claims):
            subprocess.run(["rm", "-r", self.volume(pod, name)], check=True)


def page_lines(beginning: str) -> list[str]:
    """The lines of the page that begin so."""
    return [line.strip() for line in PAGE.read_text().splitlines() if line.startswith(f"    {beginning}")]


def command_line(line: str, cwd: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euc", line]
    done = subprocess.run(
        command, cwd=cwd, env=environment(PATH=path), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def encrypt_as_the_page_says(pods: Pods) -> None:
    """Keys that are in the clear get the Secret's passphrase, in replicas that run."""
    (line,) = page_lines("for n in 0 1 2; do kubectl exec ")
    command = shlex.split(line.partition(" -- ")[2].removesuffix("; done"))
    for pod in range(pods.count):
        key = pods.volume(pod, "data") / "replica" / "tls.key"
        for words, is_encrypted in (([*command[:4], "--remove"], False), (command, True)):
            pods.within(pod, "replica", *words)
            assert ("ENCRYPTED" in key.read_text()) == is_encrypted


def test_the_notes_of_the_chart_lead_to_a_cluster(tmp_path):
    """Keys made in the pods, public files from their logs, the cluster file back by the values; and a pod that is replaced."""
    with Engine() as engine:
        context = tmp_path / "context"
        context.mkdir()
        build_image(engine, context)
        engine.docker("network", "create", NETWORK)
        directory = engine.directory / "pods"
        directory.mkdir()
        pods = Pods(engine, directory, VALUES)
        for pod in range(pods.count):
            pods.start_keys(pod)
            (tmp_path / f"replica-{pod}.public.toml").write_text(pods.public_file(pod))
        for line in page_lines("trustlog-replica "):
            command_line(line, tmp_path)
        config = render({"cluster": (tmp_path / "cluster.toml").read_text()})["ConfigMap"]["data"]
        assert config == {"cluster.toml": (tmp_path / "cluster.toml").read_text()}
        for pod in range(pods.count):
            (pods.volume(pod, "cluster") / "cluster.toml").write_text(config["cluster.toml"])
        for pod in range(pods.count):
            pods.start_replica(pod)
        for pod in range(pods.count):
            pods.probe(pod, "replica", "readinessProbe")

        command_line("trustlog-replica client-key client", tmp_path)
        place = engine.directory / "client"
        place.mkdir()
        subprocess.run(["cp", "-r", tmp_path / "cluster.toml", tmp_path / "client", place], check=True)
        subprocess.run(["chown", "-R", "10000:10000", place], check=True)

        def client(*words: str) -> str:
            options = ("--rm", "--network", NETWORK, "--volume", f"{place}:/c:ro", "--no-healthcheck")
            return engine.docker("run", *options, IMAGE, "trustlog-client", "-c", "/c", *words).stdout.strip()

        assert client("incr", "visits") == "1"
        encrypt_as_the_page_says(pods)
        for pod in range(pods.count):
            pods.delete(pod)
            assert client("incr", "visits") == str(pod + 2), "the others go on"
            pods.start_keys(pod)
            pods.start_replica(pod)
            pods.probe(pod, "replica", "readinessProbe")
        assert client("get", "visits") == str(pods.count + 1)

        # Both claims of one are lost.
        pods.delete(1)
        pods.lose(1)
        pods.start_keys(1)
        public = pods.public_file(1, "# waiting: ")
        assert "this folder belongs to another cluster, or to other keys" in public
        (tmp_path / "replica-1.public.toml").write_text(public)
        (line,) = page_lines("kubectl exec operator -- ")
        subprocess.run(["cp", "-r", tmp_path / "operator", tmp_path / "replica-1.public.toml", place], check=True)
        subprocess.run(["chown", "-R", "10000:10000", place], check=True)
        options = ("--rm", "--network", NETWORK, "--volume", f"{place}:/tmp", "--no-healthcheck")
        engine.docker("run", *options, IMAGE, *shlex.split(line)[4:], seconds=120)
        assert client("incr", "visits") == str(pods.count + 2), "the others went over"
        (tmp_path / "cluster.members.toml").write_text((place / "cluster.members.toml").read_text())
        config = render({name: (tmp_path / f"{file}.toml").read_text() for name, file in FILES.items()})["ConfigMap"][
            "data"
        ]
        for pod in range(pods.count):
            (pods.volume(pod, "cluster") / "cluster.members.toml").write_text(config["cluster.members.toml"])
        pods.start_replica(1)
        pods.probe(1, "replica", "readinessProbe")
        # It bears another one's fault.
        pods.delete(0)
        assert client("incr", "visits") == str(pods.count + 3)
