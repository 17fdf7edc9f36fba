import pytest

from tests.support.swtpm import software_tpm
from tests.trustlog.appraisal.hosts import made_host


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
def host(tpm, tmp_path):
    with made_host(tpm, tmp_path) as made:
        yield made
