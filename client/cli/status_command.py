"""`trustlog-client status`: every replica's own word on itself, side by side."""

from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from client.cli.running import Target, example
from client.queries import ReplicaStatus, number_in
from trustlog.cli.contract import Exit, Output, grid, output_option, printable

HEAD_SHOWN = 8
PRIMARY = "*"
# Narrow, so that a row fits a terminal of 80 columns; remarks are longer and stand below.
HEADINGS = ("id", "address", "view", "slot", "stable", "log", "head", "trust", "store")


@click.command(
    epilog=example("trustlog-client -c my-cluster status", "trustlog-client -c my-cluster --deadline 2 status -o json")
)
@output_option
@click.pass_obj
def status(cluster: Target, *, output: Output) -> Exit:
    """Show each replica: reachable, view, slots, log length and head, what attests it, durability.

    What a replica says of itself is its own word; nobody has agreed on it. Exit 3 if fewer than f+1 replicas can be
    reached, because then the cluster serves nobody.

    With -o plain, each replica is a line of twelve fields with tabs between them: number; * for the primary, else -;
    address; view; slot executed; stable checkpoint; log length; log head; what attests the log; durability; remark;
    verdicts. What is not known is a -, the remark may be empty. Verdicts are what the replica thinks of every log:
    "trusted", or those logs that are not, with commas between them, each as number:verdict:reason:seconds, such as
    1:exposed:wrong-view:80,2:suspected:silent:12.

    Below a table stands what replicas concluded from each other's evidence of which program holds their log's key.
    """
    client = cluster.open()
    quorum = client.cluster.needed
    found = cluster.run(lambda opened: opened.status())
    reachable = sum(1 for replica in found if replica.reachable)
    serves = reachable >= quorum
    verdict = f"{reachable} of {len(found)} replicas reachable, {quorum} are needed"
    data: dict[str, object] = {
        "cluster": client.cluster.genesis.name,
        "cluster_id": client.cluster.cluster_id.hex(),
        "ordering": client.cluster.genesis.ordering.label,
        "reachable": reachable,
        "quorum": quorum,
        "serves": serves,
        "replicas": [_as_data(replica) for replica in found],
    }
    rows = [_row(replica) for replica in found]
    if output.format == "plain":
        for row in rows:
            click.echo("\t".join(printable(field) for field in row))
    else:
        output.result(data, "", _table(rows))
        if output.format == "table":
            for row in rows:
                if row[10]:
                    click.echo(printable(f"replica-{row[0]}: {row[10]}"))
            for protects, numbers in _protections(found).items():
                click.echo(f"log of {', '.join(numbers)}: {printable(protects)}")
            for line in _appraisals(found):
                click.echo(printable(line))
    if output.format != "json":
        click.echo(f"* primary; {verdict}", err=not serves or output.format == "plain")
    return Exit.OK if serves else Exit.UNREACHABLE


def _table(rows: Sequence[Sequence[str]]) -> Table:
    # A mark needs no column of its own here.
    table = grid(HEADINGS, [(f"{row[0]} *" if row[1] == PRIMARY else row[0], *row[2:10]) for row in rows])
    # An address must be whole to be read and copied.
    table.columns[1].no_wrap = True
    return table


def _as_data(replica: ReplicaStatus) -> dict[str, Any]:
    return {
        "number": replica.number,
        "address": replica.address,
        "reachable": replica.reachable,
        "problem": replica.problem,
        "report": replica.report,
    }


def _row(replica: ReplicaStatus) -> tuple[str, ...]:
    """Return the fields of -o plain, as the help lists them."""
    if not replica.report:
        remark = replica.problem if replica.reachable else f"not reachable: {replica.problem}"
        return (str(replica.number), "-", replica.address, *("-" * 7), remark, "-")
    report = replica.report
    is_primary = report.get("primary") == replica.number
    log = report.get("log")
    log = log if isinstance(log, dict) else {}
    return (
        str(replica.number),
        PRIMARY if is_primary else "-",
        replica.address,
        *(str(number_in(report, name)) for name in ("view", "executed", "stable")),
        str(number_in(log, "last")),
        str(log.get("head", "-"))[:HEAD_SHOWN],
        str(log.get("backend", "-")),
        str(report.get("durability", "-")),
        _remark(report),
        _verdicts(report),
    )


def _appraisals(found: Sequence[ReplicaStatus]) -> list[str]:
    """Return what replicas concluded from each other's evidence: "replica-2: tpm, measured 3f9a… (says 0, 1)"."""
    said: dict[tuple[int, str], list[str]] = {}
    for replica in found:
        peers = replica.report.get("peers") if replica.report else None
        for peer in peers if isinstance(peers, list) else []:
            appraisal = peer.get("appraisal") if isinstance(peer, dict) else None
            if isinstance(appraisal, dict):
                about = (number_in(peer, "replica"), str(appraisal.get("text", "-")))
                said.setdefault(about, []).append(str(replica.number))
    return [f"replica-{number}: {text} (says {', '.join(sayers)})" for (number, text), sayers in sorted(said.items())]


def _doubted(report: dict[str, Any]) -> list[tuple[str, str, str, str]] | None:
    """Return number, verdict, reason and seconds of every log that is not trusted; None if the report says nothing."""
    verdicts = report.get("verdicts")
    if not isinstance(verdicts, list):
        return None
    found = []
    for one in verdicts:
        if isinstance(one, dict) and one.get("verdict") != "trusted":
            words = (str(one.get(name) or "-") for name in ("verdict", "reason"))
            found.append((str(number_in(one, "replica")), *words, str(number_in(one, "for_s"))))
    return found  # type: ignore[return-value]


def _verdicts(report: dict[str, Any]) -> str:
    doubted = _doubted(report)
    if doubted is None:
        return "-"
    return ",".join(map(":".join, doubted)) or "trusted"


def _protections(found: Sequence[ReplicaStatus]) -> dict[str, list[str]]:
    """Return what logs protect against, by their replicas' own word, and whose they are."""
    shown: dict[str, list[str]] = {}
    for replica in found:
        log = (replica.report or {}).get("log")
        if isinstance(log, dict) and isinstance(log.get("protects"), str):
            shown.setdefault(log["protects"], []).append(str(replica.number))
    return shown


def _remark(report: dict[str, Any]) -> str:
    log = report.get("log")
    if isinstance(log, dict) and isinstance(log.get("trouble"), str):
        return str(log["trouble"])
    said = {"exposed": "exposes", "broken": "trusted part broken:", "suspected": "suspects"}
    doubted = _doubted(report) or ()
    return "; ".join(
        f"{said.get(verdict, verdict)} {number} ({reason}{f' {seconds} s' if verdict == 'suspected' else ''})"
        for number, verdict, reason, seconds in doubted
    )
