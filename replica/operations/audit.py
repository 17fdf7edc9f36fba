"""Auditing a replica's folder offline: all that it holds of every log, and its state, verified from the beginning.

For every group of every log: that it is well formed, that the log's key signed it, that it continues the group before
it, and that every entry is one that a correct replica writes, envelopes' signatures included. From the newest durable
milestone on, all logs are then read together, as every replica reads them, and each entry is judged by the protocol's
rules; what lies before it was certified by a quorum and is retained for late peers only. The milestone itself: its
certificate, and every key of the state against the digests in it.

Several folders, of one cluster, are compared with each other: two groups that end at one index with two heads are two
histories of one log, and prove its trusted part broken.

Nothing is changed, and no key is needed but the public ones in cluster.toml (and a sealed store's).
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from replica.cluster.home import ReplicaHome
from replica.cluster.memberlists import EntryVerifier
from replica.core.batch import decode_batch
from replica.core.chain import founding_of, said_under
from replica.core.checkpoint import check_certificate, is_founding, state_digest
from replica.core.entries import decode_judged
from replica.core.evidence import Basis
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.proving import Ground, Replay
from replica.core.rules import Violation, Wait
from replica.shell.atrest import CLEAR, Clear
from replica.shell.sqlitefile import StoreError
from replica.shell.statestore import PinnedState
from replica.shell.statetree import StateDamagedError
from replica.shell.store import StoredGroup, is_group_row, unsealed_row
from replica.shell.verify import EnvelopeVerifier, GroupVerifier
from trustlog import VerificationError

# Problems of one log, or of one state, that are named; more are counted.
NAMED_MAX: Final = 20
# Entries of one log that may wait for others before the others are read on.
UNREAD_MAX: Final = 256
_ROWS: Final = """
select g.first, g.last, coalesce(g.attestation, a.attestation), g.payloads
from groups g left join own_attestations a on g.attestation is null and a.first = g.first
where g.log = ? order by g.first
"""
_DAMAGED: Final = "stop the replica and start it again: what is damaged is named, dropped and had from its peers"
_ACCUSED: Final = "keep this folder: it is evidence. That log can never be trusted again: replace its replica"

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it must be. where: the file, and the log and entries in it, or the part of the state."""

    file: str
    where: str
    text: str
    remedy: str


@dataclass(slots=True)
class LogSummary:
    """What was found of one log: groups and entries verified, the first and last index, and the gaps between."""

    log: int
    groups: int = 0
    entries: int = 0
    first: int = 0
    last: int = 0
    judged: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Findings:
    """What an audit of one folder found. slot: of its milestone, 0 without one. keys: of the state, verified."""

    number: int
    path: Path
    logs: list[LogSummary]
    slot: int = 0
    keys: int = 0
    faults: list[Fault] = field(default_factory=list)
    unnamed: int = 0
    notes: list[str] = field(default_factory=list)


class Audit:
    """An audit of folders of one cluster, one after the other, which are compared with those before."""

    def __init__(self) -> None:
        self._heads: dict[tuple[int, int], tuple[bytes, str]] = {}  # by log and last index: head, and who has it

    def size(self, home: ReplicaHome) -> int:
        """Return how many groups and keys there are in a folder, for a progress bar."""
        total = 0
        for path, table in ((home.store_path, "groups"), (home.state_path, "entries")):
            if path.exists():
                with suppress(sqlite3.Error), closing(_open(path)) as db:  # damage is said when it is read
                    total += db.execute(f"select count(*) from {table}").fetchone()[0]  # noqa: S608 - ours
        return total

    def run(self, home: ReplicaHome, advance: Advance, seal: Clear = CLEAR) -> Findings:
        """Audit a folder; `advance` is called with how many groups and keys were verified since."""
        auditor = _FolderAudit(home, seal, self._heads, advance)
        auditor.run()
        return auditor.found


class _RuleReader(Replay):
    """Reads logs by the protocol's rules and keeps every violation, instead of stopping at the one in question."""

    def __init__(self, home: ReplicaHome, keys: GroupVerifier, basis: Basis | Ground | None) -> None:
        super().__init__(home.cluster.genesis, keys, basis, EnvelopeVerifier())
        self.violations: list[tuple[int, int, Violation]] = []

    def unread(self, log: int) -> int:
        """Return how many entries of `log` wait to be read."""
        return len(self._unread[log])

    def read_on(self) -> None:
        """Read all logs as far as possible."""
        self.run(-1, 0)

    def _read_next(self, log: int) -> Violation | Wait | None:
        index = self._unread[log][0][0]
        outcome = super()._read_next(log)
        if isinstance(outcome, Violation):
            self.violations.append((log, index, outcome))
        return outcome


class _FolderAudit:
    """One folder."""

    def __init__(
        self, home: ReplicaHome, seal: Clear, heads: dict[tuple[int, int], tuple[bytes, str]], advance: Advance
    ) -> None:
        genesis = home.cluster.genesis
        self.found = Findings(home.number, home.path, [LogSummary(log) for log in range(genesis.n)])
        self._home = home
        self._seal = seal
        self._heads = heads
        self._advance = advance
        self._verifier = GroupVerifier(genesis)
        self._envelopes = EnvelopeVerifier()
        self._named: dict[str, int] = {}
        self._starts = [(0, head) for head in self._verifier.initial_heads()]  # where the milestone begins

    def run(self) -> None:
        """Audit the state, then the logs."""
        founding = self._home.cluster.genesis.founding
        if founding is not None:
            origin = f"cluster {founding.cluster_id.hex()}, which was its own after slot {founding.slot}"
            self.found.notes.append(
                f"history begins with a state of {origin}: the genesis names it, no log here shows it"
            )
        basis = self._state()
        if not self._home.store_path.exists():
            self.found.notes.append(f"{self._home.store_path} is not there")
            return
        try:
            with closing(_open(self._home.store_path)) as db:
                texts = [bytes(row[0]).decode(errors="replace") for row in db.execute("pragma quick_check(5)")]
                if texts != ["ok"]:
                    self._fault(self._home.store_path, "its structure", "; ".join(texts), _DAMAGED)
                self._logs(db, basis)
        except sqlite3.Error as error:
            self._fault(self._home.store_path, "its structure", str(error), _DAMAGED)

    def _fault(self, file: Path, where: str, text: str, remedy: str, of: str = "") -> None:
        self._named[of or where] = self._named.get(of or where, 0) + 1
        if self._named[of or where] > NAMED_MAX:
            self.found.unnamed += 1
        else:
            self.found.faults.append(Fault(str(file), where, text, remedy))

    # The state

    def _state(self) -> Basis | Ground | None:
        path = self._home.state_path
        if not path.exists():
            return None
        try:
            with PinnedState(path, self._seal) as view:
                if not view.exists:
                    return None
                return self._milestone(view)
        except StateDamagedError as error:
            self._fault(path, "the state", str(error), _DAMAGED)
        except (sqlite3.Error, StoreError) as error:
            self._fault(path, "its structure", str(error), _DAMAGED)
        return None

    def _milestone(self, view: PinnedState) -> Basis | Ground | None:
        present = self._home.cluster.genesis
        try:
            header, genesis = said_under(view.header, present, self._home.cluster.before)
            check_certificate(view.certificate, header, genesis, EntryVerifier(genesis))
            if tuple(map(state_digest, view.logs)) != header.logs:
                raise LayoutError("the logs' reduced states are not those that a quorum attested")  # noqa: TRY301
            for raw in view.batches:
                decode_batch(raw, genesis.cluster_id(), genesis.limits)
        except LayoutError as error:
            self._fault(view.path, "the milestone", str(error), _DAMAGED)
            return None
        self.found.slot = header.slot
        for tree, wanted in enumerate((header.application, header.table)):
            name = ("the application's state", "the client table")[tree]
            try:
                for _ in view.trees[tree].entries():
                    self.found.keys += 1
                    self._advance(1)
                if view.trees[tree].root() != wanted:
                    self._fault(view.path, name, "does not have the digest that a quorum attested", _DAMAGED)
            except StateDamagedError as error:
                self._fault(view.path, name, str(error), _DAMAGED)
        if genesis is not present:
            founding, states = founding_of(header, present, self._verifier.initial_heads())
            self._starts = list(zip(founding.cut, founding.heads, strict=True))
            return Ground(header.slot, states, tuple(self._starts))
        if not is_founding(header, genesis):
            self._starts = list(zip(header.cut, header.heads, strict=True))
        return Basis(view.header, view.certificate, view.logs)

    # The logs

    def _logs(self, db: sqlite3.Connection, basis: Basis | Ground | None) -> None:
        logs = range(len(self.found.logs))
        reader = self._reader(basis)
        groups = {log: self._groups(db, log) for log in logs}
        ahead: dict[int, VerifiedGroup | None] = {log: next(groups[log], None) for log in logs}
        broken = set[int]()  # logs that are not whole beyond the milestone: judged up to there
        moved = True
        while moved:
            moved = False
            for log in logs:
                while (group := ahead[log]) is not None and (log in broken or reader.unread(log) < UNREAD_MAX):
                    if group.last > reader.end(log) and log not in broken:
                        try:
                            reader.add(group)
                        except LayoutError:
                            broken.add(log)
                    ahead[log] = next(groups[log], None)
                    moved = True
            before = sum(map(reader.unread, logs))
            reader.read_on()
            moved = moved or sum(map(reader.unread, logs)) < before
            if not moved and any(group is not None for group in ahead.values()):
                # The rest waits for entries that are not here: it is verified, and not judged.
                broken.update(log for log in logs if ahead[log] is not None)
                moved = True
        self._conclude(reader)

    def _reader(self, basis: Basis | Ground | None) -> _RuleReader:
        try:
            return _RuleReader(self._home, self._verifier, basis)
        except LayoutError as error:
            self._fault(self._home.state_path, "the milestone", str(error), _DAMAGED)
            return _RuleReader(self._home, self._verifier, None)

    def _conclude(self, reader: _RuleReader) -> None:
        for log, index, violation in reader.violations:
            text = f"breaks the rule {violation.rule}: {violation.text}"
            self._fault(self._home.store_path, f"log {log}, entry {index}", text, _ACCUSED, f"rules {log}")
        for summary in self.found.logs:
            state, start = reader.states[summary.log], self._starts[summary.log][0]
            summary.judged = max(0, state.position - start)
            waiting = reader.unread(summary.log)
            if waiting:
                why = reader.waits.get(summary.log)
                text = "" if why is None else f": the next one waits for {why.why}"
                self.found.notes.append(f"log {summary.log}: the last {waiting} entries cannot be judged here{text}")
            for first, last in summary.gaps:
                where = f"log {summary.log}, entries {first} to {last}"
                if last <= start:
                    self.found.notes.append(f"{where} are not here; the milestone covers them")
                else:
                    text = "are missing between what is here"
                    self._fault(self._home.store_path, where, text, _DAMAGED, f"gaps {summary.log}")

    def _groups(self, db: sqlite3.Connection, log: int) -> Iterator[VerifiedGroup]:
        """Yield every group of a log that verifies; name the others, and what does not follow what is before it."""
        summary = self.found.logs[log]
        last, head = 0, self._starts[log][1] if self._starts[log][0] == 0 else None
        for row in self._rows(db, log):
            where = f"log {log}, entries {row.first} to {row.last}"
            if row.attestation is None:
                if log != self._home.number:
                    self._fault(self._home.store_path, where, "have no attestation", _DAMAGED, f"log {log}")
                continue  # own, and about to be attested when the replica stopped
            group = self._verified(row, where)
            if group is None:
                last, head = row.last, None
                continue
            if summary.groups and group.first > last + 1:
                summary.gaps.append((last + 1, group.first - 1))
                head = None
            elif not summary.groups and group.first > 1:
                head = None  # forgotten before: allowed
            self._follows(group, where, last, head)
            summary.groups, summary.entries = summary.groups + 1, summary.entries + len(group.payloads)
            summary.first, summary.last = summary.first or group.first, group.last
            last, head = group.last, group.head_after
            yield group

    def _rows(self, db: sqlite3.Connection, log: int) -> Iterator[StoredGroup]:
        for found in db.execute(_ROWS, (log,)):
            self._advance(1)
            row = unsealed_row(self._seal, log, found)
            if is_group_row(row):
                yield StoredGroup(log, *row)  # type: ignore[arg-type]
            else:
                first = found[0] if type(found[0]) is int else "?"
                where = f"log {log}, the group at entry {first}"
                self._fault(self._home.store_path, where, "is no group, or does not unseal", _DAMAGED, f"log {log}")

    def _verified(self, row: StoredGroup, where: str) -> VerifiedGroup | None:
        genesis = self._home.cluster.genesis
        try:
            group = self._verifier.verify(row.log, row.raw)
            if (group.first, group.last) != (row.first, row.last):
                raise LayoutError(f"entries {group.first} to {group.last} stand in their place")  # noqa: TRY301
        except (LayoutError, VerificationError) as error:
            text = f"do not verify: {error}"
            self._fault(self._home.store_path, where, text, _DAMAGED, f"log {row.log}")
            return None
        for index, payload in enumerate(group.payloads, group.first):
            try:
                decode_judged(payload, genesis, genesis.cluster_id(), self._envelopes)
            except LayoutError as error:
                entry = f"log {row.log}, entry {index}"
                text = f"was attested by its log and is malformed: {error}"
                self._fault(self._home.store_path, entry, text, _ACCUSED, f"log {row.log}")
        return group

    def _follows(self, group: VerifiedGroup, where: str, last: int, head: bytes | None) -> None:
        file, of = self._home.store_path, f"log {group.author}"
        if group.first <= last:
            self._fault(file, where, f"overlap what ends at {last}", _DAMAGED, of)
        elif head is not None and group.head_before != head:
            text = f"do not continue entry {last}: two histories of one log"
            self._fault(file, where, text, _ACCUSED, of)
        cut, certified = self._starts[group.author]
        if cut and group.last == cut and group.head_after != certified:
            text = "have another head than a quorum attested: two histories of one log"
            self._fault(file, where, text, _ACCUSED, of)
        mine = f"replica {self._home.number}"
        other, whose = self._heads.setdefault((group.author, group.last), (group.head_after, mine))
        if other != group.head_after:
            text = f"are others than {whose} holds up to that index: two histories of one log"
            self._fault(file, where, text, _ACCUSED, of)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    db.text_factory = bytearray
    return db
