"""Commands are imported when they are asked for, and all that are named can be."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from client.cli.main import cli as client
from replica.cli.main import cli as replica
from trustlog.cli.lazy import LazyCommands
from trustlog.cli.main import cli as log

ROOT = Path(__file__).parents[2]
MODULES = {
    "client": ("client.cli.gateway_command", "client.cli.bench_command", "client.cli.status_command"),
    "replica": ("replica.cli.running", "replica.cli.audit", "replica.sim.command", "replica.lab.command"),
    "trustlog": ("trustlog.cli.attestation", "trustlog.cli.tpm", "trustlog.cli.serve"),
}


@pytest.mark.parametrize("group", [log, replica, client])
def test_every_command_is_found_under_its_own_name(group):
    for name in group.commands:
        assert group.commands[name].name == name
        assert group.commands[name] is group.commands[name]


@pytest.mark.parametrize("package", MODULES)
def test_a_program_that_starts_imports_no_command(package):
    shown = "\n".join(f"print({name!r} in sys.modules)" for name in MODULES[package])
    script = f"import sys\nimport {package}.cli.main as program\n{shown}\nlist(program.cli.commands)\n{shown}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["False"] * 2 * len(MODULES[package])


def test_it_is_a_mapping_of_commands():
    commands = LazyCommands({"quote": "trustlog.cli.attestation:quote", "gone": "trustlog.cli.attestation:none"})
    made = click.Command("made")
    commands["made"] = made
    assert (list(commands), len(commands), "gone" in commands, "other" in commands) == (
        ["quote", "gone", "made"],
        3,
        True,
        False,
    )
    assert commands["made"] is made
    assert commands["quote"].name == "quote"
    with pytest.raises(AttributeError):
        commands["gone"]
    with pytest.raises(KeyError):
        commands["other"]
    del commands["gone"]
    assert "gone" not in commands
