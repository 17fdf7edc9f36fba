"""What the commands of a cluster's operator take, and what they begin with."""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from replica.cli.options import Command
from replica.cluster.clusterfile import CLUSTER_FILE_NAME, ClusterFile
from replica.cluster.keys import ClientKey
from replica.cluster.memberlists import load_present_cluster
from replica.cluster.passphrase import PassphraseSource, unlocked_client_key
from replica.cluster.provision import OPERATOR_NAME
from replica.operations.changing import ChangeError, refresh
from trustlog.cli.passphrases import asker, passphrase_option

CLUSTER = click.argument("cluster", metavar="CLUSTER", type=click.Path(path_type=Path, exists=True))
OPERATOR = click.option(
    "--operator",
    "operator_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The folder of the operator's key.  [default: {OPERATOR_NAME} beside cluster.toml]",
)


def deadline_option(default_s: float, until: str) -> Callable[[Command], Command]:
    """Return the option --deadline: seconds until `until`."""
    return click.option(
        "--deadline",
        "deadline_s",
        type=click.FloatRange(1, 3600),
        default=default_s,
        show_default=True,
        help=f"Seconds until {until}.",
    )


def cluster_file(place: Path) -> Path:
    """Return the cluster file that CLUSTER names."""
    return place / CLUSTER_FILE_NAME if place.is_dir() else place


def refreshed(file: Path, deadline_s: float) -> ClusterFile:
    """Return the cluster under the list of members that is in force, as its replicas prove."""
    return asyncio.run(refresh(load_present_cluster(file), deadline_s))


@dataclass(frozen=True)
class Operator:
    """A running cluster and an operator's key; the replicas are asked, and the key is read, when that is first needed.

    folder: of the key, None for the one beside the cluster file.
    """

    file: Path
    deadline_s: float
    folder: Path | None
    passphrase_file: Path | None

    @cached_property
    def present(self) -> ClusterFile:
        """See `refreshed`."""
        return refreshed(self.file, self.deadline_s)

    @cached_property
    def key(self) -> ClientKey:
        """An operator's key; ChangeError if it is none of this cluster's, which may have none."""
        if not self.present.genesis.operators:
            raise ChangeError(
                f"{self.file}: genesis.operators: this cluster was made without an operator's key, so its members, "
                "who may be a client, and its application's version stay as they are"
            )
        folder = self.folder or self.file.parent / OPERATOR_NAME
        key = unlocked_client_key(folder, PassphraseSource(self.passphrase_file, asker()))
        if key.public_key not in self.present.genesis.operators:
            raise ChangeError(f"{folder}: this key is no operator's of the cluster of {self.file}")
        return key


def operated(deadline_s: float, until: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command CLUSTER and the options of every operator's command, as one argument `operator`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @CLUSTER
        @OPERATOR
        @passphrase_option
        @deadline_option(deadline_s, until)
        @functools.wraps(command)
        def begin(
            *,
            cluster: Path,
            operator_folder: Path | None,
            passphrase_file: Path | None,
            deadline_s: float,
            **own: object,
        ) -> None:
            command(operator=Operator(cluster_file(cluster), deadline_s, operator_folder, passphrase_file), **own)

        return begin

    return decorate
