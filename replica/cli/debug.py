"""`trustlog-replica debug dump`: one file for a bug report, without any key."""

import datetime as dt
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.text import Text

from replica.cli.options import FOLDER
from replica.cli.status import DEADLINE
from replica.cluster.home import ReplicaHome
from replica.operations.asking import Answer, ask_all
from replica.operations.doctor_folder import examine_folder
from replica.operations.doctor_network import examine_network
from replica.operations.dump import DumpError, make_dump
from replica.operations.findings import Finding, Severity
from replica.operations.http import fetch_metrics
from trustlog.cli.contract import CommandError, Exit, Output, example, output_option


@click.group("debug", epilog=example("trustlog-replica debug dump my-cluster/replica-0 dump.tar.gz"))
def debug_commands() -> None:
    """Collect what helps somebody else to understand a replica."""


@debug_commands.command(
    "dump",
    short_help="Write everything for a bug report to a file, without any key.",
    epilog=example(
        "trustlog-replica debug dump my-cluster/replica-0 dump.tar.gz",
        "trustlog-replica debug dump my-cluster/replica-0 dump.tar.gz --log replica-0.log",
    ),
)
@FOLDER
@click.argument("out", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--log",
    "logs",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Of the replica's log, such as journalctl's output; its last 4 MiB are taken. May be repeated.",
)
@DEADLINE
@output_option
def dump_command(*, folder: Path, out: Path, logs: tuple[Path, ...], deadline: float, output: Output) -> None:
    """Write to the new FILE what the doctor finds, every replica's status, metrics, settings, sizes and versions.

    No key, no operation and nothing of the application's state is in it; it is searched for this folder's keys before
    it is written, and not written if anything is found. cluster.toml is in it: addresses and public keys. Look into it
    before you send it: tar -tzf FILE.
    """
    findings, home = examine_folder(folder, dt.datetime.now(dt.UTC))
    if home is None:
        first = next(
            one for one in findings if one.severity is Severity.PROBLEM and one.check in {"configuration", "folder"}
        )
        raise CommandError(first.text, first.remedy, Exit.USAGE, code="configuration")
    asked, answers, metrics = uvloop.run(_ask(home, deadline))
    statuses = [_status(answer) for answer in answers]
    try:
        names = make_dump(home, out, findings=findings + asked, statuses=statuses, metrics=metrics, logs=list(logs))
    except DumpError as error:
        raise CommandError(str(error), exit_code=Exit.NEGATIVE, code="dump") from error
    data = {"file": str(out), "bytes": out.stat().st_size, "holds": names}
    output.result(data, str(out), Text(f"{out}: {', '.join(names)}"))


async def _ask(home: ReplicaHome, deadline: float) -> tuple[list[Finding], list[Answer], bytes | None]:
    findings = await examine_network(home, deadline)
    answers = await ask_all(home.cluster, deadline)
    return findings, answers, await fetch_metrics(home, deadline)


def _status(answer: Answer) -> dict[str, Any]:
    return {
        "replica": answer.number,
        "address": answer.place.address,
        "outcome": answer.outcome.value,
        "problem": answer.problem or None,
        "report": answer.report or None,
    }
