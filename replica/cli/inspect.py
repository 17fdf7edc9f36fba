"""`trustlog-replica inspect`: look into a replica's folder, running or not, and show what a log says, with proof.

The answer is a document that `trustlog verify` checks anywhere with nothing but the log's public key and the
cluster's context.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click
import structlog

from replica.cluster.home import ReplicaHome, load_home
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    EpochMark,
    NewView,
    Prepare,
    PrePrepare,
    Skipped,
    SlotResult,
    Suspect,
    decode_entry,
)
from replica.core.group import VerifiedGroup, decode_group
from replica.core.layout import LayoutError
from replica.shell.atrest import CLEAR, Clear
from replica.shell.opening import open_trusted_log, payload_seal
from replica.shell.sqlitefile import reading
from replica.shell.store import StoredGroup, read_only_group
from replica.shell.verify import GroupVerifier
from trustlog import TrustLogError, VerificationError, entry_digest
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, output_option
from trustlog.cli.documents import document


def describe(entry: Entry) -> str:
    """Return an entry in words, digests cut short: "PREPARE view 0 slot 7 batch 3f9a12cc"."""
    if isinstance(entry, PrePrepare):
        operations = len(entry.batch.envelopes)
        return (
            f"PRE-PREPARE view {entry.view} slot {entry.slot} batch {_short(entry.batch.digest)} envelopes {operations}"
        )
    if isinstance(entry, Prepare):
        return f"PREPARE view {entry.view} slot {entry.slot} batch {_short(entry.digest)}"
    if isinstance(entry, Commit):
        return f"COMMIT view {entry.view} slot {entry.slot} batch {_short(entry.digest)}"
    if isinstance(entry, Checkpoint):
        return f"CHECKPOINT slot {entry.slot} state {_short(entry.digest)}"
    if isinstance(entry, SlotResult):
        return f"RESULT slot {entry.slot} operations {entry.size} root {_short(entry.root)}"
    if isinstance(entry, EpochMark):
        return "the log's epoch ends or begins (CLOSE, OPEN)"
    if isinstance(entry, Skipped):
        return "said under another list of members"
    if isinstance(entry, Suspect):
        return f"SUSPECT view {entry.view}"
    if isinstance(entry, NewView):
        named = " ".join(f"{r.replica}:{r.index}" for r in entry.references)
        return f"NEW-VIEW view {entry.view} names {named}"
    return f"VIEW-CHANGE view {entry.view}"


@click.command(
    "inspect",
    short_help="Show what a log says at an index, with its attestation.",
    epilog=example(
        "trustlog-replica inspect my-cluster/replica-1 --log 0 -o json > group.json",
        "trustlog verify --key my-cluster/replica-0/log/log.pub --context $CONTEXT group.json",
    ),
)
@click.argument("folder", metavar="DIR/replica-N", type=click.Path(path_type=Path))
@click.option("--log", "log", type=click.IntRange(0), help="Whose log.  [default: the replica's own]")
@click.option("--index", type=click.IntRange(1), help="Which entry; its whole group is shown.  [default: the last]")
@output_option
def inspect_command(*, folder: Path, log: int | None, index: int | None, output: Output) -> None:
    """Show the group that holds an entry, as this replica stored it, and verify its attestation.

    Reads the replica's store, also while the replica runs. Needs no key but the public ones in cluster.toml.
    """
    home = load_home(folder)
    number = home.number if log is None else log
    if number >= home.cluster.genesis.n:
        raise click.UsageError(f"there is no replica {number}; the cluster has 0 to {home.cluster.genesis.n - 1}")
    group, row = _read(home, number, index)
    genesis = home.cluster.genesis
    entries = _entries(home, group.payloads)
    digests = [entry_digest(payload) for payload in group.payloads]
    data = document(decode_group(row.raw, genesis.limits).attestation, digests=digests)
    listed = [
        {"index": at, "entry": text, "bytes": len(payload)}
        for at, (text, payload) in enumerate(zip(entries, group.payloads, strict=True), group.first)
    ]
    data |= {"replica": number, "context": genesis.context().hex(), "entries": listed}
    plain = [f"{entry['index']} {entry['entry']}" for entry in listed]
    rows: Sequence[Sequence[object]] = [[entry["index"], entry["entry"], entry["bytes"]] for entry in listed]
    output.result(data, plain, grid(["index", f"replica-{number} said, attested and verified here", "bytes"], rows))


def _read(home: ReplicaHome, log: int, index: int | None) -> tuple[VerifiedGroup, StoredGroup]:
    if not home.store_path.exists():
        raise CommandError(
            f"{home.store_path}: there is no store", "run the replica first", Exit.USAGE, code="no-store"
        )
    try:
        with reading(), closing(sqlite3.connect(f"{home.store_path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            row = read_only_group(db, log, index, seal_of(home))
    except sqlite3.Error as error:
        raise CommandError(f"{home.store_path}: {error}", "see whether the file is damaged", code="store") from error
    if row is None:
        where = "anything" if index is None else f"entry {index}"
        raise CommandError(f"{home.store_path}: does not hold {where} of log {log}", code="unassigned")
    try:
        return GroupVerifier(home.cluster.genesis).verify(log, row.raw), row
    except (LayoutError, VerificationError) as error:
        raise CommandError(
            f"{home.store_path}: group {row.first} to {row.last} of log {log} does not verify: {error}",
            "the file is damaged: restore it from a good copy, or replace this replica",
            code="damaged",
        ) from error


def seal_of(home: ReplicaHome) -> Clear:
    """Ask the trusted log for the key of a sealed store; it serves one program at a time."""
    if not home.settings.trusted_log.encrypt_store:
        return CLEAR
    try:
        with closing(open_trusted_log(home, structlog.get_logger())) as log:
            return payload_seal(home, log)
    except TrustLogError as error:
        raise CommandError(
            f"the store of {home.path} is sealed, and its key cannot be had: {error}",
            "stop the replica first: the key is its log's",
            code="sealed",
        ) from error


def _entries(home: ReplicaHome, payloads: Sequence[bytes]) -> list[str]:
    texts = []
    for payload in payloads:
        try:
            texts.append(describe(decode_entry(payload, home.cluster.genesis, home.cluster.cluster_id)))
        except LayoutError as error:
            texts.append(f"no entry: {error}")
    return texts


def _short(digest: bytes) -> str:
    return digest.hex()[:8]
