"""`trustlog-replica backup` and `restore`: a replica's data again, and never its log."""

from pathlib import Path

import click
import structlog
import uvloop
from rich.console import Group
from rich.text import Text

from replica.cli.options import FOLDER
from replica.cluster.home import load_home
from replica.operations.asking import ask_all
from replica.operations.backup import BackupError, make_backup
from replica.operations.restoring import Restored, restore
from replica.wire.reports import number
from trustlog.cli.contract import CommandError, Exit, Output, example, key_values, output_option

PEERS_S = 3.0


@click.command(
    "backup",
    short_help="Write a replica's data, without its log, to a file.",
    epilog=example("trustlog-replica backup my-cluster/replica-0 replica-0.backup"),
)
@FOLDER
@click.argument("out", metavar="FILE", type=click.Path(path_type=Path))
@output_option
def backup_command(*, folder: Path, out: Path, output: Output) -> None:
    """Write settings, TLS key, databases and evidence of this folder to the new FILE; the replica may run.

    The log's own state and key are not in it, so that nobody can make a log forget by restoring it: who must not lose
    a log keeps its folder on a disk that does not fail, or replaces it by a new one. FILE has mode 0600 and holds the
    key of the replica's connections: keep it as secret as the folder.
    """
    try:
        manifest = make_backup(load_home(folder), out)
    except BackupError as error:
        raise CommandError(str(error), exit_code=Exit.NEGATIVE, code="backup") from error
    data = {
        "file": str(out),
        "bytes": out.stat().st_size,
        "replica": manifest.number,
        "log_last": manifest.log_last,
        "slot": manifest.slot,
        "files": len(manifest.files),
    }
    output.result(data, str(out), key_values(data))


@click.command(
    "restore",
    short_help="Put a backup's data back; never a log.",
    epilog=example("trustlog-replica restore replica-0.backup my-cluster/replica-0"),
)
@click.argument("archive", metavar="FILE", type=click.Path(path_type=Path))
@FOLDER
@output_option
def restore_command(*, archive: Path, folder: Path, output: Output) -> None:
    """Put the databases of a backup back into this folder, whose replica must be stopped; the present ones are kept.

    The log stays as it is. What it said since the backup, the replica has back from its peers before it speaks again:
    restore one replica at a time, and at most f, and wait for `health` each time. Where a service of its own keeps the
    log, the folder may be missing: it is made. Exit 1, with nothing changed, for a backup of another replica, an
    altered one, a log that was rolled back, and a log that is lost: that one needs a new log, and no copy.
    """
    try:
        done = restore(archive, folder, structlog.get_logger())
    except BackupError as error:
        raise CommandError(str(error), exit_code=Exit.NEGATIVE, code="restore") from error
    manifest = done.manifest
    data: dict[str, object] = {
        "folder": str(folder),
        "made_at": manifest.made_at,
        "slot": manifest.slot if done.left_of_list is None else None,
        "log_last": done.log_last,
        "held": done.held,
        "missing": done.missing,
        "left_of_list": done.left_of_list,
        "files": list(done.files),
    }
    notes = _notes(done) if done.log_last > done.held else []
    data["warnings"] = notes
    lines = [*_said(done), *(f"warning: {note}" for note in notes)]
    lines.append(f"next: trustlog-replica run {folder}, and wait for: trustlog-replica health {folder}")
    output.result(data, lines, Group(key_values(data), *map(Text, lines)))


def _said(done: Restored) -> list[str]:
    manifest = done.manifest
    files = f"{' and '.join(done.files) or 'nothing'} as of {manifest.made_at}"
    if done.left_of_list is not None:
        present = done.home.cluster.genesis.list_number
        why = (
            f"the members changed since that backup: its state, slot {manifest.slot}, is of list {done.left_of_list} "
            f"of them, and list {present} is in force. It was not put back, because nobody can go on with it"
        )
        then = (
            f"the state of list {present}, and what this log, which ends at {done.log_last}, said after it, comes "
            "from peers before the replica speaks"
        )
        return [f"{files}: own log up to {done.held}", why, then]
    lines = [f"{files}: slot {manifest.slot}, own log up to {done.held}"]
    if done.missing:
        lines.append(f"entries {done.held + 1} to {done.log_last} of its log come from peers before it speaks")
    return lines


def _notes(done: Restored) -> list[str]:
    """Say so if nobody who answers now has what is missing of the log."""
    home = done.home
    held = 0
    for answer in uvloop.run(ask_all(home.cluster, PEERS_S)):
        peers = answer.report.get("peers")
        for peer in peers if isinstance(peers, list) else []:
            if isinstance(peer, dict) and number(peer, "replica") == home.number:
                held = max(held, number(peer, "received") or 0)
    if held >= done.log_last:
        return []
    text = (
        f"no replica that answers now holds this log to its end, {done.log_last} (the furthest: {held}): until one "
        "that does is back, this replica stays mute. Restore no other replica before"
    )
    return [text]
