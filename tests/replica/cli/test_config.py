"""Where settings come from: options over TRUSTLOG_* variables over replica.toml over the defaults."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from replica.cli.main import main
from replica.cluster.environment import VARIABLES, settings_of, unknown_variables
from replica.cluster.home import load_home
from replica.cluster.provision import init_cluster
from replica.cluster.replicatoml import HomeError, Settings
from replica.cluster.strict_toml import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    init_cluster(tmp_path / "c", base_port=0)
    return tmp_path / "c" / "replica-0"


@pytest.fixture
def call(capsys):
    def call_program(*arguments, output="json"):
        with pytest.raises(SystemExit) as ended:
            main([*(str(argument) for argument in arguments), "-o", output])
        out, err = capsys.readouterr()
        return ended.value.code, json.loads(out) if output == "json" else out, err

    return call_program


def write(folder, text):
    path = folder / "replica.toml"
    path.write_text(text + path.read_text())


def test_each_source_stands_above_the_next(folder, call, monkeypatch):
    def found(*options):
        code, data, _ = call("config", "check", folder, *options)
        assert code == 0
        one = data["settings"]["log_level"]
        return one["value"], one["source"]

    assert found() == ("info", "default")
    write(folder, 'log_level = "warning"\n')
    assert found() == ("warning", str(folder / "replica.toml"))
    monkeypatch.setenv("TRUSTLOG_LOG_LEVEL", "error")
    assert found() == ("error", "TRUSTLOG_LOG_LEVEL")
    assert found("--log-level", "debug") == ("debug", "option")
    monkeypatch.setenv("TRUSTLOG_LOG_LEVEL", "")
    assert found() == ("warning", str(folder / "replica.toml")), "an empty one is not set"


def test_every_variable_is_a_setting_and_reaches_the_replica(folder, tmp_path):
    given = {
        "TRUSTLOG_CLUSTER_FILE": str(tmp_path / "c" / "cluster.toml"),
        "TRUSTLOG_DURABILITY": "memory",
        "TRUSTLOG_LOG_LEVEL": "debug",
        "TRUSTLOG_LOG_FORMAT": "json",
        "TRUSTLOG_LISTEN": "0.0.0.0:7100",
        "TRUSTLOG_HTTP": "[::1]:8100",
        "TRUSTLOG_RETAIN_MIB": "7",
    }
    assert set(given) == set(VARIABLES)
    home = load_home(folder, environ=given)
    wanted = Settings(
        0,
        cluster=given["TRUSTLOG_CLUSTER_FILE"],
        durability="memory",
        log_level="debug",
        log_format="json",
        listen=("0.0.0.0", 7100),
        http=("::1", 8100),
        retain_mib=7,
    )
    assert home.settings == wanted
    assert home.listen_address == ("0.0.0.0", 7100)
    assert load_home(folder, {"retain_mib": 9}, given).settings == replace(wanted, retain_mib=9)
    assert load_home(folder, environ={}).settings == Settings(0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TRUSTLOG_LOG_LEVEL", "inof", 'did you mean "info"'),
        ("TRUSTLOG_DURABILITY", "none", '"disk"'),
        ("TRUSTLOG_HTTP", "8100", "host:port"),
        ("TRUSTLOG_RETAIN_MIB", "-1", "whole number"),
        ("TRUSTLOG_RETAIN_MIB", "9999999999", "whole number"),
        ("TRUSTLOG_CLUSTER_FILE", "/nowhere/cluster.toml", "/nowhere/cluster.toml"),
    ],
)
def test_a_value_that_is_wrong_is_named_with_its_variable(folder, call, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    code, data, _ = call("config", "check", folder)
    assert (code, data["error"]["code"]) == (2, "configuration")
    assert words in data["error"]["message"]
    if "FILE" not in name:
        assert name in data["error"]["message"]
    with pytest.raises(HomeError):
        load_home(folder)


def test_a_misspelt_variable_is_an_error_and_somebody_elses_a_note(folder, call, monkeypatch):
    monkeypatch.setenv("TRUSTLOG_SERVICE_HOST", "10.0.0.1")  # as Kubernetes does for a service called trustlog
    monkeypatch.setenv("TRUSTLOG_PORT_7100_TCP", "tcp://10.0.0.1:7100")
    monkeypatch.setenv("TRUSTLOG_CLUSTER", "my-cluster")  # of trustlog-client
    code, data, _ = call("config", "check", folder)
    assert code == 0
    assert [note.split()[1] for note in data["notes"]] == ["TRUSTLOG_PORT_7100_TCP", "TRUSTLOG_SERVICE_HOST"]
    monkeypatch.setenv("TRUSTLOG_LOGLEVEL", "debug")
    code, data, _ = call("config", "check", folder)
    assert code == 2
    assert "did you mean TRUSTLOG_LOG_LEVEL?" in data["error"]["message"]
    assert unknown_variables({"TRUSTLOG_PORT": "x", "HOME": "y"}) == {"TRUSTLOG_PORT": ""}
    # Of the container's own scripts, and no misspelling of TRUSTLOG_LOG_FORMAT.
    assert unknown_variables({"TRUSTLOG_LOG_SOCKET": "/run/log.sock"}) == {"TRUSTLOG_LOG_SOCKET": ""}


def test_the_containers_own_variables_are_no_misspelling_of_a_setting(folder, call, monkeypatch):
    script = (Path(__file__).parents[3] / "deploy" / "docker" / "setup").read_text()
    names = set(re.findall(r"TRUSTLOG_[A-Z_]+", script))
    assert {"TRUSTLOG_PASSPHRASE_FILE", "TRUSTLOG_PASSPHRASE_SECRET", "TRUSTLOG_FOLDER"} <= names
    assert not any(unknown_variables(dict.fromkeys(names, "x")).values())
    for name in names:
        monkeypatch.setenv(name, "/x")
    assert call("config", "check", folder)[0] == 0


def test_who_is_no_member_is_told_apart_from_what_is_wrong(folder, call, tmp_path):
    """The containers' script waits for the one, and for nothing else takes a list of members."""
    init_cluster(tmp_path / "other", base_port=0)
    (tmp_path / "other" / "cluster.toml").replace(folder.parent / "cluster.toml")
    code, data, _ = call("config", "check", folder)
    assert (code, data["error"]["code"], "SHA-256" in data["error"]["message"]) == (1, "no-member", True)
    write(folder, "retain_mb = 3\n")
    assert call("config", "check", folder)[0] == 2


def test_a_members_folder_with_a_mistake_is_no_strangers(folder, call):
    path = folder / "replica.toml"
    before = path.read_text()
    for text, words in (
        (before + '[trusted_log]\nbackend = "process"\n', "a log keeps its backend for ever: restore the file."),
        (before.replace("number = 0", "number = 1"), "number: 1, but"),
        (before.replace("number = 0", "number = 7"), "as replica 0's; put the number right"),
    ):
        path.write_text(text)
        code, data, _ = call("config", "check", folder)
        assert (code, data["error"]["code"], words in data["error"]["message"]) == (2, "configuration", True)
        assert "members.toml" not in data["error"]["message"]


def test_the_advice_for_a_damaged_cluster_file_is_to_restore_it(folder, call):
    file = folder.parent / "cluster.toml"
    file.write_text(file.read_text().replace("f = 1", "f = 2", 1))
    code, data, _ = call("config", "check", folder)
    assert (code, "restore the file" in data["error"]["message"]) == (2, True)


def test_a_misspelt_key_is_an_error_with_the_nearest_name(folder, call):
    write(folder, "retain_mb = 3\n")
    code, data, _ = call("config", "check", folder)
    assert code == 2
    assert 'did you mean "retain_mib"?' in data["error"]["message"]


def test_a_cluster_file_is_checked_too(folder, call):
    file = folder.parent / "cluster.toml"
    for place in (file, folder.parent):
        code, data, _ = call("config", "check", place)
        assert (code, data["f"]) == (0, 1)
    file.write_text(file.read_text().replace("nonce", "nonse", 1))
    code, data, _ = call("config", "check", file)
    assert code == 2
    assert 'is "nonse" a misspelling of it?' in data["error"]["message"]


def test_plain_and_table(folder, call):
    code, out, _ = call("config", "check", folder, output="plain")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, {len(row) for row in rows}, len(rows)) == (0, {3}, 8)
    assert "the configuration is in order" in call("config", "check", folder, output="table")[1]


def test_run_takes_every_setting_as_an_option(folder, call, monkeypatch):
    from replica.shell import daemon

    homes = []
    monkeypatch.setattr(daemon, "run", lambda home: homes.append(home) or 0)
    monkeypatch.setenv("TRUSTLOG_RETAIN_MIB", "5")
    monkeypatch.setenv("TRUSTLOG_LISTN", "h:1")
    with pytest.raises(SystemExit):
        main(
            [
                "run",
                str(folder),
                "--retain-mib",
                "6",
                "--listen",
                "127.0.0.1:9",
                "--cluster-file",
                str(folder.parent / "cluster.toml"),
            ]
        )
    (home,) = homes
    assert (home.settings.retain_mib, home.settings.listen) == (6, ("127.0.0.1", 9))


def test_only_text_is_read_from_the_environment():
    assert settings_of({}) == {}
    with pytest.raises(ConfigError, match="TRUSTLOG_HTTP"):
        settings_of({"TRUSTLOG_HTTP": "no port"})
