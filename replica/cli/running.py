"""Running replicas: `run` one, `dev` a whole cluster, `close` a TPM log's epoch before a reboot."""

import dataclasses
import os
from pathlib import Path

import click
import structlog
from click.core import ParameterSource
from rich.text import Text

from replica.cli.dev import run_development_cluster
from replica.cli.options import (
    FAULTS,
    FOLDER,
    LOG_BACKEND,
    agreed_options,
    check_application,
    refuse_log_options,
)
from replica.cli.settings import flags_given, settings_options
from replica.cluster.clusterfile import ORDERINGS
from replica.cluster.environment import unknown_variables
from replica.cluster.home import load_any_home, load_home, unlocked
from replica.cluster.passphrase import PassphraseSource
from replica.core.quorum import FAULTS_MAX
from trustlog import TrustLogError
from trustlog.cli.contract import Exit, Output, example, output_option
from trustlog.cli.passphrases import asker, passphrase_option


@click.command("run", short_help="Run one replica.", epilog=example("trustlog-replica run my-cluster/replica-0"))
@FOLDER
@settings_options
@passphrase_option
@output_option
def run_command(
    *,
    folder: Path,
    passphrase_file: Path | None,
    output: Output,
    **settings: object,
) -> None:
    """Run one replica until SIGTERM or Ctrl-C.

    With --http it answers /livez, /readyz, /metrics, /status, /v1/keys, /v1/keys/KEY and /v1/watch: this replica's own
    word, in plain HTTP, so keep it on loopback or behind what protects it.

    Options stand above TRUSTLOG_* variables, and these above replica.toml: trustlog-replica config check shows what
    counts.
    """
    # Imported here: the other commands need no daemon, and answer sooner without it.
    from replica.shell import daemon  # noqa: PLC0415

    passphrases = PassphraseSource(passphrase_file, asker())
    home = unlocked(load_any_home(folder, flags_given(settings)), passphrases)
    home = dataclasses.replace(home, passphrases=passphrases)
    if output.format == "json" and "log_format" not in flags_given(settings):
        home = dataclasses.replace(home, settings=dataclasses.replace(home.settings, log_format="json"))
    daemon.configure_logging(home)
    for name, near in unknown_variables(os.environ).items():
        structlog.get_logger().warning("unknown variable in the environment", name=name, did_you_mean=near or None)
    if not home.cluster.has_logs:
        from replica.pbft import daemon as pbft_daemon  # noqa: PLC0415

        raise click.exceptions.Exit(pbft_daemon.run(home))
    try:
        status = daemon.run(home)
    except daemon.StartError as error:
        if isinstance(error.__cause__, TrustLogError):
            # The log's own texts name its directory already.
            raise daemon.StartError(str(error.__cause__)) from error
        raise
    raise click.exceptions.Exit(status)


@click.command(
    "dev",
    short_help="Run a whole cluster in this terminal.",
    epilog=example("trustlog-replica dev my-cluster"),
)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@FAULTS
@click.option(
    "--base-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the first replica of a new cluster.  [default: free ones]",
)
@click.option(
    "--http-base-port",
    type=click.IntRange(1, 65535 - 2 * FAULTS_MAX),
    help="Answer read-only HTTP on loopback, the first replica at this port, the next at the next.",
)
@agreed_options
@LOG_BACKEND
@passphrase_option
@output_option
@click.pass_context
def dev_command(
    ctx: click.Context,
    *,
    directory: Path | None,
    f: int,
    base_port: int,
    http_base_port: int | None,
    ordering: str,
    application: str,
    log_backend: str,
    passphrase_file: Path | None,
    output: Output,
) -> Exit:
    """Run a whole cluster in this terminal, until Ctrl-C; it is made first if DIR does not exist.

    Without DIR, the cluster is made in a temporary directory. A replica that ends is not started again. The options
    say how a new cluster is made; given for one that exists, they must be what it was made with.
    """
    names = {
        "f": "--f",
        "base_port": "--base-port",
        "ordering": "--ordering",
        "application": "--app",
        "log_backend": "--log-backend",
    }
    given = {option for name, option in names.items() if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    check_application(application)
    refuse_log_options(ordering)
    return run_development_cluster(
        directory,
        f=f,
        base_port=base_port,
        ordering=ORDERINGS[ordering],
        application=application,
        log_backend=log_backend,
        as_json=output.format == "json",
        http_base_port=http_base_port,
        given=given,
        passphrase_file=passphrase_file,
    )


@click.command(
    "close",
    short_help="End a TPM log's epoch before a reboot.",
    epilog=example("trustlog-replica close my-cluster/replica-0"),
)
@FOLDER
@output_option
def close_command(*, folder: Path, output: Output) -> None:
    """Have the log say CLOSE, so that it can go on after the next boot. The replica must have been stopped.

    A reboot empties a TPM's register. Only a log that was closed right before it is known to have no hidden end; any
    other ends with the boot. Until the machine was switched off and on, the replica says nothing more.
    """
    from replica.shell.closing import close_epoch  # noqa: PLC0415
    from replica.shell.daemon import StartError  # noqa: PLC0415
    from replica.shell.store import StoreError  # noqa: PLC0415

    home = load_home(folder)
    try:
        last = close_epoch(home)
    except (TrustLogError, StoreError) as error:
        raise StartError(f"{home.path}: {error}") from error
    data = {"number": home.number, "closed_at": last, "last": last}
    output.result(data, [str(last)], Text(f"closed with entry {last}: switch the machine off, and on again once"))
