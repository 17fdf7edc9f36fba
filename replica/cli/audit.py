"""`trustlog-replica audit`: verify offline all that folders hold of every log."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from replica.cli.inspect import seal_of
from replica.cluster.clusterfile import CLUSTER_FILE_NAME
from replica.cluster.home import SETTINGS_NAME, ReplicaHome, load_home
from replica.operations.audit import Audit, Findings
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, output_option, printable


@click.command(
    "audit",
    short_help="Verify offline all that a folder holds of every log.",
    epilog=example("trustlog-replica audit my-cluster/replica-0", "trustlog-replica audit my-cluster -o json"),
)
@click.argument("places", metavar="DIR…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--progress/--no-progress", default=None, help="Show a bar on stderr.  [default: if it is a terminal]")
@output_option
def audit_command(*, places: tuple[Path, ...], progress: bool | None, output: Output) -> Exit:
    """Verify the whole retained history of every log, and the state, in replicas' folders or a cluster's directory.

    Every group's signature and its place in its chain, every entry, every envelope's signature, the protocol's rules
    from the durable milestone on, and every key of the state. Several folders are compared: two histories of one log
    prove its trusted part broken. Nothing is changed. The replicas may run; of a sealed store they must be stopped.

    Exit 0: all is well; exit 1: something is not, and file and entry are named. With -o plain, each fault is a line of
    four fields with tabs between them: file, where in it, what, what to do.
    """
    homes = [load_home(folder) for place in places for folder in _folders(place)]
    first = homes[0].cluster
    for home in homes[1:]:
        if home.cluster.cluster_id != first.cluster_id:
            text = f"{home.path} is of another cluster than {homes[0].path}"
            raise CommandError(text, "audit one cluster at a time", Exit.USAGE, code="other-cluster")
    show = sys.stderr.isatty() if progress is None else progress
    found = _audit(homes, show=show)
    faults = [fault for one in found for fault in one.faults]
    data = {
        "faults": [
            {"file": fault.file, "where": fault.where, "text": fault.text, "remedy": fault.remedy} for fault in faults
        ],
        "unnamed": sum(one.unnamed for one in found),
        "replicas": [_as_data(one) for one in found],
    }
    if output.format == "plain":
        for fault in faults:
            click.echo("\t".join(map(printable, (fault.file, fault.where, fault.text, fault.remedy))))
    else:
        output.result(data, "", Group(*_lines(found)))
    return Exit.NEGATIVE if faults else Exit.OK


def _folders(place: Path) -> list[Path]:
    if (place / SETTINGS_NAME).exists() or not (place / CLUSTER_FILE_NAME).exists():
        return [place]
    found = sorted(path.parent for path in place.glob(f"*/{SETTINGS_NAME}"))
    if not found:
        raise CommandError(
            f"{place}: holds no replica's folder", "name one, such as DIR/replica-0", Exit.USAGE, code="usage"
        )
    return found


def _audit(homes: Sequence[ReplicaHome], *, show: bool) -> list[Findings]:
    audit = Audit()
    found = []
    with _bar(show=show) as begin:
        for home in homes:
            if not home.store_path.exists() and not home.state_path.exists():
                text = f"{home.path}: there is nothing to audit yet"
                raise CommandError(text, "run the replica first", Exit.USAGE, code="no-store")
            found.append(audit.run(home, begin(f"replica {home.number}", audit.size(home)), seal_of(home)))
    return found


@contextmanager
def _bar(*, show: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield what begins a bar and returns what advances it."""
    if not show:
        yield lambda _name, _total: lambda _count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def begin(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda count: progress.update(task, advance=count)

        yield begin


def _as_data(found: Findings) -> dict[str, object]:
    return {
        "replica": found.number,
        "folder": str(found.path),
        "slot": found.slot,
        "keys": found.keys,
        "notes": found.notes,
        "logs": [
            {
                "log": log.log,
                "groups": log.groups,
                "entries": log.entries,
                "first": log.first,
                "last": log.last,
                "judged": log.judged,
                "gaps": log.gaps,
            }
            for log in found.logs
        ],
    }


def _lines(found: Sequence[Findings]) -> Iterator[RenderableType]:
    for one in found:
        yield Text(printable(f"{one.path}: milestone at slot {one.slot}, {one.keys} keys verified"))
        rows = [(log.log, log.groups, log.entries, f"{log.first} to {log.last}", log.judged) for log in one.logs]
        yield grid(("log", "groups", "entries", "indexes", "judged by the rules"), rows)
        for note in one.notes:
            yield Text(printable(f"note: {note}"))
        for fault in one.faults:
            yield Text(printable(f"BAD {fault.file}: {fault.where}: {fault.text} → {fault.remedy}"), style="bold red")
        if one.unnamed:
            yield Text(f"and {one.unnamed} more of the same kinds", style="bold red")
    count = sum(len(one.faults) + one.unnamed for one in found)
    yield Text("all is well" if not count else f"{count} faults", style="bold")
