"""Auditing a replica's folder offline: all that it holds of every log, and its state, verified from the beginning.

For every group of every log: that it is well formed, that the log's key signed it, that it continues the group before
it, and that every entry is one that a correct replica writes, envelopes' signatures included. From the newest durable
milestone on, all logs are then read together, as every replica reads them, and each entry is judged by the protocol's
rules; what lies before it was certified by a quorum and is retained for late peers only. Where the members changed,
each entry is judged by the list under which it was said (`replica.operations.tenure`). The milestone itself: its
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
from replica.core.evidence import Basis
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.members import Membership
from replica.core.proving import Ground, Replay
from replica.core.rules import Violation, Wait
from replica.core.sessions import MEMBERS_RECORDS
from replica.core.state import BucketedMap
from replica.operations.tenure import Tenure, may_end_with
from replica.shell.atrest import CLEAR, Clear
from replica.shell.sqlitefile import StoreError, find_foreign, reading
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
# By a log's key, as numbers change hands, and last index: the head, and who has it.
Heads = dict[tuple[bytes, int], tuple[bytes, str]]


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
        self._heads: Heads = {}

    def size(self, home: ReplicaHome) -> int:
        """Return how many groups and keys there are in a folder, for a progress bar."""
        total = 0
        for path, table in ((home.store_path, "groups"), (home.state_path, "entries")):
            if path.exists():
                with suppress(sqlite3.Error), reading(), closing(_open(path)) as db:  # damage is said when it is read
                    total += db.execute(f"select count(*) from {table}").fetchone()[0]  # noqa: S608 - ours
        return total

    def run(self, home: ReplicaHome, advance: Advance, seal: Clear = CLEAR) -> Findings:
        """Audit a folder; `advance` is called with how many groups and keys were verified since."""
        auditor = _FolderAudit(home, seal, self._heads, advance)
        auditor.run()
        return auditor.found


class _RuleReader(Replay):
    """Reads logs by the protocol's rules and keeps every violation, instead of stopping at the one in question.

    may_end: the slot with which the list of members may end, if that is not known: what was said after is not judged.
    """

    def __init__(
        self, genesis: Genesis, keys: GroupVerifier, basis: Basis | Ground | None, ends: int | None = None
    ) -> None:
        super().__init__(genesis, keys, basis, EnvelopeVerifier(), ends)
        self.may_end: int | None = ends
        self.violations: list[tuple[int, int, Violation]] = []

    def is_over(self, log: int) -> bool:
        """Say whether what follows in `log` is, or may be, of the next list of members."""
        return self.may_end is not None and self.states[log].last_checkpoint >= self.may_end

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

    def __init__(self, home: ReplicaHome, seal: Clear, heads: Heads, advance: Advance) -> None:
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
        self._tenures = [Tenure(home.cluster, log) for log in range(genesis.n)]
        self._ends: int | None = None  # the last slot of the present list, if the state names the next one
        self._may_end: int | None = None
        # By log: which entry, what is wrong, and after CHECKPOINT of which slot; and how many more.
        self._malformed: list[list[tuple[int, str, int]]] = [[] for _ in range(genesis.n)]
        self._malformed_more = [0] * genesis.n

    def run(self) -> None:
        """Audit the state, then the logs; nothing if they are another cluster's, as nothing would verify."""
        home = self._home
        foreign = find_foreign((home.store_path, home.state_path), home.cluster.cluster_id, home.number)
        if foreign is not None:
            self._fault(home.cluster_path, "whose databases these are", str(foreign), foreign.remedy)
            return
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
            with reading(), closing(_open(self._home.store_path)) as db:
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
            members: list[tuple[bytes, bytes]] = []
            try:
                for key, value in view.trees[tree].entries():
                    self.found.keys += 1
                    self._advance(1)
                    if tree and key.startswith(MEMBERS_RECORDS):
                        members.append((key, value))
                if view.trees[tree].root() != wanted:
                    self._fault(view.path, name, "does not have the digest that a quorum attested", _DAMAGED)
                elif tree:
                    agreed = Membership.restored(present, BucketedMap(sorted(members)))
                    self._ends = self._may_end = agreed.last_slot_of(present.list_number)
            except (StateDamagedError, LayoutError) as error:
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
                            reader.may_end = self._may_end
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
            return _RuleReader(self._home.cluster.genesis, self._verifier, basis, self._ends)
        except LayoutError as error:
            self._fault(self._home.state_path, "the milestone", str(error), _DAMAGED)
            return _RuleReader(self._home.cluster.genesis, self._verifier, None, self._ends)

    def _conclude(self, reader: _RuleReader) -> None:
        for log, index, violation in reader.violations:
            text = f"breaks the rule {violation.rule}: {violation.text}"
            self._fault(self._home.store_path, f"log {log}, entry {index}", text, _ACCUSED, f"rules {log}")
        for log, malformed in enumerate(self._malformed):
            # Beyond the last list that this folder knows, layouts are another's.
            named = [one for one in malformed if self._may_end is None or one[-1] < self._may_end]
            for index, wrong, _ in named:
                text = f"was attested by its log and is malformed: {wrong}"
                self._fault(self._home.store_path, f"log {log}, entry {index}", text, _ACCUSED, f"log {log}")
            if len(named) == len(malformed):
                self.found.unnamed += self._malformed_more[log]
        for summary in self.found.logs:
            state, start = reader.states[summary.log], self._starts[summary.log][0]
            summary.judged = max(0, state.position - start)
            waiting = reader.unread(summary.log)
            if waiting:
                why = reader.waits.get(summary.log)
                text = "" if why is None else f": the next one waits for {why.why}"
                if reader.is_over(summary.log):
                    text = ": they may be of a later list of members, which this folder does not have"
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
        genesis, tenure = self._home.cluster.genesis, self._tenures[row.log]
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
                ends = may_end_with(tenure.read(payload, self._envelopes), genesis, self.found.slot)
            except LayoutError as error:
                # With which slot the list may end is known when all is read.
                if len(self._malformed[row.log]) < NAMED_MAX:
                    self._malformed[row.log].append((index, str(error), tenure.checkpoint))
                else:
                    self._malformed_more[row.log] += 1
                continue
            if ends is not None and self._ends is None and (self._may_end is None or ends < self._may_end):
                self._may_end = ends
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
        key = self._home.cluster.genesis.members[group.author].log_public_key
        other, whose = self._heads.setdefault((key, group.last), (group.head_after, mine))
        if other != group.head_after:
            text = f"are others than {whose} holds up to that index: two histories of one log"
            self._fault(file, where, text, _ACCUSED, of)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    db.text_factory = bytearray
    return db
