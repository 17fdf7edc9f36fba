"""The README's examples run, and its numbers are true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import trustlog
from trustlog.statements import AppendStatement, EndStatement, LookupStatement, TruncateStatement

PACKAGE = Path(trustlog.__file__).parent
README = (PACKAGE / "README.md").read_text()


def test_the_python_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_commands_run_in_their_order(tmp_path):
    commands = re.findall(r"^    (?:(?:printf .* \| )?trustlog |NONCE=).*$", README, re.MULTILINE)
    assert len(commands) == 8
    program = shlex.join([sys.executable, "-m", "trustlog.cli.main"])
    script = "\n".join(re.sub(r"\btrustlog ", f"{program} ", command, count=1) for command in commands)
    environment = {"PATH": "/usr/bin:/bin"}  # whatever else they need, the README sets
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "fresh yes" in result.stdout


def test_the_count_of_trusted_lines(tmp_path):
    (command,) = re.findall(r"^    \$ (cat trustlog/.*)$", README, re.MULTILINE)
    count = subprocess.run(
        ["bash", "-c", command], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    ).stdout
    said = f"{int(count):,} lines, docstrings included"
    assert f"counts {said}" in README
    assert f"(`trustlog/` without `cli/`: {said})" in (PACKAGE.parent / "README.md").read_text()


def test_the_sizes_in_the_table():
    for statement in (AppendStatement, LookupStatement, EndStatement, TruncateStatement):
        tag = statement.TAG.rstrip(b"\0").decode()
        assert f"| `{tag}` | {statement.LAYOUT.size} |" in README
