"""Options for the passphrase of private keys, and asking for one on a terminal, as all programs do it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.text import Text

from trustlog.cli.contract import CommandError, Exit, Output, printable

Command = TypeVar("Command", bound=Callable[..., Any])


def passphrase_option(command: Command) -> Command:
    """Add ``--passphrase-file``, the first place where a passphrase is looked for: ``passphrase_file``."""
    option = click.option(
        "--passphrase-file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Holds the passphrase of the private keys, on one line, mode 0600; over TRUSTLOG_PASSPHRASE_FILE.",
    )
    return option(command)


def encrypt_keys_option(command: Command) -> Command:
    """Add ``--encrypt-keys`` and ``--passphrase-file`` to a command that makes keys."""
    option = click.option(
        "--encrypt-keys",
        is_flag=True,
        help="Ask for a passphrase and encrypt the private keys with it; a file that is named does it by itself.",
    )
    return option(passphrase_option(command))


def new_passphrase_options(command: Command) -> Command:
    """Add where a new passphrase comes from: ``new_file``, ``remove``; see ``check_new``."""
    options = (
        click.option(
            "--new-passphrase-file",
            "new_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Holds the new passphrase, as --passphrase-file does the old one; without it, you are asked.",
        ),
        click.option("--remove", is_flag=True, help="Leave the keys without a passphrase."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def asker() -> Callable[[str], str] | None:
    """Return what asks a person, None where standard input is no terminal."""
    return ask if sys.stdin is not None and sys.stdin.isatty() else None


def ask(prompt: str) -> str:
    """Ask once, without showing what is typed; on standard error, so that results stay alone on standard output."""
    return str(click.prompt(prompt, hide_input=True, err=True, default="", show_default=False))


def ask_new(prompt: str) -> str:
    """Ask twice for a new passphrase; CommandError if there is no terminal or the two differ."""
    if asker() is None:
        raise CommandError(
            "no new passphrase was given, and there is no terminal to ask on",
            "name a file that holds it",
            Exit.USAGE,
            code="usage",
        )
    first = ask(prompt)
    if ask("Repeat it") != first:
        raise CommandError("the two differ; nothing was changed", "try again", Exit.USAGE, code="usage")
    return first


def show_changed(output: Output, paths: Sequence[Path], changed: int, *, encrypted: bool) -> None:
    """Print which keys now have which kind of passphrase; if they had it before, that nothing was changed."""
    data = {"keys": [str(path) for path in paths], "changed": changed, "encrypted": encrypted}
    how = "encrypted with the new passphrase" if encrypted else "without a passphrase"
    names = ", ".join(map(str, paths))
    if not changed:
        text = f"nothing was changed: {names}: {how}, as before"
        output.result(data, text, Text(printable(text)))
        return
    text = f"{names}: {how}; {changed} of {len(paths)} files were changed"
    output.result(data, [str(path) for path in paths], Text(printable(text)))
