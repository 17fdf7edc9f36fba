"""Settings on the command line, and `trustlog-replica config check`: what counts, where it comes from, what is wrong.

An option stands above its TRUSTLOG_* variable, a variable above replica.toml, and that above the default.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

import click
from rich.console import Group
from rich.text import Text

from replica.cli.options import Address, Command
from replica.cluster.clusterfile import CLUSTER_FILE_NAME, ClusterFile, format_address, load_any_cluster_file
from replica.cluster.environment import (
    RETAIN_MIB_MAX,
    VARIABLES,
    Durability,
    LogFormat,
    LogLevel,
    settings_of,
    unknown_variables,
)
from replica.cluster.home import SETTINGS_NAME, NoMemberError, ReplicaHome, load_any_home
from replica.cluster.strict_toml import parse_toml, read_bounded
from replica.shell.sqlitefile import find_foreign
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, key_values, output_option, printable

_VARIABLE_OF: Final = {field: variable for variable, (field, _) in VARIABLES.items()}


def settings_options(command: Command) -> Command:
    """Add an option for every setting; they arrive as keyword arguments, None where they were not given."""

    def choices(kind: object) -> click.Choice[str]:
        return click.Choice(list(get_args(kind)))

    options = (
        click.option("--log-level", type=choices(LogLevel), help=_help("log_level")),
        click.option("--log-format", type=choices(LogFormat), help=_help("log_format")),
        click.option("--durability", type=choices(Durability), help=_help("durability")),
        click.option(
            "--http", type=Address(), metavar="HOST:PORT", help=f"Answer read-only HTTP here. {_help('http')}"
        ),
        click.option("--listen", type=Address(), metavar="HOST:PORT", help=f"Where to listen. {_help('listen')}"),
        click.option(
            "--retain-mib",
            type=click.IntRange(0, RETAIN_MIB_MAX),
            help=f"How much of the logs to keep beyond need. {_help('retain_mib')}",
        ),
        click.option(
            "--cluster-file",
            "cluster",
            metavar="PATH",
            type=click.Path(path_type=Path),
            callback=lambda _context, _parameter, value: None if value is None else str(value.absolute()),
            help=f"The cluster's public file. {_help('cluster')}",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def flags_given(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that were given as options."""
    return {field: value for field, value in settings.items() if value is not None}


def _help(field: str) -> str:
    return f"Over {_VARIABLE_OF[field]} and replica.toml."


@click.group(
    "config", epilog=example("trustlog-replica config check my-cluster/replica-0"), short_help="Look at configuration."
)
def config_commands() -> None:
    """Look at what a replica would run with."""


@config_commands.command(
    "check",
    short_help="Check configuration; show what counts and where it comes from.",
    epilog=example(
        "trustlog-replica config check my-cluster/replica-0",
        "trustlog-replica config check my-cluster/replica-0 --log-level debug",
        "trustlog-replica config check my-cluster/cluster.toml",
    ),
)
@click.argument("place", metavar="DIR/replica-N|CLUSTER.toml", type=click.Path(path_type=Path))
@settings_options
@output_option
def check_command(*, place: Path, output: Output, **settings: object) -> None:
    """Read a replica's folder as `run` would, or a cluster.toml; exit 2 and name the first mistake if there is one.

    Exit 1 if the folder's replica is none of the members that its files name. Databases of another cluster are a
    mistake too; whether the log can be opened the doctor says.

    A key that no program here knows is a mistake, in a file or as a TRUSTLOG_* variable, and the nearest known one is
    named. For each setting it is shown whether an option, a variable, the file or the default counts.

    With -o plain, each setting is a line of three fields with tabs between them: name, value, source.
    """
    notes = _variables()
    if place.is_file() or ((place / CLUSTER_FILE_NAME).exists() and not (place / SETTINGS_NAME).exists()):
        _show_cluster(load_any_cluster_file(place), output)
        return
    flags = flags_given(settings)
    try:
        home = load_any_home(place, flags)
    except NoMemberError as error:
        raise CommandError(str(error), code="no-member") from error
    foreign = find_foreign((home.store_path, home.state_path), home.cluster.cluster_id, home.number)
    if foreign is not None:
        text = f"{home.cluster_path}: {foreign}"
        raise CommandError(text, foreign.remedy, Exit.USAGE, code="configuration")
    rows = _effective(home, flags)
    data = {
        "folder": str(place),
        "cluster_file": str(home.cluster_path),
        "cluster_file_sha256": home.cluster.digest.hex(),
        "settings": {name: {"value": value, "source": source} for name, value, source in rows},
        "notes": notes,
    }
    table = grid(("setting", "value", "from"), rows)
    if output.format == "plain":
        for row in rows:
            click.echo("\t".join(map(printable, row)))
    else:
        output.result(data, "", Group(table, *map(Text, notes), Text("the configuration is in order")))


def _variables() -> list[str]:
    """Refuse variables that come near a known name; return notes about the others that nobody here reads."""
    notes = []
    for name, near in unknown_variables(os.environ).items():
        if near:
            text = f"environment: {name} is not a variable that this program knows; did you mean {near}?"
            raise CommandError(text, f"rename it, or unset {name}", Exit.USAGE, code="configuration")
        notes.append(f"note: {name} is read by no program of trustlog")
    return notes


def _effective(home: ReplicaHome, flags: Mapping[str, object]) -> list[tuple[str, str, str]]:
    path = home.path / SETTINGS_NAME
    in_file = parse_toml(read_bounded(path), str(path)).data
    in_environment = settings_of(os.environ)
    rows = []
    for field in ("cluster", "listen", "http", "durability", "log_level", "log_format", "retain_mib"):
        source = "default"
        if field in flags:
            source = "option"
        elif field in in_environment:
            source = _VARIABLE_OF[field]
        elif field in in_file:
            source = str(path)
        rows.append((field, _shown(getattr(home.settings, field)), source))
    trusted = home.settings.trusted_log
    if not home.cluster.has_logs:
        return [*rows, ("trusted_log", "none", str(home.cluster_path))]
    kept = trusted.backend.name.lower() + ("" if trusted.socket is None else f" at {trusted.socket}")
    kept += ", payloads sealed" if trusted.encrypt_store else ""
    rows.append(("trusted_log", kept, str(path) if "trusted_log" in in_file else "default"))
    return rows


def _shown(value: Any) -> str:  # noqa: ANN401 - a setting
    if value is None:
        return "-"
    return format_address(*value) if isinstance(value, tuple) else str(value)


def _show_cluster(cluster: ClusterFile, output: Output) -> None:
    genesis = cluster.genesis
    data: dict[str, object] = {
        "name": genesis.name,
        "cluster_id": cluster.cluster_id.hex(),
        "file_sha256": cluster.digest.hex(),
        "f": genesis.f,
        "ordering": genesis.ordering.label,
        "application": genesis.application,
        "replicas": ", ".join(place.address for place in cluster.replicas),
    }
    output.result(data, [f"{name}={value}" for name, value in data.items()], key_values(data))
