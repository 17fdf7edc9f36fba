"""From what the disk holds to a core: the state after the newest milestone, then every log from its cut on.

Nothing on the disk is believed. The state must have the digests that q logs attested; every group is verified as if it
came from the network. What is damaged is named, and dropped or left out: the core asks the peers for it (design
section 6). The own log is whole only if it ends where the trusted log does, so a torn tail is never taken for the end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replica.application import Application
from replica.cluster.clusterfile import ClusterFile
from replica.core.batch import decode_batch
from replica.core.chain import earlier_list, found, said_under
from replica.core.checkpoint import Header, check_certificate, decode_header, founding_header
from replica.core.events import Effect, GroupReceived
from replica.core.founding import check_maps
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.machine import ReplicaCore
from replica.core.snapshot import Fetched, Snapshot
from replica.shell.atrest import CLEAR, Clear
from replica.shell.salvage import salvage
from replica.shell.sqlitefile import EARLIER, StoreError
from replica.shell.statestore import PinnedState, StateStore, discard_state
from replica.shell.statetree import StateDamagedError
from replica.shell.store import GroupDamagedError, Store, StoreDamagedError, StoredGroup
from replica.shell.trustedlog import TrustedLog
from replica.shell.verify import GroupVerifier
from trustlog import VerificationError

# Unread entries of one log that recovery lets pile up before it turns to another log.
UNREAD_MAX = 256
# Places of a log that cannot be read, one after the other, before the rest of it is left to the peers.
DAMAGES_MAX = 4096


def open_state(
    path: Path,
    cluster_id: bytes,
    number: int,
    *,
    durable: bool,
    log: Any,  # noqa: ANN401 - structlog
    seal: Clear = CLEAR,
) -> StateStore:
    """Open the state file; a damaged one is moved aside, and an empty one begun."""
    try:
        return StateStore(path, cluster_id, number, durable=durable, seal=seal)
    except StateDamagedError as error:
        aside = discard_state(path)
        log.error("state file damaged; peers are asked for the state", error=str(error), moved_to=str(aside))  # noqa: TRY400 - no traceback
        return StateStore(path, cluster_id, number, durable=durable, seal=seal)


def open_store(
    path: Path,
    cluster_id: bytes,
    number: int,
    *,
    durable: bool,
    log: Any,  # noqa: ANN401 - structlog
    seal: Clear = CLEAR,
) -> Store:
    """Open the log store, whose structure is checked; of a damaged file all that can be read goes into a new one."""
    try:
        store = Store(path, cluster_id, number, durable=durable, seal=seal)
        problems = store.problems()
        if not problems:
            make_shrinkable(store, log)
            return store
        store.close()
    except StoreDamagedError as error:
        problems = [str(error)]
    log.error("log store damaged; what can be read of it is saved", problems=problems)
    saved = salvage(path, cluster_id, number, seal)
    missing = [f"log {gap.log}: {gap.first} to {gap.last or 'its end'}" for gap in saved.missing]
    log.error("log store salvaged", groups=saved.groups, missing=missing, damaged_file=str(saved.aside))
    return Store(path, cluster_id, number, durable=durable, seal=seal)


def make_shrinkable(kept: Store | StateStore, log: Any) -> None:  # noqa: ANN401 - structlog
    """Have a file that an earlier version made give room back to the disk, which takes seconds once; say why not."""
    why = kept.make_shrinkable()
    if why:
        text = "a file of an earlier version keeps its size, whatever is deleted in it; the next start tries again"
        log.warning(text, path=str(kept.path), why=why)


def load_snapshot(
    store: StateStore,
    cluster: ClusterFile,
    application: Application,
    verifier: GroupVerifier,
    log: Any,  # noqa: ANN401 - structlog
) -> Snapshot | None:
    """Return the state that the file holds, verified; None if there is none, or it is of no use and was moved aside.

    The last state of the list of members before the present one is what the present one begins with. An earlier one, of
    an old backup or of a replica that was away across a change, is of no use and no damage. StoreError if it is to be
    that with which a cluster was founded, and is another one: that is no damage either, somebody put it there.
    """
    genesis, before = cluster.genesis, cluster.before
    try:
        view = store.load()
        if view is None:
            if genesis.founding is not None and not genesis.list_number:
                log.warning("the state with which this cluster was founded is not here; peers are asked for one")
            return None
        with view:
            _check_founding(view, genesis)
            earlier, slot = earlier_list(view.header, cluster.lists), view.slot
            if earlier is None:
                _, agreed = said_under(view.header, genesis, before)
                if agreed is genesis:
                    return _verified(view, genesis, application, verifier)
                last = _verified(view, agreed, application, GroupVerifier(agreed))
                return found(last, genesis, verifier.initial_heads())
    except (StateDamagedError, LayoutError) as error:
        aside = store.discard()
        log.error("state file damaged; peers are asked for the state", error=str(error), moved_to=str(aside))  # noqa: TRY400 - no traceback
        return None
    log.warning(
        "the state is of an earlier list of members and is not used; peers are asked for one of the present list",
        slot=slot,
        of_list=earlier,
        present_list=genesis.list_number,
        moved_to=str(store.discard(EARLIER)),
    )
    return None


def _check_founding(view: PinnedState, genesis: Genesis) -> None:
    founding, expected = genesis.founding, founding_header(genesis)
    if founding is None or expected is None or view.slot > genesis.base:
        return
    try:
        _compare(decode_header(view.header, genesis.n), expected)
        check_maps(expected, *(tree.root() for tree in view.trees))
    except LayoutError as error:
        raise StoreError(
            f"{view.path}: begins with another state than this cluster was founded with, which is that of cluster "
            f"{founding.cluster_id.hex()} after slot {founding.slot}: {error}. Compare cluster.toml with the other "
            "replicas'; if it is theirs, move this file away and start again: a replica that has the state hands it out"
        ) from error


def _compare(header: Header, expected: Header) -> None:
    check_maps(expected, header.application, header.table)
    if header != expected:
        raise LayoutError(
            f"slot {header.slot} and agreed time {header.time_ms}, and {expected.slot} and "
            f"{expected.time_ms} belong there, or other logs"
        )


def _verified(view: PinnedState, genesis: Genesis, application: Application, verifier: GroupVerifier) -> Snapshot:
    header = decode_header(view.header, genesis.n)
    check_certificate(view.certificate, header, genesis, verifier.entry)
    if [tree.root() for tree in view.trees] != [header.application, header.table]:
        raise LayoutError("the state does not have the digests that a quorum attested")
    states = tuple(map(LogState.decode, view.logs))
    if [(state.author, state.position) for state in states] != list(enumerate(header.cut)):
        raise LayoutError("the logs' reduced states are not those at the cut")
    batches = tuple(decode_batch(raw, genesis.cluster_id(), genesis.limits) for raw in view.batches)
    state, table = (tree.frozen() for tree in view.trees)
    return Fetched(header, view.certificate, states, batches, state, table).snapshot(application, genesis)


def drop_former_logs(store: Store, genesis: Genesis, verifier: GroupVerifier, own: int) -> None:
    """Drop what the store holds of logs that are members no more, whose numbers others have now."""
    for member in genesis.members:
        if not member.since or member.number == own:
            continue
        try:
            first = next(iter(store.groups(member.number, 1)), None)
            if first is not None:
                verifier.verify(member.number, first.raw)
        except (LayoutError, VerificationError, GroupDamagedError):
            store.drop_from(member.number, 1)


def name_what_is_missing(core: ReplicaCore, begun_at: int, trusted_log: TrustedLog, store: Store, log: Any) -> None:  # noqa: ANN401
    """Say so if the disk held less of the own log than the trusted log attested and others may still need.

    SQLite drops what follows the first torn or rotten page of a write-ahead log without a word: for its file format
    that is where the log ends. Only the trusted log knows how far it reached. begun_at: the own log's index at the
    cut of the state that the core began with. Without any state of the present members nothing is missing but that:
    what this log said before it, nobody needs, and what it said later comes with it.
    """
    if core.needs_state:
        text = "no state of the present members is here; peers are asked for it, and for what this log said after it"
        log.info(text, of_list=core.genesis.list_number, log_last=trusted_log.last)
        return
    if begun_at + 1 < trusted_log.low:
        text = (
            f"the state file beside {store.path} reaches entry {begun_at} of this replica's own log, and a later state "
            f"was written, for which the log was truncated below {trusted_log.low}: the end of the file or of its "
            "write-ahead log is damaged or lost"
        )
        log.error("state file incomplete; peers are asked for the state", text=text)
    if core.received(core.number) < trusted_log.last:
        first, last = core.received(core.number) + 1, trusted_log.last
        text = (
            f"{store.path}: entries {first} to {last} of this replica's own log were attested and are not there: the "
            "end of the file or of its write-ahead log is damaged or lost"
        )
        log.error("log store incomplete; peers are asked for the rest", first=first, last=last, text=text)


class Replay:
    """Hands a core what the store holds beyond the core's beginning, all logs in step.

    stored: up to where each log is on disk without a gap. beyond: by log and first index, the ends of the groups that
    are on disk as well, behind a gap.
    """

    def __init__(self, core: ReplicaCore, store: Store, verifier: GroupVerifier, log: Any) -> None:  # noqa: ANN401
        self.stored = [core.received(number) for number in range(core.genesis.n)]
        self.beyond: dict[tuple[int, int], int] = {}
        self._core = core
        self._store = store
        self._verifier = verifier
        self._log = log
        self._named = ""

    def run(self) -> Iterator[list[Effect]]:
        """Yield what the core wants done, group after group; `stored` says up to where each log is on disk."""
        logs = range(self._core.genesis.n)
        rows = {log: self._groups(log) for log in logs}
        held = {log: next(rows[log], None) for log in logs}
        moved = True
        while moved and self._core.halted is None:
            moved = False
            for log in logs:
                while (group := held[log]) is not None and self._core.unread(log) < UNREAD_MAX:
                    if group.first <= self.stored[log] + 1:
                        self.stored[log] = max(self.stored[log], group.last)
                    else:
                        self.beyond[log, group.first] = group.last
                    yield self._core.handle(GroupReceived(group))
                    held[log] = next(rows[log], None)
                    moved = True

    def _groups(self, log: int) -> Iterator[VerifiedGroup]:
        """Yield a log's groups, those beyond a damaged one too: whoever reads them verifies them anyhow."""
        at = self.stored[log] + 1
        for _ in range(DAMAGES_MAX):
            try:
                for row in self._store.groups(log, at):
                    if row.attestation is None:
                        return  # the own log's last group, not attested yet
                    group = self._verify(row)
                    at = row.last + 1
                    yield group
            except GroupDamagedError as error:
                at = self._beyond_damage(log, max(at, error.first), str(error))
            else:
                return
        self._log.error("too much damage in a log; peers are asked for the rest of it", log=log, first=at)
        if log != self._core.number:
            self._store.drop_from(log, at)

    def _verify(self, row: StoredGroup) -> VerifiedGroup:
        try:
            group = self._verifier.verify(row.log, row.raw)
        except (LayoutError, VerificationError) as error:
            text = f"{self._store.path}: the group {row.first} to {row.last} of log {row.log} is damaged: {error}"
            raise GroupDamagedError(text, row.log, row.first) from error
        if (group.first, group.last) != (row.first, row.last):
            text = f"{self._store.path}: another group stands in the place of {row.first} to {row.last} of {row.log}"
            raise GroupDamagedError(text, row.log, row.first)
        return group

    def _beyond_damage(self, log: int, first: int, text: str) -> int:
        """Drop a damaged group of another log, leave one of the own log to be replaced; say where to read on."""
        if text != self._named:  # a group is looked for at each of its indexes
            self._log.error("damage in the store; peers are asked for what is missing", log=log, first=first, text=text)
        self._named = text
        if log == self._core.number:
            return first + 1
        self._store.drop(log, first)
        return first
