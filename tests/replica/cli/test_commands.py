"""`trustlog-replica` as a program: what stands on stdout and stderr, and the exit code."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from replica.cli.main import cli, main
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home, read_log_public_key
from replica.cluster.replicatoml import TrustedLogSettings, load_settings
from tests.trustlog.service.support import Service, public_folder
from trustlog import BackendKind, open_log


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call_program(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call_program


def documents(out):
    parsed = [json.loads(line) for line in out.splitlines()]
    assert all(document["schema_version"] == 1 for document in parsed)
    return parsed


def test_init_in_three_formats(call, tmp_path):
    code, out, err = call("init", "a b", "--base-port", 0, "--ordering", "two-phase", "-o", "json")
    assert (code, err) == (0, "")
    (document,) = documents(out)
    cluster = load_cluster_file(tmp_path / "a b")
    assert document["cluster_id"] == cluster.cluster_id.hex()
    assert document["ordering"] == "two-phase"
    assert [r["address"] for r in document["replicas"]] == [place.address for place in cluster.replicas]
    assert load_home(tmp_path / document["replicas"][2]["folder"]).number == 2

    code, out, err = call("init", "plain", "-o", "plain", "--name", "n")
    assert (code, err) == (0, "")
    lines = dict(line.split("=", 1) for line in out.splitlines())
    assert lines["name"] == "n"
    assert lines["replica-2"] == "127.0.0.1:7102"

    code, out, err = call("init", "table", "-o", "table", "--f", 2, "--hosts", "a,b,c,d,e")
    assert (code, err) == (0, "")
    assert "e:7100" in out
    assert "next: trustlog-replica run table/replica-0" in " ".join(out.split())


def test_existing_directory_is_a_usage_error(call, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").write_text("")
    code, out, err = call("init", "c", "-o", "json")
    assert (code, err) == (2, "")
    (document,) = documents(out)
    assert document["error"]["code"] == "configuration"
    assert "not overwritten" in document["error"]["message"]
    code, out, err = call("init", "c")
    assert (code, out) == (2, "")
    assert err.startswith("error: c: exists already")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init"], "Missing argument"),
        (["init", "c", "--f", "0"], "--f"),
        (["init", "c", "--f", "11"], "--f"),
        (["init", "c", "--hosts", "a,,b"], "empty host"),
        (["init", "c", "--hosts", "a,b"], "2 hosts for 3 replicas"),
        (["init", "c", "--hosts", "a_b!,b,c"], "neither a host name"),
        (["init", "c", "--ordering", "one-phase"], "--ordering"),
        (["init", "c", "--app", "no.such.module:App"], "--app"),
        (["init", "c", "--app", "kv"], "module:Class"),
        (["keygen", "c", "--number", "0"], "--address"),
        (["keygen", "c", "--number", "0", "--address", "h"], "host:port"),
        (["keygen", "c", "--number", "21", "--address", "h:1"], "--number"),
        (["assemble"], "PUBLIC.toml"),
        (["assemble", "missing.toml"], "No such file"),
        (["run", "missing"], "no replica's folder"),
        (["frobnicate"], "No such command"),
    ],
)
def test_mistakes_are_usage_errors_in_every_format(call, tmp_path, arguments, words):
    code, out, err = call(*arguments, *([] if arguments == ["frobnicate"] else ["-o", "plain"]))
    assert (code, out) == (2, "")
    assert words in err
    code, out, err = call(*arguments, "-o", "json")
    assert (code, err) == (2, "")
    (document,) = documents(out)
    assert words in document["error"]["message"]
    assert document["error"]["exit"] == 2
    assert list(tmp_path.iterdir()) == []


def test_several_machines(call, tmp_path):
    publics = []
    for i in range(3):
        code, out, _ = call("keygen", f"m{i}/replica-{i}", "--number", i, "--address", f"[::1]:{7100 + i}")
        assert code == 0
        publics.append(out.strip())
    assert call("client-key", "operator")[0] == 0
    key = (tmp_path / "operator" / "client.pub").read_text().strip()
    words = ("--out", "cluster.toml", "--name", "spread", "--operator", key, "-o", "json")
    code, out, err = call("assemble", *publics, *words)
    assert (code, err) == (0, "")
    (document,) = documents(out)
    assert document["cluster_file"] == "cluster.toml"
    assert document["cluster_id"] == load_cluster_file(tmp_path).cluster_id.hex()
    code, out, _ = call("client-key", "client", "-o", "json")
    assert code == 0
    assert (tmp_path / "client" / "client.pub").read_text().strip() == documents(out)[0]["public_key"]
    code, _, err = call("client-key", "client")
    assert code == 2
    assert "not overwritten" in err
    for i in range(3):
        shutil.copy("cluster.toml", f"m{i}")
        assert load_home(tmp_path / f"m{i}" / f"replica-{i}").number == i


@pytest.mark.parametrize("form", ["plain", "table", "json"])
def test_assembling_without_an_operator_warns(call, form):
    publics = []
    for i in range(3):
        code, out, _ = call("keygen", f"replica-{i}", "--number", i, "--address", f"[::1]:{7100 + i}")
        assert code == 0
        publics.append(out.strip())
    code, _, err = call("assemble", *publics, "-o", form)
    assert code == 0
    assert "warning: no operator's key is named" in err
    assert "--operator" in err


def test_run_with_the_wrong_cluster_file_says_so(call, tmp_path):
    assert call("init", "a")[0] == call("init", "b")[0] == 0
    shutil.copy("a/cluster.toml", "b/cluster.toml")
    code, out, err = call("run", "b/replica-0")
    assert (code, out) == (2, "")
    assert "SHA-256" in err
    assert load_cluster_file(tmp_path / "a").replicas[0].fingerprint.hex() in err


def test_what_keeps_the_log_is_chosen_when_it_is_made(call, tmp_path):
    for arguments, kind in (([], "process"), (["--log-backend", "software"], "software")):
        assert call("init", kind, *arguments, "--base-port", "0")[0] == 0
        assert load_home(tmp_path / kind / "replica-0").settings.trusted_log.backend.name.lower() == kind
    assert call("init", "sealed", "--encrypt-store", "--base-port", "0")[0] == 0
    assert load_home(tmp_path / "sealed" / "replica-2").settings.trusted_log.encrypt_store
    assert call("init", "other", "--encrypt-store", "--log-backend", "software")[0] == 2
    code, out, _ = call("keygen", "k", "--number", "0", "--address", "h:1", "-o", "json")
    assert code == 0
    assert documents(out)[0]["log_backend"] == "process"
    assert load_settings(tmp_path / "k" / "replica.toml").trusted_log == TrustedLogSettings(BackendKind.PROCESS)


def test_keygen_asks_a_running_service_for_its_key(call, tmp_path):
    with public_folder() as folder, Service(folder) as service:
        keygen = ["keygen", "k", "--number", "0", "--address", "h:1", "--log-socket", str(service.socket)]
        code, _, err = call(*keygen, "-o", "json")
        assert code == 0, err
        assert [path.name for path in (tmp_path / "k" / "log").iterdir()] == ["log.pub"]
        assert read_log_public_key(tmp_path / "k" / "log") == service.public_key
        settings = load_settings(tmp_path / "k" / "replica.toml").trusted_log
        assert settings == TrustedLogSettings(BackendKind.PROCESS, service.socket)
        # A log that said something belongs to a replica that is.
        with service.connect_when_free() as log:
            log.append([bytes(32)], context=bytes(32))
        code, _, err = call("keygen", "other", *keygen[2:])
        assert code == 2
        assert "1 entries; a replica needs an empty one" in err
        service.kill()
        code, _, err = call("keygen", "other", *keygen[2:])
        assert code == 2
        assert "start it first: trustlog serve" in err
        assert not (tmp_path / "other").exists()
        assert call("keygen", "other", *keygen[2:], "--log-backend", "software")[0] == 2


def test_a_log_in_use_is_named_once(call, tmp_path):
    assert call("init", "c")[0] == 0
    with open_log(tmp_path / "c" / "replica-0" / "log", kind=BackendKind.PROCESS):
        code, out, err = call("run", "c/replica-0")
    assert (code, out) == (2, "")
    assert "error: c/replica-0/log is in use by another process" in err
    assert err.count("replica-0/log") == 1


def test_run_hands_settings_and_exit_code_on(call, monkeypatch):
    from replica.shell import daemon

    assert call("init", "c")[0] == 0
    homes = []

    def run(home):
        homes.append(home)
        return 1

    monkeypatch.setattr(daemon, "run", run)
    options = ["--log-level", "debug", "--durability", "memory"]
    assert call("run", "c/replica-1", *options)[0] == 1
    assert call("run", "c/replica-1", "-o", "json")[0] == 1
    first, second = (home.settings for home in homes)
    assert (first.number, first.log_level, first.durability, first.log_format) == (1, "debug", "memory", "auto")
    assert (second.log_level, second.durability, second.log_format) == ("info", "disk", "json")


GROUPS = {
    "application": ("show", "activate"),
    "clients": ("list", "mode", "allow", "quota", "revoke"),
    "config": ("check",),
    "debug": ("dump",),
    "evidence": ("list", "verify"),
    "keys": ("passphrase", "renew-certificate"),
    "lab": ("list", "run", "serve"),
    "member": ("list", "replace", "renew", "move", "add", "remove"),
}
COMMANDS = [*sorted(cli.commands), *(f"{group} {name}" for group, names in GROUPS.items() for name in names)]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example_of_the_command(call, command):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "Example:\n    trustlog-replica " + command in out
    if command and command not in GROUPS:
        assert "-o, --output" in out


def test_module_can_be_run_from_any_directory(tmp_path):
    """As `dev` starts its children."""
    done = subprocess.run(
        [sys.executable, "-m", "replica.cli.main", "init", "c", "-o", "json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert documents(done.stdout)[0]["f"] == 1
