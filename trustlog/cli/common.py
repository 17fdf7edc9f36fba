"""What several commands of ``trustlog`` share: their arguments, opening a log, reading files, showing facts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from trustlog import software
from trustlog.cli.contract import CommandError, Exit, Output, as_command_error, key_values
from trustlog.cli.documents import DOCUMENT_SIZE_MAX
from trustlog.errors import SealedStateError
from trustlog.keys import VerifyingKey
from trustlog.log import AttestedLog
from trustlog.statements import NONCE_SIZE
from trustlog.tpm.backend import TpmLog
from trustlog.tpm.chain import TpmPins, read_public_file
from trustlog.tpm.folder import CONFIG_FILE
from trustlog.tpm.opening import open_log as open_tpm_log

DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))


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


@contextmanager
def opened(directory: Path) -> Iterator[AttestedLog | TpmLog]:
    """Open a log for one command."""
    try:
        log = open_tpm_log(directory) if (directory / CONFIG_FILE).exists() else software.open_log(directory)
        with log:
            yield log
    except OSError as error:
        failure = as_command_error(error)
        if failure.exit_code != Exit.USAGE:
            failure.hint = "check the disk; nothing unsaved was signed"
        raise failure from error


def read_key(path: Path) -> tuple[VerifyingKey, TpmPins | None]:
    """Read a log.pub, with the pins of a TPM log; CommandError if it is none."""
    try:
        return read_public_file(path)
    except SealedStateError as error:
        raise CommandError(
            f"{path} is no public key of a log",
            "give the log.pub that `trustlog init` wrote",
            Exit.USAGE,
            code="bad-key",
        ) from error


def read_file(path: Path, size_max: int = DOCUMENT_SIZE_MAX) -> bytes:
    """Return a file's content (- is standard input), at most ``size_max`` bytes and one."""
    if str(path) == "-":
        return sys.stdin.buffer.read(size_max + 1)
    with path.open("rb") as stream:
        return stream.read(size_max + 1)


def show(output: Output, data: Mapping[str, object]) -> None:
    """Print facts, one per line, a payload as text; attested bytes and digests are in the JSON only."""
    shown = {name: value for name, value in data.items() if name not in {"attestation", "digests"}}
    if isinstance(payload := shown.get("payload"), str):
        shown["payload"] = bytes.fromhex(payload).decode("utf-8", "backslashreplace")
    if shown.get("fresh") is False:
        shown["fresh"] = "not proven: no --nonce was given"
    if "not_proven" in shown:
        shown["NOT proven:"] = shown.pop("not_proven")
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
