"""What the commands share: opening the client, ending with the right exit code, bytes for people and programs."""

import asyncio
import base64
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from client.api import CLIENT_FOLDER, Client
from client.errors import (
    ClientError,
    HeldBack,
    NoLongerAllowed,
    NoReceipt,
    NotAllowed,
    NotExecuted,
    NotOffered,
    NotPermitted,
    OperationFailed,
    SessionExpired,
    Undecided,
)
from replica.apps.kv import KEY_BYTES_MAX
from replica.cluster.clusterfile import CLUSTER_FILE_NAME
from replica.cluster.keys import CLIENT_KEY_NAME
from replica.cluster.passphrase import PassphraseSource
from replica.cluster.strict_toml import ConfigError
from trustlog.cli.contract import CommandError, Exit
from trustlog.cli.passphrases import asker

LIMITS = (
    f"a key has 1 to {KEY_BYTES_MAX} bytes, an operation (key and values together) at most 1 MiB "
    "unless cluster.toml says otherwise"
)
_FILES = (CLUSTER_FILE_NAME, Path(CLIENT_FOLDER) / CLIENT_KEY_NAME)
_WHICH_DIRECTORY = (
    "the directory is the one that trustlog-replica init made, or holds copies of its cluster.toml and its "
    "folder client"
)

_ASK_OPERATOR = "the cluster's operator sees who may do what: trustlog-replica clients list"

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Target:
    """Which cluster, how long to wait, where its key's passphrase is: the options before the command's name."""

    directory: Path | None
    deadline_s: float
    passphrase_file: Path | None = None

    @property
    def passphrase(self) -> PassphraseSource:
        """Return where the key's passphrase comes from."""
        return PassphraseSource(self.passphrase_file, asker())

    def named(self) -> Path:
        """Return the cluster's directory; CommandError if none is named."""
        if self.directory is None:
            raise CommandError(
                "no cluster is named",
                "give its directory: trustlog-client -c DIR …, or set TRUSTLOG_CLUSTER",
                Exit.USAGE,
                code="usage",
            )
        return self.directory

    def open(self) -> Client:
        """Return a client, not connected yet; CommandError if the files cannot be used."""
        directory = self.named()
        try:
            return Client.from_dir(directory, deadline_s=self.deadline_s, passphrase=self.passphrase)
        except ConfigError as error:
            # A file that is there but cannot be used: the error's own text says what to do.
            is_complete = all((directory / name).exists() for name in _FILES)
            hint = "" if is_complete else _WHICH_DIRECTORY
            raise CommandError(str(error), hint, Exit.USAGE, code="config") from error

    def run(self, work: Callable[[Client], Awaitable[_Value]]) -> _Value:
        """Connect, do `work`, disconnect; failures end the command as the contract has it."""
        client = self.open()

        async def opened() -> _Value:
            async with client:
                return await work(client)

        try:
            return run_async(opened())
        except (ClientError, ValueError) as error:
            raise as_command_error(error) from error


def as_command_error(error: Exception) -> CommandError:
    """Give a client's error its hint, code and exit code."""
    if isinstance(error, NotPermitted):
        return CommandError(str(error), _ASK_OPERATOR, Exit.NEGATIVE, code="not-permitted")
    if isinstance(error, OperationFailed):
        return CommandError(str(error), "it changed nothing", Exit.NEGATIVE, code="operation-failed")
    if isinstance(error, NoReceipt):
        hint = "do not repeat it for the receipt alone: it would be executed again"
        return CommandError(str(error), hint, Exit.UNREACHABLE, code="no-receipt")
    if isinstance(error, NotAllowed):
        return CommandError(str(error), _ASK_OPERATOR, Exit.NEGATIVE, code="not-allowed")
    if isinstance(error, NoLongerAllowed):
        return CommandError(str(error), _ASK_OPERATOR, Exit.UNREACHABLE, code="not-allowed")
    if isinstance(error, SessionExpired):
        return CommandError(str(error), "see what is there, then repeat", Exit.UNREACHABLE, code="expired")
    if isinstance(error, Undecided):
        hint = "see what is there before you repeat; trustlog-client status shows each replica"
        return CommandError(str(error), hint, Exit.UNREACHABLE, code="undecided")
    if isinstance(error, NotOffered):
        return CommandError(str(error), "", Exit.USAGE, code="not-offered")
    if isinstance(error, HeldBack):
        hint = (
            "send fewer at a time or wait longer (--deadline); the operator sets quotas: trustlog-replica clients quota"
        )
        return CommandError(str(error), hint, Exit.UNREACHABLE, code="busy")
    if isinstance(error, NotExecuted):
        hint = "are the replicas running? trustlog-client status shows each; --deadline waits longer"
        return CommandError(str(error), hint, Exit.UNREACHABLE, code="unreachable")
    if isinstance(error, ValueError):
        context = click.get_current_context(silent=True)
        path = context.command_path if context else "trustlog-client"
        hint = f"{LIMITS}; see: {path} --help"
        return CommandError(str(error), hint, Exit.USAGE, code="usage")
    return CommandError(str(error))


def run_async(work: Coroutine[Any, Any, _Value]) -> _Value:
    """Run a coroutine to its end, on uvloop if it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - only commands want it, the library works without
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def show(name: str, data: bytes) -> dict[str, str]:
    """Return bytes as a JSON field: `name` if they are UTF-8, else `name`_base64."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def text_of(data: bytes) -> str:
    """Return bytes as text for people; what is no UTF-8 is replaced by escapes."""
    return data.decode(errors="backslashreplace")


def write_raw(data: bytes) -> None:
    """Write bytes as they are to stdout."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def example(*lines: str) -> str:
    """Return a help text's epilog; the mark in front keeps click from wrapping it."""
    return "\b\nExample:\n  " + "\n  ".join(lines)


class BytesArgument(click.ParamType[bytes]):
    """An argument as the bytes that the shell passed."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:  # noqa: ARG002
        """Undo Python's decoding of arguments, so that any bytes pass."""
        return value if isinstance(value, bytes) else os.fsencode(str(value))
