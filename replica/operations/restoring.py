"""Restoring a backup. It never rolls a log back, because the log is neither in the backup nor touched here.

What is put back are the databases, and, where a service of its own keeps the log, the folder around them. The replica
then begins with what they hold, as after any loss (`replica.core.homecoming`): it knows from its log how far it had
come, stays mute until its peers have given it everything that it said since, and says nothing twice.

Refused, before anything is changed:

  - the backup of another replica, cluster or log, or one that was altered;
  - a replica that runs: its log is in use;
  - a log that ends before what the backup shows that it attested: somebody has rolled it back already. It must never
    speak again; a new log takes its place;
  - a log that is lost: no copy may stand in for it. A new log has to be enrolled;
  - databases that are whole, and a store that reaches as far as the backup's: there is nothing to restore.
"""

import hashlib
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from replica.cluster.clusterfile import CLUSTER_FILE_NAME, ClusterFile
from replica.cluster.home import (
    LOG_NAME,
    LOG_PUBLIC_KEY_NAME,
    SETTINGS_NAME,
    STATE_NAME,
    STORE_NAME,
    TLS_CERTIFICATE_NAME,
    TLS_KEY_NAME,
    ReplicaHome,
    load_home,
)
from replica.cluster.keys import write_new
from replica.cluster.memberlists import OWN_NAME
from replica.cluster.replicatoml import dump_settings, load_settings
from replica.cluster.writing import give_all, sync_directory
from replica.core.chain import earlier_list
from replica.operations.backup import (
    CHUNK,
    DATABASE_NAMES,
    EVIDENCE_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    NEXT_NAMES,
    SMALL_BYTES_MAX,
    SMALL_NAMES,
    BackupError,
    Manifest,
    decode_manifest,
    is_evidence,
    own_end,
)
from replica.shell.evidence import EvidenceFolder
from replica.shell.opening import open_trusted_log
from replica.shell.sqlitefile import finish_replacement, reading
from trustlog import BackendKind, LogInUseError, TrustLogError
from trustlog.service.client import ServiceBusyError, ServicePeerError

OTHER_USER: Final = (
    "whether its replica runs, its log's service tells only the user whom it serves: run this command as that user, "
    "with the replica stopped"
)
_NEW_LOG: Final = (
    "no copy may stand in for a log: it would say again, and differently, what it said already, and be exposed for "
    "ever. Make a new log (trustlog-replica keygen in a new folder) and have it take this one's place in the cluster "
    "(trustlog-replica member replace)"
)


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done. log_last: where the log ends. held: up to where the store holds it. files: what was put back.

    left_of_list: of which earlier list of members the backup's state is, which then was not put back; else None.
    """

    manifest: Manifest
    home: ReplicaHome
    log_last: int
    held: int
    files: tuple[str, ...]
    left_of_list: int | None

    @property
    def missing(self) -> int | None:
        """Return how many entries of the own log must come from peers; None if their state decides that."""
        return None if self.left_of_list is not None else self.log_last - self.held


def restore(archive: Path, folder: Path, log: Any) -> Restored:  # noqa: ANN401 - structlog
    """Put a backup into a replica's folder, which is made if a service keeps the log; see above for what is refused.

    BackupError, ConfigError or OSError; then the folder is as it was. What root does here, it does for whoever the
    folder belongs to, or the one around it.
    """
    owner = next(one for one in (folder, *folder.absolute().parents) if one.exists()).stat()
    try:
        with tarfile.open(archive, mode="r:") as opened:
            manifest = _manifest(opened)
            put = _into_folder if (folder / SETTINGS_NAME).exists() else _into_new_folder
            return put(opened, manifest, folder, log)
    except tarfile.TarError as error:
        raise BackupError(f"{archive}: not a backup, or damaged: {error}") from error
    except BackupError as error:
        raise BackupError(f"{archive}: {error}") from error
    finally:
        if folder.exists():
            give_all(folder, owner)


def unpack(archive: Path, folder: Path) -> Path:
    """Put what a backup holds into the new folder, to be looked into; no replica can run with it, without a log.

    Return the folder. BackupError or OSError if that cannot be; evidence is left out.
    """
    try:
        with tarfile.open(archive, mode="r:") as opened:
            manifest = _manifest(opened)
            (folder / LOG_NAME).mkdir(parents=True, mode=0o700)
            log_key = f"{LOG_NAME}/{LOG_PUBLIC_KEY_NAME}"
            small = {**dict(zip(SMALL_NAMES, SMALL_NAMES, strict=True)), LOG_PUBLIC_KEY_NAME: log_key}
            for name, place in small.items():
                write_new(folder / place, _small(opened, manifest, name), 0o600)
            if OWN_NAME in manifest.files:
                write_new(folder / OWN_NAME, _small(opened, manifest, OWN_NAME), 0o600)
            for name in [name for name in DATABASE_NAMES if name in manifest.files]:
                with (folder / name).open("xb") as file:
                    _copy(opened, manifest, name, file)
            settings = load_settings(folder / SETTINGS_NAME)
            (folder / SETTINGS_NAME).write_bytes(dump_settings(replace(settings, cluster=CLUSTER_FILE_NAME)))
    except tarfile.TarError as error:
        raise BackupError(f"{archive}: not a backup, or damaged: {error}") from error
    except BackupError as error:
        raise BackupError(f"{archive}: {error}") from error
    return folder


def _manifest(opened: tarfile.TarFile) -> Manifest:
    member = opened.next()
    if member is None or member.name != MANIFEST_NAME or not member.isreg() or member.size > MANIFEST_BYTES_MAX:
        raise BackupError("not a backup: it does not begin with a manifest")
    manifest = decode_manifest(_content(opened, member).read())
    seen = set()
    for other in opened.getmembers()[1:]:
        known = manifest.files.get(other.name)
        if not other.isreg() or known is None or other.size != known[0] or other.name in seen:
            raise BackupError(f"altered: {other.name!r} is not as its manifest says")
        seen.add(other.name)
    if missing := set(manifest.files) - seen:
        raise BackupError(f"cut off: {', '.join(sorted(missing))} are missing")
    for name, (size, _) in manifest.files.items():
        large = is_evidence(name) or name == OWN_NAME
        limit = SMALL_BYTES_MAX if name in {*SMALL_NAMES, *NEXT_NAMES} else EVIDENCE_BYTES_MAX if large else size
        if size > limit:
            raise BackupError(f"{name} has {size} bytes, the limit is {limit}")
    return manifest


def _into_folder(opened: tarfile.TarFile, manifest: Manifest, folder: Path, log: Any) -> Restored:  # noqa: ANN401
    home = load_home(folder)
    _check_same(manifest, home)
    with _staged(opened, manifest, folder) as staged, closing(_open_log(home, log)) as trusted:
        _check_end(manifest, home, trusted.last, staged)
        left = _leave_an_earlier_state(home, staged)
        _leave_what_is_better(manifest, home, staged)
        _put(opened, manifest, home, staged)
        return Restored(manifest, home, trusted.last, _held(home), tuple(staged), left)


def _into_new_folder(opened: tarfile.TarFile, manifest: Manifest, folder: Path, log: Any) -> Restored:  # noqa: ANN401
    if folder.exists() and any(folder.iterdir()):
        raise BackupError(f"{folder} holds files, and no {SETTINGS_NAME}: name the replica's folder, or a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    written: list[Path] = []
    try:
        _fill(opened, manifest, building, written)
        home = load_home(building)
        _check_same(manifest, home)
        with _staged(opened, manifest, building) as staged, closing(_open_log(home, log)) as trusted:
            _check_end(manifest, home, trusted.last, staged)
            left = _leave_an_earlier_state(home, staged)
            _put(opened, manifest, home, staged)
            done = (trusted.last, _held(home), tuple(staged), left)
        sync_directory(building)
        building.rename(folder)
        sync_directory(folder.parent)
        written.clear()
        return Restored(manifest, load_home(folder), *done)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        for path in written:
            path.unlink(missing_ok=True)


def _fill(opened: tarfile.TarFile, manifest: Manifest, building: Path, written: list[Path]) -> None:
    """Put the small files into a new folder, and cluster.toml where they expect it, unless one is there."""
    waiting = [name for name in NEXT_NAMES if name in manifest.files]
    for name in (SETTINGS_NAME, TLS_KEY_NAME, TLS_CERTIFICATE_NAME, *waiting):
        write_new(building / name, _small(opened, manifest, name), 0o600)
    if OWN_NAME in manifest.files:
        write_new(building / OWN_NAME, _small(opened, manifest, OWN_NAME), 0o644)
    settings = load_settings(building / SETTINGS_NAME)
    if settings.trusted_log.socket is None:
        in_tpm = settings.trusted_log.backend is BackendKind.TPM
        where = "was in a TPM, and ended with its folder" if in_tpm else "was in it, and is lost"
        raise BackupError(f"the replica's folder is not there; its log {where}. It is not in a backup: {_NEW_LOG}")
    (building / LOG_NAME).mkdir(mode=0o700)
    write_new(building / LOG_NAME / LOG_PUBLIC_KEY_NAME, _small(opened, manifest, LOG_PUBLIC_KEY_NAME), 0o644)
    place = (building / settings.cluster).resolve()
    if not place.exists():
        write_new(place, _small(opened, manifest, CLUSTER_FILE_NAME), 0o644)
        written.append(place)


def _check_same(manifest: Manifest, home: ReplicaHome) -> None:
    """Refuse the backup of another replica; whoever mixes them up is told which one it is."""
    cluster: ClusterFile = home.cluster
    if manifest.cluster_id != cluster.cluster_id:
        raise BackupError(
            f"of cluster {manifest.cluster_id.hex()}, {home.path} is of {cluster.cluster_id.hex()}: take the right one"
        )
    if manifest.number != home.number:
        raise BackupError(f"of replica {manifest.number}, {home.path} is replica {home.number}: take the right one")
    if manifest.log_public_key != cluster.genesis.members[home.number].log_public_key:
        raise BackupError(f"of another log than the one of {home.path}: take the right one")


def _open_log(home: ReplicaHome, log: Any) -> Any:  # noqa: ANN401 - a TrustedLog
    try:
        return open_trusted_log(home, log)
    except (LogInUseError, ServiceBusyError) as error:
        raise BackupError(f"{home.path}: its replica runs; stop the replica first: {error}") from error
    except ServicePeerError as error:
        raise BackupError(f"{home.path}: {OTHER_USER}: {error}") from error
    except TrustLogError as error:
        raise BackupError(f"the log of {home.path} cannot be opened: {error}. If it is lost: {_NEW_LOG}") from error


def _check_end(manifest: Manifest, home: ReplicaHome, log_last: int, staged: dict[str, Path]) -> None:
    """Refuse a log that ends before what it attested, as the backup or the store that is here shows."""
    stores = [staged[STORE_NAME]] if STORE_NAME in staged else []
    if _is_whole(home.store_path):
        stores.append(home.store_path)
    shown = max([manifest.log_last, *(own_end(store, home.number) for store in stores)])
    if shown > log_last:
        raise BackupError(
            f"the log of {home.path} ends at {log_last}, and entry {shown} shows that it attested more: the log was "
            f"rolled back. This replica must never run with it; {_NEW_LOG}"
        )


def _leave_an_earlier_state(home: ReplicaHome, staged: dict[str, Path]) -> int | None:
    """Leave out a state with which nobody can go on, as the members changed since; return of which list it is."""
    if STATE_NAME not in staged:
        return None
    with closing(sqlite3.connect(f"{staged[STATE_NAME].absolute().as_uri()}?mode=ro", uri=True)) as db:
        row = db.execute("select header from milestone").fetchone()
    of_list = None if row is None else earlier_list(bytes(row[0]), home.cluster.lists)
    if of_list is not None:
        staged.pop(STATE_NAME).unlink()
    return of_list


def _leave_what_is_better(manifest: Manifest, home: ReplicaHome, staged: dict[str, Path]) -> None:
    """Keep a store that is whole and reaches as far as the backup's; BackupError if the state is whole as well."""
    if STORE_NAME not in staged or not _is_whole(home.store_path):
        return
    end = own_end(home.store_path, home.number)
    if end < manifest.log_last:
        return
    if STATE_NAME not in staged or _is_whole(home.state_path):
        raise BackupError(
            f"{home.store_path} is whole and reaches entry {end} of this replica's log, the backup reaches "
            f"{manifest.log_last}, and has no state that would be needed: nothing has to be restored, and what the "
            "replica lacks comes from its peers. If you know better, move the file away first"
        )
    staged.pop(STORE_NAME).unlink()


def _is_whole(path: Path) -> bool:
    """Say whether there is a database whose structure SQLite finds in order."""
    if not path.exists():
        return False
    try:
        with reading(), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("pragma quick_check(1)").fetchall() == [("ok",)]
    except sqlite3.Error:
        return False


@contextmanager
def _staged(opened: tarfile.TarFile, manifest: Manifest, folder: Path) -> Iterator[dict[str, Path]]:
    """Extract the databases beside their places, verified; whatever is left of that vanishes in the end."""
    staged: dict[str, Path] = {name: folder / f"{name}.restoring" for name in DATABASE_NAMES if name in manifest.files}
    try:
        for name, path in staged.items():
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                path.chmod(0o600)
                _copy(opened, manifest, name, file)
                file.flush()
                os.fsync(file.fileno())
        yield staged
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _copy(opened: tarfile.TarFile, manifest: Manifest, name: str, target: IO[bytes]) -> None:
    digest = hashlib.sha256()
    source = _content(opened, opened.getmember(name))
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        target.write(chunk)
    if digest.digest() != manifest.files[name][1]:
        raise BackupError(f"{name} is damaged or altered: its SHA-256 is not the manifest's; take another backup")


def _small(opened: tarfile.TarFile, manifest: Manifest, name: str) -> bytes:
    if name not in manifest.files:
        raise BackupError(f"it has no {name}")
    content = _content(opened, opened.getmember(name)).read()
    if hashlib.sha256(content).digest() != manifest.files[name][1]:
        raise BackupError(f"{name} is damaged or altered: its SHA-256 is not the manifest's; take another backup")
    return content


def _content(opened: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = opened.extractfile(member)
    if content is None:
        raise BackupError(f"{member.name} is not a file")
    return content


def _held(home: ReplicaHome) -> int:
    return own_end(home.store_path, home.number) if home.store_path.exists() else 0


def _put(opened: tarfile.TarFile, manifest: Manifest, home: ReplicaHome, staged: dict[str, Path]) -> None:
    """Put the databases in place; those that were there are set aside."""
    for name, path in ((STORE_NAME, home.store_path), (STATE_NAME, home.state_path)):
        if name in staged:
            staged[name].replace(path.with_name(path.name + ".new"))
            sync_directory(path.parent)
            finish_replacement(path)
    evidence = EvidenceFolder(home.evidence_path)
    for name in filter(is_evidence, manifest.files):
        with suppress(OSError):  # it is not needed to go on
            evidence.write(name.partition("/")[2], _small(opened, manifest, name))
