"""What the doctor says of a trusted log: what `run` would refuse is a problem, and a log in use is let alone."""

import asyncio
import datetime as dt
import os
import shutil
from contextlib import closing

import pytest

from replica.cluster.home import load_home
from replica.cluster.provision import init_cluster
from replica.cluster.replicatoml import HomeError
from replica.operations.doctor_folder import examine_folder
from replica.operations.doctor_log import examine_log
from replica.operations.doctor_network import examine_network
from replica.operations.findings import Severity
from replica.shell import daemon
from replica.shell.store import Store, own_group
from tests.replica.operations.test_doctor import problems
from trustlog import BackendKind, open_log

KINDS = (BackendKind.SOFTWARE, BackendKind.PROCESS)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name.lower())
def home(request, tmp_path):
    init_cluster(tmp_path / "c", base_port=0, log_kind=request.param)
    return load_home(tmp_path / "c" / "replica-0")


def kind_of(home):
    return home.settings.trusted_log.backend


def say(home, *payloads):
    """Have the log say something, as a replica does: in its store, then attested."""
    context = home.cluster.genesis.context()
    with (
        open_log(home.log_path, kind=kind_of(home)) as log,
        closing(Store(home.store_path, home.cluster.cluster_id, home.number)) as store,
    ):
        group = own_group(home.number, log.last + 1, payloads)
        issued = log.append([bytes(32)] * len(payloads), context=context)
        store.write([], (group.first, issued.raw), group)


def test_a_log_that_is_well_is_opened(home):
    say(home, b"a", b"b")
    (found,) = examine_log(home)
    assert (found.severity, found.text) == (
        Severity.OK,
        "can be opened, and ends at entry 2; the store holds it up to 2",
    )
    assert problems(home) == []


def test_a_log_that_was_rolled_back(home, tmp_path):
    say(home, b"a")
    shutil.copytree(home.log_path, tmp_path / "old")
    say(home, b"b", b"c")
    shutil.rmtree(home.log_path)
    shutil.copytree(tmp_path / "old", home.log_path)
    (found,) = problems(home)
    assert (found.check, found.subject) == ("log", str(home.log_path))
    assert "store.sqlite holds this replica's own log up to 3, its trusted log ends at 1" in found.text
    assert "rolled back" in found.text
    assert "member replace" in found.remedy
    with pytest.raises(daemon.StartError) as refused:
        daemon.run(home)
    assert found.text.partition(" holds ")[2] in str(refused.value)
    # Nobody is told to start it as it is.
    startable = asyncio.run(examine_network(home, 1))
    mend = asyncio.run(examine_network(home, 1, startable=False))
    remedies = [one.remedy for findings in (startable, mend) for one in findings if one.check == "replica"]
    assert [remedy.partition(":")[0] for remedy in remedies] == [
        "start it",
        "mend the problems of its folder, then start it",
    ]


def test_a_log_in_a_folder_that_is_open_to_others(home):
    home.log_path.chmod(0o755)
    (found,) = problems(home)
    assert (found.check, found.subject) == ("mode", str(home.log_path))
    assert "has mode 0755" in found.text
    assert f"chmod 700 {home.log_path}" in found.remedy
    if kind_of(home) is BackendKind.PROCESS:
        with pytest.raises(daemon.StartError, match="with mode 0755"):
            daemon.run(home)


def test_a_log_that_is_in_use_is_let_alone(home):
    with open_log(home.log_path, kind=kind_of(home)):
        (found,) = examine_log(home)
    assert found.severity is Severity.OK
    assert "not opened: the replica, or another program, has it open" in found.text


def test_a_log_that_cannot_be_opened(home):
    (home.log_path / "log.state").write_bytes(b"x" * 512)
    (found,) = problems(home)
    assert (found.check, "log.state: damaged at offset" in found.text) == ("log", True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_log_of_another_user_is_not_opened_where_its_process_would_refuse_it(home):
    for path in (home.path, home.log_path, *home.path.iterdir(), *home.log_path.iterdir()):
        os.chown(path, 65534, -1)
    (found,) = examine_log(home)
    assert found.severity is Severity.OK
    assert ("run the doctor as that user" in found.text) is (kind_of(home) is BackendKind.PROCESS)


@pytest.mark.parametrize("names", [["log"], ["log/log.pub", "log/log.state"]])
def test_a_log_that_is_lost(home, names):
    for name in names:
        path = home.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (found,) = problems(home)
    assert (found.check, found.subject) == ("log", str(home.log_path))
    assert "lost: " in found.text
    with pytest.raises(HomeError, match="trusted log is lost") as refused:
        load_home(home.path)
    for text in (found.remedy, str(refused.value)):
        assert "never put an old copy there" in text
        assert "trustlog-replica member replace" in text


def test_a_public_key_that_is_lost_is_made_again(home):
    path = home.log_path / "log.pub"
    content = path.read_text()
    path.unlink()
    (found,) = problems(home)
    assert (found.check, f"this line in it: {content.strip()}" in found.text) == ("configuration", True)
    path.write_text(found.text.rpartition(": ")[2] + "\n")
    assert problems(home) == []


def test_an_application_that_cannot_be_loaded(tmp_path):
    init_cluster(tmp_path / "c", base_port=0, application="no.such.module:App")
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    findings, _ = examine_folder(tmp_path / "c" / "replica-0", now)
    (found,) = [one for one in findings if one.check == "application"]
    assert (found.severity, found.subject) == (Severity.WARNING, "no.such.module:App")
    assert "PYTHONPATH" in found.text
