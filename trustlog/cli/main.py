"""``trustlog``: one attested log by hand, and its verification anywhere with the public key alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from trustlog import software
from trustlog.cli.contract import CommandError, Exit, Output, as_command_error, example, key_values, output_option, run
from trustlog.cli.documents import DOCUMENT_SIZE_MAX, Expectation, document, verify_document
from trustlog.cli.hostlog import STANDALONE_CONTEXT, HostLog
from trustlog.errors import VerificationError
from trustlog.log import AttestedLog
from trustlog.statements import NONCE_SIZE, U64_MAX
from trustlog.verification import VerifyingKey

HONESTY = (
    "The software backend refuses damaged state, and a crash loses nothing that was signed. It does not "
    "protect against a thief of this directory (the sealing key lies in it), an old copy put back, or a "
    "host program that lies."
)

_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))


class Bytes32(click.ParamType[bytes]):
    """Exactly 32 bytes in hexadecimal digits; ``what`` says what they are."""

    name = "hex"

    def __init__(self, what: str) -> None:
        """Take the word that errors use."""
        self._what = what

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Parse, or fail as a usage error."""
        if isinstance(value, bytes):
            return value
        try:
            content = bytes.fromhex(str(value))
        except ValueError:
            content = b""
        if len(content) != NONCE_SIZE or len(str(value)) != 2 * NONCE_SIZE:
            self.fail(f"a {self._what} is {2 * NONCE_SIZE} hexadecimal digits", param, ctx)
        return content


_NONCE = click.option(
    "--nonce",
    type=Bytes32("nonce"),
    help="Your nonce, 64 hex digits, proves freshness; a new one if absent.",
)


@click.group(
    epilog=example(
        "trustlog init mylog",
        'trustlog append mylog "first entry" -o json > append.json',
        "trustlog verify --key mylog/log.pub append.json",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="trustlog", message="%(prog)s %(version)s")
def cli() -> None:
    """Keep an attested append-only log in a directory, and verify what such a log says."""


@cli.command(epilog=example("trustlog init mylog"))
@_DIRECTORY
@output_option
def init(directory: Path, output: Output) -> None:
    """Create an empty log with a new key in DIR, which must not exist."""
    if not directory.parent.is_dir():
        raise CommandError(f"{directory.parent} is not a directory", "create it first", Exit.USAGE, code="no-parent")
    with software.create(directory) as log:
        data = {
            "created": str(directory),
            "log_id": log.log_id.hex(),
            "public_key": log.public_key.hex(),
            "public_key_file": str(directory / software.PUBLIC_KEY_FILE),
            "backend": log.kind.name.lower(),
            "protection": HONESTY,
        }
    _show(output, data)


@cli.command(
    epilog=example(
        'trustlog append mylog "first entry"',
        "printf 'a\\nb\\n' | trustlog append mylog - -o json > append.json",
    )
)
@_DIRECTORY
@click.argument("text", default="-", metavar="[TEXT|-]")
@output_option
def append(directory: Path, text: str, output: Output) -> None:
    """Append TEXT as one entry, or with - every line of standard input as an entry of one group."""
    if text != "-":
        payloads = [text.encode("utf-8", "surrogateescape")]
    elif sys.stdin.isatty():
        raise click.UsageError("nothing to append: give a text, or lines on standard input")
    else:
        payloads = sys.stdin.buffer.read().removesuffix(b"\n").split(b"\n")
        payloads = [] if payloads == [b""] else payloads
    with _opened(directory) as log:
        attestation, digests = HostLog(directory, log).append(payloads)
    _show(output, document(attestation, digests=digests))


@cli.command(
    epilog=example(
        "trustlog lookup mylog 1",
        "trustlog lookup mylog 1 --nonce $(openssl rand -hex 32) -o json > lookup.json",
    )
)
@_DIRECTORY
@click.argument("index", metavar="N", type=click.IntRange(1, U64_MAX))
@_NONCE
@output_option
def lookup(directory: Path, index: int, nonce: bytes | None, output: Output) -> None:
    """Have the log attest what stands at index N: assigned, unassigned, or forgotten."""
    with _opened(directory) as log:
        attestation, payload = HostLog(directory, log).lookup(index, nonce or os.urandom(NONCE_SIZE))
    _show(output, document(attestation, payload=payload))


@cli.command(epilog=example("trustlog end mylog -o json > end.json"))
@_DIRECTORY
@_NONCE
@output_option
def end(directory: Path, nonce: bytes | None, output: Output) -> None:
    """Have the log attest where it ends now."""
    with _opened(directory) as log:
        HostLog(directory, log)
        attestation = log.end(nonce=nonce or os.urandom(NONCE_SIZE), context=STANDALONE_CONTEXT)
    _show(output, document(attestation))


@cli.command(epilog=example("trustlog truncate mylog 3"))
@_DIRECTORY
@click.argument("index", metavar="N", type=click.IntRange(1, U64_MAX))
@output_option
def truncate(directory: Path, index: int, output: Output) -> None:
    """Have the log forget every entry below N, for ever. The host's payload file stays as it is."""
    with _opened(directory) as log:
        HostLog(directory, log)
        attestation = log.truncate(index, context=STANDALONE_CONTEXT)
    _show(output, document(attestation))


@cli.command(epilog=example('trustlog verify --key log.pub lookup.json --nonce $NONCE --payload "first entry"'))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Public key file, log.pub.")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--nonce", type=Bytes32("nonce"), help="The nonce you asked with: without it, freshness is not proven.")
@click.option("--index", type=click.IntRange(1, U64_MAX), help="The index you asked for.")
@click.option(
    "--context",
    type=Bytes32("context"),
    default=STANDALONE_CONTEXT,
    help="Where the statement counts, 64 hex digits.  [default: logs kept by this program]",
)
@click.option("--payload", "payloads", multiple=True, help="Expected payload; once per entry, in order.")
@output_option
def verify(
    *,
    key: Path,
    file: Path,
    nonce: bytes | None,
    index: int | None,
    context: bytes,
    payloads: tuple[str, ...],
    output: Output,
) -> None:
    """Verify a JSON document that another command wrote (- reads standard input). Needs no log directory.

    Exit 1 with the reason if it does not prove what it says, or cannot prove what you ask: only lookup and end
    have a nonce, only lookup an index, only append and lookup payloads.
    """
    expected_payloads = [payload.encode("utf-8", "surrogateescape") for payload in payloads]
    expected = Expectation(context, nonce, index, expected_payloads)
    verifying_key = _read_key(key)
    said = verify_document(_read_file(file), verifying_key, expected)
    fresh = {"fresh": nonce is not None} if "nonce" in said else {}
    _show(output, {"verified": True, **fresh, **said})


@contextmanager
def _opened(directory: Path) -> Iterator[AttestedLog]:
    try:
        with software.open_log(directory) as log:
            yield log
    except OSError as error:
        failure = as_command_error(error)
        if failure.exit_code != Exit.USAGE:
            failure.hint = "check the disk; nothing unsaved was signed"
        raise failure from error


def _read_key(path: Path) -> VerifyingKey:
    try:
        return VerifyingKey.from_bytes(bytes.fromhex(path.read_bytes()[:256].decode("ascii").strip()))
    except (ValueError, VerificationError) as error:
        raise CommandError(
            f"{path} is no public key of a log",
            "give the log.pub that `trustlog init` wrote",
            Exit.USAGE,
            code="bad-key",
        ) from error


def _read_file(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(DOCUMENT_SIZE_MAX + 1)
    with path.open("rb") as stream:
        return stream.read(DOCUMENT_SIZE_MAX + 1)


def _show(output: Output, data: Mapping[str, object]) -> None:
    """Print facts, one per line, a payload as text; attested bytes and digests are in the JSON only."""
    shown = {name: value for name, value in data.items() if name not in {"attestation", "digests"}}
    if isinstance(payload := shown.get("payload"), str):
        shown["payload"] = bytes.fromhex(payload).decode("utf-8", "backslashreplace")
    if shown.get("fresh") is False:
        shown["fresh"] = "not proven: no --nonce was given"
    shown = {name: _text(value) for name, value in shown.items()}
    output.result(data, [f"{name} {value}" for name, value in shown.items()], key_values(shown))


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case _:
            return str(value)


def main() -> NoReturn:
    """Entry point of the ``trustlog`` program."""
    run(cli, prog_name="trustlog")


if __name__ == "__main__":
    main()
