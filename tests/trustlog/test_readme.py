"""The README's examples run, and its numbers are true."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trustlog
from tests.support.swtpm import software_tpm
from trustlog import MisuseError
from trustlog.statements import AppendStatement, EndStatement, LookupStatement, QuoteStatement, TruncateStatement
from trustlog.tpm.enrol import create
from trustlog.tpm.opening import open_log

PACKAGE = Path(trustlog.__file__).parent
README = (PACKAGE / "README.md").read_text()


def test_the_python_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_commands_run_in_their_order(tmp_path):
    commands = re.findall(r"^    (?:(?:printf .* \| )?trustlog |NONCE=).*$", README, re.MULTILINE)
    assert len(commands) == 10
    serve = commands.pop()  # which runs for ever
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
    assert serve.startswith("    trustlog serve ")
    line = re.sub(r"^ +trustlog ", f"exec {program} ", serve)
    service = subprocess.Popen(
        ["bash", "-euc", line], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with service:
        assert service.stderr is not None
        try:
            said = service.stderr.readline()
        finally:
            service.terminate()
        assert b"serving log" in said, said + service.stderr.read()


def test_the_count_of_trusted_lines(tmp_path):
    commands = re.findall(r"^    \$ (cat trustlog/.*)$", README, re.MULTILINE)
    assert len(commands) == 4, "one for each backend, and one for receipts"
    page = (PACKAGE.parent / "README.md").read_text()
    for command in commands:
        count = subprocess.run(
            ["bash", "-c", command], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
        ).stdout
        assert f"counts {int(count):,} lines, docstrings included" in README
        assert f"{int(count):,} " in page
    # What the second command counts is what the service's program loads of this package.
    script = "import sys, trustlog.service.__main__; print(*sorted(m for m in sys.modules if m.startswith('trustlog')))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    counted = re.findall(r"\w+", " ".join(re.findall(r"\{(.*?)\}", commands[1])))
    names = {name.rsplit(".", 1)[-1] for name in loaded} - {"trustlog", "service"} | {"__init__"}
    assert set(counted) == names


def test_the_sizes_in_the_table():
    for statement in (AppendStatement, LookupStatement, EndStatement, TruncateStatement, QuoteStatement):
        tag = statement.TAG.rstrip(b"\0").decode()
        assert f"| `{tag}` | {statement.LAYOUT.size} |" in README


def test_the_tpm_commands_run_in_their_order(tmp_path):
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    program = shlex.join([sys.executable, "-m", "trustlog.cli.main"])
    with software_tpm(tmp_path / "tpm") as machine:
        script = re.sub(r"^trustlog ", f"{program} ", block, flags=re.MULTILINE).replace("/dev/tpmrm0", machine.address)
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    assert "accepted yes" in result.stdout
    assert "closed_at 2" in result.stdout


def test_a_stores_key_goes_over_to_another_version_as_the_page_says(tmp_path):
    """The new version is another folder, in which a file of the trusted part has one more line."""
    lines = re.findall(r"^    trustlog-((?:new|old) .*?)(?: +#.*)?$", README, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["new", "old", "new"]
    (tmp_path / "new").mkdir()
    new = shutil.copytree(PACKAGE, tmp_path / "new" / "trustlog")
    with (new / "log.py").open("a") as file:
        file.write("# newer\n")

    def run(line: str) -> str:
        version, *words = shlex.split(line)
        paths = {"new": str(tmp_path / "new"), "old": str(PACKAGE.parent)}
        done = subprocess.run(
            [sys.executable, "-m", "trustlog.cli.main", *words, "-o", "json"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": paths[version]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout

    folder = tmp_path / "replica-0" / "log"
    with software_tpm(tmp_path / "tpm") as machine:
        folder.parent.mkdir()
        with create(folder, address=machine.address) as log:
            log.create_store_key()
            key = log.store_key()
        measured = json.loads(run(lines[0]))["measurement"]
        assert json.loads(run(lines[1].replace("8ec9053e…", measured)))["also_for"] == measured
        assert json.loads(run(lines[2]))["also_for"] == "no other program"
        assert len(key) == 32
        with pytest.raises(MisuseError, match="not sealed for this program"):
            open_log(folder)
