"""The layer check itself: this tree passes, and each planted violation is found where it was planted."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import check_layers

ROOT = Path(__file__).resolve().parent.parent


def test_this_tree_passes_and_was_really_looked_at():
    command = [sys.executable, str(ROOT / "tests" / "check_layers.py")]
    # From another directory: the program finds its own tree.
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" KEPT") == 4
    assert "replica.core.genesis" in done.stdout
    assert done.stdout.endswith("layers: ok\n")


def plant(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(root).parents:
            if parent.parts and not (root / parent / "__init__.py").exists():
                (root / parent / "__init__.py").write_text("")
    return root


@pytest.mark.parametrize(
    "line",
    [
        "import numpy",
        "import numpy.linalg as n",
        "from click import echo",
        "from replica.core import state",
        "import trustlog.cli.contract",
        "from trustlog import cli",
        "from .cli import contract",
        "from ..replica import core",
        "def f():\n    import msgpack",
        "if False:\n    import structlog",
        "try:\n    import uvloop\nexcept ImportError:\n    pass",
    ],
)
def test_foreign_import_in_the_trusted_base_is_found(tmp_path, line):
    plant(tmp_path, {"trustlog/log.py": line + "\n", "trustlog/cli/main.py": "import click\n"})
    (problem,) = check_layers.check_trusted_base(tmp_path)
    assert problem.startswith(f"trustlog/log.py:{1 + line[: line.find('import')].count(chr(10))}: ")


def test_what_the_trusted_base_may_import(tmp_path):
    text = "import os, sys\nfrom cryptography import x509\nfrom trustlog.hashing import fold\nfrom . import log\n"
    plant(tmp_path, {"trustlog/software.py": text, "trustlog/hashing.py": "", "trustlog/log.py": ""})
    assert check_layers.check_trusted_base(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "import asyncio",
        "import os.path",
        "from random import Random",
        "from datetime import datetime",
        "import socket as s",
        "import threading",
        "import secrets",
        "import sys",
        "import io",
        "import logging",
        "import importlib",
        "import msgpack",
        "import cryptography",
        "from replica.shell import daemon",
        "from replica import wire",
        "import trustlog.software",
        "from trustlog import create",
        "from trustlog import software",
        "from trustlog.log import AttestedLog",
        "from trustlog.sealed import Files",
        "from trustlog.cli import contract",
        "def f():\n    import time",
        "x = hash(b'')",
        "x = open('f')",
        "print('x')",
        "x = input()",
        "x = id(3)",
        "x = eval('1')",
        "x = __import__('time')",
    ],
)
@pytest.mark.parametrize("where", ["replica/core/rules.py", "client/core.py", "client/core/inner/deep.py"])
def test_impurity_in_a_core_is_found(tmp_path, where, line):
    (problem,) = check_layers.check_cores(plant(tmp_path, {where: line + "\n"}))[0]
    assert problem.startswith(where + ":")


@pytest.mark.parametrize("line", ["from ..wire import tls", "from .. import wire", "from ..wire.tls import x"])
def test_relative_import_out_of_the_core_is_found(tmp_path, line):
    (problem,) = check_layers.check_cores(plant(tmp_path, {"replica/core/rules.py": line + "\n"}))[0]
    assert problem.startswith("replica/core/rules.py:1: ")


def test_impurity_that_a_core_imports_is_found(tmp_path):
    files = {
        "client/core.py": "from client import pending\n",
        "client/pending.py": "from .deeper import x\n",
        "client/deeper.py": "import time\nx = time\n",
        "client/shell.py": "import asyncio\n",
    }
    problems, seen = check_layers.check_cores(plant(tmp_path, files))
    assert problems == ["client/deeper.py:1: a pure core must not import time"]
    assert "client.shell" not in seen


def test_what_a_core_may_import(tmp_path):
    text = (
        "import hashlib, struct\nfrom collections.abc import Iterator\nfrom sortedcontainers import SortedDict\n"
        "from trustlog import Attestation, verify_append\nfrom trustlog.hashing import fold\n"
        "from replica.core import other\nfrom replica.application import load_application\n"
    )
    files = {
        "replica/core/rules.py": text,
        "replica/core/other.py": "",
        "replica/application.py": "from importlib import import_module\n",
    }
    problems, seen = check_layers.check_cores(plant(tmp_path, files))
    assert problems == []
    assert "replica.application" in seen


def test_the_exception_is_for_one_module_only(tmp_path):
    files = {"replica/core/rules.py": "import replica.application\n", "replica/application.py": "import time\n"}
    assert check_layers.check_cores(plant(tmp_path, files))[0] == [
        "replica/application.py:1: a pure core must not import time"
    ]


@pytest.mark.parametrize("package", check_layers.PACKAGES)
def test_assert_is_found(tmp_path, package):
    plant(tmp_path, {f"{package}/a/b.py": "def f():\n    assert True\n"})
    assert check_layers.check_asserts(tmp_path) == [f"{package}/a/b.py:2: assert: raise an exception instead"]


SKELETON = {
    f"{name}.py": ""
    for name in [
        "trustlog/software",
        "trustlog/sealed",
        "trustlog/cli/main",
        "replica/application",
        "replica/apps/kv",
        "replica/core/a",
        "replica/cluster/a",
        "replica/wire/a",
        "replica/shell/a",
        "replica/pbft/a",
        "replica/pbft/machine",
        "replica/operations/a",
        "replica/sim/a",
        "replica/lab/a",
        "replica/cli/a",
        "client/a",
        "client/core",
    ]
}


@pytest.fixture
def skeleton(tmp_path):
    plant(tmp_path, SKELETON)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "line", "contract"),
    [
        ("trustlog/software.py", "import replica.core.a", "client, replica, trustlog"),
        ("trustlog/software.py", "import client.a", "client, replica, trustlog"),
        ("replica/wire/a.py", "def f():\n    import client.a", "client, replica, trustlog"),
        ("replica/core/a.py", "from replica.wire import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/cluster/a.py", "from replica.wire import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/wire/a.py", "from replica.shell import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/shell/a.py", "from replica.cli import a", "cli, operations or lab, shell, wire, cluster, core"),
        (
            "replica/shell/a.py",
            "from replica.operations import a",
            "cli, operations or lab, shell, wire, cluster, core",
        ),
        ("replica/shell/a.py", "from replica.lab import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/sim/a.py", "from replica.lab import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/shell/a.py", "from replica.pbft import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/sim/a.py", "from replica.pbft import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/pbft/a.py", "from replica.lab import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/operations/a.py", "from replica.cli import a", "cli, operations or lab, shell, wire, cluster, core"),
        ("replica/apps/kv.py", "from trustlog import sealed", "core and applications"),
        ("replica/core/a.py", "import trustlog.software", "core and applications"),
        ("client/a.py", "from replica.shell import a", "client: no daemon"),
        ("client/a.py", "from replica.cli import a", "client: no daemon"),
        ("client/a.py", "from replica.pbft import a", "client: no daemon"),
    ],
)
def test_import_against_the_layers_is_found(skeleton, where, line, contract):
    (skeleton / where).write_text(line + "\n")
    kept, report = check_layers.check_layers(skeleton)
    assert not kept
    broken = [text for text in report.splitlines() if text.endswith(" BROKEN")]
    assert len(broken) == 1, report
    assert broken[0].startswith(contract)


def test_imports_downwards_are_kept(skeleton):
    (skeleton / "client/a.py").write_text("import replica.wire.a\nimport trustlog.software\n")
    (skeleton / "replica/cli/a.py").write_text("import replica.shell.a\nimport replica.cluster.a\n")
    kept, report = check_layers.check_layers(skeleton)
    assert kept, report


def test_program_fails_for_each_rule(skeleton, monkeypatch, capsys):
    monkeypatch.setattr(check_layers, "__file__", str(skeleton / "tests" / "check_layers.py"))
    assert check_layers.main() == 0
    for where, line in [
        ("trustlog/software.py", "import numpy"),
        ("replica/core/a.py", "import time"),
        ("replica/pbft/machine.py", "import asyncio"),
        ("client/a.py", "assert True"),
        ("replica/wire/a.py", "import replica.shell.a"),
    ]:
        (skeleton / where).write_text(line + "\n")
        assert check_layers.main() == 1
        assert "layers: violated" in capsys.readouterr().out
        (skeleton / where).write_text("")
    shutil.rmtree(skeleton / "replica" / "core")
    assert check_layers.main() == 1
    assert "wrong place" in capsys.readouterr().out
