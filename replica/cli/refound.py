"""`trustlog-replica refound`: a new cluster with the state that survivors of a lost one have."""

from pathlib import Path
from typing import Any

import click
import structlog
from rich.console import Group
from rich.text import Text

from replica.cli.options import ENCRYPT_STORE, LOG_BACKEND, PROGRAM, Hosts
from replica.cluster.clusterfile import CLUSTER_FILE_NAME, ClusterFile
from replica.cluster.memberlists import members_path
from replica.cluster.passphrase import PassphraseSource, for_new_keys
from replica.cluster.provision import (
    CLIENT_NAME,
    DEFAULT_BASE_PORT,
    DEFAULT_HOST,
    OPERATOR_NAME,
    check_new,
    init_cluster,
    replica_folder_name,
)
from replica.core.quorum import FAULTS_MAX
from replica.operations.refounding import Plan, planned
from replica.operations.survivors import SurvivorError
from trustlog import BackendKind
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, key_values, output_option, printable
from trustlog.cli.passphrases import ask_new, encrypt_keys_option

OLD_LISTS = members_path(Path(CLUSTER_FILE_NAME)).name
LAST_RESORT = "as long as f+1 replicas can come back, bring them back instead: then nothing is lost"


@click.command(
    "refound",
    short_help="Found a new cluster with what is left of a lost one.",
    epilog=example(
        "trustlog-replica refound my-cluster/replica-2 new-cluster",
        "trustlog-replica refound my-cluster/replica-2 replica-1.backup new-cluster --accept-loss 4711",
    ),
)
@click.argument("survivors", metavar="SURVIVOR…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--accept-loss",
    metavar="SLOT",
    type=click.IntRange(min=1),
    help="Give up whatever came after this slot, the last one that the command says the survivors show.",
)
@click.option("--f", type=click.IntRange(1, FAULTS_MAX), help="Faulty replicas to survive.  [default: as before]")
@click.option("--hosts", type=Hosts(), default=DEFAULT_HOST, show_default=True, help="One for all, or one each.")
@click.option(
    "--base-port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_BASE_PORT,
    show_default=True,
    help="Port of the first replica on a host, the next one has the next; 0: free ones of this machine.",
)
@click.option("--name", help="A name for people to know the cluster by.  [default: as before]")
@LOG_BACKEND
@ENCRYPT_STORE
@encrypt_keys_option
@output_option
def refound_command(
    *,
    survivors: tuple[Path, ...],
    directory: Path,
    accept_loss: int | None,
    f: int | None,
    hosts: tuple[str, ...],
    base_port: int,
    name: str | None,
    log_backend: str,
    encrypt_store: bool,
    encrypt_keys: bool,
    passphrase_file: Path | None,
    output: Output,
) -> Exit:
    """Make a new cluster in the new directory DIR, with the state of one that lost more than f replicas for good.

    SURVIVOR is the folder of a stopped replica, or a backup of one; name all that there are. What each has executed is
    found out from what its databases prove, as when it starts; the one that is furthest counts, and two that contradict
    each other are named and nothing is made. Survivors are not changed.

    Nothing is made without --accept-loss either: the command says what would be lost, and exits with 1. Whatever was
    executed after the slot that it names is lost, acknowledged or not. Sessions of clients end: an operation that was
    under way may have been executed, and is executed again if it is sent again. The new cluster has another id: give
    clients its cluster.toml, and delete what they keep beside the old one. Their keys stay what they are, as do the
    operators', who may be a client, and the version of the application that is in force.
    """
    check_new(directory)
    try:
        with planned(survivors, directory, structlog.get_logger()) as plan:
            encrypt = encrypt_store or plan.encrypts_store
            if encrypt and log_backend == "software":
                text = "--encrypt-store, or a survivor whose payloads are sealed, needs --log-backend process"
                raise click.UsageError(text)
            if accept_loss != plan.best.executed:
                _refuse(plan, accept_loss, output)
                return Exit.NEGATIVE
            cluster = init_cluster(
                directory,
                f=plan.genesis.f if f is None else f,
                hosts=hosts,
                base_port=base_port,
                name=name or plan.genesis.name,
                ordering=plan.genesis.ordering,
                application=plan.genesis.application,
                limits=plan.genesis.limits,
                log_kind=BackendKind[log_backend.upper()],
                encrypt_store=encrypt,
                passphrase=for_new_keys(PassphraseSource(passphrase_file), asks=encrypt_keys, ask=ask_new),
                foundation=plan.foundation(),
            )
            _show(plan, cluster, directory, output)
    except SurvivorError as error:
        raise CommandError(str(error), exit_code=Exit.NEGATIVE, code="refound") from error
    return Exit.OK


def _refuse(plan: Plan, accepted: int | None, output: Output) -> None:
    """Say what would be lost; nothing was made."""
    slot = plan.best.executed
    given = (
        "" if accepted is None else f"--accept-loss {accepted} is not what the survivors show, which is slot {slot}. "
    )
    lines = [f"{given}Nothing was made. These would be lost for ever:"]
    lines += [f"  - {text}" for text in plan.losses()]
    lines.append(f"if that is accepted, repeat the command with: --accept-loss {slot}")
    lines.append(f"{LAST_RESORT}.")
    plain = [
        *([given.strip()] if given else []),
        f"application_version={plan.version}",
        *(f"lost: {text}" for text in plan.losses()),
        f"accept-loss={slot}",
    ]
    data = {"made": False, **_as_data(plan), "lost": plan.losses(), "accept_loss": slot}
    output.result(data, plain, Group(*_survivor_lines(plan), *map(Text, lines)))


def _show(plan: Plan, cluster: ClusterFile, directory: Path, output: Output) -> None:
    summary = {
        "cluster_file": str(directory / CLUSTER_FILE_NAME),
        "cluster_id": cluster.cluster_id.hex(),
        "file_sha256": cluster.digest.hex(),
        "founded_from": plan.founding.cluster_id.hex(),
        "slot": plan.founding.slot,
        "first_slot": plan.base + 1,
        "keys": plan.keys,
        "application_version": plan.version,
        "f": cluster.genesis.f,
        "client": str(directory / CLIENT_NAME),
        "operator": str(directory / OPERATOR_NAME),
    }
    folders = [str(directory / replica_folder_name(place.number)) for place in cluster.replicas]
    lines = [
        f"next: {PROGRAM} run {folders[0]}, and so on; one with the state is enough, the others fetch it",
        f"give clients {directory / CLUSTER_FILE_NAME}, and delete every old {OLD_LISTS}, an error beside the new file",
        "never start a replica of the old cluster again",
    ]
    if plan.has_appraisal:
        lines.append(
            "[appraisal] of the old cluster.toml is not carried over: it is about the old logs and their machines; "
            "write the new file a table of its own once its logs can show what that demands"
        )
    if plan.listed:
        lines.append(
            f"only clients that are allowed may work, as before, and the new key in {directory / CLIENT_NAME} is none: "
            f"{PROGRAM} clients allow"
        )
    data = {"made": True, **_as_data(plan), **summary, "replicas": folders, "lost": plan.losses()}
    plain = [f"{name}={value}" for name, value in summary.items()]
    output.result(data, plain, Group(*_survivor_lines(plan), key_values(summary), "", *map(Text, lines)))


def _as_data(plan: Plan) -> dict[str, Any]:
    return {
        "old_cluster_id": plan.founding.cluster_id.hex(),
        "application_version": plan.version,
        "survivors": [
            {
                "replica": one.home.number,
                "place": str(one.place),
                "executed": one.executed,
                "milestone": one.began,
                "voted": one.top,
                "digest": one.digest.hex(),
                "notes": one.notes,
            }
            for one in plan.survivors
        ],
        "chosen": str(plan.best.place),
    }


def _survivor_lines(plan: Plan) -> list[Any]:
    rows = [
        (one.home.number, one.executed, one.began, one.top, f"{one.digest.hex()[:16]}…", str(one.place))
        for one in plan.survivors
    ]
    lines: list[Any] = [Text(f"cluster {plan.founding.cluster_id.hex()}, the furthest survivor is {plan.best.name}:")]
    lines.append(grid(("replica", "executed", "milestone", "votes up to", "state", "survivor"), rows))
    application = plan.genesis.application
    lines.append(Text(f"version {plan.version} of the application {application} is in force, and stays so"))
    return [*lines, *(Text(printable(f"note: {one.name}: {note}")) for one in plan.survivors for note in one.notes)]
