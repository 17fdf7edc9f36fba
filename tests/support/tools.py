"""Programs of others that tests run: without them a test is skipped loudly, or fails where they must be there."""

import os
import shutil
from typing import NoReturn

import pytest


def required(reason: str) -> NoReturn:
    """Skip for a reason that lies in this machine; where REQUIRE_TOOLS is set, as in CI, that is a failure."""
    if os.environ.get("REQUIRE_TOOLS"):
        pytest.fail(f"{reason}, and REQUIRE_TOOLS says that it must be there")
    pytest.skip(reason)


def tool(name: str) -> str:
    """Return the program's path; without it, the test is skipped or fails as above."""
    found = shutil.which(name)
    return found if found is not None else required(f"{name} is not installed")
