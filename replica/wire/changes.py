"""Changes of the state as replicas tell them to whoever watches: positions and byte layout.

Every slot's changes are numbered from 1 in the order of execution; all correct replicas number alike. A position says
what was seen: everything up to change `place` of `slot`, or with place END the whole slot. As text, for people and for
resuming: "SLOT", or "SLOT.PLACE" in the middle of one.

A watch is a chain of links, each from one position to the next; the first begins where the watcher said. A link holds
the changes in between whose keys begin with the watched prefix:

    count x (u32 place, u8 kind, u16 length, key, then: 1 PUT u32 length, value; 2 PUT without its value, u32 length
    of the value; 3 DELETE nothing)

What makes up a link is fixed, so that all correct replicas' chains are equal, byte for byte: the changes of one slot,
from the position on, as many as fit LINK_BYTES_MAX (at least one); a slot that has none makes no link, unless its
number is a multiple of BOOKMARK_SLOTS. So a watch of what never changes moves on too, and may resume later.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from replica.core.layout import LayoutError, Reader

END: Final = 2**32 - 1
SLOT_MAX: Final = 2**63 - 1
PREFIX_BYTES_MAX: Final = 4096
LINK_BYTES_MAX: Final = 1024 * 1024
BOOKMARK_SLOTS: Final = 256
# A larger value is left out, and so is what would make a slot's changes larger than this.
VALUE_BYTES_MAX: Final = 64 * 1024
SLOT_BYTES_MAX: Final = 4 * 1024 * 1024
# A slot with more changes than this is told as a gap.
SLOT_CHANGES_MAX: Final = 65536
# How far a replica goes ahead of what its watcher has acknowledged.
WINDOW_LINKS: Final = 32
WINDOW_BYTES: Final = 4 * 1024 * 1024

# About what a change takes in memory besides its bytes.
CHANGE_OVERHEAD: Final = 200

PUT, PUT_WITHOUT_VALUE, DELETE = 1, 2, 3
_HEAD = struct.Struct(">IBH")
_LENGTH = struct.Struct(">I")
_PLACE_SIZE = 4


class Position(NamedTuple):
    """Up to where changes were seen."""

    slot: int
    place: int = END

    def __str__(self) -> str:
        return str(self.slot) if self.place == END else f"{self.slot}.{self.place}"


def parse_position(text: str) -> Position:
    """Return the position that a text names; ValueError if it is none."""
    slot, dot, place = text.partition(".")
    digits = (slot, place) if dot else (slot,)
    if not all(part.isascii() and part.isdigit() and len(part) <= 19 for part in digits):
        raise ValueError(f"{text[:40]!r} is no position: say SLOT, or SLOT.PLACE")
    position = Position(int(slot), int(place) if dot else END)
    if position.slot > SLOT_MAX or position.place > END:
        raise ValueError(f"{text[:40]!r} is no position: it is too high")
    return position


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change. value: None if the key was removed, or if it is too large to be told (`size` says how large).

    position: pass it as `after` to go on behind this change.
    """

    key: bytes
    value: bytes | None
    deleted: bool
    size: int
    slot: int
    position: Position

    @property
    def is_whole(self) -> bool:
        """Say whether the value was told, if there is one."""
        return self.deleted or self.value is not None


def encode_change(place: int, key: bytes, value: bytes | int | None) -> bytes:
    """Return the layout of one change; value: its length if it is left out, None if the key was removed."""
    if value is None:
        return _HEAD.pack(place, DELETE, len(key)) + key
    if isinstance(value, int):
        return _HEAD.pack(place, PUT_WITHOUT_VALUE, len(key)) + key + _LENGTH.pack(value)
    return _HEAD.pack(place, PUT, len(key)) + key + _LENGTH.pack(len(value)) + value


def decode_changes(raw: bytes, slot: int, end: Position) -> list[Change]:
    """Return the changes of a link that ends at `end`; LayoutError if these bytes are none."""
    body = Reader(raw)
    found: list[Change] = []
    before = 0
    while body.left():
        place, kind, key = body.u32(), body.u8(), body.take(body.u16())
        if not before < place < END or kind not in {PUT, PUT_WITHOUT_VALUE, DELETE}:
            raise LayoutError("changes out of order, or of an unknown kind")
        before = place
        size = 0 if kind == DELETE else body.u32()
        value = body.take(size) if kind == PUT else None
        # After the last one nothing of the link is left to be seen.
        position = Position(slot, place) if body.left() else end
        found.append(Change(key, value, kind == DELETE, size, slot, position))
    return found


class SlotChanges:
    """The changes of one slot, in order; each laid out only when somebody is told of it.

    size: about how much memory they take, in bytes.
    """

    __slots__ = ("_by_key", "_keys", "_laid_out", "_values", "size", "slot")

    def __init__(self, slot: int, changed: list[tuple[bytes, bytes | int | None]], size: int) -> None:
        self.slot, self.size = slot, size
        self._keys = [key for key, _ in changed]
        # New values, until they are laid out; a number is the length of a value that is left out, None: removed.
        self._values = [value for _, value in changed]
        self._laid_out: list[bytes | None] = [None] * len(changed)
        # The changes' numbers, from 0, in the order of their keys: sorted once, however many watches there are.
        self._by_key: list[int] | None = None

    def matching(self, prefix: bytes, seen: int) -> Sequence[int]:
        """Return the numbers, from 0 and in order, of the changes from number `seen` on whose keys begin so.

        Those that do not begin so cost nothing: they are not looked at.
        """
        if not prefix:
            return range(seen, len(self._keys))
        keys = self._keys
        if self._by_key is None:
            self._by_key = sorted(range(len(keys)), key=keys.__getitem__)
        size = len(prefix)
        first = bisect_left(self._by_key, prefix, key=keys.__getitem__)
        behind = bisect_right(self._by_key, prefix, first, key=lambda number: keys[number][:size])
        return sorted([number for number in self._by_key[first:behind] if number >= seen])

    def laid_out(self, number: int) -> bytes:
        """Return the layout of one change, by its number from 0."""
        raw = self._laid_out[number]
        if raw is None:
            raw = self._laid_out[number] = encode_change(number + 1, self._keys[number], self._values[number])
            self._values[number] = None
        return raw


def make_slot(slot: int, changed: list[tuple[bytes, bytes | None]]) -> SlotChanges | None:
    """Return a slot's changes from keys and new values in the order of execution; None if they are too many."""
    if len(changed) > SLOT_CHANGES_MAX:
        return None
    told: list[tuple[bytes, bytes | int | None]] = []
    values = keys = 0
    for key, value in changed:
        keys += len(key)
        if value is None:
            told.append((key, None))
        elif len(value) > VALUE_BYTES_MAX or values + len(value) > SLOT_BYTES_MAX:
            told.append((key, len(value)))
        else:
            values += len(value)
            told.append((key, value))
    return SlotChanges(slot, told, keys + values + CHANGE_OVERHEAD * (len(told) + 1))


class Link(NamedTuple):
    """A step of a watch: the watched changes between two positions."""

    start: Position
    end: Position
    changes: bytes


def next_link(start: Position, prefix: bytes, slot: int, changes: SlotChanges | None) -> Link | None:
    """Return the link from `start` into `slot`, at which a chain stands or comes next; None if there is none.

    changes: the slot's, None if it has none. `start` lies in this slot or before it.
    """
    seen = start.place if start.slot == slot else 0
    parts: list[bytes] = []
    size = 0
    told = () if changes is None or seen == END else map(changes.laid_out, changes.matching(prefix, seen))
    for raw in told:
        if parts and size + len(raw) > LINK_BYTES_MAX:
            return Link(start, Position(slot, _place_of(parts[-1])), b"".join(parts))
        parts.append(raw)
        size += len(raw)
    # In the middle of a slot the rest of it is a link even if it holds nothing more.
    if parts or (slot % BOOKMARK_SLOTS == 0 and seen != END) or 0 < seen < END:
        return Link(start, Position(slot), b"".join(parts))
    return None


def _place_of(raw: bytes) -> int:
    number: int = _LENGTH.unpack(raw[:_PLACE_SIZE])[0]
    return number
