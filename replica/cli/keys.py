"""`trustlog-replica keys`: the passphrase of private keys that are there, and a replica's next TLS key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.console import Group as Lines
from rich.text import Text

from replica.cli.options import PROGRAM
from replica.cluster.clusterfile import CLUSTER_FILE_NAME
from replica.cluster.home import NEXT_KEY_NAME, SETTINGS_NAME, SIGNING_KEY_NAME, TLS_KEY_NAME, load_home, unlocked
from replica.cluster.keys import CLIENT_KEY_NAME, CLIENT_PUBLIC_NAME
from replica.cluster.passphrase import PassphraseSource, change_passphrases, new_passphrase
from replica.cluster.provision import renew_certificate
from replica.cluster.strict_toml import ConfigError
from trustlog.cli.contract import Output, example, key_values, output_option
from trustlog.cli.passphrases import ask_new, asker, new_passphrase_options, passphrase_option, show_changed

# What stands in a replica's folder, and in a client's or the operator's; other folders' keys are not ours.
_OWNERS: Final = (SETTINGS_NAME, CLIENT_PUBLIC_NAME)
_NAMES: Final = (TLS_KEY_NAME, NEXT_KEY_NAME, SIGNING_KEY_NAME, CLIENT_KEY_NAME)


@click.group(
    "keys",
    short_help="Renew a replica's TLS key; change how private keys are kept.",
    epilog=example("trustlog-replica keys passphrase my-cluster/replica-0"),
)
def keys_commands() -> None:
    """Make a replica another TLS key and certificate, or change how private keys are kept."""


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

    Of a cluster's directory, the keys in all folders directly in it, replicas', clients' and the operator's.

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


@keys_commands.command(
    "renew-certificate",
    short_help="Make a replica another TLS key and certificate.",
    epilog=example(
        "trustlog-replica keys renew-certificate my-cluster/replica-1",
        "trustlog-replica member renew my-cluster my-cluster/replica-1/renewal.public.toml",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@passphrase_option
@output_option
def renew_command(*, folder: Path, passphrase_file: Path | None, output: Output) -> None:
    """Make the replica in DIR, which keeps its log, another TLS key and certificate beside those that it has.

    They wait, with the present key's passphrase, until `trustlog-replica member renew` has the change ordered: then the
    replica goes over to them by itself, running or not. Run again, this shows what waits already. The old key is needed
    until then, and removed after.
    """
    home = unlocked(load_home(folder), PassphraseSource(passphrase_file, asker()))
    public_file, part, is_new = renew_certificate(home)
    data = {
        "number": home.number,
        "public_file": str(public_file),
        "certificate_sha256": part.place.fingerprint.hex(),
        "new": is_new,
    }
    next_step = f"next: {PROGRAM} member renew CLUSTER {public_file}, wherever the operator's key is"
    output.result(data, [str(public_file)], Lines(key_values(data), Text(next_step)))


def _key_files(place: Path) -> Iterator[Path]:
    folders = [place]
    if (place / CLUSTER_FILE_NAME).exists():
        # Whatever they are called: a replica that took another's place, and a further client, have names of their own.
        folders += sorted(path.parent for name in _OWNERS for path in place.glob(f"*/{name}"))
    for folder in folders:
        yield from (folder / name for name in _NAMES if (folder / name).exists())
