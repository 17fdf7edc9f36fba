"""What survivors of a cluster still have: the state that each has come to, as its own restart would, and compared.

A survivor is the folder of a replica that is stopped, or a backup of one. Nothing in it is believed: the newest durable
milestone must be the one that a quorum attested, every group above it carries its log's signature, and what was decided
is found out by reading all logs by the protocol's rules, in a core that says nothing. So a survivor cannot make up a
state; it can only lack the end of the history, or keep it back.

Databases are copied and only the copies are opened. The trusted log's folder is locked meanwhile, which fails if the
replica runs. The log itself is opened only for the key of a sealed store, or for its last statement once more, if the
store was cut off before that was kept.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from replica.application import ApplicationLoadError, load_application
from replica.cluster.home import STATE_NAME, STORE_NAME, ReplicaHome, load_home
from replica.core.events import Effect, Executed
from replica.core.execution import Executor
from replica.core.machine import ReplicaCore
from replica.operations.backup import BackupError
from replica.operations.restoring import OTHER_USER, unpack
from replica.shell.atrest import CLEAR, Clear
from replica.shell.opening import open_trusted_log, payload_seal
from replica.shell.outbox import settle_last_group
from replica.shell.recovery import Replay, drop_former_logs, load_snapshot, open_store
from replica.shell.sqlitefile import StoreError, reading
from replica.shell.statestore import StateStore
from replica.shell.store import Store
from replica.shell.verify import EnvelopeVerifier, GroupVerifier
from trustlog import BackendKind, TrustLogError
from trustlog.errors import LogInUseError
from trustlog.sealed import lock_directory
from trustlog.service.client import ServiceBusyError, ServicePeerError

NOTES_MAX: Final = 20


class SurvivorError(Exception):
    """A survivor cannot be used, or two contradict each other; the text says which, why and what to do."""


@dataclass(slots=True)
class Survivor:
    """One survivor, read. place: as it was named. executor: the state after `executed`, as long as it is kept.

    began: the slot of the milestone it began with. top: the highest slot for which it holds a vote. batches: digests of
    what it executed above `began`, by slot. marked: the state's digests after the slots that were asked for.
    """

    place: Path
    home: ReplicaHome
    executed: int = 0
    began: int = 0
    top: int = 0
    digest: bytes = b""
    executor: Executor | None = None
    batches: dict[int, bytes] = field(default_factory=dict)
    marked: dict[int, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How it is called in texts."""
        return f"replica {self.home.number} ({self.place})"


def read_survivors(places: Sequence[Path], work: Path, log: Any) -> tuple[Survivor, list[Survivor]]:  # noqa: ANN401
    """Return the survivor that is furthest, with its state, and all of them in the order given.

    work: an empty directory for copies, about as large as all databases. SurvivorError; ConfigError for a folder that
    is none.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(place, work / str(number), log)) for number, place in enumerate(places)]
        _check_same_cluster(opened)
        read = []
        for one in opened:
            read.append(_read(one))
            if len(opened) > 1:
                read[-1].executor = None  # only one state at a time is kept in memory
        at = max(range(len(read)), key=lambda i: (read[i].executed, -i))
        if len(read) > 1:
            # Once more, to be compared where the others end.
            read[at] = _read(opened[at], {one.executed for one in read})
        _check_agreement(read[at], read)
        return read[at], read


@dataclass(frozen=True, slots=True)
class _Opened:
    """A survivor's copied databases, with what unseals them."""

    place: Path
    home: ReplicaHome
    state: Path
    store: Path
    seal: Clear
    notes: list[str]


class _Notes:
    """Stands for a structlog logger: what recovery says of damage becomes the survivor's notes."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def error(self, what: str, /, **values: object) -> None:
        """Note it, once."""
        said = f"{what}: " + ", ".join(f"{name} {value}" for name, value in values.items())
        if said not in self._notes and len(self._notes) < NOTES_MAX:
            self._notes.append(said)

    warning = error


@contextmanager
def _opened(place: Path, work: Path, log: Any) -> Iterator[_Opened]:  # noqa: ANN401 - structlog
    work.mkdir(mode=0o700)
    notes: list[str] = []
    is_backup = place.is_file()
    home = load_home(_unpacked(place, work) if is_backup else place, with_keys=False)
    copies = work / "copies"
    copies.mkdir(mode=0o700)
    state, store = copies / STATE_NAME, copies / STORE_NAME
    with ExitStack() as stack:
        lock = None if is_backup else _lock(home, notes)
        with ExitStack() as locked:
            if lock is not None:
                locked.callback(os.close, lock)
            for source, target in ((home.state_path, state), (home.store_path, store)):
                _copy(source, target)
            unlocked = locked.pop_all()
        settings = home.settings.trusted_log
        is_unsettled = _is_unsettled(store, home.number) and settings.backend is not BackendKind.TPM
        if settings.encrypt_store or settings.socket is not None or (is_unsettled and not is_backup):
            unlocked.close()  # whoever opens the log locks it
            trusted = _open_log(home, stack, notes, log, is_backup=is_backup)
        else:
            stack.enter_context(unlocked)
            trusted = None
        seal = CLEAR if trusted is None else _seal(home, trusted)
        if trusted is not None and is_unsettled:
            _settle(home, trusted, store, seal, notes)
        yield _Opened(place, home, state, store, seal, notes)


def _unpacked(archive: Path, work: Path) -> Path:
    try:
        return unpack(archive, work / "folder")
    except BackupError as error:
        raise SurvivorError(str(error)) from error


def _lock(home: ReplicaHome, notes: list[str]) -> int | None:
    """Lock the log that is in the folder, which fails if the replica runs; nothing is read or written."""
    if home.settings.trusted_log.socket is not None:
        return None
    try:
        return lock_directory(home.log_path)
    except FileNotFoundError:
        notes.append(f"its log, {home.log_path}, is lost, and not needed")
        return None
    except LogInUseError as error:
        raise SurvivorError(f"{home.path}: its replica runs; stop it first, and all others: {error}") from error


def _open_log(home: ReplicaHome, stack: ExitStack, notes: list[str], log: Any, *, is_backup: bool) -> Any:  # noqa: ANN401
    """Open the log for its store's key, or its last statement; None if it cannot be had and is not needed."""
    settings = home.settings.trusted_log
    if is_backup and settings.socket is None:
        raise SurvivorError(
            f"the backup of replica {home.number}: its payloads are sealed with a key that its log keeps, and that "
            "is in no backup: name the replica's folder, or another survivor"
        )
    try:
        return stack.enter_context(closing(open_trusted_log(home, log)))
    except (LogInUseError, ServiceBusyError) as error:
        raise SurvivorError(f"{home.path}: its replica runs; stop it first, and all others: {error}") from error
    except ServicePeerError as error:
        raise SurvivorError(f"{home.path}: {OTHER_USER}: {error}") from error
    except (TrustLogError, OSError) as error:
        if settings.encrypt_store:
            raise SurvivorError(
                f"{home.path}: its payloads are sealed with a key that its log keeps, and the log cannot be opened: "
                f"{error}. Without that log nobody can read them"
            ) from error
        notes.append(f"its log cannot be opened, so its last group may be missing: {error}")
        return None


def _seal(home: ReplicaHome, trusted: Any) -> Clear:  # noqa: ANN401 - a TrustedLog
    try:
        return payload_seal(home, trusted)
    except TrustLogError as error:
        raise SurvivorError(
            f"{home.path}: its payloads are sealed, and its log does not give the key: {error}"
        ) from error


def _copy(source: Path, target: Path) -> None:
    """Copy a database that nobody has open, with what its write-ahead log holds."""
    for suffix in ("", "-wal"):
        part = source.with_name(source.name + suffix)
        if part.exists():
            shutil.copyfile(part, target.with_name(target.name + suffix))


def _is_unsettled(store: Path, number: int) -> bool:
    """Say whether the own log's last group is here without its attestation, which the log may have given."""
    if not store.exists():
        return False
    unattested = "log = ? and attestation is null and first not in (select first from own_attestations)"
    try:
        with reading(), closing(sqlite3.connect(store)) as db:
            found = db.execute(f"select 1 from groups where {unattested}", (number,)).fetchone()  # noqa: S608 - no input
    except sqlite3.Error:
        return False  # damaged: that is said when it is read
    return found is not None


def _settle(home: ReplicaHome, trusted: Any, store: Path, seal: Clear, notes: list[str]) -> None:  # noqa: ANN401
    """Have the last own group's attestation once more: peers may have acted on it before it was kept here."""
    try:
        copy = open_store(store, home.cluster.cluster_id, home.number, durable=False, log=_Notes(notes), seal=seal)
        with closing(copy):
            settle_last_group(home.number, trusted, copy)
    except (StoreError, TrustLogError) as error:
        notes.append(str(error))


def _check_same_cluster(opened: Sequence[_Opened]) -> None:
    first = opened[0]
    for other in opened[1:]:
        if other.home.cluster.cluster_id != first.home.cluster.cluster_id:
            raise SurvivorError(
                f"{other.place} is of cluster {other.home.cluster.cluster_id.hex()}, {first.place} of "
                f"{first.home.cluster.cluster_id.hex()}: name survivors of one cluster"
            )


def _read(opened: _Opened, marks: set[int] | None = None) -> Survivor:
    """Have a core read what there is; with `marks` slot by slot, and the state is kept."""
    home, genesis = opened.home, opened.home.cluster.genesis
    notes = _Notes(opened.notes)
    mine = (home.cluster.cluster_id, home.number)
    verifier = GroupVerifier(genesis)
    with ExitStack() as stack:
        try:
            application = load_application(genesis.application)
            state = stack.enter_context(closing(StateStore(opened.state, *mine, durable=False, seal=opened.seal)))
            with_state = _has_state(state)
            snapshot = load_snapshot(state, home.cluster, application, verifier, notes)
            store = open_store(opened.store, *mine, durable=False, log=notes, seal=opened.seal)
            stack.enter_context(closing(store))
        except (ApplicationLoadError, StoreError) as error:
            raise SurvivorError(f"{opened.place}: {error}") from error
        if with_state and snapshot is None:
            raise SurvivorError(
                f"{opened.place}: its state cannot be used: {'; '.join(opened.notes)}. Take another survivor"
            )
        drop_former_logs(store, genesis, verifier, home.number)
        fixed = (genesis, home.number, application, verifier.initial_heads(), EnvelopeVerifier())
        core = ReplicaCore(*fixed, snapshot=snapshot)
        survivor = Survivor(opened.place, home, began=core.executed, notes=opened.notes)
        _replay(core, store, verifier, survivor, marks or set(), notes)
    if core.executor.outdated is not None:
        versions, known = core.executor.versions, core.executor.knows_version
        raise SurvivorError(
            f"{opened.place}: version {versions.present} of the application {genesis.application} is in force after "
            f"slot {versions.after}, and the code here knows no version above {known}: install the code that knows it "
            "on this machine, and give the same command again"
        )
    if core.halted is not None:
        raise SurvivorError(f"{opened.place}: it cannot be read to its end: {core.halted}. Take another survivor")
    survivor.executed, survivor.top, survivor.digest = core.executed, core.top, core.executor.digest()
    survivor.executor = core.executor
    return survivor


def _has_state(state: StateStore) -> bool:
    view = state.load()
    if view is None:
        return False
    view.close()
    return True


def _replay(
    core: ReplicaCore, store: Store, verifier: GroupVerifier, survivor: Survivor, marks: set[int], log: _Notes
) -> None:
    if marks:
        core.work_max = 1  # then one call executes one slot at the most
    _mark(core, survivor, marks)
    for effects in Replay(core, store, verifier, log).run():
        _note(effects, core, survivor, marks)
        while core.has_more:
            _note(core.handle(), core, survivor, marks)


def _note(effects: Sequence[Effect], core: ReplicaCore, survivor: Survivor, marks: set[int]) -> None:
    executed = {effect.slot: effect.batch.digest for effect in effects if isinstance(effect, Executed)}
    survivor.batches.update(executed)
    if executed:
        _mark(core, survivor, marks)


def _mark(core: ReplicaCore, survivor: Survivor, marks: set[int]) -> None:
    if core.executed in marks:
        survivor.marked[core.executed] = core.executor.digest()


def _check_agreement(best: Survivor, survivors: Sequence[Survivor]) -> None:
    """SurvivorError if one executed something else than the furthest, as far as both are here."""
    for other in survivors:
        differing = min(
            (slot for slot, digest in other.batches.items() if best.batches.get(slot, digest) != digest), default=None
        )
        here = best.marked.get(other.executed, other.digest)
        if differing is not None:
            what = f"after slot {differing - 1}: {best.name} executed {_short(best.batches[differing])} at slot "
            what += f"{differing}, {other.name} {_short(other.batches[differing])}"
        elif here != other.digest:
            what = f"at slot {other.executed}: the state after it has the digest {_short(here)} with {best.name}, "
            what += f"{_short(other.digest)} with {other.name}"
        else:
            continue
        raise SurvivorError(
            f"two survivors contradict each other {what}. Nothing was made. One of them was tampered with, the "
            "application is not deterministic, or more logs than f are broken: find out which one is right "
            "(trustlog-replica audit names the folder that does not verify), and name that one alone"
        )


def _short(digest: bytes) -> str:
    return digest.hex()[:16]
