"""The lab's server as a user starts it, and a browser that looks at its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*arguments: str):
    """Start `trustlog-replica lab serve` on a free port; yield where it is."""
    command = [sys.executable, "-m", "replica.cli.main", "lab", "serve", "--port", "0", "-o", "json", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        said = process.stdout.readline()
        assert said, f"the server ended with {process.wait(20)}"
        yield json.loads(said)["url"]
    finally:
        process.terminate()
        ended = process.wait(20)
        process.stdout.close()
    assert ended == 0
