"""`trustlog-client keys passphrase`: set, change or take away the passphrase of the client's key."""

from pathlib import Path

import click

from client.api import CLIENT_FOLDER
from client.cli.running import Target, example
from replica.cluster.keys import CLIENT_KEY_NAME
from replica.cluster.passphrase import change_passphrases, new_passphrase
from replica.cluster.strict_toml import ConfigError
from trustlog.cli.contract import CommandError, Exit, Output, output_option
from trustlog.cli.passphrases import ask_new, new_passphrase_options, show_changed


@click.group(
    "keys",
    short_help="Change how the client's key is kept.",
    epilog=example("trustlog-client -c my-cluster keys passphrase"),
)
def keys_commands() -> None:
    """Change how the client's key is kept."""


@keys_commands.command(
    "passphrase",
    short_help="Set, change or remove the key's passphrase.",
    epilog=example(
        "trustlog-client -c my-cluster keys passphrase",
        "trustlog-client -c my-cluster --passphrase-file secret keys passphrase --remove",
    ),
)
@new_passphrase_options
@output_option
@click.pass_obj
def passphrase_command(target: Target, *, new_file: Path | None, remove: bool, output: Output) -> None:
    """Encrypt the client's private key with a new passphrase; nothing is sent to the cluster.

    The old passphrase is wanted if there is one. The file is exchanged at once; if the command is interrupted, run it
    again.
    """
    if remove and new_file is not None:
        raise click.UsageError("give either --new-passphrase-file or --remove")
    path = target.named() / CLIENT_FOLDER / CLIENT_KEY_NAME
    try:
        new = None if remove else new_passphrase(new_file, ask_new)
        changed = change_passphrases([path], target.passphrase, new)
    except ConfigError as error:
        raise CommandError(str(error), exit_code=Exit.USAGE, code="config") from error
    show_changed(output, [path], changed, encrypted=new is not None)
