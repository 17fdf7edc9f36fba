"""Which version of the application is in force: agreed, and changed by operators while the cluster runs.

Replicas get new code one after the other, so for a while old and new code execute the same slots, and must do the
same. New code therefore does what the old did, until an operator's command, ordered like any other, puts its version in
force: `apply` is told by `context.version`, and behaves so. A cluster begins with version 0.

A command is judged by what is agreed alone, at execution: an operator of the genesis signed it, and its version is
greater than the one in force. It may leave versions out: a version says how `apply` behaves, and is no step that
rewrites the state, so nothing would be won by going through each. It never goes back, so a captured command does
nothing when it comes again.

Executed at slot r it is in force after slot r: all of r is executed by the version before, whatever its place in the
batch, so no slot is executed by two. No distance like that of members' lists is needed, because no vote depends on it.
One command can be executed in a slot; another one there is refused.

Which versions a replica's code knows is its own business and not agreed: it stops before the first slot of a version
that it does not know (`replica.core.machine`), and with other code goes on from there.

Layout of a command (integers big-endian):

    16  tag "trustlog/version"   u8 version 1
    u16 the application's version, from 1

It is kept in the client table's records, which the checkpoint digest covers; none as long as version 0 is in force:

    "vc" -> u16 version, u64 r: in force after that slot
"""

import struct
from typing import cast

from replica.application import VERSION_MAX
from replica.core.envelope import Administer, AdministerReply, RefusedError, Status
from replica.core.layout import LayoutError, Reader
from replica.core.sessions import VERSIONS_RECORDS
from replica.core.state import BucketedMap

VERSION_TAG = b"trustlog/version"
ACTIVATION_VERSION = 1

CURRENT = b"vc"

_COMMAND = struct.Struct(">16sBH")
_RECORD = struct.Struct(">HQ")


def is_about_versions(command: bytes) -> bool:
    """Say whether an operator's command is one of these, well formed or not."""
    return command.startswith(VERSION_TAG)


def encode_activation(version: int) -> bytes:
    """Return the command that puts a version of the application in force."""
    return _COMMAND.pack(VERSION_TAG, ACTIVATION_VERSION, version)


def decode_activation(raw: bytes) -> int:
    """Return the version that a command puts in force; LayoutError says what is wrong."""
    reader = Reader(raw)
    tag, layout, version = cast("tuple[bytes, int, int]", _COMMAND.unpack(reader.take(_COMMAND.size)))
    reader.finish()
    if tag != VERSION_TAG or layout != ACTIVATION_VERSION:
        raise LayoutError("not a command about the application's version that this program knows")
    if not 1 <= version <= VERSION_MAX:
        raise LayoutError(f"an application's version that is put in force is from 1 to {VERSION_MAX}, not {version}")
    return version


class Versions:
    """The agreed version: `present` is in force, since the slot after `after`; 0 and 0 in the beginning.

    Whoever calls `execute` has made sure that an operator signed the command.
    """

    def __init__(self, records: BucketedMap) -> None:
        self.present = 0
        self.after = 0
        self._next: tuple[int, int] | None = None  # version and slot, while the slot of a command is executed
        self._records = records

    @classmethod
    def restored(cls, records: BucketedMap) -> "Versions":
        """Return what these records hold; LayoutError for what no version has."""
        made = cls(records)
        for key, value in records.scan(VERSIONS_RECORDS):
            if key != CURRENT or len(value) != _RECORD.size:
                text = f"a record of {len(key)} and {len(value)} bytes is nothing about the application's version"
                raise LayoutError(text)
            made.present, made.after = _RECORD.unpack(value)
        return made

    def known(self, content: Administer) -> AdministerReply | None:
        """Return the reply to a command whose version is in force, or is so after this slot; else None."""
        try:
            wanted = decode_activation(content.command)
        except LayoutError:
            return None
        for version, after in ((self.present, self.after), *([self._next] if self._next else [])):
            if wanted == version:
                return _done(content, wanted, after)
        return None

    def execute(self, content: Administer, slot: int) -> AdministerReply:
        """Execute an operator's command at `slot`; nothing changes unless the status is OK."""
        known = self.known(content)
        if known is not None:
            return known
        if slot > content.void_after:
            return AdministerReply.to(content, Status.VOID, slot, "its time is over")
        try:
            wanted = decode_activation(content.command)
            self._judge(wanted)
        except (LayoutError, RefusedError) as error:
            return AdministerReply.to(content, Status.ERROR, slot, str(error))
        self._next = (wanted, slot)
        return _done(content, wanted, slot)

    def end_slot(self) -> None:
        """Put in force what was commanded in the slot that ends, the last one of the version before."""
        if self._next is None:
            return
        (self.present, self.after), self._next = self._next, None
        self._records.put_unbounded(CURRENT, _RECORD.pack(self.present, self.after))
        self._records.commit()

    def _judge(self, wanted: int) -> None:
        """Raise RefusedError if `wanted` must not follow the version in force."""
        if self._next is not None:
            raise RefusedError(f"version {self._next[0]} of the application is in force after this slot: ask then")
        if wanted < self.present:
            raise RefusedError(
                f"version {self.present} of the application is in force, and none goes back to version {wanted}"
            )


def _done(content: Administer, version: int, slot: int) -> AdministerReply:
    return AdministerReply.to(content, Status.OK, slot, f"version {version} of the application")
