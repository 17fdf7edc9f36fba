"""`trustlog-replica status` and `health`: what replicas say of themselves now, for people, probes and scripts."""

import asyncio
import datetime as dt
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from replica.cli.options import FOLDER
from replica.cluster.clusterfile import CLUSTER_FILE_NAME, ClusterFile
from replica.cluster.home import SETTINGS_NAME, load_any_home
from replica.cluster.memberlists import load_any_present_cluster
from replica.operations.asking import DEADLINE_S, DEADLINE_S_MAX, Answer, Outcome, ask_all
from replica.operations.health import check_health
from replica.operations.reports import doubts, median_ms, text
from replica.wire.reports import number
from trustlog.cli.contract import Exit, FiniteFloat, Output, example, grid, output_option, printable

INTERVAL_S = 2.0
HEADINGS = ("id", "address", "view", "slot", "stable", "lag", "log", "fsync", "attest", "client")
UNKNOWN = "-"
PRIMARY = "*"

DEADLINE = click.option(
    "--deadline",
    metavar="SECONDS",
    type=FiniteFloat(0, DEADLINE_S_MAX, min_open=True),
    default=DEADLINE_S,
    show_default=True,
    help="How long a replica has to answer.",
)


@click.command(
    "status",
    short_help="Show every replica of a cluster, side by side.",
    epilog=example("trustlog-replica status my-cluster", "trustlog-replica status my-cluster/replica-0 --watch"),
)
@click.argument("place", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=FiniteFloat(0.1, 3600),
    default=INTERVAL_S,
    show_default=True,
    help="With --watch: how long to pause.",
)
@click.option("--count", type=click.IntRange(1), help="With --watch: end after so many times.")
@DEADLINE
@output_option
def status_command(
    *, place: Path, watch: bool, interval: float, count: int | None, deadline: float, output: Output
) -> Exit:
    """Ask all replicas of the cluster at DIR: a cluster's directory, a replica's folder, or a cluster.toml.

    slot: the highest one executed; lag: how many slots the replica is behind the one that executed most; log: entries
    in its own log; fsync, attest, client: medians of the latest 128, in milliseconds. * marks the primary of the
    highest view. Below stand remarks: what is not reachable and why, what is not ready, and whom a replica does not
    trust. It is each replica's own word on itself.

    Exit 3 if fewer than f+1 replicas answer, because then the cluster serves nobody. With -o plain, each replica is a
    line of thirteen fields with tabs between them: number, * or -, address, view, slot, stable, lag, log, what attests
    it, fsync, attest, client, and the remark. With --watch, each round of them begins with a line "# " and the time.
    """
    cluster = cluster_at(place)
    if not watch:
        answers = uvloop.run(ask_all(cluster, deadline))
        _print(cluster, answers, output)
        return _exit(cluster, answers)
    if output.format == "table" and sys.stdout.isatty():
        return _watch_table(cluster, interval, count, deadline)
    answers = []
    for _ in _times(interval, count):
        answers = uvloop.run(ask_all(cluster, deadline))
        if output.format != "json":
            click.echo(f"# {dt.datetime.now(dt.UTC).isoformat(timespec='seconds')}")
        _print(cluster, answers, output)
    return _exit(cluster, answers)


@click.command(
    "health",
    short_help="Exit 0 if a replica is healthy, else 1.",
    epilog=example(
        "trustlog-replica health my-cluster/replica-0", "trustlog-replica health my-cluster/replica-0 --live"
    ),
)
@FOLDER
@click.option("--live", is_flag=True, help="Ask only whether it runs and has not halted; not whether it is ready.")
@DEADLINE
@output_option
def health_command(*, folder: Path, live: bool, deadline: float, output: Output) -> Exit:
    """Ask the replica of this folder, on this machine, whether it is ready: exit 0, or 1 and why not.

    Ready: its view is open, f others are connected, and it has caught up with them. For a container's health check, a
    probe or a script. It asks over the port that clients use, with the public cluster.toml, and ends within the
    deadline: not reachable is 1 as well.
    """
    found = asyncio.run(check_health(load_any_home(folder), deadline))
    healthy = found.live if live else found.ready
    data: dict[str, object] = {
        "replica": found.number,
        "address": found.address,
        "healthy": healthy,
        "live": found.live,
        "ready": found.ready,
        "problem": found.problem,
    }
    word = "live" if live else "ready"
    line = f"replica {found.number} at {found.address} is {word if healthy else f'not {word}: {found.problem}'}"
    output.result(data, line)
    return Exit.OK if healthy else Exit.NEGATIVE


def cluster_at(place: Path) -> ClusterFile:
    """Return the cluster of a replica's folder, or of a directory or file that holds a cluster.toml."""
    if (place / SETTINGS_NAME).exists() and not (place / CLUSTER_FILE_NAME).exists():
        return load_any_home(place).cluster
    return load_any_present_cluster(place)


def _exit(cluster: ClusterFile, answers: Sequence[Answer]) -> Exit:
    reached = sum(1 for answer in answers if answer.outcome is Outcome.ANSWERED)
    return Exit.OK if reached >= cluster.needed else Exit.UNREACHABLE


def _times(interval: float, count: int | None) -> Any:  # noqa: ANN401 - a generator of nothing
    done = 0
    while count is None or done < count:
        if done:
            time.sleep(interval)
        done += 1
        yield


def _watch_table(cluster: ClusterFile, interval: float, count: int | None, deadline: float) -> Exit:
    answers: list[Answer] = []
    with Live(console=Console(highlight=False), auto_refresh=False, screen=False) as live:
        for _ in _times(interval, count):
            answers = uvloop.run(ask_all(cluster, deadline))
            live.update(_table(cluster, answers), refresh=True)
    return _exit(cluster, answers)


def _print(cluster: ClusterFile, answers: Sequence[Answer], output: Output) -> None:
    reached = [answer for answer in answers if answer.outcome is Outcome.ANSWERED]
    known = max((number(one.report, "executed") or 0 for one in reached), default=0)
    data: dict[str, object] = {
        "cluster": cluster.genesis.name,
        "cluster_id": cluster.cluster_id.hex(),
        "reachable": len(reached),
        "quorum": cluster.needed,
        "serves": len(reached) >= cluster.needed,
        "known": known,
        "replicas": [
            {
                "number": one.number,
                "address": one.place.address,
                "outcome": one.outcome.value,
                "problem": one.problem or None,
                "rtt_ms": round(one.rtt_s * 1000, 3) if one.report else None,
                "clock_ahead_ms": None if one.ahead_s is None else round(one.ahead_s * 1000),
                "report": one.report or None,
            }
            for one in answers
        ],
    }
    if output.format == "plain":
        for row in _rows(answers):
            click.echo("\t".join(printable(field) for field in row))
    else:
        output.result(data, "", _table(cluster, answers))


def _table(cluster: ClusterFile, answers: Sequence[Answer]) -> RenderableType:
    rows = _rows(answers)
    # A mark needs no column of its own here.
    shown = grid(HEADINGS, [(f"{row[0]} *" if row[1] == PRIMARY else row[0], *row[2:8], *row[9:12]) for row in rows])
    shown.columns[1].no_wrap = True
    reached = sum(1 for answer in answers if answer.outcome is Outcome.ANSWERED)
    genesis = cluster.genesis
    kept = [Text(f"log of {', '.join(numbers)}: {printable(kind)}") for kind, numbers in _backends(answers).items()]
    summary = f"{genesis.name}: {reached} of {genesis.n} replicas answer, {cluster.needed} are needed; * primary"
    remarks = [Text(printable(f"replica-{row[0]}: {row[12]}")) for row in rows if row[12]]
    return Group(shown, *remarks, *kept, Text(printable(summary)))


def _backends(answers: Sequence[Answer]) -> dict[str, list[str]]:
    """Return what attests the logs, and whose they are."""
    shown: dict[str, list[str]] = {}
    for answer in answers:
        kind = text(answer.report, "log", "backend")
        if kind is not None:
            shown.setdefault(f"{kind} ({text(answer.report, 'log', 'protects')})", []).append(str(answer.number))
    return shown


def _rows(answers: Sequence[Answer]) -> list[tuple[str, ...]]:
    """Return a row for each replica: number, mark, the columns from the address on, remark."""
    reached = [answer for answer in answers if answer.outcome is Outcome.ANSWERED]
    known = max((number(one.report, "executed") or 0 for one in reached), default=0)
    newest = max(reached, key=lambda one: number(one.report, "view") or 0, default=None)
    primary = None if newest is None else number(newest.report, "primary")
    return [_row(answer, known, primary) for answer in answers]


def _row(answer: Answer, known: int, primary: int | None) -> tuple[str, ...]:
    mark = PRIMARY if answer.number == primary else UNKNOWN
    if answer.outcome is not Outcome.ANSWERED:
        return (
            str(answer.number),
            mark,
            answer.place.address,
            *([UNKNOWN] * 9),
            f"{answer.outcome.value}: {answer.problem}",
        )
    report = answer.report
    executed = number(report, "executed")
    return (
        str(answer.number),
        mark,
        answer.place.address,
        _shown(number(report, "view")),
        _shown(executed),
        _shown(number(report, "stable")),
        UNKNOWN if executed is None else str(known - executed),
        _shown(number(report, "log", "last")),
        text(report, "log", "backend") or UNKNOWN,
        *(_shown(median_ms(report, what)) for what in ("fsync", "attest", "client")),
        _remark(report),
    )


def _shown(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _remark(report: dict[str, Any]) -> str:
    remarks = []
    not_ready = text(report, "not_ready")
    if not_ready is not None:
        remarks.append(f"not ready: {not_ready}")
    remarks += [f"{verdict} {other} ({reason})" for other, verdict, reason in doubts(report)]
    peers = report.get("peers")
    for peer in peers if isinstance(peers, list) else []:
        theirs = text(peer, "cluster_file") if isinstance(peer, dict) else None
        if theirs is not None and theirs != text(report, "cluster_file"):
            remarks.append(f"replica {number(peer, 'replica')} has another cluster.toml")
    return "; ".join(remarks)
