"""``trustlog serve``: checks the options, then becomes the service's program in a new interpreter.

Nothing of this command's own libraries is left in the process that holds the key (see ``trustlog.service``).
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path
from typing import NoReturn

import click

from trustlog import service
from trustlog.cli.contract import CommandError, Exit, Output, example, output_option

DEFAULT_USER = "trustlog-log"
# What the dynamic linker of an interpreter outside the usual places needs; nothing else is handed on.
_ENVIRONMENT_KEPT = ("LD_LIBRARY_PATH", "TZ")


class User(click.ParamType[tuple[int, int]]):
    """A user by name or number: its user id and its group id."""

    name = "user"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Find the user, or fail as a usage error. A number need not be in the system's list."""
        text = str(value)
        if text.isascii() and text.isdigit() and int(text) < 2**32 - 1:
            number = int(text)
            try:
                return number, pwd.getpwuid(number).pw_gid
            except KeyError:
                return number, number
        try:
            found = pwd.getpwnam(text)
        except KeyError:
            self.fail(f"there is no user {text!r}; make one with: useradd --system {text}", param, ctx)
        return found.pw_uid, found.pw_gid


@click.command(
    epilog=example(
        "trustlog serve --socket /run/trustlog-log/log.sock --state /var/lib/trustlog-log/log --client-user trustlog",
    ),
)
@click.option("--socket", required=True, type=click.Path(path_type=Path), help="Where the replica connects.")
@click.option("--state", required=True, type=click.Path(path_type=Path), help="A log of `trustlog init`.")
@click.option("--user", type=User(), help=f"As root: the log's own user.  [default: {DEFAULT_USER}]")
@click.option("--client-user", type=User(), help="The replica's user, who alone may connect.  [default: the log's own]")
@output_option
def serve(
    *,
    socket: Path,
    state: Path,
    user: tuple[int, int] | None,
    client_user: tuple[int, int] | None,
    output: Output,
) -> NoReturn:
    """Run the log in --state as a program of its own, until it is killed. It serves one replica at a time.

    Started as root, it becomes the log's own user. It gives up whatever it does not need: see trustlog/README.md.
    What it reports while it runs are lines on standard error; --output is for mistakes in the options.
    """
    del output
    if os.geteuid() == 0 and user is None:
        user = _default_user()
    command = [*service.command(), "--socket", str(socket), "--state", str(state)]
    if user is not None:
        command += ["--user", f"{user[0]}:{user[1]}"]
    if client_user is not None:
        command += ["--client-uid", str(client_user[0])]
    kept = {name: os.environ[name] for name in _ENVIRONMENT_KEPT if name in os.environ}
    os.execve(sys.executable, command, kept)  # noqa: S606 - no shell is wanted


def _default_user() -> tuple[int, int]:
    try:
        found = pwd.getpwnam(DEFAULT_USER)
    except KeyError:
        raise CommandError(
            f"started as root, and there is no user {DEFAULT_USER}",
            f"make one (useradd --system {DEFAULT_USER}), or name another with --user",
            Exit.USAGE,
            code="no-user",
        ) from None
    return found.pw_uid, found.pw_gid
