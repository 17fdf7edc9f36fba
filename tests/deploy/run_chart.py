"""The chart is rendered and checked, the image's files are linted: `make test-chart`. No cluster is asked."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chart import CHART, RELEASE, helm, render

kubernetes_validate = pytest.importorskip("kubernetes_validate")
DOCKER = CHART.parents[1] / "docker"
PAGE = (CHART.parents[1] / "README.md").read_text()
VERSIONS = ("1.29", "1.33")
VALUES = {
    "default": {},
    "all": {
        "replicas": 5,
        "cluster": "format = 1\n[genesis]\nname = 'x'\n",
        "metrics": {"enabled": True, "from": [{"podSelector": {}}]},
        "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"a": "b"}}}]},
        "imagePullSecrets": [{"name": "secret"}],
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "storage": {"storageClass": "fast", "data": "1Gi", "log": "1Gi"},
        "members": "format = 1\nlinks = []\n",
        "passphrase": {"secret": "words", "key": "line"},
        "tracing": {
            "endpoint": "http://collector.monitoring.svc:4318",
            "fraction": 0.01,
            "env": [{"name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}],
            "to": [{"namespaceSelector": {}}],
        },
    },
    # As an older release left them, with --reuse-values: without what came later, or with no more than what is set now.
    "older": {"passphrase": None, "tracing": None, "members": None},
    "older, and set": {
        "passphrase": {"secret": "words", "key": None},
        "tracing": {"endpoint": "http://x:4318"} | dict.fromkeys(("fraction", "env", "port", "to")),
    },
    "one node": {"spreadOverNodes": False, "networkPolicy": {"enabled": False}},
}


def pod(values=None) -> dict:
    return render(values)["StatefulSet"]["spec"]["template"]["spec"]


def containers(values=None) -> dict[str, dict]:
    spec = pod(values)
    return {one["name"]: one for one in spec["initContainers"] + spec["containers"]}


def mounts(container: dict) -> dict[str, bool]:
    return {one["name"]: one.get("readOnly", False) for one in container["volumeMounts"]}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_kubernetes_takes(name, version):
    objects = render(VALUES[name])
    assert {"StatefulSet", "Service", "PodDisruptionBudget"} <= set(objects)
    for one in objects.values():
        kubernetes_validate.validate(one, version, strict=True)
    assert ("ConfigMap" in objects, "NetworkPolicy" in objects) == (name == "all", name != "one node")


def test_helm_finds_nothing_to_warn_of():
    found = helm().lint(CHART, VALUES["all"], strict=True)
    assert (found["errors"], [one for one in found["messages"] if one["severity"] > 1]) == ([], [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 4},
        {"replicas": 1},
        {"replica": 3},
        {"storage": {"size": "1Gi"}},
        {"metrics": {"enabled": "x"}},
        {"tracing": {"endpoint": "collector:4318"}},
        {"tracing": {"fraction": 2}},
        {"passphrase": {"file": "x"}},
    ],
)
def test_values_that_make_no_cluster_are_refused(wrong):
    with helm().Chart.load(CHART) as chart, pytest.raises(Exception, match=r"schema|values"):
        chart.render(wrong, name="x", namespace="x")


def test_a_log_is_apart_from_its_replica():
    """As in deploy/systemd: another user, and nothing in common but the socket."""
    found = containers()
    log, replica = found["log"], found["replica"]
    assert log["restartPolicy"] == "Always", "it goes on beside the replica"
    assert list(found) == ["log", "keys", "cluster", "replica"], "it is there before keys are made"
    users = {name: one["securityContext"]["runAsUser"] for name, one in found.items()}
    assert users == {"log": 10001, "keys": 10000, "cluster": 10000, "replica": 10000}
    assert mounts(log) == {"log": False, "socket": False}
    assert mounts(replica) == {"data": False, "socket": True, "cluster": True}
    text = (DOCKER / "Dockerfile").read_text()
    assert "useradd --uid 10000 --gid 10000 --no-create-home --home-dir /var/lib/trustlog " in text
    assert "useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/trustlog-log " in text


def test_what_every_container_gives_up():
    spec = pod()
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for name, one in containers().items():
        security = one["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True), name


def test_http_is_on_loopback_unless_it_is_asked_for():
    for enabled, address in ((False, "127.0.0.1:8100"), (True, "0.0.0.0:8100")):
        command = containers({"metrics": {"enabled": enabled}})["replica"]["command"]
        assert command[command.index("--http") + 1] == address


def test_replicas_can_become_ready_and_be_taken_down_one_by_one():
    objects = render(VALUES["all"])
    assert objects["StatefulSet"]["spec"]["podManagementPolicy"] == "Parallel"
    assert objects["StatefulSet"]["spec"]["replicas"] == 5
    assert objects["Service"]["spec"]["publishNotReadyAddresses"] is True
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    labels = objects["StatefulSet"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels


def test_the_cluster_file_arrives_unchanged():
    """And so does the file of the lists that followed it."""
    content = "# a comment\nformat = 1\n\n[genesis]\nname = \"x\"\ncertificate = '''\n-----BEGIN-----\n'''\n"
    assert render({"cluster": content})["ConfigMap"]["data"] == {"cluster.toml": content}
    members = '# x\n\nformat = 1\nlinks = [\n    "00",\n]\n'
    found = render({"cluster": content, "members": members})["ConfigMap"]["data"]
    assert found == {"cluster.toml": content, "cluster.members.toml": members}


def variables(container: dict) -> dict[str, str]:
    return {one["name"]: one.get("value") for one in container.get("env", [])}


def test_who_gets_a_passphrase():
    """The Secret reaches the container that copies it, the copy the replica, and neither the log."""
    assert not any("PASSPHRASE" in str(one) for one in (pod(), containers()))
    found = containers({"passphrase": {"secret": "words", "key": "line"}})
    copied, volumes = "/run/trustlog-passphrase/passphrase", {one["name"]: one for one in pod(VALUES["all"])["volumes"]}
    assert volumes["secret"]["secret"]["secretName"] == "words"
    assert volumes["secret"]["secret"]["items"] == [{"key": "line", "path": "passphrase"}]
    assert volumes["passphrase"]["emptyDir"]["medium"] == "Memory"
    got = {name: {"secret", "passphrase"} & set(mounts(one)) for name, one in found.items()}
    assert got == {"log": set(), "keys": {"secret", "passphrase"}, "cluster": set(), "replica": {"passphrase"}}
    assert mounts(found["replica"])["passphrase"], "to read"
    assert variables(found["keys"])["TRUSTLOG_PASSPHRASE_SECRET"] == "/run/secrets/trustlog/passphrase"
    for name in ("keys", "replica"):
        assert variables(found[name])["TRUSTLOG_PASSPHRASE_FILE"] == copied


def test_traces_are_sent_where_it_is_asked_for_and_let_out():
    assert "OTEL" not in str(render())
    objects = render(VALUES["all"])
    found = variables(containers(VALUES["all"])["replica"])
    assert found["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.monitoring.svc:4318"
    assert found["OTEL_TRACES_SAMPLER_ARG"] == "0.01"
    assert "OTEL_EXPORTER_OTLP_HEADERS" in found
    rules = objects["NetworkPolicy"]["spec"]["egress"]
    assert {"ports": [{"port": 4318}], "to": [{"namespaceSelector": {}}]} in rules
    assert len(rules) == len(render()["NetworkPolicy"]["spec"]["egress"]) + 1


def test_a_release_from_before_passphrases_and_traces_is_as_it_was():
    assert render(VALUES["older"]) == render()
    set_now = {"passphrase": {"secret": "words"}, "tracing": {"endpoint": "http://x:4318"}}
    assert render(VALUES["older, and set"]) == render(set_now)
    fraction = {"tracing": {"endpoint": "http://x:4318", "fraction": 0}}
    assert variables(containers(fraction)["replica"])["OTEL_TRACES_SAMPLER_ARG"] == "0"


def test_the_commands_exist():
    """The commands and options that the probes and containers use are those of the programs."""
    for one in containers().values():
        commands = [one["command"]]
        commands += [one[probe]["exec"]["command"] for probe in one if probe.endswith("Probe")]
        for program, verb, *rest in commands:
            if program == "trustlog-setup":
                assert f"\n{verb})" in (DOCKER / "setup").read_text()
                continue
            assert program == "trustlog-replica"
            asked = [sys.executable, "-m", "replica.cli.main", verb, "--help"]
            help_text = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
            assert all(word in help_text for word in rest if word.startswith("--"))


def page_settings(line: str) -> tuple[dict, list[str]]:
    """The values that a line of the page gives to helm, and what of them must be found in the objects."""
    words, values, given = shlex.split(line), {}, []
    for option, word in itertools.pairwise(words):
        if option in {"--set", "--set-file"}:
            path, _, value = word.partition("=")
            *parents, last = path.split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value if option == "--set" else f"content of {value}"
            given.append(place[last])
    return values, given


def test_the_settings_of_the_pages_lines_are_the_charts():
    lines = re.findall(r"^    (helm (?:install|upgrade) .*)$", PAGE, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert shlex.split(line)[2:4] == [RELEASE, "deploy/helm/trustlog"]
        values, given = page_settings(line)
        assert given
        # Lists of members belong to a cluster that is there.
        objects = str(render({"cluster": "x"} | values))
        assert all(one in objects for one in given), line


def test_the_names_in_the_pages_lines_are_the_charts():
    lines = [line for line in re.findall(r"^    (.*)$", PAGE, re.MULTILINE) if "kubectl " in line]
    objects = render({"passphrase": {"secret": "words"}})
    name, spec = objects["StatefulSet"]["metadata"]["name"], objects["StatefulSet"]["spec"]
    claims = {f"{one['metadata']['name']}-{name}-1" for one in spec["volumeClaimTemplates"]}
    (pvc,) = [line for line in lines if " delete pvc " in line]
    assert claims == set(pvc.split()[3:-1])
    assert f"kubectl delete pod {name}-1" in lines
    asked = {(pod, container) for line in lines for pod, container in re.findall(r" ([^\s:]+)(?::\S+)? -c (\S+)", line)}
    assert asked == {(f"{name}-$n", "cluster"), (f"{name}-$n", "replica"), (f"{name}-1", "cluster")}
    assert {container for _, container in asked} <= set(containers())
    (secret,) = [line for line in lines if " create secret " in line]
    (volume,) = [one for one in spec["template"]["spec"]["volumes"] if one["name"] == "secret"]
    assert f"--from-file={volume['secret']['items'][0]['key']}=" in secret


@pytest.mark.parametrize("command", [["hadolint", DOCKER / "Dockerfile"], ["shellcheck", DOCKER / "setup"]])
def test_the_linters_are_content(command):
    # Installed beside the libraries, in bin.
    program = Path(kubernetes_validate.__file__).parents[1] / "bin" / command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
