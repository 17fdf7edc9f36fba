"""Backups of a replica's folder: what its data can be had again from, and nothing with which its log could speak.

A replica is trusted because its log never says two things at one index. Whoever puts an old copy of the log's state
back makes it forget what it said, and say something else in its place: the log is exposed, and the replica lost. So the
log's state and key are *not in a backup*: nothing in it can sign an entry, and restoring it cannot roll a log back,
however old it is. What is in it is what a replica can lose and have again:

    manifest.json             what this is, whose, how far the own log reached, size and SHA-256 of every file below
    replica.toml, cluster.toml, log.pub
    members.toml              which members followed those of cluster.toml, if any did
    tls.key, tls.crt          the key to the replica's connections: keep a backup as secret as the folder
    tls.next.key, tls.next.crt    those that wait for a list of members that names them, if any do
    store.sqlite              every log's groups, from before which peers need nothing
    state.sqlite              the newest durable milestone
    evidence/NAME             against other replicas

The small files are copied as they are at one moment, before they are measured: a replica that goes over to other
members, or gets another key, meanwhile replaces them. Databases are copied by SQLite while the replica runs, each as of
one moment. An own group that was stored and not yet attested is left out: the log may since have attested another in
its place.
"""

import datetime as dt
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from replica.cluster.clusterfile import CLUSTER_FILE_NAME
from replica.cluster.home import (
    EVIDENCE_NAME,
    LOG_PUBLIC_KEY_NAME,
    NEXT_CERTIFICATE_NAME,
    NEXT_KEY_NAME,
    SETTINGS_NAME,
    STATE_NAME,
    STORE_NAME,
    TLS_CERTIFICATE_NAME,
    TLS_KEY_NAME,
    ReplicaHome,
)
from replica.cluster.keys import write_new
from replica.cluster.memberlists import OWN_NAME
from replica.cluster.writing import sync_directory
from replica.core.genesis import MIB
from replica.shell.evidence import FILE_NAME, EvidenceFolder
from replica.shell.sqlitefile import reading
from trustlog import __version__

KIND: Final = "trustlog-replica backup"
FORMAT: Final = 1
MANIFEST_NAME: Final = "manifest.json"
MANIFEST_BYTES_MAX: Final = MIB
SMALL_NAMES: Final = (SETTINGS_NAME, CLUSTER_FILE_NAME, LOG_PUBLIC_KEY_NAME, TLS_KEY_NAME, TLS_CERTIFICATE_NAME)
NEXT_NAMES: Final = (NEXT_CERTIFICATE_NAME, NEXT_KEY_NAME)
DATABASE_NAMES: Final = (STORE_NAME, STATE_NAME)
SMALL_BYTES_MAX: Final = MIB
EVIDENCE_BYTES_MAX: Final = 65 * MIB  # also of what followed cluster.toml
CHUNK: Final = MIB
READS_MAX: Final = 10


class BackupError(Exception):
    """A backup cannot be made or used; the text says why and what to do. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself. log_last: the last attested entry of the own log in its store.

    slot: of its milestone, 0 if there is none. files: by name, size and SHA-256 (32 bytes).
    """

    cluster_id: bytes
    number: int
    log_public_key: bytes
    made_at: str
    log_last: int
    slot: int
    files: dict[str, tuple[int, bytes]]

    def encode(self) -> bytes:
        """Return the manifest's JSON."""
        content = {
            "kind": KIND,
            "format": FORMAT,
            "version": __version__,
            "made_at": self.made_at,
            "cluster_id": self.cluster_id.hex(),
            "number": self.number,
            "log_public_key": self.log_public_key.hex(),
            "log_last": self.log_last,
            "slot": self.slot,
            "files": {name: {"size": size, "sha256": digest.hex()} for name, (size, digest) in self.files.items()},
        }
        return json.dumps(content, indent=1).encode() + b"\n"


def decode_manifest(raw: bytes) -> Manifest:
    """Read a manifest; BackupError if it is none of this format."""
    try:
        said: dict[str, Any] = json.loads(raw)
        if said["kind"] != KIND or said["format"] != FORMAT:
            raise BackupError(f"a {said['kind']} of format {said['format']}; this program reads format {FORMAT}")
        files = {
            _allowed(name): (_natural(one["size"]), _bytes(one["sha256"], 32)) for name, one in said["files"].items()
        }
        return Manifest(
            _bytes(said["cluster_id"], 32),
            _natural(said["number"]),
            _bytes(said["log_public_key"], 65),
            str(said["made_at"])[:40],
            _natural(said["log_last"]),
            _natural(said["slot"]),
            files,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BackupError(f"not a backup's manifest: {type(error).__name__} {error}") from None


def is_evidence(name: str) -> bool:
    """Say whether a name in a backup is a file's of evidence."""
    folder, _, file = name.partition("/")
    return folder == EVIDENCE_NAME and FILE_NAME.fullmatch(file) is not None


def make_backup(home: ReplicaHome, out: Path) -> Manifest:
    """Write a backup of a replica's folder, running or not, to the new file `out`, mode 0600; return its manifest.

    BackupError or OSError if that fails; then there is no `out`.
    """
    if out.exists() or out.is_symlink():
        raise BackupError(f"{out}: exists already and is not overwritten; choose another name")
    made_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
            # State first: what the store forgets meanwhile lies below a later milestone, and peers have it.
            work = Path(name)
            slot = _copy_state(home, work / STATE_NAME)
            log_last = _copy_store(home, work / STORE_NAME)
            sources = dict(_sources(home, work))
            files = {name: _measure(path) for name, path in sources.items()}
            key = home.cluster.genesis.members[home.number].log_public_key
            manifest = Manifest(home.cluster.cluster_id, home.number, key, made_at, log_last, slot, files)
            partial = work / "backup"
            _write(partial, manifest, sources)
            os.link(partial, out)  # unlike a rename, this never replaces anything
        sync_directory(out.parent)
    except FileExistsError:
        raise BackupError(f"{out}: exists already and is not overwritten; choose another name") from None
    return manifest


def _copy_state(home: ReplicaHome, target: Path) -> int:
    if not _copy(home.state_path, target):
        return 0
    with closing(sqlite3.connect(target)) as db:
        row = db.execute("select slot from milestone").fetchone()
    return 0 if row is None else int(row[0])


def _copy_store(home: ReplicaHome, target: Path) -> int:
    if not _copy(home.store_path, target):
        return 0
    with closing(sqlite3.connect(target)) as db:
        unattested = "log = ? and attestation is null and first not in (select first from own_attestations)"
        db.execute(f"delete from groups where {unattested}", (home.number,))  # noqa: S608 - no input
        db.commit()
    return own_end(target, home.number)


def own_end(store: Path, number: int) -> int:
    """Return the last index of log `number` that a store holds with its attestation, 0 if none."""
    attested = "attestation is not null or first in (select first from own_attestations)"
    with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True)) as db:
        newest = db.execute(
            f"select ifnull(max(last), 0) from groups where log = ? and ({attested})",  # noqa: S608 - no input
            (number,),
        ).fetchone()[0]
    return int(newest)


def _copy(source: Path, target: Path) -> bool:
    """Copy a database as of one moment into one file; say whether there is one. BackupError if it is damaged."""
    if not source.exists():
        return False
    try:
        whole = f"{source.absolute().as_uri()}?mode=ro"
        with reading(), closing(sqlite3.connect(whole, uri=True)) as db, closing(sqlite3.connect(target)) as copy:
            target.chmod(0o600)
            db.backup(copy)
            copy.execute("pragma journal_mode = delete")
            found = copy.execute("pragma quick_check(1)").fetchall()
    except sqlite3.Error as error:
        if _is_out_of_room(error):
            raise BackupError(f"{target.parent.parent}: no room for a copy of {source}: {error}; free some") from error
        raise _damaged(source, str(error)) from error
    if found != [("ok",)]:
        raise _damaged(source, str(found[0][0]))
    return True


def _is_out_of_room(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def _damaged(source: Path, text: str) -> BackupError:
    return BackupError(
        f"{source}: damaged, and no backup was made of it: {text}. Stop the replica and start it again: it saves what "
        "can be read and has the rest from its peers; then make the backup"
    )


def _sources(home: ReplicaHome, work: Path) -> Iterator[tuple[str, Path]]:
    """Name what is packed, with its copy in `work`, where nobody else writes."""
    for name, content in _small_files(home).items():
        write_new(work / name, content, 0o600)
        yield name, work / name
    yield from ((name, work / name) for name in DATABASE_NAMES if (work / name).exists())
    (work / EVIDENCE_NAME).mkdir()
    for file in EvidenceFolder(home.evidence_path).files():
        name = f"{EVIDENCE_NAME}/{file.name}"
        shutil.copyfile(file, work / name)
        yield name, work / name


def _small_files(home: ReplicaHome) -> dict[str, bytes]:
    """Return what the small files hold at one moment: they are read until they are twice the same."""
    before: dict[str, bytes] = {}
    for _ in range(READS_MAX):
        try:
            found = _read_small_files(home)
        except FileNotFoundError as error:
            if home.is_renewed:  # by now its pair may have the usual names
                home = replace(home, is_renewed=False)
                continue
            raise BackupError(f"{error.filename}: is missing: put it back, or make this backup again") from error
        if found == before:
            return found
        before = found
    raise BackupError(f"{home.path}: its small files change all the time; find out what writes them, and try again")


def _read_small_files(home: ReplicaHome) -> dict[str, bytes]:
    needed = (
        home.path / SETTINGS_NAME,
        home.cluster_path,
        home.log_path / LOG_PUBLIC_KEY_NAME,
        home.key_path,
        home.certificate_path,
    )
    found = {name: _read(path) for name, path in zip(SMALL_NAMES, needed, strict=True)}
    # A certificate that waits counts without its key, too: that has its last name first.
    for name in (OWN_NAME,) if home.is_renewed else (*NEXT_NAMES, OWN_NAME):
        with suppress(FileNotFoundError):
            found[name] = _read(home.path / name)
    return found


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _measure(path: Path) -> tuple[int, bytes]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.digest()


def _write(partial: Path, manifest: Manifest, sources: dict[str, Path]) -> None:
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            raw = manifest.encode()
            archive.addfile(_member(MANIFEST_NAME, len(raw)), io.BytesIO(raw))
            for name, path in sources.items():
                with path.open("rb") as content:
                    archive.addfile(_member(name, manifest.files[name][0]), content)
        file.flush()
        os.fsync(file.fileno())


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _allowed(name: str) -> str:
    if name not in {*SMALL_NAMES, *NEXT_NAMES, *DATABASE_NAMES, OWN_NAME} and not is_evidence(name):
        raise ValueError(f"a file {name!r}, which no backup holds")
    return name


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a number that is none")
    return value


def _bytes(value: str, size: int) -> bytes:
    raw = bytes.fromhex(value)
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes, wanted are {size}")
    return raw
