"""The reduced state of one log: a pure function of the log's prefix (design section 4.1).

Structural rules read only these fields, and of these only what is never pruned, so all correct replicas judge a log
alike and stop at the same index of a bad one. `votes` and `commits` are pruned below the stable checkpoint.

Layout, for checkpoints (integers u64 big-endian unless noted; an absent slot is 0, which no entry can name):

    u16 author      position, view      u8 flags: 1 suspected, 2 not joined
                    last_vote, last_commit, last_checkpoint, top
    u32 openings    x (view, base, top)                       views ascending
    u32 departures  x (view, index, last_checkpoint, top)     views ascending
    u32 votes       x (slot, view, 32 digest)                 slots, then views ascending
    u32 commits     likewise
    u64 results     RESULTs since the last CHECKPOINT; left out if there are none
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from replica.core.layout import DIGEST_SIZE, U64, LayoutError, Reader

_SUSPECTED, _NOT_JOINED = 1, 2
_FIELDS = struct.Struct(">HQQBQQQQ")
_COUNT = struct.Struct(">I")
_OPENING = struct.Struct(">QQQ")
_DEPARTURE = struct.Struct(">QQQQ")
_VOTE = struct.Struct(">QQ32s")


@dataclass(frozen=True, slots=True)
class Opening:
    """A NEW-VIEW, reduced: what it proposes again lies in (base, top]."""

    base: int
    top: int


@dataclass(frozen=True, slots=True)
class Departure:
    """A VIEW-CHANGE, reduced: its index, and what its author's log held up to there."""

    index: int
    last_checkpoint: int
    top: int


@dataclass(slots=True)
class LogState:
    """What the rules need to know about replica `author`'s log up to `position`.

    Invariants, checked by `check()`:
      1. last_commit <= last_vote wherever both are set in the present view, or last_vote is a carried vote;
      2. no vote lies above `top`, and none above last_checkpoint + the window when it was written;
      3. `view_change_at` holds no view above `view`.
    """

    author: int
    position: int = 0
    view: int = 0
    suspected: bool = False
    last_vote: int | None = None  # slot, in the present view
    last_commit: int | None = None  # slot, in the present view
    last_checkpoint: int = 0
    top: int = 0  # the highest slot ever voted for
    opened: dict[int, Opening] = field(default_factory=dict)
    view_change_at: dict[int, Departure] = field(default_factory=dict)
    votes: dict[int, dict[int, bytes]] = field(default_factory=dict)
    commits: dict[int, dict[int, bytes]] = field(default_factory=dict)
    results: int = 0  # RESULTs since the last CHECKPOINT
    joined: bool = True  # the list of members under which it is read; before that its entries belong to an older one

    @property
    def wants(self) -> int:
        """The view its author wants to be in."""
        return self.view + (1 if self.suspected else 0)

    def copy(self) -> "LogState":
        """Return an independent copy."""
        return LogState(
            author=self.author,
            position=self.position,
            view=self.view,
            suspected=self.suspected,
            last_vote=self.last_vote,
            last_commit=self.last_commit,
            last_checkpoint=self.last_checkpoint,
            top=self.top,
            opened=dict(self.opened),
            view_change_at=dict(self.view_change_at),
            votes={slot: dict(by_view) for slot, by_view in self.votes.items()},
            commits={slot: dict(by_view) for slot, by_view in self.commits.items()},
            results=self.results,
            joined=self.joined,
        )

    def vote(self, view: int, slot: int, digest: bytes) -> None:
        """Note a vote, one that was carried into `view` by NEW-VIEW included."""
        self.votes.setdefault(slot, {})[view] = digest
        self.top = max(self.top, slot)

    def prune(self, slot: int) -> None:
        """Forget votes and commits up to `slot`, a stable checkpoint."""
        for kept in (self.votes, self.commits):
            for old in [s for s in kept if s <= slot]:
                del kept[old]

    def drop_views(self, below: int) -> None:
        """Forget openings of and departures for views below `below`, which nobody can name any more."""
        for views in (self.opened, self.view_change_at):
            for old in [view for view in views if view < below]:
                del views[old]

    @property
    def _flags(self) -> int:
        return _SUSPECTED * self.suspected + _NOT_JOINED * (not self.joined)

    def encode(self) -> bytes:
        """Return the documented layout."""
        numbers = (self.last_vote or 0, self.last_commit or 0, self.last_checkpoint, self.top)
        parts = [_FIELDS.pack(self.author, self.position, self.view, self._flags, *numbers)]
        parts.append(_COUNT.pack(len(self.opened)))
        parts += [_OPENING.pack(view, o.base, o.top) for view, o in sorted(self.opened.items())]
        parts.append(_COUNT.pack(len(self.view_change_at)))
        departures = sorted(self.view_change_at.items())
        parts += [_DEPARTURE.pack(view, d.index, d.last_checkpoint, d.top) for view, d in departures]
        for kept in (self.votes, self.commits):
            said = [(slot, view, kept[slot][view]) for slot in sorted(kept) for view in sorted(kept[slot])]
            parts.append(_COUNT.pack(len(said)))
            parts += [_VOTE.pack(*vote) for vote in said]
        if self.results:
            parts.append(U64.pack(self.results))
        return b"".join(parts)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Decode the documented layout; LayoutError if these bytes are not exactly that."""
        reader = Reader(raw)
        author, position, view, flags, *numbers = _FIELDS.unpack(reader.take(_FIELDS.size))
        last_vote, last_commit, last_checkpoint, top = numbers
        state = cls(author, position, view, bool(flags & _SUSPECTED), last_vote or None, last_commit or None)
        state.joined = not flags & _NOT_JOINED
        state.last_checkpoint, state.top = last_checkpoint, top
        for _ in range(reader.u32()):
            at, base, opening_top = _OPENING.unpack(reader.take(_OPENING.size))
            state.opened[at] = Opening(base, opening_top)
        for _ in range(reader.u32()):
            at, *departure = _DEPARTURE.unpack(reader.take(_DEPARTURE.size))
            state.view_change_at[at] = Departure(*departure)
        for kept in (state.votes, state.commits):
            for _ in range(reader.u32()):
                slot, at, digest = reader.u64(), reader.u64(), reader.take(DIGEST_SIZE)
                kept.setdefault(slot, {})[at] = digest
        if reader.left():
            state.results = reader.u64()
        reader.finish()
        # One state, one layout: what is not ascending, or says something twice, is not taken.
        if state.encode() != raw:
            raise LayoutError("a log's reduced state that is not in canonical order")
        return state

    def check(self) -> None:
        """Raise RuntimeError if an invariant is broken."""
        if self.last_commit is not None and self.last_vote is not None and self.view not in self.opened:
            floor = max(self.last_vote, self.last_checkpoint)
            if self.last_commit > floor:
                raise RuntimeError(f"invariant 1: commit for {self.last_commit} above {floor}")
        if any(slot > self.top for slot in self.votes):
            raise RuntimeError("invariant 2: a vote above top")
        if any(view > self.view for view in self.view_change_at):
            raise RuntimeError("invariant 3: a VIEW-CHANGE to a view that was not entered")


def initial_states(n: int, base: int = 0) -> list[LogState]:
    """Return the reduced state of every empty log. View 0 is open: its primary proposes from slot base + 1 on."""
    states = [LogState(author, last_checkpoint=base, top=base) for author in range(n)]
    states[0].opened[0] = Opening(base=base, top=base)
    return states


def founding_states(positions: Sequence[int], base: int) -> list[LogState]:
    """Return every log's reduced state where a list of members begins, in force after slot `base`.

    positions: where each log is read on. What a log says before it joins, with CHECKPOINT(base) or a later one, belongs
    to the list before, or is nothing. View 0 of the list is open, whatever views there were.
    """
    states = [
        LogState(author, position, last_checkpoint=base, top=base, joined=False)
        for author, position in enumerate(positions)
    ]
    states[0].opened[0] = Opening(base=base, top=base)
    return states
