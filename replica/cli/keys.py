"""`trustlog-replica keys passphrase`: set, change or take away the passphrase of private keys that are there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from replica.cluster.clusterfile import CLUSTER_FILE_NAME
from replica.cluster.home import SIGNING_KEY_NAME, TLS_KEY_NAME
from replica.cluster.keys import CLIENT_KEY_NAME
from replica.cluster.passphrase import PassphraseSource, change_passphrases, new_passphrase
from replica.cluster.provision import CLIENT_NAME, OPERATOR_NAME
from replica.cluster.strict_toml import ConfigError
from trustlog.cli.contract import Output, example, output_option
from trustlog.cli.passphrases import ask_new, asker, new_passphrase_options, passphrase_option, show_changed

_NAMES: Final = (TLS_KEY_NAME, SIGNING_KEY_NAME, CLIENT_KEY_NAME)


@click.group(
    "keys",
    short_help="Change how private keys are kept.",
    epilog=example("trustlog-replica keys passphrase my-cluster/replica-0"),
)
def keys_commands() -> None:
    """Change how private keys are kept."""


@keys_commands.command(
    "passphrase",
    short_help="Set, change or remove the passphrase of private keys.",
    epilog=example(
        "trustlog-replica keys passphrase my-cluster/replica-0",
        "trustlog-replica keys passphrase my-cluster --new-passphrase-file secret",
        "trustlog-replica keys passphrase my-cluster --passphrase-file secret --remove",
    ),
)
@click.argument("place", metavar="DIR", type=click.Path(path_type=Path))
@passphrase_option
@new_passphrase_options
@output_option
def passphrase_command(
    *, place: Path, passphrase_file: Path | None, new_file: Path | None, remove: bool, output: Output
) -> None:
    """Encrypt the private keys in DIR with a new passphrase: a replica's folder, a client's, or a cluster's directory.

    The old passphrase is wanted if there is one. Each file is exchanged at once; if the command is interrupted, run it
    again. The log's own key has no passphrase: see SECURITY.md. A running replica goes on, and wants the new passphrase
    when it is started again.
    """
    if remove and new_file is not None:
        raise click.UsageError("give either --new-passphrase-file or --remove")
    paths = list(_key_files(place))
    if not paths:
        raise ConfigError(
            f"{place}: holds no private key; give a replica's folder, a client's, or a cluster's directory"
        )
    new = None if remove else new_passphrase(new_file, ask_new)
    changed = change_passphrases(paths, PassphraseSource(passphrase_file, asker()), new)
    show_changed(output, paths, changed, encrypted=new is not None)


def _key_files(place: Path) -> Iterator[Path]:
    folders = [place]
    if (place / CLUSTER_FILE_NAME).exists():
        folders += [*sorted(place.glob("replica-*")), place / CLIENT_NAME, place / OPERATOR_NAME]
    for folder in folders:
        yield from (folder / name for name in _NAMES if (folder / name).exists())
