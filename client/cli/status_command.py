"""`trustlog-client status`: every replica's own word on itself, side by side."""

from typing import Any

import click

from client.cli.running import Target, example
from client.queries import ReplicaStatus, number_in
from trustlog.cli.contract import Exit, Output, grid, output_option, printable

HEAD_SHOWN = 8
PRIMARY = "*"
# Narrow, so that a row fits a terminal of 80 columns.
HEADINGS = ("id", "address", "view", "slot", "stable", "log", "head", "trust", "store", "remark")


@click.command(
    epilog=example("trustlog-client -c my-cluster status", "trustlog-client -c my-cluster --deadline 2 status -o json")
)
@output_option
@click.pass_obj
def status(cluster: Target, *, output: Output) -> Exit:
    """Show each replica: reachable, view, slots, log length and head, what attests it, durability.

    What a replica says of itself is its own word; nobody has agreed on it. Exit 3 if fewer than f+1 replicas can be
    reached, because then the cluster serves nobody.

    With -o plain, each replica is a line of eleven fields with tabs between them: number; * for the primary, else -;
    address; view; slot executed; stable checkpoint; log length; log head; what attests the log; durability; remark.
    What is not known is a -, the remark may be empty.
    """
    client = cluster.open()
    quorum = client.cluster.genesis.quorum
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
        # A mark needs no column of its own here, and most of the time there is nothing to remark.
        shown = [(f"{row[0]} *" if row[1] == PRIMARY else row[0], *row[2:]) for row in rows]
        width = len(HEADINGS) if any(row[-1] for row in rows) else len(HEADINGS) - 1
        output.result(data, "", grid(HEADINGS[:width], [row[:width] for row in shown]))
    if output.format != "json":
        click.echo(f"* primary; {verdict}", err=not serves or output.format == "plain")
    return Exit.OK if serves else Exit.UNREACHABLE


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
        return (str(replica.number), "-", replica.address, *("-" * 7), remark)
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
    )


def _remark(report: dict[str, Any]) -> str:
    peers = report.get("peers")
    exposed = [
        str(peer.get("replica"))
        for peer in (peers if isinstance(peers, list) else [])
        if isinstance(peer, dict) and peer.get("exposed")
    ]
    return f"exposes replica {', '.join(exposed)}" if exposed else ""
