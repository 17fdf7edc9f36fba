r"""The chain of member lists: how today's members are learnt from those one knows (design section 4.4).

A link shows that list g ended and what follows it: the last checkpoint of list g, which q of *its* logs attested, and
the next list, whose digest stands in that checkpoint's header. Whoever knows list g verifies the link, and then knows
list g + 1: a replica that was long away, a client, or who verifies something years later. Links are kept for ever.

    16  tag "trustlog/link\0\0\0"
    u32 length, header of the checkpoint of the last slot    u32 length, its certificate (`replica.core.checkpoint`)
    u32 length, the next list of members (`replica.core.members`)

A list of members begins with the state after that checkpoint (`found`). Every log that stays is read from the agreed
cut on, and what it said there under the old list is skipped without a look, until it joins with CHECKPOINT of that
slot; a replica that is late, or whose log is new, joins with a later one. So no reader depends on how far another had
read the old list, and nothing that was said under it counts above its last slot.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from replica.core.checkpoint import Header, VerifyProof, check_certificate, decode_header, state_digest
from replica.core.genesis import Genesis
from replica.core.layout import LayoutError, Reader
from replica.core.logstate import LogState, founding_states
from replica.core.members import MemberList, decode_members
from replica.core.proof import PROOF_BYTES_MAX
from replica.core.quorum import FAULTS_MAX, replica_count
from replica.core.snapshot import Snapshot

LINK_TAG = b"trustlog/link\0\0\0"
HEADER_BYTES_MAX = 4096
CERTIFICATE_BYTES_MAX = 2 + replica_count(FAULTS_MAX) * (6 + PROOF_BYTES_MAX)
LIST_BYTES_MAX = 128 * 1024
LINK_BYTES_MAX = 28 + HEADER_BYTES_MAX + CERTIFICATE_BYTES_MAX + LIST_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Link:
    """One link, as bytes of the documented parts."""

    header: bytes
    certificate: bytes
    members: bytes

    def encode(self) -> bytes:
        """Return the documented layout."""
        parts = [LINK_TAG]
        for part in (self.header, self.certificate, self.members):
            parts += [struct.pack(">I", len(part)), part]
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Proven:
    """What a verified link shows: how the list before ended, and what is agreed under the next one."""

    header: Header
    members: MemberList
    genesis: Genesis


def decode_link(raw: bytes) -> Link:
    """Take a link apart, nothing is verified here; LayoutError if it is not laid out as documented."""
    if len(raw) > LINK_BYTES_MAX:
        raise LayoutError(f"a link of {len(raw)} bytes, the limit is {LINK_BYTES_MAX}")
    reader = Reader(raw)
    if reader.take(len(LINK_TAG)) != LINK_TAG:
        raise LayoutError("not a link of a chain of member lists")
    sizes = (HEADER_BYTES_MAX, CERTIFICATE_BYTES_MAX, LIST_BYTES_MAX)
    link = Link(*(reader.block(size) for size in sizes))
    reader.finish()
    return link


def check_link(link: Link, before: Genesis, verify: VerifyProof) -> Proven:
    """Return what `link` shows to whoever knows `before`; LayoutError unless it follows that list.

    verify: whether a log of `before` attested an entry.
    """
    header = decode_header(link.header, before.n)
    check_certificate(link.certificate, header, before, verify)
    if hashlib.sha256(link.members).digest() != header.members:
        raise LayoutError("the list of members is not the one that the checkpoint names")
    members = decode_members(link.members)
    if members.number != before.list_number + 1 or members.after != header.slot:
        raise LayoutError(f"list {members.number} after slot {members.after} does not follow list {before.list_number}")
    try:
        return Proven(header, members, members.genesis(before))
    except ValueError as error:
        raise LayoutError(f"list {members.number}: {error}") from error


def said_under(raw: bytes, genesis: Genesis, before: Genesis | None) -> tuple[Header, Genesis]:
    """Decode a header that was said under the list of `genesis`, or the last one of the list `before`.

    Return it with what is agreed under the list that said it. LayoutError if it is neither; nothing is verified here.
    """
    if before is not None:
        try:
            last = decode_header(raw, before.n)
        except LayoutError:
            last = None
        if last is not None and last.list_number == before.list_number and last.slot == genesis.base:
            return last, before
    header = decode_header(raw, genesis.n)
    if header.list_number != genesis.list_number:
        raise LayoutError(f"a header of list {header.list_number} of members, not of list {genesis.list_number}")
    return header, genesis


def earlier_list(raw: bytes, lists: Sequence[Genesis]) -> int | None:
    """Return under which of these lists a header was said, if that is none with which the last of them can go on.

    lists: every list so far. None for a header that `said_under` takes, and for what is no header; nothing is verified.
    """
    try:
        said_under(raw, lists[-1], lists[-2] if len(lists) > 1 else None)
    except LayoutError:
        return next((genesis.list_number for genesis in lists[:-1] if _is_of(raw, genesis)), None)
    return None


def _is_of(raw: bytes, genesis: Genesis) -> bool:
    try:
        return decode_header(raw, genesis.n).list_number == genesis.list_number
    except LayoutError:
        return False


def header_under(raw: bytes, genesis: Genesis, before: Genesis | None) -> Header:
    """Decode a header as `said_under` does; its cut is that of the present list's logs, 0 for those that came in."""
    header, agreed = said_under(raw, genesis, before)
    return header if agreed is genesis else replace(header, cut=_cut_from(header, genesis))


def _cut_from(header: Header, genesis: Genesis) -> tuple[int, ...]:
    return tuple(header.cut[member.number] if member.since < genesis.list_number else 0 for member in genesis.members)


def found(snapshot: Snapshot, genesis: Genesis, heads: Sequence[bytes]) -> Snapshot:
    """Return the state with which the list of `genesis` begins, from the last one of the list before.

    heads: of every log of the new list before its first entry. LayoutError if that state is not what it begins with.
    """
    header, membership = snapshot.header, snapshot.executor.membership
    if header.slot != genesis.base or membership.number != genesis.list_number:
        raise LayoutError(f"the state after slot {header.slot} is not what list {genesis.list_number} begins with")
    founding, states = founding_of(header, genesis, heads)
    return Snapshot(founding, snapshot.certificate, states, (), snapshot.executor, founded=header.digest)


def founding_of(header: Header, genesis: Genesis, heads: Sequence[bytes]) -> tuple[Header, tuple[LogState, ...]]:
    """Return where the list of `genesis` begins, from the last header of the list before; heads: as for `found`."""
    cut = _cut_from(header, genesis)
    stays = [member.since < genesis.list_number for member in genesis.members]
    at = tuple(header.heads[i] if staying else heads[i] for i, staying in enumerate(stays))
    states = tuple(founding_states(cut, genesis.base))
    digests = tuple(state_digest(state.encode()) for state in states)
    return replace(header, cut=cut, heads=at, logs=digests, list_number=genesis.list_number), states
