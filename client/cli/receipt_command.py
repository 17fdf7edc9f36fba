"""`trustlog-client receipt verify`, and what the commands with `--receipt` share."""

import json
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import click

from client.cli.running import Target, example, show
from client.receipts import Receipt, verify
from client.store import KeyValueCalls
from replica.apps import kv
from replica.apps.kv_layout import I64
from replica.cluster.clusterfile import load_cluster_file
from replica.cluster.strict_toml import ConfigError, read_bounded
from replica.core.envelope import Status
from replica.core.layout import LayoutError, Reader
from trustlog import VerificationError
from trustlog.cli.contract import CommandError, Exit, Output, key_values, output_option, printable
from trustlog.receipts import RECEIPT_BYTES_MAX

_Value = TypeVar("_Value")

receipt_option = click.option(
    "--receipt",
    "receipt",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a receipt of it to FILE, which must not exist: receipt verify checks it anywhere.",
)


def run_one(
    cluster: Target, call: Callable[[KeyValueCalls], Awaitable[_Value]], receipt: Path | None
) -> tuple[_Value, dict[str, object]]:
    """Make one call, with a receipt if a file is named for it; return what it returns, and what JSON says besides."""
    if receipt is None:
        return cluster.run(call), {}
    if receipt.name in {"", "-"}:
        raise click.UsageError("--receipt wants the name of a new file")
    with _Place(receipt) as place:
        value, made = cluster.run(lambda client: client.with_receipt(call))
        place.fill(made.encode())
    return value, {"receipt": str(receipt)}


class _Place:
    """A file that appears whole or not at all; that it can be written is found out before anything is executed.

    What is written is a new file of its own beside it, which nobody else knows and which is never opened by its name
    again: a link gives it the name that was asked for, and unlike a rename that never replaces anything.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
        self._descriptor = -1

    def __enter__(self) -> Self:
        if os.path.lexists(self._path):
            hint = "nothing was executed; name another file, or remove this one"
            raise CommandError(f"{self._path}: exists already", hint, Exit.USAGE, code="exists")
        try:
            self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            # Some file systems have no links.
            tried = self._partial.with_name(f"{self._partial.name}.link")
            os.link(self._partial, tried)
            tried.unlink()
        except OSError as error:
            self._clean_up()
            hint = "nothing was executed; name a file in a folder that you may write"
            text = f"{self._path}: cannot be written: {error.strerror}"
            raise CommandError(text, hint, Exit.USAGE, code="not-writable") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def fill(self, content: bytes) -> None:
        """Write the file, durably; CommandError if the disk fails, or another one took its name."""
        try:
            with os.fdopen(os.dup(self._descriptor), "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(self._partial, self._path)
        except OSError as error:
            text = f"{self._path}: the receipt cannot be written: {error.strerror}"
            raise CommandError(text, "the operation was executed", Exit.USAGE, code="output-failed") from error


@click.group(
    "receipt",
    short_help="Verify receipts of operations.",
    epilog=example("trustlog-client -c my-cluster receipt verify r.json"),
)
def receipt_commands() -> None:
    """Receipts: proofs that the cluster executed an operation, for whoever has its public file.

    put, del, cas, incr and exec write one with --receipt FILE.
    """


@receipt_commands.command(
    "verify",
    short_help="Say what a receipt proves.",
    epilog=example(
        "trustlog-client -c my-cluster put greeting hello --receipt r.json",
        "trustlog-client receipt verify r.json --cluster my-cluster/cluster.toml",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--cluster",
    "cluster_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Your own copy of cluster.toml, or its directory: whose keys count.  [default: the cluster's directory]",
)
@output_option
@click.pass_obj
def verify_command(target: Target, *, file: Path, cluster_path: Path | None, output: Output) -> None:
    """Say which operation a receipt proves to be executed, by which client, with what result.

    Needs the cluster's public file and nothing that runs. Exit 1 with the reason if it proves nothing. Look at what
    it is of: a receipt of another operation is a good one, too.
    """
    path = cluster_path or target.directory
    if path is None:
        raise click.UsageError("whose keys count? Give --cluster with your copy of cluster.toml, or -c DIR")
    try:
        application = load_cluster_file(path).genesis.application
    except ConfigError as error:
        raise CommandError(str(error), "name your copy of cluster.toml", Exit.USAGE, code="config") from error
    try:
        receipt = verify(_read(file), path)
    except VerificationError as error:
        hint = "do not act on this file; ask for the original, and check that the cluster file is the right one"
        raise CommandError(f"proves nothing: {error}", hint, Exit.NEGATIVE, code="not-proven") from error
    data, text = _said(receipt, application)
    members = [entry.member for entry in receipt.entries]
    client = receipt.outcome.client.hex()
    plain = f"slot {receipt.outcome.slot}: {text}; by client {client[2:18]}, attested by replicas {_listed(members)}"
    shown = {
        "proven": text,
        "slot": receipt.outcome.slot,
        "client": client,
        "attested by replicas": _listed(members),
    }
    output.result({"proven": True, **data, "replicas": members}, printable(plain), key_values(shown))


def _read(file: Path) -> bytes:
    try:
        return read_bounded(file, RECEIPT_BYTES_MAX)
    except ConfigError as error:
        if file.is_file() and file.stat().st_size > RECEIPT_BYTES_MAX:
            raise VerificationError("malformed", f"a file of more than {RECEIPT_BYTES_MAX} bytes") from error
        raise CommandError(str(error), "name the file that --receipt wrote", Exit.USAGE, code="no-file") from error


def _said(receipt: Receipt, application: str) -> tuple[dict[str, object], str]:
    """Return what a receipt says, for programs, and in a line for people."""
    said = receipt.outcome
    status = Status(said.status).name.lower() if said.status in set(Status) else str(said.status)
    data: dict[str, object] = {
        "slot": said.slot,
        "client": said.client.hex(),
        "session": f"{said.session[0]}.{said.session[1]}",
        "number": said.number,
        "status": status,
        **show("operation", said.operation),
        **show("result", said.result),
    }
    text = f"{_quoted(said.operation)} gave {status} {_quoted(said.result)}"
    if application == kv.APPLICATION and said.status == Status.OK:
        try:
            command, words, result = _key_value(said.operation, said.result)
        except (LayoutError, ValueError, KeyError):
            return data, text
        data |= {"command": command, **{name: value for pair in words.items() for name, value in show(*pair).items()}}
        text = " ".join((command, *map(_quoted, words.values()))) + f" gave {result}"
    return data, text


def _key_value(operation: bytes, result: bytes) -> tuple[str, dict[str, bytes], str]:
    """Return a key-value operation as the command that makes it: its name, its arguments, its result in words."""
    body = Reader(operation)
    code, key = body.u8(), body.take(body.u16())
    rest = operation[body.position :]
    if code == kv.Code.PUT:
        return "put", {"key": key, "value": rest}, "replaced" if kv.read_flag(result) else "created"
    if code == kv.Code.DELETE:
        return "del", {"key": key}, "deleted" if kv.read_flag(result) else "absent"
    if code == kv.Code.GET:
        value = kv.read_value(result)
        return "get", {"key": key}, "no value" if value is None else _quoted(value)
    if code == kv.Code.INCR:
        return "incr", {"key": key, "amount": b"%d" % I64.unpack(rest)[0]}, str(kv.read_number(result))
    if code == kv.Code.CAS:
        expects, expected = body.u8(), body.block(body.left())
        wanted = {"expected": expected} if expects else {}
        new = body.take(body.left())
        return "cas", {"key": key, **wanted, "new": new}, "swapped" if kv.read_cas(result).swapped else "not swapped"
    raise KeyError(code)


def _quoted(data: bytes) -> str:
    """Return bytes so that nothing else reads alike, and where they end is seen: as a JSON string, or in hex digits."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"0x{data.hex()}"
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else f"0x{data.hex()}"


def _listed(members: list[int]) -> str:
    return " ".join(map(str, members))
