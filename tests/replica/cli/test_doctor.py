"""`trustlog-replica doctor` as a program: what it takes, and what stands on a terminal."""

import json
import re
import shutil

import pytest

from replica.cli.main import main
from replica.cluster.provision import init_cluster


@pytest.fixture
def directory(tmp_path):
    init_cluster(tmp_path / "c", base_port=0)
    return tmp_path / "c"


@pytest.fixture
def call(capsys):
    def call_program(*arguments, output="json"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *(str(argument) for argument in arguments), "-o", output])
        out, err = capsys.readouterr()
        return ended.value.code, json.loads(out) if output == "json" else out, err

    return call_program


def test_a_clusters_directory_is_refused_and_the_folders_are_named(directory, call):
    code, found, _ = call(directory)
    assert (code, found["error"]["code"]) == (2, "usage")
    assert f"{directory}: no replica's folder" in found["error"]["message"]
    for number in range(3):
        assert f"trustlog-replica doctor {directory}/replica-{number}" in found["error"]["hint"]
        shutil.rmtree(directory / f"replica-{number}")
    code, found, _ = call(directory)
    assert (code, "no replica's folder" in found["error"]["message"]) == (2, True)


def test_a_folder_without_its_settings_is_examined(directory, call):
    (directory / "replica-0" / "replica.toml").unlink()
    code, found, _ = call(directory / "replica-0", "--offline")
    (problem,) = [one for one in found["findings"] if one["severity"] == "problem"]
    assert (code, problem["check"]) == (1, "configuration")


def test_the_table_names_each_check(directory, call):
    _, out, _ = call(directory / "replica-0", "--offline", output="plain")
    rows = [line.split("\t") for line in out.splitlines()]
    _, out, _ = call(directory / "replica-0", "--offline", output="table")
    shown = re.sub(r"\s+", " ", out)
    assert {"mode", "configuration", "key", "certificate", "log", "database"} <= {row[1] for row in rows}
    for severity, check, subject, *_ in rows:
        assert f"{severity} {check} {subject[:6]}" in shown  # a long name is broken anywhere
