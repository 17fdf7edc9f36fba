"""`trustlog-replica clients`: who may be a client of a running cluster, and what for."""

import asyncio
import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Group as Lines

from replica.application import Right
from replica.cli.member import CLUSTER, OPERATOR, cluster_file, operator_key, refreshed
from replica.cluster.clusterfile import ClusterFile
from replica.cluster.keys import ClientKey, read_public_key
from replica.core.clients import (
    PERMISSIONS_MAX,
    PREFIX_BYTES_MAX,
    Allow,
    Command,
    Listing,
    Mode,
    Permission,
    Revoke,
    SetMode,
)
from replica.core.genesis import TEXT_SIZE_MAX
from replica.operations.clients import command, read_policy
from trustlog.cli.contract import Output, example, grid, key_values, output_option
from trustlog.cli.passphrases import passphrase_option

DEADLINE_S = 30.0

KEY = click.argument("key", metavar="KEY")
DEADLINE = click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(1, 3600),
    default=DEADLINE_S,
    show_default=True,
    help="Seconds until f + 1 replicas must have answered alike.",
)
_WORDS = {Right.READ: "read", Right.WRITE: "write", Right.READ | Right.WRITE: "read and write"}


@click.group(
    "clients",
    short_help="List, allow and revoke the keys of a running cluster's clients.",
    epilog=example("trustlog-replica clients list my-cluster"),
)
def clients_commands() -> None:
    """Say who may be a client of a running cluster: ordered like any operation, so it holds everywhere alike.

    CLUSTER is cluster.toml or its directory. In mode "open", which is how a cluster begins, every key that was not
    revoked is a client's; in mode "listed" only keys that were allowed are. KEY is a client's public key: the digits in
    the file client.pub of its folder, or that file or folder itself.
    """


@clients_commands.command(
    "list", short_help="Say who may be a client.", epilog=example("trustlog-replica clients list my-cluster")
)
@CLUSTER
@OPERATOR
@passphrase_option
@DEADLINE
@output_option
def list_command(
    *, cluster: Path, operator_folder: Path | None, passphrase_file: Path | None, deadline_s: float, output: Output
) -> None:
    """Say the mode, and every key that was allowed or revoked: ordered, and vouched for by f + 1 replicas."""
    policy = asyncio.run(
        read_policy(*_opened(cluster, operator_folder, passphrase_file, deadline_s), deadline_s=deadline_s)
    )
    rows = [_row(key, listing) for key, listing in policy.listings]
    may = [_may(listing) for _, listing in policy.listings]
    data = {"mode": policy.mode.label, "command": policy.number, "slot": policy.slot, "keys": rows}
    plain = [f"mode={policy.mode.label} command={policy.number} slot={policy.slot}"]
    plain += [
        " ".join((row["key"], row["state"], what, row["name"] or "-")) for row, what in zip(rows, may, strict=True)
    ]
    table = grid(
        ["key", "name", "state", "may", "command"],
        [[row["key"], row["name"], row["state"], what, row["command"]] for row, what in zip(rows, may, strict=True)],
    )
    summary = {"mode": policy.mode.label, "last command": policy.number, "as of slot": policy.slot}
    output.result(data, plain, Lines(key_values(summary), table))


@clients_commands.command(
    "mode",
    short_help="Let every key be a client's, or only allowed ones.",
    epilog=example("trustlog-replica clients mode my-cluster listed"),
)
@CLUSTER
@click.argument("mode", type=click.Choice([mode.label for mode in Mode]))
@OPERATOR
@passphrase_option
@DEADLINE
@output_option
def mode_command(
    *,
    cluster: Path,
    mode: str,
    operator_folder: Path | None,
    passphrase_file: Path | None,
    deadline_s: float,
    output: Output,
) -> None:
    """Set the mode. "listed" refuses every key that was not allowed, from that slot on: allow your clients first."""
    wanted = Mode[mode.upper()]
    _order(
        output,
        _opened(cluster, operator_folder, passphrase_file, deadline_s),
        lambda n: SetMode(n, wanted),
        deadline_s,
        mode=mode,
    )


@clients_commands.command(
    "allow",
    short_help="Allow a client's key, everything or some prefixes.",
    epilog=example(
        "trustlog-replica clients allow my-cluster my-cluster/client --name shop",
        "trustlog-replica clients allow my-cluster meter/client.pub --read config/ --write readings/",
    ),
)
@CLUSTER
@KEY
@click.option("--name", default="", help="A name for people.")
@click.option("--read", multiple=True, metavar="PREFIX", help="It may read keys that begin so; may be repeated.")
@click.option("--write", multiple=True, metavar="PREFIX", help="It may write keys that begin so; may be repeated.")
@OPERATOR
@passphrase_option
@DEADLINE
@output_option
def allow_command(
    *,
    cluster: Path,
    key: str,
    name: str,
    read: tuple[str, ...],
    write: tuple[str, ...],
    operator_folder: Path | None,
    passphrase_file: Path | None,
    deadline_s: float,
    output: Output,
) -> None:
    """Allow KEY to be a client's. Without --read and --write it may do everything; what was said before is replaced.

    In mode "open" permissions bind this key only: whoever holds it can make another one.
    """
    made = read_public_key(key)
    if len(name.encode()) > TEXT_SIZE_MAX:
        raise click.UsageError(f"--name has at most {TEXT_SIZE_MAX} bytes")
    permissions = _permissions(read, write)
    _order(
        output,
        _opened(cluster, operator_folder, passphrase_file, deadline_s),
        lambda number: Allow(number, made, name, permissions),
        deadline_s,
        key=made.hex(),
    )


@clients_commands.command(
    "revoke",
    short_help="Revoke a client's key.",
    epilog=example("trustlog-replica clients revoke my-cluster lost-laptop/client.pub"),
)
@CLUSTER
@KEY
@OPERATOR
@passphrase_option
@DEADLINE
@output_option
def revoke_command(
    *,
    cluster: Path,
    key: str,
    operator_folder: Path | None,
    passphrase_file: Path | None,
    deadline_s: float,
    output: Output,
) -> None:
    """Revoke KEY: from that slot on nothing that it signs is executed, and it is told so. `allow` takes it back."""
    made = read_public_key(key)
    opened = _opened(cluster, operator_folder, passphrase_file, deadline_s)
    _order(output, opened, lambda number: Revoke(number, made), deadline_s, key=made.hex())


def _opened(
    cluster: Path, folder: Path | None, passphrase_file: Path | None, deadline_s: float
) -> tuple[ClusterFile, ClientKey]:
    file = cluster_file(cluster)
    present = refreshed(file, deadline_s)
    return present, operator_key(file, folder, passphrase_file, present)


def _order(
    output: Output,
    opened: tuple[ClusterFile, ClientKey],
    made: Callable[[int], Command],
    deadline_s: float,
    **about: str,
) -> None:
    number, slot = asyncio.run(command(*opened, made, deadline_s=deadline_s))
    data: dict[str, Any] = {"command": number, "slot": slot, **about}
    output.result(data, [f"{name}={value}" for name, value in data.items()], key_values(data))


def _permissions(read: Sequence[str], write: Sequence[str]) -> tuple[Permission, ...]:
    rights: dict[bytes, Right] = {}
    for right, prefixes in ((Right.READ, read), (Right.WRITE, write)):
        for prefix in map(os.fsencode, prefixes):
            if len(prefix) > PREFIX_BYTES_MAX:
                raise click.UsageError(f"a prefix has at most {PREFIX_BYTES_MAX} bytes")
            rights[prefix] = rights.get(prefix, Right(0)) | right
    if len(rights) > PERMISSIONS_MAX:
        raise click.UsageError(f"a key has permissions for at most {PERMISSIONS_MAX} prefixes")
    return tuple(Permission(right, prefix) for prefix, right in sorted(rights.items()))


def _row(key: bytes, listing: Listing) -> dict[str, Any]:
    return {
        "key": key.hex(),
        "name": listing.name,
        "state": "revoked" if listing.is_revoked else "allowed",
        "permissions": [{"rights": _WORDS[one.rights], **_shown(one.prefix)} for one in listing.permissions],
        "command": listing.number,
        "slot": listing.slot,
    }


def _shown(prefix: bytes) -> dict[str, str]:
    try:
        return {"prefix": prefix.decode()}
    except UnicodeDecodeError:
        return {"prefix_base64": base64.b64encode(prefix).decode()}


def _may(listing: Listing) -> str:
    if listing.is_revoked:
        return "nothing"
    parts = [f'{_WORDS[one.rights]} "{one.prefix.decode(errors="backslashreplace")}"' for one in listing.permissions]
    return ", ".join(parts) or "everything"
