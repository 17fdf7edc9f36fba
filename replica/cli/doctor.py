"""`trustlog-replica doctor`: looks for what is wrong with a replica, and says what to do about it."""

import datetime as dt
import shlex
from pathlib import Path

import click
import uvloop
from rich.console import Group
from rich.text import Text

from replica.cli.options import FOLDER
from replica.cli.status import DEADLINE
from replica.cluster.clusterfile import CLUSTER_FILE_NAME
from replica.cluster.home import SETTINGS_NAME, TLS_KEY_NAME
from replica.operations.doctor_folder import examine_folder
from replica.operations.doctor_network import examine_network
from replica.operations.findings import Finding, Severity, count
from trustlog.cli.contract import CommandError, Exit, Output, example, output_option, printable

_STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.PROBLEM: "bold red"}
_CHECK_WIDTH = 14  # of the longest check's name, and a space


@click.command(
    "doctor",
    short_help="Find what is wrong with a replica, and what to do.",
    epilog=example(
        "trustlog-replica doctor my-cluster/replica-0", "trustlog-replica doctor my-cluster/replica-0 -o json"
    ),
)
@FOLDER
@click.option("--offline", is_flag=True, help="Look at the folder only; ask nobody.")
@DEADLINE
@output_option
def doctor_command(*, folder: Path, offline: bool, deadline: float, output: Output) -> Exit:
    """Examine the replica of this folder, on its machine, running or not; nothing is changed.

    Files and modes, keys against cluster.toml, certificates' expiry, databases, disk, ports, whether every peer is
    reached and has the same cluster.toml, clocks, and what the replicas think of each other. Of a stopped replica the
    log is opened as `run` opens it, for a moment. Every finding comes with a remedy. Exit 0: no
    problem (warnings may be there); exit 1: at least one problem.

    With -o plain, each finding is a line of five fields with tabs between them: ok, warning or problem; the check; its
    subject; what was found; what to do.
    """
    _refuse_cluster_directory(folder)
    findings, home = examine_folder(folder, dt.datetime.now(dt.UTC))
    if home is not None and not offline:
        startable = not count(findings, Severity.PROBLEM)
        findings += uvloop.run(examine_network(home, deadline, startable=startable))
    problems, warnings = count(findings, Severity.PROBLEM), count(findings, Severity.WARNING)
    data = {"problems": problems, "warnings": warnings, "findings": [one.as_data() for one in findings]}
    if output.format == "plain":
        for one in findings:
            fields = (one.severity.label, one.check, one.subject, one.text, one.remedy)
            click.echo("\t".join(map(printable, fields)))
    else:
        summary = f"{len(findings)} checks: {problems} problems, {warnings} warnings"
        output.result(data, "", Group(*map(_line, findings), Text(summary, style="bold")))
    return Exit.NEGATIVE if problems else Exit.OK


def _refuse_cluster_directory(place: Path) -> None:
    """Refuse the directory around replicas' folders: nothing in it is private, and what is no replica's has no keys."""
    if not place.is_dir() or any((place / name).exists() for name in (SETTINGS_NAME, TLS_KEY_NAME)):
        return
    folders = sorted(path.parent for path in place.glob(f"*/{SETTINGS_NAME}"))
    if folders:
        each = "; ".join(f"trustlog-replica doctor {shlex.quote(str(folder))}" for folder in folders)
        text = f"{place}: no replica's folder, but the directory around {len(folders)} of them"
        raise CommandError(text, f"examine each: {each}", Exit.USAGE, code="usage")
    if (place / CLUSTER_FILE_NAME).exists():
        text = f"{place}: no replica's folder: {CLUSTER_FILE_NAME} is there, and no {SETTINGS_NAME}"
        raise CommandError(text, "give the folder that init or keygen made", Exit.USAGE, code="usage")


def _line(finding: Finding) -> Text:
    remedy = f" → {finding.remedy}" if finding.remedy else ""
    return Text.assemble(
        (f"{finding.severity.label:8}", _STYLES[finding.severity]),
        f"{finding.check:{_CHECK_WIDTH}}",
        printable(f"{finding.subject}: {finding.text}"),
        (printable(remedy), "italic"),
    )
