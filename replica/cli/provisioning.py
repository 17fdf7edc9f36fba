"""Making clusters: `init` all at once; `keygen`, `client-key` and `assemble` machine by machine."""

from pathlib import Path
from typing import cast

import click
from rich.console import Group as Lines
from rich.text import Text

from replica.cli.options import (
    ENCRYPT_STORE,
    FAULTS,
    LOG_BACKEND,
    NEW_DIRECTORY,
    PROGRAM,
    Address,
    Hosts,
    agreed_options,
    check_application,
    refuse_log_options,
)
from replica.cluster.clusterfile import ORDERINGS, ClusterFile
from replica.cluster.passphrase import PassphraseSource, for_new_keys
from replica.cluster.pbft import BASELINE
from replica.cluster.provision import (
    CLIENT_NAME,
    DEFAULT_BASE_PORT,
    DEFAULT_HOST,
    TpmPlace,
    assemble,
    init_cluster,
    keygen,
    load_public_part,
    make_client,
    replica_folder_name,
)
from replica.cluster.replicatoml import STORE_KEY_BACKENDS, TrustedLogSettings
from replica.core.genesis import PUBLIC_KEY_SIZE
from replica.core.quorum import FAULTS_MAX
from trustlog import BackendKind, VerificationError, VerifyingKey, log_id
from trustlog.cli.contract import Output, example, grid, key_values, output_option
from trustlog.cli.passphrases import ask_new, encrypt_keys_option
from trustlog.tpm.chain import PCR_DEFAULT, PCR_MAX
from trustlog.tpm.folder import DEFAULT_ADDRESS


@click.command(
    "init",
    short_help="Make a whole cluster in a new directory.",
    epilog=example("trustlog-replica init my-cluster --f 1", "trustlog-replica run my-cluster/replica-0"),
)
@NEW_DIRECTORY
@FAULTS
@click.option("--hosts", type=Hosts(), default=DEFAULT_HOST, show_default=True, help="One for all, or one each.")
@click.option(
    "--base-port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_BASE_PORT,
    show_default=True,
    help="Port of the first replica on a host, the next one has the next; 0: free ones of this machine.",
)
@click.option("--name", help="A name for people to know the cluster by.  [default: DIR's]")
@agreed_options
@LOG_BACKEND
@ENCRYPT_STORE
@encrypt_keys_option
@output_option
def init_command(
    *,
    directory: Path,
    f: int,
    hosts: tuple[str, ...],
    base_port: int,
    name: str | None,
    ordering: str,
    application: str,
    log_backend: str,
    encrypt_store: bool,
    encrypt_keys: bool,
    passphrase_file: Path | None,
    output: Output,
) -> None:
    """Make a whole cluster in the new directory DIR: cluster.toml, a folder per replica, a client's key.

    All private keys are made here. Where each machine should make its own, use keygen and assemble.
    """
    check_application(application)
    refuse_log_options(ordering)
    cluster = init_cluster(
        directory,
        f=f,
        hosts=hosts,
        base_port=base_port,
        name=name,
        ordering=ORDERINGS[ordering],
        application=application,
        log_kind=_backend(log_backend, encrypt_store=encrypt_store),
        encrypt_store=encrypt_store,
        passphrase=for_new_keys(PassphraseSource(passphrase_file), asks=encrypt_keys, ask=ask_new),
    )
    _show_cluster(output, cluster, directory / "cluster.toml", directory)


@click.command(
    "keygen",
    short_help="Make one replica's private folder.",
    epilog=example("trustlog-replica keygen my-cluster/replica-0 --number 0 --address 192.0.2.10:7100"),
)
@NEW_DIRECTORY
@click.option("--number", type=click.IntRange(0, 2 * FAULTS_MAX), required=True, help="From 0 to 2f.")
@click.option("--address", type=Address(), required=True, help="Where the others will reach this replica.")
@click.option(
    "--log-backend",
    type=click.Choice(["process", "software", "tpm"]),
    default="process",
    show_default=True,
    help="What keeps the replica's log: a program of its own, the replica itself, or a TPM 2.0.",
)
@click.option(
    "--tpm",
    metavar="ADDRESS",
    help=f"Device, or socket of a software TPM, for --log-backend tpm.  [default: {DEFAULT_ADDRESS}]",
)
@click.option(
    "--tpm-pcr",
    type=click.IntRange(0, PCR_MAX),
    help=f"The PCR that becomes the log's chain; nothing else may extend it.  [default: {PCR_DEFAULT}]",
)
@ENCRYPT_STORE
@click.option(
    "--log-socket",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Of a running `trustlog serve`, whose log the replica takes; without it, the replica starts its own.",
)
@encrypt_keys_option
@output_option
def keygen_command(
    *,
    directory: Path,
    number: int,
    address: tuple[str, int],
    log_backend: str,
    encrypt_store: bool,
    log_socket: Path | None,
    tpm: str | None,
    tpm_pcr: int | None,
    encrypt_keys: bool,
    passphrase_file: Path | None,
    output: Output,
) -> None:
    """Make one replica's private folder DIR on this machine, and the public file to send to the assembler."""
    backend = _backend(log_backend, encrypt_store=encrypt_store)
    if log_socket is not None and backend is not BackendKind.PROCESS:
        raise click.UsageError("--log-socket belongs to --log-backend process")
    if (tpm is not None or tpm_pcr is not None) and backend is not BackendKind.TPM:
        raise click.UsageError("--tpm and --tpm-pcr belong to --log-backend tpm")
    trusted_log = TrustedLogSettings(backend, None if log_socket is None else log_socket.absolute(), encrypt_store)
    place = TpmPlace(tpm or DEFAULT_ADDRESS, PCR_DEFAULT if tpm_pcr is None else tpm_pcr)
    passphrase = for_new_keys(PassphraseSource(passphrase_file), asks=encrypt_keys, ask=ask_new)
    public_file = keygen(directory, number, *address, trusted_log, place, passphrase)
    part = load_public_part(public_file)
    data = {
        "number": number,
        "address": part.place.address,
        "folder": str(directory),
        "public_file": str(public_file),
        "certificate_sha256": part.place.fingerprint.hex(),
        "log_id": log_id(part.member.log_public_key).hex(),
        "log_backend": log_backend,
    }
    next_step = f"next: send {public_file} to whoever runs {PROGRAM} assemble"
    output.result(data, [str(public_file)], Lines(key_values(data), Text(next_step)))


@click.command(
    "client-key",
    short_help="Make a client's private folder.",
    epilog=example("trustlog-replica client-key my-cluster/client"),
)
@NEW_DIRECTORY
@encrypt_keys_option
@output_option
def client_key_command(*, directory: Path, encrypt_keys: bool, passphrase_file: Path | None, output: Output) -> None:
    """Make a client's private folder DIR with a new key, for a machine where `init` was not run."""
    passphrase = for_new_keys(PassphraseSource(passphrase_file), asks=encrypt_keys, ask=ask_new)
    public_key = make_client(directory, passphrase).public_key.hex()
    data = {"folder": str(directory), "public_key": public_key}
    output.result(data, public_key, key_values(data))


@click.command(
    "assemble",
    short_help="Write the cluster file from public files.",
    epilog=example("trustlog-replica assemble replica-*.public.toml --operator $(cat operator/client.pub)"),
)
@click.argument("public_files", metavar="PUBLIC.toml…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="cluster.toml", show_default=True)
@click.option("--name", default="trustlog", show_default=True, help="A name for people.")
@click.option(
    "--enrolled",
    type=(click.IntRange(0, 2 * FAULTS_MAX), click.Path(path_type=Path)),
    metavar="N LOG.PUB",
    multiple=True,
    help="For each TPM log: the replica's number, and the file that `trustlog tpm accept` wrote when you enrolled it.",
)
@click.option(
    "--operator",
    "operators",
    metavar="HEX",
    multiple=True,
    help="The public key (client-key makes one) of who may change the members later; without any, nobody can.",
)
@agreed_options
@output_option
def assemble_command(
    *,
    public_files: tuple[Path, ...],
    out: Path,
    name: str,
    ordering: str,
    application: str,
    enrolled: tuple[tuple[int, Path], ...],
    operators: tuple[str, ...],
    output: Output,
) -> None:
    """Write the cluster file from the public files of replicas 0 to 2f.

    Copy it, unchanged, to every replica and every client.
    """
    if len(dict(enrolled)) != len(enrolled):
        raise click.UsageError("--enrolled names a replica twice: give one file for each")
    order = ORDERINGS[ordering]
    cluster = assemble(
        public_files,
        out,
        name=name,
        ordering=order,
        application=application,
        enrolled=dict(enrolled),
        operators=tuple(map(_operator_key, operators)),
    )
    _show_cluster(output, cluster, out, None)
    if cluster.not_enrolled:
        click.echo(
            f"warning: that the log of replica {', '.join(map(str, cluster.not_enrolled))} is in a TPM stands in its "
            "public file only, and anybody can write that: its evidence counts as self-asserted. Enrol the log "
            "(trustlog tpm), and assemble with --enrolled",
            err=True,
        )
    if not operators:
        click.echo(
            "warning: no operator's key is named: no member of this cluster can ever be replaced, and no client "
            f"allowed or revoked. Before it starts, make a key ({PROGRAM} client-key DIR), remove {out}, which is not "
            "overwritten, and assemble again with --operator and the content of DIR/client.pub",
            err=True,
        )


def _operator_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
        VerifyingKey.from_bytes(key)
    except (ValueError, VerificationError):
        raise click.UsageError(
            f"--operator {text[:20]}…: no public key; give the {2 * PUBLIC_KEY_SIZE} hexadecimal digits that "
            f"{PROGRAM} client-key shows"
        ) from None
    return key


def _backend(name: str, *, encrypt_store: bool) -> BackendKind:
    backend = BackendKind[name.upper()]
    if encrypt_store and backend not in STORE_KEY_BACKENDS:
        raise click.UsageError("--encrypt-store needs a log that keeps a key: --log-backend process or tpm")
    return backend


def _show_cluster(output: Output, cluster: ClusterFile, file: Path, directory: Path | None) -> None:
    genesis = cluster.genesis
    replicas = [
        {
            "number": place.number,
            "address": place.address,
            "certificate_sha256": place.fingerprint.hex(),
            **({"log_id": log_id(member.log_public_key).hex()} if cluster.has_logs else {}),
            **({"log_enrolled": place.log_enrolled} if member.log_kind == BackendKind.TPM else {}),
        }
        for place, member in zip(cluster.replicas, genesis.members, strict=True)
    ]
    summary: dict[str, object] = {
        "cluster_file": str(file),
        "cluster_id": cluster.cluster_id.hex(),
        "file_sha256": cluster.digest.hex(),
        "name": genesis.name,
        "f": genesis.f,
        "ordering": genesis.ordering.label,
        "application": genesis.application,
    }
    next_step = f"next: copy {file} to every replica and client, each beside its folder"
    if directory is not None:
        for replica in replicas:
            replica["folder"] = str(directory / replica_folder_name(cast("int", replica["number"])))
        summary["client"] = str(directory / CLIENT_NAME)
        next_step = f"next: {PROGRAM} run {replicas[0]['folder']}, and so on; or: {PROGRAM} dev {directory}"
    plain = [f"{key}={value}" for key, value in summary.items()]
    plain += [f"replica-{replica['number']}={replica['address']}" for replica in replicas]
    table = grid(
        ["replica", "address", "log id"],
        [[r["number"], r["address"], f"{str(r['log_id'])[:16]}…" if "log_id" in r else "none"] for r in replicas],
    )
    output.result({**summary, "replicas": replicas}, plain, Lines(key_values(summary), "", table, "", Text(next_step)))
    if not cluster.has_logs:
        click.echo(f"warning: {BASELINE}", err=True)
