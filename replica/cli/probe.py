"""`trustlog-replica probe`: the health check of a container or a pod, which has no other program that could ask.

A replica and a gateway are asked over their HTTP port. A trusted log is not asked at all: it serves one client, and
counts everybody else who connects as an intruder. The kernel says whether somebody listens at its socket, if that was
bound in this network namespace.
"""

import http.client
import json
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

from trustlog.cli.contract import CommandError, Exit, Output, example, key_values, output_option

TIMEOUT_S_DEFAULT: Final = 3.0
TIMEOUT_S_MAX: Final = 60.0
ANSWER_BYTES_MAX: Final = 64 * 1024
DEFAULT_PATH: Final = "/readyz"
UNIX_SOCKETS: Final = Path("/proc/net/unix")
_ACCEPTS_CONNECTIONS: Final = 0x10000  # __SO_ACCEPTCON, include/linux/net.h


@click.command(
    "probe",
    short_help="Ask one replica, gateway or log whether it is well.",
    epilog=example(
        "trustlog-replica probe http://127.0.0.1:8100/readyz",
        "trustlog-replica probe --log-socket /run/trustlog-log/log.sock",
    ),
)
@click.argument("url", metavar="[URL]", required=False)
@click.option(
    "--log-socket",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Of a trusted log in this container or pod: does a service listen there? Nothing is sent to it.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, TIMEOUT_S_MAX),
    default=TIMEOUT_S_DEFAULT,
    show_default=True,
    help="Seconds that the answer may take.",
)
@output_option
def probe_command(*, url: str | None, log_socket: Path | None, timeout: float, output: Output) -> None:
    """Ask what is at URL, http://HOST:PORT/readyz or /livez: exit with 0 if it is well, else with 1 and its reason."""
    if (url is None) == (log_socket is None):
        raise click.UsageError("give either a URL or --log-socket")
    if url is not None:
        problem = problem_at(url, timeout)
    else:
        problem = None if listens(log_socket or Path()) else f"no service listens at {log_socket}"
    if problem is not None:
        raise CommandError(problem, "see what it logged", Exit.NEGATIVE, code="unhealthy")
    asked = url or str(log_socket)
    output.result({"asked": asked, "healthy": True}, "healthy", key_values({"asked": asked, "healthy": True}))


def problem_at(url: str, timeout_s: float) -> str | None:
    """Say what is not well there; None if it is. click.UsageError if the URL is none."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "http" or not parts.hostname or port is None:
        raise click.UsageError(f"{url}: not of the form http://HOST:PORT/readyz")
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or DEFAULT_PATH)
        response = connection.getresponse()
        body = response.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        return f"{url} does not answer: {error}"
    finally:
        connection.close()
    return None if response.status == http.client.OK else f"{url}: {_reason(body) or response.reason}"


def listens(path: Path) -> bool:
    """Tell whether a Unix socket that was bound as `path` in this network namespace waits for connections."""
    for line in UNIX_SOCKETS.read_text(errors="surrogateescape").splitlines()[1:]:
        # Num: RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(path) and int(fields[3], 16) & _ACCEPTS_CONNECTIONS:
            return True
    return False


def _reason(body: bytes) -> str:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    problem = found.get("problem") if isinstance(found, dict) else None
    return problem if isinstance(problem, str) else ""
