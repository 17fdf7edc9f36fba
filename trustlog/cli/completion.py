"""Shell completion, click's own: `PROGRAM completion bash` prints what a shell has to read."""

import os
import sys

import click
from click.shell_completion import get_completion_class, shell_complete

from trustlog.cli.contract import Output, example, output_option

SHELLS = ("bash", "zsh", "fish")


def variable(program: str) -> str:
    """Return the environment variable by which a shell asks a program for completions."""
    return f"_{program}_COMPLETE".replace("-", "_").upper()


def answer_shell(group: click.Group, program: str) -> None:
    """If it is a shell that asks, answer and exit; else do nothing."""
    instruction = os.environ.get(variable(program))
    if instruction:
        sys.exit(shell_complete(group, {}, program, variable(program), instruction))


def completion_command(group: click.Group, program: str) -> click.Command:
    """Return the command `completion` of a program."""

    @click.command(
        "completion",
        short_help="Print what a shell needs to complete this program's words.",
        epilog=example(f"{program} completion bash > ~/.local/share/bash-completion/completions/{program}"),
    )
    @click.argument("shell", type=click.Choice(SHELLS))
    @output_option
    def completion(*, shell: str, output: Output) -> None:
        """Print a script for bash, zsh or fish that completes commands, options and their values.

        bash: as in the example. zsh: put it into a file _PROGRAM in a directory of $fpath. fish: into
        ~/.config/fish/completions/PROGRAM.fish. Or at once: eval "$(PROGRAM completion bash)".
        """
        found = get_completion_class(shell)
        if found is None:
            raise click.UsageError(f"click knows no {shell}")
        script = found(group, {}, program, variable(program)).source()
        if output.format == "json":
            output.result({"shell": shell, "script": script}, "")
        else:
            click.echo(script)

    return completion
