"""The rules of a log: what its author may write next, and what a reader must know before judging it.

`judge` answers for the next entry of a log with one of

  None       the entry is good: apply it;
  Wait       a cause of it is missing here: judge again when more was read. Waits are monotone and mention only what
             the author must have processed before it wrote, so what one correct replica reads, all can;
  Violation  the author broke a rule. Only its own log's prefix is looked at (and, for NEW-VIEW, the entries that it
             names), so every correct replica stops at this index. The violation is evidence.

`apply_entry` may assume that `judge` said None. Rules after the design, section 4.1; the numbers in violations are
stable names for evidence and metrics.

A vote that differs from what was proposed, or a checkpoint that differs from the stable one, is *not* judged here: a
replica that pruned could not tell. It is not counted, and reported as a lie, by `replica.core.slots`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from replica.core.carry import Carry
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    EpochMark,
    NewView,
    Prepare,
    PrePrepare,
    Skipped,
    SlotResult,
    Suspect,
    ViewChange,
)
from replica.core.genesis import Genesis
from replica.core.logstate import Departure, LogState
from replica.core.quorum import primary


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that an entry breaks: its stable name, and a sentence about this case."""

    rule: str
    text: str


@dataclass(frozen=True, slots=True)
class Wait:
    """What is missing: entries of these logs, all of which the waiting entry's author has."""

    why: str
    logs: tuple[int, ...]


Verdict = Violation | Wait | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader knows: every log's reduced state, and how far it executed and forgot.

    ends: the last slot of this list of members, once it is known. A vote above it needs a CHECKPOINT of its author
    above the slot at which that was decided (the two are a window apart), so whoever judges such a vote knows it.
    """

    genesis: Genesis
    states: Sequence[LogState]
    executed: int
    stable: int
    ends: int | None = None

    def others(self, author: int) -> tuple[int, ...]:
        """Return the numbers of all logs but `author`'s."""
        return tuple(n for n in range(self.genesis.n) if n != author)

    def base_of(self, view: int) -> int | None:
        """Return the base of `view`, or None if this reader has not seen it opened."""
        opening = self.states[primary(view, self.genesis.n)].opened.get(view)
        return None if opening is None else opening.base


def judge(state: LogState, entry: Entry, reading: Reading) -> Verdict:
    """Judge `entry` as the next one of the log that `state` reduces; nothing is changed."""
    return _JUDGES[type(entry)](state, entry, reading)


def apply_entry(state: LogState, entry: Entry) -> None:
    """Advance `state` over `entry`, which `judge` found good. Carried votes of NEW-VIEW are the caller's."""
    state.position += 1
    if isinstance(entry, PrePrepare):
        state.last_vote = entry.slot
        state.vote(entry.view, entry.slot, entry.batch.digest)
    elif isinstance(entry, Prepare):
        state.last_vote = entry.slot
        state.vote(entry.view, entry.slot, entry.digest)
    elif isinstance(entry, Commit):
        state.last_commit = entry.slot
        state.commits.setdefault(entry.slot, {})[entry.view] = entry.digest
    elif isinstance(entry, Checkpoint):
        state.last_checkpoint = entry.slot
        state.results = 0
        state.joined = True
    elif isinstance(entry, SlotResult):
        state.results += 1
    elif isinstance(entry, Suspect):
        state.suspected = True
    elif isinstance(entry, ViewChange):
        state.view = entry.view
        state.suspected = False
        state.last_vote = state.last_commit = None
        state.view_change_at[entry.view] = Departure(state.position, state.last_checkpoint, state.top)


def apply_opening(state: LogState, view: int, carried: Carry) -> None:
    """Note that the log opened `view`: what it proposes again counts as its author's votes."""
    state.opened[view] = carried.opening
    for slot, digest in carried.votes:
        state.vote(view, slot, digest)
    state.top = max(state.top, carried.opening.top)


def next_vote(state: LogState, base: int) -> int:
    """Return the only slot for which the log's author may vote next in its view.

    `base` is the view's base for a backup, and its top for its primary, whose NEW-VIEW already voted up to there.
    """
    reached = base if state.last_vote is None else state.last_vote
    return max(reached, state.last_checkpoint) + 1


def next_commit(state: LogState, base: int) -> int:
    """Return the only slot that the log's author may commit next in its view; `base` is the view's base."""
    reached = base if state.last_commit is None else state.last_commit
    return max(reached, state.last_checkpoint) + 1


def results_max(genesis: Genesis) -> int:
    """Return how many RESULTs a log may hold between two CHECKPOINTs: one for each slot of a window."""
    return genesis.limits.window


def highest_own_vote(state: LogState) -> int:
    """Return the highest slot that the author voted for in its present view, 0 if none."""
    if state.last_vote is not None:
        return state.last_vote
    opening = state.opened.get(state.view)
    return 0 if opening is None else opening.top


def _wrong_view(state: LogState, view: int) -> Violation | None:
    if view == state.view:
        return None
    return Violation("wrong-view", f"an entry for view {view} by a replica in view {state.view}")


def _beyond_window(state: LogState, slot: int, reading: Reading) -> Violation | None:
    end = state.last_checkpoint + reading.genesis.limits.window
    if slot <= end:
        if reading.ends is not None and slot > reading.ends:
            return Violation("beyond-list", f"slot {slot}, the list of members ends with {reading.ends}")
        return None
    return Violation("beyond-window", f"slot {slot}, its author's window ends at {end}")


def _judge_pre_prepare(state: LogState, entry: PrePrepare, reading: Reading) -> Verdict:
    wrong = _wrong_view(state, entry.view)
    if wrong is not None:
        return wrong
    if state.author != primary(entry.view, reading.genesis.n):
        return Violation("not-primary", f"replica {state.author} proposed in view {entry.view}")
    opening = state.opened.get(entry.view)
    if opening is None:
        return Violation("view-not-open", f"a proposal in view {entry.view} before NEW-VIEW({entry.view})")
    due = next_vote(state, opening.top)
    if entry.slot < due:
        return Violation("proposed-twice", f"a proposal for slot {entry.slot}, the next is {due}")
    if entry.slot > due:
        return Violation("slot-skipped", f"a proposal for slot {entry.slot}, the next is {due}")
    beyond = _beyond_window(state, entry.slot, reading)
    if beyond is not None:
        return beyond
    # A proposer's claim about its own log cannot wait for the very entry that makes it.
    missing = tuple(
        log
        for log, position in enumerate(entry.batch.cut)
        if position > reading.states[log].position and log != state.author
    )
    if entry.batch.cut and entry.batch.cut[state.author] > state.position:
        return Violation("cut-ahead", "a cut beyond its proposer's own log")
    return Wait("the positions in its cut", missing) if missing else None


def _judge_prepare(state: LogState, entry: Prepare, reading: Reading) -> Verdict:
    wrong = _wrong_view(state, entry.view)
    if wrong is not None:
        return wrong
    proposer = primary(entry.view, reading.genesis.n)
    if state.author == proposer:
        return Violation("primary-prepared", f"the primary of view {entry.view} voted by PREPARE")
    base = reading.base_of(entry.view)
    if base is None:
        return Wait(f"NEW-VIEW({entry.view})", (proposer,))
    due = next_vote(state, base)
    if entry.slot != due:
        rule = "voted-twice" if entry.slot < due else "slot-skipped"
        return Violation(rule, f"a vote for slot {entry.slot}, the next is {due}")
    beyond = _beyond_window(state, entry.slot, reading)
    if beyond is not None:
        return beyond
    proposed = entry.view in reading.states[proposer].votes.get(entry.slot, ())
    if not proposed and entry.slot > reading.stable:
        return Wait(f"the proposal for slot {entry.slot} in view {entry.view}", (proposer,))
    return None


def _judge_commit(state: LogState, entry: Commit, reading: Reading) -> Verdict:
    wrong = _wrong_view(state, entry.view)
    if wrong is not None:
        return wrong
    base = reading.base_of(entry.view)
    if base is None:
        return Wait(f"NEW-VIEW({entry.view})", (primary(entry.view, reading.genesis.n),))
    due = next_commit(state, base)
    if entry.slot != due:
        rule = "committed-twice" if entry.slot < due else "slot-skipped"
        return Violation(rule, f"a commit for slot {entry.slot}, the next is {due}")
    voted = highest_own_vote(state)
    if entry.slot > voted:
        return Violation("commit-without-vote", f"a commit for slot {entry.slot}, voted up to {voted}")
    return None


def _judge_checkpoint(state: LogState, entry: Checkpoint, reading: Reading) -> Verdict:
    if entry.slot % reading.genesis.limits.checkpoint_interval:
        return Violation("checkpoint-misplaced", f"slot {entry.slot} is no multiple of the interval")
    if entry.slot <= state.last_checkpoint and state.joined:
        return Violation("checkpoint-backwards", f"slot {entry.slot} after {state.last_checkpoint}")
    if entry.slot > reading.executed:
        return Wait(f"slot {entry.slot} executed here", reading.others(state.author))
    return None


def _judge_result(state: LogState, entry: SlotResult, reading: Reading) -> Verdict:
    end = state.last_checkpoint + reading.genesis.limits.window
    if entry.slot > end:
        return Violation("result-beyond-window", f"a RESULT of slot {entry.slot}, its author's window ends at {end}")
    if state.results >= results_max(reading.genesis):
        return Violation(
            "too-many-results", f"more than {state.results} RESULTs after CHECKPOINT({state.last_checkpoint})"
        )
    if entry.slot > reading.executed:
        return Wait(f"slot {entry.slot} executed here", reading.others(state.author))
    return None


def _judge_suspect(state: LogState, entry: Suspect, reading: Reading) -> Verdict:  # noqa: ARG001 - one signature
    wrong = _wrong_view(state, entry.view)
    if wrong is not None:
        return wrong
    if state.suspected:
        return Violation("suspected-twice", f"a second SUSPECT({entry.view})")
    return None


def _judge_view_change(state: LogState, entry: ViewChange, reading: Reading) -> Verdict:
    if entry.view <= state.view:
        return Violation("view-backwards", f"VIEW-CHANGE({entry.view}) in view {state.view}")
    wanting = sum(1 for other in reading.states if other.wants >= entry.view)
    if wanting < reading.genesis.quorum:
        return Wait(f"q replicas that want view {entry.view}", reading.others(state.author))
    return None


def _judge_new_view(state: LogState, entry: NewView, reading: Reading) -> Verdict:
    wrong = _wrong_view(state, entry.view)
    if wrong is not None:
        return wrong
    if state.author != primary(entry.view, reading.genesis.n):
        return Violation("not-primary", f"NEW-VIEW({entry.view}) by replica {state.author}")
    if entry.view in state.opened:
        return Violation("opened-twice", f"a second NEW-VIEW({entry.view})")
    missing = tuple(r.replica for r in entry.references if r.index > reading.states[r.replica].position)
    if state.author in missing:
        return Violation("reference-ahead", "a reference beyond its author's own log")
    if missing:
        return Wait("the entries that it names", missing)
    for reference in entry.references:
        departure = reading.states[reference.replica].view_change_at.get(entry.view)
        if departure is None or departure.index != reference.index:
            text = f"entry {reference.index} of replica {reference.replica} is no VIEW-CHANGE({entry.view})"
            return Violation("wrong-reference", text)
    return None


_JUDGES: dict[type, Callable[[LogState, "Entry", Reading], Verdict]] = {
    PrePrepare: _judge_pre_prepare,  # type: ignore[dict-item]
    Prepare: _judge_prepare,  # type: ignore[dict-item]
    Commit: _judge_commit,  # type: ignore[dict-item]
    Checkpoint: _judge_checkpoint,  # type: ignore[dict-item]
    Suspect: _judge_suspect,  # type: ignore[dict-item]
    ViewChange: _judge_view_change,  # type: ignore[dict-item]
    NewView: _judge_new_view,  # type: ignore[dict-item]
    SlotResult: _judge_result,  # type: ignore[dict-item]
    Skipped: lambda _state, _entry, _reading: None,
    EpochMark: lambda _state, _entry, _reading: None,
}
