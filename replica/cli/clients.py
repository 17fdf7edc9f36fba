"""`trustlog-replica clients`: who may be a client of a running cluster, and what for."""

import asyncio
import base64
import os
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Group as Lines

from replica.application import Right
from replica.cli.operating import Operator, operated
from replica.cluster.keys import read_public_key
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

DEADLINE_S = 30.0

KEY = click.argument("key", metavar="KEY")
OPERATED = operated(DEADLINE_S, "f + 1 replicas must have answered alike")
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
@OPERATED
@output_option
def list_command(*, operator: Operator, output: Output) -> None:
    """Say the mode, and every key that was allowed or revoked: ordered, and vouched for by f + 1 replicas."""
    policy = asyncio.run(read_policy(operator.present, operator.key, deadline_s=operator.deadline_s))
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
@OPERATED
@click.argument("mode", type=click.Choice([mode.label for mode in Mode]))
@output_option
def mode_command(*, operator: Operator, mode: str, output: Output) -> None:
    """Set the mode. "listed" refuses every key that was not allowed, from that slot on: allow your clients first."""
    wanted = Mode[mode.upper()]
    _order(output, operator, lambda n: SetMode(n, wanted), mode=mode)


@clients_commands.command(
    "allow",
    short_help="Allow a client's key, everything or some prefixes.",
    epilog=example(
        "trustlog-replica clients allow my-cluster my-cluster/client --name shop",
        "trustlog-replica clients allow my-cluster meter/client.pub --read config/ --write readings/",
    ),
)
@click.option("--name", default="", help="A name for people.")
@click.option("--read", multiple=True, metavar="PREFIX", help="It may read keys that begin so; may be repeated.")
@click.option("--write", multiple=True, metavar="PREFIX", help="It may write keys that begin so; may be repeated.")
@OPERATED
@KEY
@output_option
def allow_command(
    *, operator: Operator, key: str, name: str, read: tuple[str, ...], write: tuple[str, ...], output: Output
) -> None:
    """Allow KEY to be a client's. Without --read and --write it may do everything; what was said before is replaced.

    In mode "open" permissions bind this key only: whoever holds it can make another one.
    """
    made = read_public_key(key)
    if len(name.encode()) > TEXT_SIZE_MAX:
        raise click.UsageError(f"--name has at most {TEXT_SIZE_MAX} bytes")
    permissions = _permissions(read, write)
    _order(output, operator, lambda number: Allow(number, made, name, permissions), key=made.hex())


@clients_commands.command(
    "revoke",
    short_help="Revoke a client's key.",
    epilog=example("trustlog-replica clients revoke my-cluster lost-laptop/client.pub"),
)
@OPERATED
@KEY
@output_option
def revoke_command(*, operator: Operator, key: str, output: Output) -> None:
    """Revoke KEY: from that slot on nothing that it signs is executed, and it is told so. `allow` takes it back."""
    made = read_public_key(key)
    _order(output, operator, lambda number: Revoke(number, made), key=made.hex())


def _order(output: Output, operator: Operator, made: Callable[[int], Command], **about: str) -> None:
    number, slot = asyncio.run(command(operator.present, operator.key, made, deadline_s=operator.deadline_s))
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
