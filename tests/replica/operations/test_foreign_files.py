"""Databases that do not belong to cluster.toml: one finding that names both ids and both ways to mend it, everywhere."""

import json
import shutil
from contextlib import closing

import pytest

from replica.cli.main import main
from replica.cluster.home import load_home
from replica.cluster.provision import init_cluster
from replica.shell import daemon
from replica.shell.statestore import StateStore
from replica.shell.store import Store
from tests.replica.operations.test_doctor import problems
from trustlog import BackendKind

CHANGED = ("checkpoint_interval = 128", "checkpoint_interval = 64")


@pytest.fixture
def home(tmp_path):
    """A replica's folder with its databases."""
    init_cluster(tmp_path / "c", base_port=0)
    home = load_home(tmp_path / "c" / "replica-0")
    make_databases(home, home.number)
    return home


def make_databases(home, number):
    for path, kind in ((home.store_path, Store), (home.state_path, StateStore)):
        with closing(kind(path, home.cluster.cluster_id, number)):
            pass


def with_another_cluster_file(home):
    """Another cluster that was assembled of the same keys."""
    content = home.cluster_path.read_text()
    assert CHANGED[0] in content
    home.cluster_path.write_text(content.replace(*CHANGED))
    return load_home(home.path)


@pytest.fixture
def call(capsys):
    def call_program(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*(str(argument) for argument in arguments), "-o", "json"])
        return ended.value.code, json.loads(capsys.readouterr().out)

    return call_program


def names_all(text, *homes):
    assert all(home.cluster.cluster_id.hex() in text for home in homes), text
    assert "put the right cluster.toml in its place; or, if the databases were copied" in text


def test_another_clusters_file(home, call):
    other = with_another_cluster_file(home)
    assert other.cluster.cluster_id != home.cluster.cluster_id
    (found,) = problems(home)
    assert (found.check, found.subject) == ("database", str(home.cluster_path))
    assert all(name in found.text for name in ("store.sqlite", "state.sqlite"))
    names_all(f"{found.text} {found.remedy}", home, other)
    code, found = call("audit", home.path)
    (fault,) = found["faults"]
    assert (code, fault["file"], found["unnamed"]) == (1, str(home.cluster_path), 0)
    names_all(f"{fault['text']} {fault['remedy']}", home, other)
    code, found = call("config", "check", home.path)
    assert code == 2
    names_all(f"{found['error']['message']} {found['error']['hint']}", home, other)
    with pytest.raises(daemon.StartError) as refused:
        daemon.run(other)
    names_all(str(refused.value), home, other)


def test_one_database_of_another_cluster(home, tmp_path):
    init_cluster(tmp_path / "other", base_port=0)
    other = load_home(tmp_path / "other" / "replica-0")
    make_databases(other, other.number)
    shutil.copy(other.store_path, home.store_path)
    (found,) = problems(home)
    assert found.text.startswith(f"{home.store_path} belongs to another replica or cluster")
    names_all(f"{found.text} {found.remedy}", home, other)


def test_the_databases_of_another_replica(home, call):
    home.store_path.unlink()
    home.state_path.unlink()
    make_databases(home, 2)
    (found,) = problems(home)
    assert "its number is 2, here it is 0" in found.text
    code, audited = call("audit", home.path)
    assert (code, [fault["text"] for fault in audited["faults"]]) == (1, [found.text])


def test_databases_that_were_made_to_be_in_the_clear(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, log_kind=BackendKind.PROCESS)
    home = load_home(tmp_path / "c" / "replica-0")
    make_databases(home, home.number)
    assert problems(home) == []
    settings = home.path / "replica.toml"
    settings.write_text(settings.read_text().replace("\n[trusted_log]", "\n[trusted_log]\nencrypt_store = true"))
    assert load_home(home.path).settings.trusted_log.encrypt_store
    found = problems(home)
    assert [one.subject for one in found] == [str(home.store_path), str(home.state_path)]
    assert {one.text for one in found} == {"was made to be in the clear, which cannot be changed"}
