"""`trustlog-replica` as a program: what stands on stdout and stderr, and the exit code."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from replica.cli.main import cli, main
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.home import load_home
from trustlog import open_log


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
    code, out, err = call("assemble", *publics, "--out", "cluster.toml", "--name", "spread", "-o", "json")
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


def test_run_with_the_wrong_cluster_file_says_so(call, tmp_path):
    assert call("init", "a")[0] == call("init", "b")[0] == 0
    shutil.copy("a/cluster.toml", "b/cluster.toml")
    code, out, err = call("run", "b/replica-0")
    assert (code, out) == (2, "")
    assert "SHA-256" in err
    assert load_cluster_file(tmp_path / "a").replicas[0].fingerprint.hex() in err


def test_a_log_in_use_is_named_once(call, tmp_path):
    assert call("init", "c")[0] == 0
    with open_log(tmp_path / "c" / "replica-0" / "log"):
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


@pytest.mark.parametrize("command", [None, *sorted(cli.commands)])
def test_help_has_an_example_of_the_command(call, command):
    code, out, err = call(*([command] if command else []), "--help")
    assert (code, err) == (0, "")
    assert "Example:\n    trustlog-replica " + (command or "") in out
    if command:
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
