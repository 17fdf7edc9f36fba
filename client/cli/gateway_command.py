"""`trustlog-client gateway`: Redis' protocol and HTTP/JSON for applications on this machine."""

import stat
from pathlib import Path

import click

from client.cli.running import Target, example, run_async
from replica.cluster.clusterfile import is_loopback, parse_address
from trustlog.cli.contract import CommandError, Exit, Output, output_option

DEFAULT_RESP = "127.0.0.1:6380"
PASSWORD_BYTES_MAX = 1024


class Address(click.ParamType[tuple[str, int]]):
    """host:port; port 0 lets the system choose."""

    name = "host:port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Split, or fail as a usage error."""
        text = str(value)
        any_port = text.endswith(":0")  # which no cluster file has, but a listener may
        try:
            host, port = parse_address(f"{text[:-1]}1" if any_port else text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return host, 0 if any_port else port


@click.command(
    epilog=example(
        "trustlog-client -c my-cluster gateway --resp 127.0.0.1:6380 --http 127.0.0.1:8080",
        "redis-cli -p 6380 set greeting hello",
        "curl http://127.0.0.1:8080/v1/keys/greeting",
    )
)
@click.option("--resp", type=Address(), metavar="HOST:PORT", help="Listen for Redis' protocol here.")
@click.option("--http", type=Address(), metavar="HOST:PORT", help="Listen for HTTP/JSON here.")
@click.option(
    "--password-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Whoever uses the gateway must know the first line of this file (AUTH, or Authorization: Bearer).",
)
@output_option
@click.pass_obj
def gateway(
    cluster: Target,
    *,
    resp: tuple[str, int] | None,
    http: tuple[str, int] | None,
    password_file: Path | None,
    output: Output,
) -> None:
    """Serve Redis' protocol and HTTP/JSON to applications on this machine, until SIGINT or SIGTERM.

    Without --resp and --http: Redis' protocol at 127.0.0.1:6380. A gateway is a client: it signs, and checks f+1
    matching replies itself. Whoever uses it trusts it, its host and the way to it; so run one beside each application.
    An operation whose outcome is unknown is answered with an error that says so, and never repeated.
    """
    if resp is None and http is None:
        resp = parse_address(DEFAULT_RESP)
    password = _password(password_file)
    for address in (resp, http):
        if address is not None and password is None and not is_loopback(address[0]):
            raise CommandError(
                f"{address[0]} can be reached from other machines, and everybody there could use the gateway",
                "listen on 127.0.0.1, or give --password-file; neither protocol is encrypted",
                Exit.USAGE,
                code="usage",
            )
    from client.gateway import serving  # noqa: PLC0415 - aiohttp takes its time, which other commands need not

    client = cluster.open()
    if client.cluster.genesis.application != serving.APPLICATION:
        raise CommandError(
            f"this cluster runs {client.cluster.genesis.application}, a gateway serves {serving.APPLICATION} only",
            "use trustlog-client exec, or the Python API",
            Exit.USAGE,
            code="application",
        )
    run_async(serving.serve(client, resp, http, password, output))


def _password(path: Path | None) -> bytes | None:
    if path is None:
        return None
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise CommandError(
            f"{path}: this password is open to other users (mode {mode:04o})",
            f"run: chmod 600 {path}",
            Exit.USAGE,
            code="config",
        )
    with path.open("rb") as file:
        first = file.read(PASSWORD_BYTES_MAX + 1).split(b"\n")[0].rstrip(b"\r")
    if not 1 <= len(first) <= PASSWORD_BYTES_MAX:
        raise CommandError(
            f"{path}: its first line must have 1 to {PASSWORD_BYTES_MAX} bytes", "", Exit.USAGE, code="config"
        )
    return first
