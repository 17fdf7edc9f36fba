"""The client table: which requests were executed, and their last results (agreed state, design section 5).

A session is opened by an ordered operation and is named by the slot and place at which that was executed. Request
numbers count up within it. A number below what the client acknowledged is never executed again; results of the rest
are kept, within a window of numbers and a budget of bytes. Sessions are bounded by deterministic eviction: the same
client's longest idle session first, then the longest idle of all.

An opening carries a nonce and the slot after which it is void. While it is not void its nonce is remembered, even if
its session is already evicted, so a captured opening can be replayed to no effect. Of one client only so many are
remembered: a new one takes the place of that which becomes void first, and must itself become void later than that. So
what was displaced cannot be replayed either: as long as it is not void, all that are remembered become void no sooner
than it, and there are as many as there may be.

Everything here is a function of the executed batches alone: no clock, no set order.

The checkpoint digest covers the table as a map of records (integers big-endian), from which it can be restored:

    "s", u64 slot, u32 place of a session ->
        65  client, u64 last slot, u64 acknowledged, u32 count, count x result in the order in which they were kept:
        u64 number, u8 status, u64 slot, u32 length, value
    "o", 65 client, 16 nonce of an opening that is not void ->
        u64 slot, u32 place of its session, u64 void after
    "m" ...: the lists of members, see `replica.core.members`
    "c" ...: who may be a client, see `replica.core.clients`
    "v" ...: the application's version in force, see `replica.core.versions`
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sortedcontainers import SortedDict

from replica.core.envelope import OPEN_NONCE_SIZE, Open, Result, SessionId, Status
from replica.core.frozen import FrozenMap
from replica.core.genesis import MIB, PUBLIC_KEY_SIZE, Limits
from replica.core.layout import LayoutError, Reader
from replica.core.state import BucketedMap

# How far ahead of the executing slot an opening may stay valid, in checkpoint intervals.
OPENING_INTERVALS_MAX = 8
# Openings remembered at a time; more are answered BUSY.
OPENINGS_MAX = 65536
# Those of one client: so it takes many keys to have everybody else answered BUSY.
OPENINGS_PER_CLIENT_MAX = 128
# Bytes of results kept per session; beyond, the oldest results are forgotten (never their numbers). All of them in one
# reply still fit a frame.
SESSION_RESULT_BYTES_MAX = 6 * MIB

# Records of `replica.core.members`, `.clients` and `.versions`, which have their place in the same map.
MEMBERS_RECORDS, CLIENTS_RECORDS, VERSIONS_RECORDS = b"m", b"c", b"v"

_SESSION_KEY = struct.Struct(">cQI")
_OPENING = struct.Struct(">QIQ")
_SESSION = struct.Struct(f">{PUBLIC_KEY_SIZE}sQQI")
_RESULT = struct.Struct(">QBQI")

_STATUSES = frozenset(Status)
_FORGOTTEN = Result(Status.FORGOTTEN, 0, b"")


def record_bytes_max(limits: Limits) -> int:
    """Return the size that no record of the client table exceeds.

    A session keeps its newest result whatever its size, and a result fits a reply, hence a group.
    """
    results = max(SESSION_RESULT_BYTES_MAX, limits.group_bytes_max)
    return _SESSION.size + limits.session_window * _RESULT.size + results


@dataclass(slots=True)
class Session:
    """One client session. `results` holds every executed number that is not acknowledged."""

    id: SessionId
    client: bytes
    last_slot: int
    acknowledged: int = 1
    results: dict[int, Result] = field(default_factory=dict)
    result_bytes: int = 0

    def acknowledge(self, number: int) -> None:
        """Forget results below `number`."""
        if number <= self.acknowledged:
            return
        if number - self.acknowledged > len(self.results):
            dropped = [n for n in self.results if n < number]
        else:
            dropped = [n for n in range(self.acknowledged, number) if n in self.results]
        for n in dropped:
            self.result_bytes -= len(self.results.pop(n).value)
        self.acknowledged = number

    def keep(self, number: int, result: Result) -> None:
        """Remember that `number` was executed with `result`, forgetting old results above the budget."""
        self.results[number] = result
        self.result_bytes += len(result.value)
        if self.result_bytes > SESSION_RESULT_BYTES_MAX:
            self._forget_oldest(number)

    def _forget_oldest(self, newest: int) -> None:
        for number in list(self.results):
            if self.result_bytes <= SESSION_RESULT_BYTES_MAX or number == newest:
                return
            size = len(self.results[number].value)
            if size:
                self.results[number] = Result(Status.FORGOTTEN, self.results[number].slot, b"")
                self.result_bytes -= size

    def encode(self) -> bytes:
        """Return the record that the checkpoint digest covers."""
        parts = [_SESSION.pack(self.client, self.last_slot, self.acknowledged, len(self.results))]
        for number, result in self.results.items():
            parts.append(_RESULT.pack(number, result.status, result.slot, len(result.value)))
            parts.append(result.value)
        return b"".join(parts)

    @classmethod
    def decode(cls, session: SessionId, raw: bytes) -> "Session":
        """Return the session with this record; LayoutError unless `encode()` of it would give `raw` again.

        The order of the results is part of the record: it is the order in which they are forgotten.
        """
        reader = Reader(raw)
        client, last_slot, acknowledged, count = _SESSION.unpack(reader.take(_SESSION.size))
        decoded = cls(session, client, last_slot, acknowledged)
        if last_slot < session.slot or acknowledged < 1:
            raise LayoutError(f"session {session}: last slot {last_slot}, acknowledged {acknowledged}")
        for _ in range(count):
            number, status, slot, size = _RESULT.unpack(reader.take(_RESULT.size))
            if number < acknowledged or number in decoded.results:
                raise LayoutError(f"session {session}: a result of number {number} does not belong here")
            if status not in _STATUSES:
                raise LayoutError(f"session {session}: unknown status {status}")
            decoded.results[number] = Result(Status(status), slot, reader.take(size))
            decoded.result_bytes += size
        reader.finish()
        return decoded


@dataclass(frozen=True, slots=True)
class _Opening:
    session: SessionId
    void_after: int


def _order(key: bytes, opening: _Opening) -> tuple[int, int, int, bytes]:
    return opening.void_after, opening.session.slot, opening.session.place, key


class ClientTable:
    """All sessions and the openings that are not yet void."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: dict[SessionId, Session] = {}
        self._by_client: dict[bytes, dict[SessionId, None]] = {}
        # (last slot, id), longest idle first: finding whom to evict must not take longer the more sessions there are.
        self._by_idleness: SortedDict = SortedDict()
        self._openings: dict[bytes, _Opening] = {}
        self._voids: dict[int, dict[bytes, None]] = {}
        # client -> (void after, slot, place, key), what becomes void first first
        self._openings_of: dict[bytes, SortedDict] = {}
        self._records = BucketedMap()
        self._touched: dict[SessionId, None] = {}

    @classmethod
    def restored(cls, limits: Limits, records: BucketedMap) -> "ClientTable":
        """Return the table with these records, which it keeps; it goes on exactly like the one they came from.

        LayoutError for records that no table within `limits` has.
        """
        table = cls(limits)
        for key, value in records.scan():
            if key[:1] == b"s":
                table._restore_session(key, value)
            elif key[:1] not in {MEMBERS_RECORDS, CLIENTS_RECORDS, VERSIONS_RECORDS}:
                table._restore_opening(key, value)
        if len(table) > limits.sessions_max or len(table._openings) > OPENINGS_MAX:
            raise LayoutError(f"{len(table)} sessions and {len(table._openings)} openings are too many")
        if any(len(mine) > OPENINGS_PER_CLIENT_MAX for mine in table._openings_of.values()):
            raise LayoutError(f"a client has more than {OPENINGS_PER_CLIENT_MAX} openings")
        table._records = records
        return table

    @property
    def records(self) -> BucketedMap:
        """The table as a map of records, up to date after `root()`; only the table may change it."""
        return self._records

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, session: SessionId, client: bytes) -> Session | None:
        """Return the session if it exists and belongs to `client`."""
        found = self._sessions.get(session)
        return found if found is not None and found.client == client else None

    def touch(self, session: Session, slot: int) -> None:
        """Note that `slot` changed or used the session."""
        if session.last_slot != slot:
            del self._by_idleness[session.last_slot, session.id]
            session.last_slot = slot
            self._by_idleness[slot, session.id] = None
        self._touched[session.id] = None

    def begin_slot(self, slot: int) -> None:
        """Forget openings that became void before `slot`."""
        for key in list(self._voids.get(slot - 1, ())):
            self._forget(key)
        self._records.commit()

    def open(self, client: bytes, content: Open, slot: int, place: int) -> tuple[Status, SessionId]:
        """Execute an opening at (`slot`, `place`): OK with the session's id, or VOID, or BUSY."""
        nowhere = SessionId(0, 0)
        horizon = slot + OPENING_INTERVALS_MAX * self._limits.checkpoint_interval
        if not slot <= content.void_after <= horizon:
            return Status.VOID, nowhere
        key = client + content.nonce
        known = self._openings.get(key)
        if known is not None:
            return Status.OK, known.session
        mine = self._openings_of.get(client, ())
        if len(mine) >= OPENINGS_PER_CLIENT_MAX:
            void_first, *_, displaced = mine.peekitem(0)[0]
            if content.void_after <= void_first:
                return Status.BUSY, nowhere
            self._forget(displaced)
        elif len(self._openings) >= OPENINGS_MAX:
            return Status.BUSY, nowhere
        self._make_room(client)
        session = Session(SessionId(slot, place), client, slot)
        self._add(session)
        self._touched[session.id] = None
        self._remember(key, _Opening(session.id, content.void_after))
        self._records.put(b"o" + key, _OPENING.pack(slot, place, content.void_after))
        self._records.commit()
        return Status.OK, session.id

    def opened(self, client: bytes, nonce: bytes) -> SessionId | None:
        """Return the session that an opening with this nonce led to, as long as it is remembered."""
        known = self._openings.get(client + nonce)
        return None if known is None else known.session

    def end_sessions(self, keeps: Callable[[bytes], bool]) -> None:
        """End all sessions of the clients that `keeps` denies."""
        for client in [client for client in self._by_client if not keeps(client)]:
            for session in list(self._by_client[client]):
                self._evict(self._sessions[session])

    def root(self) -> bytes:
        """Return the 32-byte digest of the whole table, encoding only sessions touched since the last call."""
        self._write_records()
        return self._records.root()

    def frozen(self) -> FrozenMap:
        """Return the records as they are now, for good."""
        self._write_records()
        return self._records.frozen()

    def take_changes(self) -> list[tuple[bytes, bytes | None]]:
        """Return the records that changed since the last call, as `BucketedMap.take_changes` does."""
        self._write_records()
        return self._records.take_changes()

    def _write_records(self) -> None:
        for session_id in self._touched:
            key = _SESSION_KEY.pack(b"s", session_id.slot, session_id.place)
            session = self._sessions.get(session_id)
            if session is None:
                self._records.delete(key)
            else:
                self._records.put_unbounded(key, session.encode())
        self._touched.clear()
        self._records.commit()

    def _restore_session(self, key: bytes, value: bytes) -> None:
        if len(key) != _SESSION_KEY.size:
            raise LayoutError(f"a record's key of {len(key)} bytes is no session's")
        _, slot, place = _SESSION_KEY.unpack(key)
        session = Session.decode(SessionId(slot, place), value)
        self._add(session)
        if len(self._by_client[session.client]) > self._limits.sessions_per_client_max:
            raise LayoutError(f"a client has more than {self._limits.sessions_per_client_max} sessions")

    def _restore_opening(self, key: bytes, value: bytes) -> None:
        if key[:1] != b"o" or len(key) != 1 + PUBLIC_KEY_SIZE + OPEN_NONCE_SIZE or len(value) != _OPENING.size:
            raise LayoutError(f"a record of {len(key)} and {len(value)} bytes is neither a session's nor an opening's")
        slot, place, void_after = _OPENING.unpack(value)
        self._remember(key[1:], _Opening(SessionId(slot, place), void_after))

    def _add(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._by_idleness[session.last_slot, session.id] = None
        self._by_client.setdefault(session.client, {})[session.id] = None

    def _remember(self, key: bytes, opening: _Opening) -> None:
        self._openings[key] = opening
        self._voids.setdefault(opening.void_after, {})[key] = None
        self._openings_of.setdefault(key[:PUBLIC_KEY_SIZE], SortedDict())[_order(key, opening)] = None

    def _forget(self, key: bytes) -> None:
        """Forget an opening."""
        opening, client = self._openings.pop(key), key[:PUBLIC_KEY_SIZE]
        voids, mine = self._voids[opening.void_after], self._openings_of[client]
        del voids[key], mine[_order(key, opening)]
        if not voids:
            del self._voids[opening.void_after]
        if not mine:
            del self._openings_of[client]
        self._records.delete(b"o" + key)

    def _make_room(self, client: bytes) -> None:
        mine = self._by_client.get(client, {})
        if len(mine) >= self._limits.sessions_per_client_max:
            self._evict(self._longest_idle(mine))
        elif len(self._sessions) >= self._limits.sessions_max:
            self._evict(self._longest_idle(mine) if mine else self._sessions[self._by_idleness.peekitem(0)[0][1]])

    def _longest_idle(self, among: Iterable[SessionId]) -> Session:
        return min((self._sessions[i] for i in among), key=lambda s: (s.last_slot, s.id))

    def _evict(self, session: Session) -> None:
        del self._sessions[session.id]
        del self._by_idleness[session.last_slot, session.id]
        mine = self._by_client[session.client]
        del mine[session.id]
        if not mine:
            del self._by_client[session.client]
        self._touched[session.id] = None


def answer(session: Session | None, number: int, slot: int) -> Result | None:
    """Return what `number` gets without being executed, or None if it must be executed now.

    `slot` is the executing slot; it stands in answers that are given anew.
    """
    if session is None:
        return Result(Status.EXPIRED, slot, b"")
    known = session.results.get(number)
    if known is not None:
        return known
    return _FORGOTTEN if number < session.acknowledged else None
