"""The trusted base stays small: what it imports, what it must not contain, and how large it may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trustlog

PACKAGE = Path(trustlog.__file__).parent
BASE = sorted(path for path in PACKAGE.rglob("*.py") if "cli" not in path.relative_to(PACKAGE).parts)
ALLOWED = sys.stdlib_module_names | {"cryptography", "trustlog"}


def foreign_imports(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return [name for name in found if name.split(".")[0] not in ALLOWED or name.startswith("trustlog.cli")]


@pytest.mark.parametrize("path", BASE, ids=lambda path: path.name)
def test_the_base_imports_the_standard_library_and_cryptography_only(path):
    assert foreign_imports(path.read_text()) == []
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))
    assert len(path.read_text().splitlines()) < 400


@pytest.mark.parametrize("line", ["import click", "from rich import x", "from . import y", "import trustlog.cli.main"])
def test_the_check_catches_foreign_imports(line):
    assert foreign_imports(f"def f():\n    {line}\n")


def test_importing_the_package_loads_nothing_else():
    script = "import sys, trustlog; print([m for m in ('click', 'rich', 'asyncio', 'socket', 'msgpack') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_public_names_exist():
    assert len(set(trustlog.__all__)) == len(trustlog.__all__)
    assert all(hasattr(trustlog, name) for name in trustlog.__all__)
    assert trustlog.__version__ == "0.1.0"
