"""A replica whose log a service of its own keeps: `refound` and `restore` notice that it runs, and who may ask."""

import pytest
import structlog

from replica.cluster.home import TrustedLogSettings, load_home
from replica.cluster.provision import assemble, keygen
from replica.operations.backup import BackupError, make_backup
from replica.operations.refounding import planned
from replica.operations.restoring import restore
from replica.operations.survivors import SurvivorError
from tests.support.ports import free_ports
from tests.trustlog.service.support import STRANGER_UID, Service, public_folder
from trustlog import BackendKind


@pytest.fixture
def service():
    with public_folder() as kept, Service(kept) as served:
        yield served


@pytest.fixture
def folder(tmp_path, service):
    """Replica 0's, whose log the service keeps; with nothing in it that would have to be read."""
    served = TrustedLogSettings(BackendKind.PROCESS, service.socket)
    publics = [
        keygen(
            tmp_path / f"replica-{number}", number, "127.0.0.1", port, served if not number else TrustedLogSettings()
        )
        for number, port in enumerate(free_ports(3))
    ]
    assemble(publics, tmp_path / "cluster.toml")
    return tmp_path / "replica-0"


def refound(folder):
    with pytest.raises(SurvivorError) as caught, planned([folder], folder.parent / "new", structlog.get_logger()):
        pass
    return str(caught.value)


def put_back(folder):
    make_backup(load_home(folder), folder.parent / "backup")
    with pytest.raises(BackupError) as caught:
        restore(folder.parent / "backup", folder, structlog.get_logger())
    return str(caught.value)


@pytest.mark.parametrize("command", [refound, put_back])
def test_a_replica_that_runs_is_noticed(service, folder, command):
    with service.connect_when_free():
        text = command(folder)
    assert str(folder) in text
    assert "its replica runs; stop" in text
    assert "is connected to this log already" in text


@pytest.mark.parametrize("command", [refound, put_back])
def test_another_user_is_told_whom_the_service_serves(service, folder, command):
    service.kill()
    service.client_uid = STRANGER_UID
    service.start().wait_ready()
    text = command(folder)
    assert str(folder) in text
    assert "run this command as that user" in text
    assert f"only user {STRANGER_UID} may speak to this log" in text


def test_one_that_is_stopped_is_read(service, folder):
    assert "nothing was executed there" in refound(folder)
