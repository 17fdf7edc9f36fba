"""The list of members, and how it changes while the cluster runs (design section 4.4).

A replica that lost its trusted state, or gets a new key, has a new log, and nothing may be resumed with it. So logs
come and go by lists of members, numbered from 0, the genesis. An operator's command names the whole next list;
executed at slot r, it takes effect after slot e, the first multiple of K at or above r + L. Slots up to e are decided
by the old list's logs, slots above by the new one's. (L apart, because whoever judges a vote above e then has
executed r, and knows e.)

A list is judged by what is agreed alone, at execution:

  * its number is the next one, no other change is under way, and an operator of the genesis signed it;
  * it has 2f + 1 members, numbered from 0, f one more or less at the most;
  * a log that stays keeps its number; one that comes in was never a member before;
  * of the old logs at least q stay, old and new q, so that some correct member hands over the state, and the new
    list can decide slots before those who come in have it.

Whether enough members are *alive* is an opinion, and no business of the agreed state.

Layout of a list (integers big-endian), which is also the command:

    16  tag "trustlog/members"   u8 version 1
    u64 number                   u64 e: in force after that slot; 0 in a command
    u16 members, then per member: u16 number, u8 kind of log, 65 its public key, a TPM's pins (75),
                                  u64 the list with which its log came in, u16 length + place: where it is reached and
                                  by which certificate it is known, which does not concern ordering
    an operator's text, u16 length, UTF-8: why

It is kept in the client table's records, which the checkpoint digest covers: "mc" the list in force, "mp" the next one,
"mr" + key -> u64 list, of logs that are members no more.
"""

import hashlib
import struct
from dataclasses import dataclass, replace

from replica.core import quorum
from replica.core.envelope import Administer, AdministerReply, RefusedError, Status
from replica.core.genesis import PUBLIC_KEY_SIZE, TEXT_SIZE_MAX, Genesis, Member
from replica.core.layout import U64, LayoutError, Reader
from replica.core.sessions import MEMBERS_RECORDS
from replica.core.state import BucketedMap
from trustlog import TPM_PINS_SIZE, BackendKind

MEMBERS_TAG = b"trustlog/members"
MEMBERS_VERSION = 1
PLACE_BYTES_MAX = 4096

CURRENT, NEXT, RETIRED = b"mc", b"mp", b"mr"

_HEADER = struct.Struct(">16sBQQH")
_MEMBER = struct.Struct(f">HB{PUBLIC_KEY_SIZE}s")


@dataclass(frozen=True, slots=True)
class Seat:
    """A member and where it is reached; `place` is opaque here."""

    member: Member
    place: bytes


@dataclass(frozen=True, slots=True)
class MemberList:
    """One list of members. after: it is in force for slots above; 0 in a command."""

    number: int
    after: int
    seats: tuple[Seat, ...]
    reason: str = ""

    def encode(self) -> bytes:
        """Return the documented layout."""
        parts = [_HEADER.pack(MEMBERS_TAG, MEMBERS_VERSION, self.number, self.after, len(self.seats))]
        for seat in self.seats:
            member = seat.member
            parts.append(_MEMBER.pack(member.number, member.log_kind, member.log_public_key) + member.log_pins)
            parts.append(U64.pack(member.since) + struct.pack(">H", len(seat.place)) + seat.place)
        reason = self.reason.encode()
        return b"".join(parts) + struct.pack(">H", len(reason)) + reason

    @property
    def digest(self) -> bytes:
        """The 32-byte SHA-256 of `encode()`."""
        return hashlib.sha256(self.encode()).digest()

    @property
    def members(self) -> tuple[Member, ...]:
        """The members as far as ordering is concerned."""
        return tuple(seat.member for seat in self.seats)

    def genesis(self, before: Genesis) -> Genesis:
        """Return what is agreed under this list, which follows `before`; ValueError if no cluster can be so."""
        return before.successor(self.number, self.after, self.members)


def decode_members(raw: bytes) -> MemberList:
    """Decode a list strictly; LayoutError says what is wrong."""
    reader = Reader(raw)
    tag, version, number, after, count = _HEADER.unpack(reader.take(_HEADER.size))
    if tag != MEMBERS_TAG or version != MEMBERS_VERSION:
        raise LayoutError("not a list of members of a version that this program knows")
    if not 1 <= count <= quorum.replica_count(quorum.FAULTS_MAX):
        raise LayoutError(f"a list of {count} members")
    seats = tuple(_decode_seat(reader) for _ in range(count))
    reason = reader.take(reader.u16())
    reader.finish()
    if len(reason) > TEXT_SIZE_MAX:
        raise LayoutError(f"a reason of {len(reason)} bytes, the limit is {TEXT_SIZE_MAX}")
    try:
        return MemberList(number, after, seats, reason.decode())
    except UnicodeDecodeError:
        raise LayoutError("the reason is not UTF-8") from None


def _decode_seat(reader: Reader) -> Seat:
    number, kind, key = _MEMBER.unpack(reader.take(_MEMBER.size))
    pins = reader.take(TPM_PINS_SIZE) if kind == BackendKind.TPM else b""
    since, size = reader.u64(), reader.u16()
    if size > PLACE_BYTES_MAX:
        raise LayoutError(f"a place of {size} bytes, the limit is {PLACE_BYTES_MAX}")
    return Seat(Member(number, kind, key, pins, since), reader.take(size))


class Membership:
    """The agreed lists: the one in force (None: the genesis itself), and the next one.

    genesis: list 0 of the cluster, or any later one: cluster and limits are the same. Whoever calls `execute` has made
    sure that an operator signed the command.
    """

    def __init__(self, genesis: Genesis, records: BucketedMap) -> None:
        self.current: MemberList | None = None
        self.next: MemberList | None = None
        self._genesis = genesis
        self._records = records
        self._retired: dict[bytes, int] = {}

    @classmethod
    def restored(cls, genesis: Genesis, records: BucketedMap) -> "Membership":
        """Return what these records hold; LayoutError for what no membership has."""
        made = cls(genesis, records)
        for key, value in records.scan(MEMBERS_RECORDS):
            if key == CURRENT:
                made.current = decode_members(value)
            elif key == NEXT:
                made.next = decode_members(value)
            elif key.startswith(RETIRED) and len(key) == len(RETIRED) + PUBLIC_KEY_SIZE and len(value) == U64.size:
                (made._retired[key[len(RETIRED) :]],) = U64.unpack(value)
            else:
                raise LayoutError(f"a record of {len(key)} and {len(value)} bytes is nothing about members")
        return made

    @property
    def number(self) -> int:
        """The number of the list in force."""
        return 0 if self.current is None else self.current.number

    @property
    def digest(self) -> bytes:
        """The 32-byte SHA-256 of the list in force; b"" as long as that is the genesis."""
        return b"" if self.current is None else self.current.digest

    @property
    def ends(self) -> int | None:
        """The last slot of the list in force, once that is known."""
        return None if self.next is None else self.next.after

    def last_slot_of(self, number: int) -> int | None:
        """Return the last slot of list `number`, the one in force or the one before; None if it is not known yet."""
        return self.current.after if self.current is not None and self.number > number else self.ends

    def known(self, content: Administer) -> AdministerReply | None:
        """Return the reply to a command that can have no effect any more, else None."""
        try:
            wanted = decode_members(content.command)
        except LayoutError:
            return None
        for made in (self.current, self.next):
            if made is not None and made.number == wanted.number and replace(made, after=0) == wanted:
                return AdministerReply.to(content, Status.OK, made.after, f"list {made.number} of members")
        return None

    def execute(self, content: Administer, slot: int) -> AdministerReply:
        """Execute a command at `slot`; nothing changes unless the status is OK."""
        known = self.known(content)
        if known is not None:
            return known
        if slot > content.void_after:
            return AdministerReply.to(content, Status.VOID, slot, "its time is over")
        try:
            made = self._judge(content, slot)
        except (LayoutError, RefusedError) as error:
            return AdministerReply.to(content, Status.ERROR, slot, str(error))
        self.next = made
        self._records.put_unbounded(NEXT, made.encode())
        self._records.commit()
        return AdministerReply.to(content, Status.OK, made.after, f"list {made.number} of members")

    @property
    def genesis(self) -> Genesis:
        """What is agreed under the list in force."""
        return self._genesis if self.current is None else self.current.genesis(self._genesis)

    def end_slot(self, slot: int) -> None:
        """Put the next list in force if `slot` is the last one of the present list."""
        made = self.next
        if made is None or slot < made.after:
            return
        staying = {member.log_public_key for member in made.members}
        for member in self.genesis.members:
            if member.log_public_key not in staying:
                self._retired[member.log_public_key] = made.number
                self._records.put_unbounded(RETIRED + member.log_public_key, U64.pack(made.number))
        self._records.put_unbounded(CURRENT, made.encode())
        self._records.delete(NEXT)
        self._records.commit()
        self.current, self.next = made, None

    def _judge(self, content: Administer, slot: int) -> MemberList:
        """Return the list that the command makes, and after which slot; RefusedError or LayoutError if it must not."""
        wanted = decode_members(content.command)
        if self.next is not None:
            raise RefusedError(
                f"list {self.next.number} is to be in force after slot {self.next.after}; wait for it, or if nothing "
                "is ordered any more repeat the command that made it, its reason included: that pushes on"
            )
        if wanted.number != self.number + 1 or wanted.after:
            raise RefusedError(f"list {wanted.number} of members is asked for, the next one is {self.number + 1}")
        limits = self._genesis.limits
        interval = limits.checkpoint_interval
        after = -(-(slot + limits.window) // interval) * interval
        made = replace(wanted, after=after)
        check_change(self.genesis, made, self._retired)
        return made


def check_change(before: Genesis, made: MemberList, retired: dict[bytes, int]) -> None:
    """Raise RefusedError unless list `made` may follow `before`; retired: keys of former logs, and when they left."""
    try:
        after = made.genesis(before)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if abs(after.f - before.f) > 1:
        raise RefusedError(f"from {before.n} to {after.n} replicas: at most two may come or go at a time")
    present = {member.log_public_key: member for member in before.members}
    staying = 0
    for member in after.members:
        known = present.get(member.log_public_key)
        if known is not None:
            staying += 1
            if known != member:
                raise RefusedError(
                    f"the log of replica {known.number} stays as it is, number and pins included, or goes"
                )
        elif member.log_public_key in retired:
            list_number = retired[member.log_public_key]
            raise RefusedError(f"the log of replica {member.number} went with list {list_number}: it cannot come back")
        elif member.since != made.number:
            raise RefusedError(
                f"the log of replica {member.number} comes in with list {made.number}, not {member.since}"
            )
    needed = max(before.quorum, after.quorum)
    if staying < needed:
        raise RefusedError(f"{staying} logs stay, {needed} must: they hand over the state and go on meanwhile")
