"""For all tests."""

import pytest
import structlog
from hypothesis import settings

# How long a machine takes is nothing that a test is about.
settings.register_profile("trustlog", deadline=None)
settings.load_profile("trustlog")


@pytest.fixture(autouse=True)
def _fresh_logging():
    """Take back what a test before configured: its output is closed by now, and a thread that logs there would die."""
    structlog.reset_defaults()
