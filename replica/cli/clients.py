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
from replica.cluster.strict_toml import ConfigError
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
    SetQuota,
)
from replica.core.genesis import TEXT_SIZE_MAX
from replica.core.quotas import BYTES_MAX, ENVELOPES_MAX, NO_QUOTA, OPERATIONS_PER_S_MAX, Quota
from replica.operations.clients import command, read_policy
from trustlog.cli.contract import Output, example, grid, key_values, output_option

DEADLINE_S = 30.0
KEY_DIGITS_SHOWN = 16
KEY_DIGITS_MIN = 8  # of a listed key that are taken for it

KEY = click.argument("key", metavar="KEY")
OPERATED = operated(DEADLINE_S, "f + 1 replicas must have answered alike")
_WORDS = {Right.READ: "read", Right.WRITE: "write", Right.READ | Right.WRITE: "read and write"}


@click.group(
    "clients",
    short_help="List, allow, limit and revoke the keys of a running cluster's clients.",
    epilog=example("trustlog-replica clients list my-cluster"),
)
def clients_commands() -> None:
    """Say who may be a client of a running cluster: ordered like any operation, so it holds everywhere alike.

    CLUSTER is cluster.toml or its directory. In mode "open", which is how a cluster begins, every key that was not
    revoked is a client's; in mode "listed" only keys that were allowed are. KEY is a client's public key: the digits in
    the file client.pub of its folder, or that file or folder itself. For a key that is listed already, the name that it
    was allowed with does, too, or the first digits that `clients list` shows, if no other key has the same.
    """


@clients_commands.command(
    "list", short_help="Say who may be a client.", epilog=example("trustlog-replica clients list my-cluster")
)
@OPERATED
@output_option
def list_command(*, operator: Operator, output: Output) -> None:
    """Say the mode, the default quota, and every key that was allowed or revoked, with its own quota if it has one.

    Ordered, and vouched for by f + 1 replicas.
    """
    policy = asyncio.run(read_policy(operator.present, operator.key, deadline_s=operator.deadline_s))
    rows = [_row(*one) for one in policy.listings]
    said = [
        (row, _may(listing), _held_to(quota)) for row, (_, quota, listing) in zip(rows, policy.listings, strict=True)
    ]
    data = {
        "mode": policy.mode.label,
        "command": policy.number,
        "slot": policy.slot,
        "quota": _quota_data(policy.quota),
        "keys": rows,
    }
    plain = [f"mode={policy.mode.label} command={policy.number} slot={policy.slot} quota={_held_to(policy.quota)}"]
    plain += [" ".join((row["key"], row["state"], what, held, row["name"] or "-")) for row, what, held in said]
    table = grid(
        ["key", "name", "state", "may", "quota", "command"],
        [
            [f"{row['key'][:KEY_DIGITS_SHOWN]}…", row["name"], row["state"], what, held, row["command"]]
            for row, what, held in said
        ],
        whole=("key", "state"),
    )
    summary = {
        "mode": policy.mode.label,
        "default quota": _held_to(policy.quota),
        "last command": policy.number,
        "as of slot": policy.slot,
    }
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
    made = _listed_key(operator, key)
    _order(output, operator, lambda number: Revoke(number, made), key=made.hex())


@clients_commands.command(
    "quota",
    short_help="Limit what one client may ask for.",
    epilog=example(
        "trustlog-replica clients quota my-cluster my-cluster/client --operations-per-s 500",
        "trustlog-replica clients quota my-cluster --operations-per-s 100 --envelopes 32",
        "trustlog-replica clients quota my-cluster --none",
    ),
)
@click.option(
    "--operations-per-s",
    type=click.IntRange(1, OPERATIONS_PER_S_MAX),
    default=None,
    help="Operations per second, as many at once.",
)
@click.option(
    "--envelopes", type=click.IntRange(1, ENVELOPES_MAX), default=None, help="Requests waiting to be executed."
)
@click.option("--bytes", "octets", type=click.IntRange(1, BYTES_MAX), default=None, help="Bytes of requests waiting.")
@click.option("--none", is_flag=True, help="No quota; a key then has the default again.")
@OPERATED
@click.argument("key", metavar="[KEY]", default="")
@output_option
def quota_command(
    *,
    operator: Operator,
    key: str,
    operations_per_s: int | None,
    envelopes: int | None,
    octets: int | None,
    none: bool,
    output: Output,
) -> None:
    """Limit what each replica takes from the client with KEY, which was allowed before; without KEY from every other.

    A key's own quota stands in the place of the default as a whole; what no option says is limited only as for
    everybody. A client that is over its quota is told so, and tries again later; what was taken is executed.
    """
    quota = Quota(envelopes or 0, octets or 0, operations_per_s or 0)
    if none != (quota == NO_QUOTA):
        raise click.UsageError("give limits (--operations-per-s, --envelopes, --bytes), or --none")
    made = _listed_key(operator, key) if key else b""
    _order(
        output,
        operator,
        lambda number: SetQuota(number, made, quota),
        key=made.hex() or "default",
        quota=_held_to(quota),
    )


def _listed_key(operator: Operator, text: str) -> bytes:
    """Return the public key that KEY means: itself, its file or folder, or a listed one's name or first digits."""
    try:
        return read_public_key(text)
    except ConfigError as error:
        if os.path.lexists(text):
            raise
        trouble = error
    policy = asyncio.run(read_policy(operator.present, operator.key, deadline_s=operator.deadline_s))
    digits = text.removesuffix("…")
    found = [
        key
        for key, _, listing in policy.listings
        if text == listing.name or (len(digits) >= KEY_DIGITS_MIN and key.hex().startswith(digits))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        keys = ", ".join(key.hex() for key in found)
        raise ConfigError(f"{text}: {len(found)} listed keys are called that; give one of them: {keys}")
    raise ConfigError(
        f"{text}: not a client's public key, and no file, and no listed client is called that; give the digits in the "
        "client's client.pub, that file, or a name of: trustlog-replica clients list"
    ) from trouble


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


def _row(key: bytes, quota: Quota, listing: Listing) -> dict[str, Any]:
    return {
        "key": key.hex(),
        "name": listing.name,
        "state": "revoked" if listing.is_revoked else "allowed",
        "permissions": [{"rights": _WORDS[one.rights], **_shown(one.prefix)} for one in listing.permissions],
        "quota": _quota_data(quota),
        "command": listing.number,
        "slot": listing.slot,
    }


def _quota_data(quota: Quota) -> dict[str, int]:
    """Return what a quota limits."""
    limits = {"operations_per_s": quota.operations_per_s, "envelopes": quota.envelopes, "bytes": quota.octets}
    return {name: limit for name, limit in limits.items() if limit}


def _held_to(quota: Quota) -> str:
    return ",".join(f"{name}={limit}" for name, limit in _quota_data(quota).items()) or "-"


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
