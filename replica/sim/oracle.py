"""A model of what the agreed order means: sessions, exactly-once and the key-value store, written from the documents.

Nothing of the replicas' code is used. The model reads raw batches by the documented layout (design, section 5):

    batch      u64 time, u16 positions, that many u64, u16 envelopes, each u32 length and bytes
    envelope   16 tag, u8 version, u8 kind, 32 cluster, 65 key, then
               kind 1: u64 u32 session, u64 first, u64 acknowledged, u16 count, count x (u32 length, operation), 64 sig
               kind 2: 16 nonce, u64 void after, 64 signature
               kind 3: u64 void after, u32 length, command, 64 signature; a list of members changes nothing here; of
               commands about clients (16 tag "trustlog/clients", u8 version, u8 kind, u64 number): mode (u8), allow
               and revoke (65 key), executed if the number is the next one and an operator asks; without permissions;
               of one about the version (16 tag "trustlog/version", u8 1, u16 version): in force from the next slot on,
               if an operator asks and it is greater than the one in force; the first of a slot counts

A version above 0 writes the slot to the key 255, "version", its number with each operation that it carries out.
"""

import struct
from dataclasses import dataclass, field

OK, ERROR = 0, 1
OPENING_INTERVALS = 8
_BODY = 16 + 1 + 1 + 32 + 65


@dataclass(frozen=True, slots=True)
class Done:
    """An operation that is carried out, and its result."""

    client: bytes
    operation: bytes
    status: int
    value: bytes


@dataclass(slots=True)
class _Session:
    client: bytes
    last_slot: int
    acknowledged: int = 1
    executed: set[int] = field(default_factory=set)


class Oracle:
    """The agreed state, by the model."""

    def __init__(
        self, interval: int, session_window: int, sessions_per_client: int, operators: tuple[bytes, ...] = ()
    ) -> None:
        self.state: dict[bytes, bytes] = {}
        self._operators = operators
        self._commands = 0
        self._version = 0
        self._next_version = 0
        self._is_listed = False
        self._allowed: dict[bytes, bool] = {}
        self._per_client = sessions_per_client
        self._interval = interval
        self._window = session_window
        self._sessions: dict[tuple[int, int], _Session] = {}
        self._openings: dict[bytes, int] = {}  # key and nonce -> void after

    def execute(self, slot: int, batch: bytes) -> list[Done]:
        """Execute a batch; return what is carried out, in order."""
        for opening in [o for o, void_after in self._openings.items() if void_after < slot]:
            del self._openings[opening]
        done: list[Done] = []
        (positions,) = struct.unpack_from(">H", batch, 8)
        at = 10 + 8 * positions
        (count,) = struct.unpack_from(">H", batch, at)
        at += 2
        for place in range(count):
            (size,) = struct.unpack_from(">I", batch, at)
            done += self._envelope(slot, place, batch[at + 4 : at + 4 + size])
            at += 4 + size
        self._version, self._next_version = self._next_version or self._version, 0
        return done

    def _envelope(self, slot: int, place: int, raw: bytes) -> list[Done]:
        client = raw[_BODY - 65 : _BODY]
        if raw[17] == 3:
            if client in self._operators:
                self._administer(raw[_BODY + 12 : -64])
            return []
        if not self._allowed.get(client, not self._is_listed):
            return []
        if raw[17] == 2:
            self._open(slot, place, client, raw)
            return []
        session_slot, session_place, first, acknowledged, count = struct.unpack_from(">QIQQH", raw, _BODY)
        session = self._sessions.get((session_slot, session_place))
        if session is None or session.client != client:
            return []
        session.last_slot = slot
        session.acknowledged = max(session.acknowledged, acknowledged)
        at = _BODY + 30
        done = []
        for number in range(first, first + count):
            (size,) = struct.unpack_from(">I", raw, at)
            operation = raw[at + 4 : at + 4 + size]
            at += 4 + size
            known = number in session.executed or number < session.acknowledged
            if known or number >= session.acknowledged + self._window:
                continue
            session.executed.add(number)
            done.append(Done(client, operation, *key_value(self.state, operation)))
            if self._version and done[-1].status == OK:
                self.state[b"\xffversion%d" % self._version] = b"%d" % slot
        return done

    def _administer(self, command: bytes) -> None:
        if command[:17] == b"trustlog/version\1":
            (version,) = struct.unpack_from(">H", command, 17)
            if version > self._version and not self._next_version:
                self._next_version = version
            return
        if command[:17] != b"trustlog/clients\1" or struct.unpack_from(">Q", command, 18)[0] != self._commands + 1:
            return  # who the members are is none of the clients' business
        self._commands += 1
        if command[17] == 1:
            self._is_listed = command[26] == 1
        else:
            self._allowed[command[26:91]] = command[17] == 2
        kept = {at: one for at, one in self._sessions.items() if self._allowed.get(one.client, not self._is_listed)}
        self._sessions = kept

    def _open(self, slot: int, place: int, client: bytes, raw: bytes) -> None:
        nonce = raw[_BODY : _BODY + 16]
        (void_after,) = struct.unpack_from(">Q", raw, _BODY + 16)
        if slot <= void_after <= slot + OPENING_INTERVALS * self._interval and client + nonce not in self._openings:
            self._openings[client + nonce] = void_after
            mine = [(known.last_slot, key) for key, known in self._sessions.items() if known.client == client]
            if len(mine) >= self._per_client:
                del self._sessions[min(mine)[1]]  # the longest idle of the same client
            self._sessions[slot, place] = _Session(client, slot)


def key_value(state: dict[bytes, bytes], operation: bytes) -> tuple[int, bytes]:
    """Carry out one operation of the key-value store; return (status, value). The text of an error is not modelled."""
    code, size = struct.unpack_from(">BH", operation)
    key, rest = operation[3 : 3 + size], operation[3 + size :]
    present = state.get(key)
    if code == 1:
        state[key] = rest
        return OK, bytes([present is not None])
    if code == 2:
        return OK, b"\0" if present is None else b"\1" + present
    if code == 3:
        state.pop(key, None)
        return OK, bytes([present is not None])
    if code == 4:
        (length,) = struct.unpack_from(">I", rest, 1)
        expected = rest[5 : 5 + length] if rest[0] else None
        if present != expected:
            return OK, b"\0" + (b"\0" if present is None else b"\1" + present)
        state[key] = rest[5 + length :]
        return OK, b"\1"
    if code == 5:
        (amount,) = struct.unpack(">q", rest)
        number = int(present or b"0") + amount
        state[key] = str(number).encode()
        return OK, struct.pack(">q", number)
    raise ValueError(f"the simulator's clients send no operation {code}")
