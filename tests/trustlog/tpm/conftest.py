import pytest

from tests.support.swtpm import software_tpm
from trustlog.tpm.enrol import create


@pytest.fixture
def machine(tmp_path):
    """A machine of its own with a software TPM, switched on."""
    with software_tpm(tmp_path / "tpm-state") as tpm:
        yield tpm


@pytest.fixture
def tpm(machine):
    with machine.connect() as connected:
        yield connected


@pytest.fixture
def folder(machine, tmp_path):
    """A log that the machine's TPM attests."""
    create(tmp_path / "log", address=machine.address).close()
    return tmp_path / "log"
