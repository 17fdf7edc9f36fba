"""Writes a man page for every command of the three programs, from the commands themselves: `make man`.

click-man makes the page; what it does not know of is added: the example, exit statuses and variables.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click_man.core import generate_man_page

import trustlog
from client.cli.main import cli as client
from replica.cli.main import cli as replica
from replica.cluster.environment import VARIABLES
from trustlog.cli.main import cli as log

PROGRAMS = {"trustlog": log, "trustlog-replica": replica, "trustlog-client": client}
EXIT_STATUS = """\
.SH EXIT STATUS
.TP
0
done
.TP
1
a negative answer, a failed verification, damage or a failing disk
.TP
2
used wrongly, or the output cannot be written
.TP
3
nobody reachable, or undecided within the deadline
.TP
130
interrupted
"""


def contexts(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """The context of a command and of all below it."""
    context = click.Context(command, info_name=name, parent=parent)
    yield context
    if isinstance(command, click.Group):
        for inner, below in command.commands.items():
            yield from contexts(inner, below, context)


def page(context: click.Context) -> str:
    """One page; the date stays out of it, so that the same commands give the same pages."""
    version = f"trustlog {trustlog.__version__}"
    made = generate_man_page(context, version=version, date="-")
    # A title is one word, and short; click-man puts the words of a command and more beside it, which overprint.
    title = context.command_path.upper().replace(" ", "-").replace("-", r"\-")
    header = f'.TH "{title}" "1" "" "{version}" "trustlog"'
    return "\n".join([header, *made.splitlines()[1:], extras(context)])


def extras(context: click.Context) -> str:
    """What click-man does not take from a command."""
    lines = (context.command.epilog or "").replace("\b", "").strip().splitlines()
    example = [line.strip().replace("\\", "\\e").replace("-", r"\-") for line in lines[1:]]
    parts = [".SH EXAMPLE\n.nf\n" + "\n".join(example) + "\n.fi\n"] if example else []
    if {"log_level", "retain_mib"} <= {parameter.name for parameter in context.command.params}:
        names = "".join(f".TP\n.B {name}\n{field} in replica.toml\n" for name, (field, _) in VARIABLES.items())
        parts.append(f".SH ENVIRONMENT\n{names}")
    return "".join([*parts, EXIT_STATUS])


def write_pages(target: Path) -> list[Path]:
    """Write all pages; return their paths."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, program in PROGRAMS.items():
        for context in contexts(name, program):
            path = target / f"{context.command_path.replace(' ', '-')}.1"
            path.write_text(page(context))
            written.append(path)
    return written


if __name__ == "__main__":
    made = write_pages(Path(sys.argv[1]))
    print(f"{len(made)} pages; read one: man -l {made[0]}")
