"""The reduced state of one log: a pure function of the log's prefix (design section 4.1).

Structural rules read only these fields, and of these only what is never pruned, so all correct replicas judge a log
alike and stop at the same index of a bad one. `votes` and `commits` are pruned below the stable checkpoint.
"""

from dataclasses import dataclass, field


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


def initial_states(n: int) -> list[LogState]:
    """Return the reduced state of every empty log. View 0 is open: its primary proposes from slot 1 on."""
    states = [LogState(author) for author in range(n)]
    states[0].opened[0] = Opening(base=0, top=0)
    return states
