"""For all tests."""

import pytest
import structlog
from hypothesis import settings

from replica.cluster import ports
from tests.support.ports import own_ports

# How long a machine takes is nothing that a test is about.
settings.register_profile("trustlog", deadline=None)
settings.load_profile("trustlog")


@pytest.fixture(autouse=True, scope="session")
def _own_ports():
    """Tests in several processes choose among different ports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "servers_ports", own_ports)
        yield


@pytest.fixture(autouse=True)
def _fresh_logging():
    """Take back what a test before configured: its output is closed by now, and a thread that logs there would die."""
    structlog.reset_defaults()
