"""Who may be a client, and what for: agreed, and changed by operators while the cluster runs.

In `open` mode, which is how a cluster begins, every key is a client's unless it was revoked; in `listed` mode only keys
that were allowed are. An allowed key may do everything, or only what its permissions say: read, write or both, keys of
the application's state that begin with a prefix. That needs an application that says which keys an operation reads and
writes (`replica.application.Application`).

A key that may not be a client has no session: what revokes it ends its sessions. So its envelopes can have no effect,
and no replica has to order them: NOT_ALLOWED is answered at once, in the same bytes as when one is executed that was
ordered before. It says how things stand where the replica is: an operation that was on its way when its key was revoked
may have been executed before.

A key may have a quota (`replica.core.quotas`); all others have the default, at first none.

An operator's command names its number, which must be the next one: so a captured command does nothing when it comes
again, and of two operators who change something at a time one is told. As long as what it did is in force, it is
answered with OK again.

Layout of a command (integers big-endian; text is UTF-8 preceded by its u16 length):

    16  tag "trustlog/clients"   u8 version 1
    u8  kind: 1 mode, 2 allow, 3 revoke, 4 show, 5 quota
    u64 number; 0 in kind 4

  kind 1, mode:     u8 mode: 0 open, 1 listed
  kind 2, allow:    65 key; text, a name for people; u16 count, count x (u8 rights: 1 read, 2 write, 3 both;
                    u16 length, prefix), each prefix once; without any: everything
  kind 3, revoke:   65 key
  kind 4, show:     16 nonce; u16 length 0 or 65, the key after which to begin
  kind 5, quota:    u16 length 65, a key that is allowed or revoked, or 0: the default; 12 quota. One that limits
                    nothing is none: that key has the default again

SHOW changes nothing; its answer's text is the hexadecimal form of

    u64 number of the last command, u8 mode, u8 1 if more keys follow, 12 the default quota
    u16 count, count x (65 key, 12 its own quota, u16 length, record as below), in the order of the keys

It is kept in the client table's records, which the checkpoint digest covers; none of them as long as there was no
command:

    "cp"      -> u64 number of the last command; u8 mode, u64 number and u64 slot of the command that set it
    "ck", key -> u64 number and u64 slot of the command that made it; u8 1 allowed, 2 revoked; name and permissions as
                 above; a revoked key's name stays
    "cq", key or nothing -> u64 number and u64 slot of the command that set it; 12 quota, of that key or the default
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from replica.application import Right
from replica.core.envelope import Administer, AdministerReply, RefusedError, Status
from replica.core.genesis import PUBLIC_KEY_SIZE, TEXT_SIZE_MAX
from replica.core.layout import U16, LayoutError, Reader
from replica.core.quotas import NO_QUOTA, QUOTA_SIZE, Quota, decode_quota
from replica.core.sessions import CLIENTS_RECORDS
from replica.core.state import BucketedMap

CLIENTS_TAG = b"trustlog/clients"
CLIENTS_VERSION = 1
NONCE_SIZE = 16
# Keys that are allowed or revoked, together; a revoked one is kept for ever.
KEYS_MAX = 8192
PERMISSIONS_MAX = 16
PREFIX_BYTES_MAX = 256
# What an answer to SHOW holds; twice that in its hexadecimal text, whose length is a u16. One record always fits.
PAGE_BYTES_MAX = 32_000

POLICY, KEY, QUOTA = b"cp", b"ck", b"cq"

_HEADER = struct.Struct(">16sBBQ")
_POLICY = struct.Struct(">QBQQ")
_RECORD = struct.Struct(">QQB")
_PAGE = struct.Struct(f">QBB{QUOTA_SIZE}sH")
_SET = struct.Struct(f">QQ{QUOTA_SIZE}s")
_ALLOWED, _REVOKED = 1, 2


class Mode(IntEnum):
    """Whose keys may be clients'."""

    OPEN = 0  # everybody's, less those that were revoked
    LISTED = 1  # those that were allowed

    @property
    def label(self) -> str:
        """Return the name used on the command line: "open" or "listed"."""
        return self.name.lower()


class Kind(IntEnum):
    """What a command does."""

    MODE = 1
    ALLOW = 2
    REVOKE = 3
    SHOW = 4
    QUOTA = 5


@dataclass(frozen=True, slots=True)
class Permission:
    """What may be done with the keys of the state that begin with `prefix`."""

    rights: Right
    prefix: bytes


@dataclass(frozen=True, slots=True)
class SetMode:
    """A command of kind 1."""

    number: int
    mode: Mode

    def encode(self) -> bytes:
        """Return the documented layout."""
        return _header(Kind.MODE, self.number) + bytes([self.mode])


@dataclass(frozen=True, slots=True)
class Allow:
    """A command of kind 2: from now on, `key` may do what `permissions` say, everything without any."""

    number: int
    key: bytes
    name: str = ""
    permissions: tuple[Permission, ...] = ()

    def encode(self) -> bytes:
        """Return the documented layout."""
        return _header(Kind.ALLOW, self.number) + self.key + _encode_grant(self.name, self.permissions)


@dataclass(frozen=True, slots=True)
class Revoke:
    """A command of kind 3."""

    number: int
    key: bytes

    def encode(self) -> bytes:
        """Return the documented layout."""
        return _header(Kind.REVOKE, self.number) + self.key


@dataclass(frozen=True, slots=True)
class Show:
    """A command of kind 4; `after`: b"", or the last key of the page before."""

    nonce: bytes
    after: bytes = b""

    def encode(self) -> bytes:
        """Return the documented layout."""
        return _header(Kind.SHOW, 0) + self.nonce + U16.pack(len(self.after)) + self.after


@dataclass(frozen=True, slots=True)
class SetQuota:
    """A command of kind 5; `key`: b"" for the default."""

    number: int
    key: bytes
    quota: Quota

    def encode(self) -> bytes:
        """Return the documented layout."""
        return _header(Kind.QUOTA, self.number) + U16.pack(len(self.key)) + self.key + self.quota.encode()


Command = SetMode | Allow | Revoke | Show | SetQuota


@dataclass(frozen=True, slots=True)
class Listing:
    """What is agreed about one key, by which command, executed at which slot."""

    number: int
    slot: int
    is_revoked: bool
    name: str = ""
    permissions: tuple[Permission, ...] = ()

    def encode(self) -> bytes:
        """Return the documented record."""
        state = _REVOKED if self.is_revoked else _ALLOWED
        return _RECORD.pack(self.number, self.slot, state) + _encode_grant(self.name, self.permissions)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of the policy, as SHOW answers it: keys, their own quotas and what is agreed about them, in order."""

    number: int
    mode: Mode
    more: bool
    quota: Quota
    listings: tuple[tuple[bytes, Quota, Listing], ...]


def is_about_clients(command: bytes) -> bool:
    """Say whether an operator's command is one of these, well formed or not."""
    return command.startswith(CLIENTS_TAG)


def decode_command(raw: bytes) -> Command:
    """Decode a command strictly; LayoutError says what is wrong."""
    reader = Reader(raw)
    tag, version, kind, number = _HEADER.unpack(reader.take(_HEADER.size))
    if tag != CLIENTS_TAG or version != CLIENTS_VERSION:
        raise LayoutError("not a command about clients of a version that this program knows")
    made: Command
    if kind == Kind.MODE:
        made = SetMode(number, _mode(reader.u8()))
    elif kind == Kind.ALLOW:
        made = Allow(number, reader.take(PUBLIC_KEY_SIZE), *_decode_grant(reader))
    elif kind == Kind.REVOKE:
        made = Revoke(number, reader.take(PUBLIC_KEY_SIZE))
    elif kind == Kind.SHOW and number == 0:
        made = Show(reader.take(NONCE_SIZE), _optional_key(reader))
    elif kind == Kind.QUOTA:
        made = SetQuota(number, _optional_key(reader), decode_quota(reader.take(QUOTA_SIZE)))
    else:
        raise LayoutError(f"unknown kind of command {kind}")
    reader.finish()
    return made


def decode_listing(raw: bytes) -> Listing:
    """Decode a key's record strictly; LayoutError says what is wrong."""
    reader = Reader(raw)
    number, slot, state = _RECORD.unpack(reader.take(_RECORD.size))
    if state not in {_ALLOWED, _REVOKED}:
        raise LayoutError(f"a key is allowed or revoked, not {state}")
    made = Listing(number, slot, state == _REVOKED, *_decode_grant(reader))
    reader.finish()
    return made


def decode_page(text: str) -> Page:
    """Decode the text that answers SHOW; LayoutError says what is wrong."""
    try:
        reader = Reader(bytes.fromhex(text))
    except ValueError:
        raise LayoutError("not the answer to a question about clients") from None
    number, mode, more, quota, count = _PAGE.unpack(reader.take(_PAGE.size))
    listings = tuple(
        (
            reader.take(PUBLIC_KEY_SIZE),
            decode_quota(reader.take(QUOTA_SIZE)),
            decode_listing(reader.take(reader.u16())),
        )
        for _ in range(count)
    )
    reader.finish()
    return Page(number, _mode(mode), more == 1, decode_quota(quota), listings)


class Clients:
    """The agreed policy.

    by_prefix: whether the application says which keys an operation reads and writes, so that permissions mean
    something. Whoever calls `execute` has made sure that an operator signed the command.
    """

    def __init__(self, records: BucketedMap, *, by_prefix: bool) -> None:
        self.number = 0
        self.mode = Mode.OPEN
        self._mode_number = self._mode_slot = 0
        self._by_prefix = by_prefix
        self._records = records
        self._listings: dict[bytes, Listing] = {}
        # Of keys with permissions: the prefixes of what they may read, and write.
        self._prefixes: dict[bytes, dict[Right, tuple[bytes, ...]]] = {}
        # By key, b"" for the default: the number and the slot of the command that set it, and the quota.
        self._quotas: dict[bytes, tuple[int, int, Quota]] = {}

    @classmethod
    def restored(cls, records: BucketedMap, *, by_prefix: bool) -> "Clients":
        """Return what these records hold; LayoutError for what no policy has."""
        made = cls(records, by_prefix=by_prefix)
        for key, value in records.scan(CLIENTS_RECORDS):
            if key == POLICY and len(value) == _POLICY.size:
                made.number, mode, made._mode_number, made._mode_slot = _POLICY.unpack(value)
                made.mode = _mode(mode)
            elif key.startswith(KEY) and len(key) == len(KEY) + PUBLIC_KEY_SIZE:
                made._take(key[len(KEY) :], decode_listing(value))
            elif key.startswith(QUOTA) and len(key) in {len(QUOTA), len(QUOTA) + PUBLIC_KEY_SIZE}:
                made._quotas[key[len(QUOTA) :]] = _decode_set(value)
            else:
                raise LayoutError(f"a record of {len(key)} and {len(value)} bytes is nothing about clients")
        return made

    def __len__(self) -> int:
        """Return how many keys are allowed or revoked."""
        return len(self._listings)

    def is_allowed(self, client: bytes) -> bool:
        """Say whether this key may be a client's."""
        listing = self._listings.get(client)
        return self.mode is Mode.OPEN if listing is None else not listing.is_revoked

    @property
    def is_public(self) -> bool:
        """Say whether operators let everybody read everything: nobody has to be listed, or has permissions."""
        return self.mode is Mode.OPEN and not self._prefixes

    def is_restricted(self, client: bytes) -> bool:
        """Say whether this key may do only what its permissions say."""
        return client in self._prefixes

    def permits(self, client: bytes, right: Right, key: bytes) -> bool:
        """Say whether an allowed key has one right to a key of the state, or to all keys that begin with that."""
        prefixes = self._prefixes.get(client)
        return prefixes is None or key.startswith(prefixes[right])

    def quota_of(self, client: bytes) -> Quota:
        """Return what this key is held to: its own quota, or else the default; NO_QUOTA itself if there is neither."""
        if not self._quotas:
            return NO_QUOTA
        own = self._own_quota(client)
        return self._own_quota(b"") if own is NO_QUOTA else own

    def _own_quota(self, key: bytes) -> Quota:
        found = self._quotas.get(key)
        return NO_QUOTA if found is None or found[2] == NO_QUOTA else found[2]

    def known(self, content: Administer) -> AdministerReply | None:
        """Return the reply to a command that was executed and whose effect is in force, else None."""
        try:
            command = decode_command(content.command)
        except LayoutError:
            return None
        return self._known(content, command)

    def execute(self, content: Administer, slot: int) -> AdministerReply:
        """Execute an operator's command at `slot`; nothing changes unless the status is OK."""
        try:
            command = decode_command(content.command)
        except LayoutError as error:
            return AdministerReply.to(content, Status.ERROR, slot, str(error))
        known = self._known(content, command)
        if known is not None:
            return known
        if slot > content.void_after:
            return AdministerReply.to(content, Status.VOID, slot, "its time is over")
        if isinstance(command, Show):
            return AdministerReply.to(content, Status.OK, slot, self._page(command.after).hex())
        try:
            self._judge(command)
        except RefusedError as error:
            return AdministerReply.to(content, Status.ERROR, slot, str(error))
        self._apply(command, slot)
        return _done(content, command.number, slot)

    def _known(self, content: Administer, command: Command) -> AdministerReply | None:
        if isinstance(command, SetMode):
            if command.number and (command.number, command.mode) == (self._mode_number, self.mode):
                return _done(content, command.number, self._mode_slot)
        elif isinstance(command, SetQuota):
            number, slot, quota = self._quotas.get(command.key, (0, 0, NO_QUOTA))
            if command.number and (command.number, command.quota) == (number, quota):
                return _done(content, number, slot)
        elif not isinstance(command, Show):
            made = self._listings.get(command.key)
            if made is not None and made == self._made(command, made.slot):
                return _done(content, command.number, made.slot)
        return None

    def _judge(self, command: SetMode | Allow | Revoke | SetQuota) -> None:
        """Raise RefusedError if the command must not be executed."""
        if command.number != self.number + 1:
            raise RefusedError(f"command {command.number} of clients is given, the next one is {self.number + 1}")
        if isinstance(command, Allow) and command.permissions and not self._by_prefix:
            raise RefusedError(
                "this cluster's application does not say which keys an operation reads and writes, so no key can be "
                "allowed for some prefixes only"
            )
        if isinstance(command, SetMode) or (isinstance(command, SetQuota) and not command.key):
            return
        is_new = command.key not in self._listings
        if isinstance(command, SetQuota) and is_new:
            raise RefusedError("only a key that is allowed can have a quota of its own: allow it first")
        if is_new and len(self._listings) >= KEYS_MAX:
            raise RefusedError(f"{KEYS_MAX} keys are allowed or revoked already, and there is no room for more")

    def _apply(self, command: SetMode | Allow | Revoke | SetQuota, slot: int) -> None:
        self.number = command.number
        if isinstance(command, SetMode):
            self.mode, self._mode_number, self._mode_slot = command.mode, command.number, slot
        elif isinstance(command, SetQuota):
            self._quotas[command.key] = (command.number, slot, command.quota)
            record = _SET.pack(command.number, slot, command.quota.encode())
            self._records.put_unbounded(QUOTA + command.key, record)
        else:
            made = self._made(command, slot)
            self._take(command.key, made)
            self._records.put_unbounded(KEY + command.key, made.encode())
        policy = _POLICY.pack(self.number, self.mode, self._mode_number, self._mode_slot)
        self._records.put_unbounded(POLICY, policy)
        self._records.commit()

    def _made(self, command: Allow | Revoke, slot: int) -> Listing:
        if isinstance(command, Allow):
            return Listing(command.number, slot, False, command.name, command.permissions)
        before = self._listings.get(command.key)
        return Listing(command.number, slot, True, "" if before is None else before.name)

    def _take(self, key: bytes, made: Listing) -> None:
        self._listings[key] = made
        self._prefixes.pop(key, None)
        if made.permissions:
            self._prefixes[key] = {
                right: tuple(one.prefix for one in made.permissions if right in one.rights)
                for right in (Right.READ, Right.WRITE)
            }

    def _page(self, after: bytes) -> bytes:
        parts: list[bytes] = []
        size = _PAGE.size
        more = 0
        for key, record in self._records.scan(KEY, KEY + after if after else None):
            client = key[len(KEY) :]
            part = client + self._own_quota(client).encode() + U16.pack(len(record)) + record
            size += len(part)
            if size > PAGE_BYTES_MAX:
                more = 1
                break
            parts.append(part)
        default = self._own_quota(b"").encode()
        return _PAGE.pack(self.number, self.mode, more, default, len(parts)) + b"".join(parts)


def _header(kind: Kind, number: int) -> bytes:
    return _HEADER.pack(CLIENTS_TAG, CLIENTS_VERSION, kind, number)


def _optional_key(reader: Reader) -> bytes:
    key = reader.take(reader.u16())
    if len(key) not in {0, PUBLIC_KEY_SIZE}:
        raise LayoutError(f"a key has {PUBLIC_KEY_SIZE} bytes, not {len(key)}")
    return key


def _decode_set(record: bytes) -> tuple[int, int, Quota]:
    reader = Reader(record)
    number, slot, quota = _SET.unpack(reader.take(_SET.size))
    reader.finish()
    return number, slot, decode_quota(quota)


def _mode(number: int) -> Mode:
    try:
        return Mode(number)
    except ValueError:
        raise LayoutError(f"unknown mode {number}") from None


def _encode_grant(name: str, permissions: Sequence[Permission]) -> bytes:
    text = name.encode()
    parts = [U16.pack(len(text)), text, U16.pack(len(permissions))]
    for one in permissions:
        parts += (bytes([one.rights]), U16.pack(len(one.prefix)), one.prefix)
    return b"".join(parts)


def _decode_grant(reader: Reader) -> tuple[str, tuple[Permission, ...]]:
    raw = reader.take(reader.u16())
    if len(raw) > TEXT_SIZE_MAX:
        raise LayoutError(f"a name of {len(raw)} bytes, the limit is {TEXT_SIZE_MAX}")
    count = reader.u16()
    if count > PERMISSIONS_MAX:
        raise LayoutError(f"{count} permissions, the limit is {PERMISSIONS_MAX}")
    permissions = tuple(_decode_permission(reader) for _ in range(count))
    if len({one.prefix for one in permissions}) != count:
        raise LayoutError("a prefix is named twice")
    try:
        return raw.decode(), permissions
    except UnicodeDecodeError:
        raise LayoutError("the name is not UTF-8") from None


def _decode_permission(reader: Reader) -> Permission:
    rights, prefix = reader.u8(), reader.take(reader.u16())
    if not 1 <= rights <= Right.READ | Right.WRITE:
        raise LayoutError(f"unknown rights {rights}")
    if len(prefix) > PREFIX_BYTES_MAX:
        raise LayoutError(f"a prefix of {len(prefix)} bytes, the limit is {PREFIX_BYTES_MAX}")
    return Permission(Right(rights), prefix)


def _done(content: Administer, number: int, slot: int) -> AdministerReply:
    return AdministerReply.to(content, Status.OK, slot, f"command {number} of clients")
