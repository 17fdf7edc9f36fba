"""For all tests."""

import pytest
import structlog


@pytest.fixture(autouse=True)
def _fresh_logging():
    """Take back what a test before configured: its output is closed by now, and a thread that logs there would die."""
    structlog.reset_defaults()
