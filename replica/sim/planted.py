"""Planted bugs: small patches of single functions, for `replica.sim.controls`.

Each function here returns what is to be replaced: (owner, attribute, value). What is patched belongs to the cores, or
to the simulated shell where the shell's duty is broken. They reach into what they break, so types and privacy are off;
the table of controls says what each one breaks.
"""
# ruff: noqa: ANN401, D103, SLF001

from collections.abc import Callable, Iterator
from typing import Any

from client.pending import Tally
from replica.core import carry, checkpoints, entries, execution, machine, pen, slots
from replica.core.batch import NULL_BATCH
from replica.core.entries import Commit, NewView, Prepare, PrePrepare, Reference, ViewChange
from replica.core.envelope import Open
from replica.core.events import Fetch
from replica.core.expectation import Expectation
from replica.core.fetching import Fetcher
from replica.core.heads import HeadsComparer
from replica.core.inbox import Arrival, Inbox
from replica.core.layout import LayoutError, Reader
from replica.core.logstate import LogState
from replica.core.patience import Patience
from replica.core.rules import Violation, Wait, apply_entry, judge
from replica.core.slots import Slot, SlotBook, ViewTally

Patch = tuple[Any, str, Any]


# Quorums and counting.


def quorum_one_short() -> list[Patch]:
    return [(slots, "is_quorum", lambda voters, f: voters.bit_count() >= f)]


def stable_one_short() -> list[Patch]:
    return [(checkpoints, "is_quorum", lambda voters, f: voters.bit_count() >= f)]


def one_counts_twice() -> list[Patch]:
    right_vote, right_commit = SlotBook.vote, SlotBook.commit

    def twice(right: Callable[..., bool], mask: str) -> Callable[..., bool]:
        def count(book: Any, author: int, view: int, slot: int, digest: bytes) -> bool:
            # A second bit for the same replica, set before the decision is made.
            found = book._slots.get(slot)
            tally = found.views.get(view) if found is not None else None
            if tally is not None and tally.digest == digest and author > 0:
                setattr(tally, mask, getattr(tally, mask) | 1 << (author + 32))
                tally.voters |= 1 << (author + 32)
            return right(book, author, view, slot, digest)

        return count

    return [(SlotBook, "vote", twice(right_vote, "voters")), (SlotBook, "commit", twice(right_commit, "committers"))]


def differing_vote_counts() -> list[Patch]:
    def vote(book: Any, author: int, view: int, slot: int, digest: bytes) -> bool:  # noqa: ARG001
        found: Slot | None = book._slots.get(slot)
        if found is not None and view in found.views:
            found.views[view].voters |= 1 << author
            book._decide(found, found.views[view])
        return True

    def commit(book: Any, author: int, view: int, slot: int, digest: bytes) -> bool:  # noqa: ARG001
        found: Slot | None = book._slots.get(slot)
        if found is not None and view in found.views:
            found.views[view].committers |= 1 << author
            book._decide(found, found.views[view])
        return True

    return [(SlotBook, "vote", vote), (SlotBook, "commit", commit)]


def no_quorum_to_execute() -> list[Patch]:
    def decide(book: Any, found: Slot, tally: ViewTally) -> None:  # noqa: ARG001
        found.decided = tally.digest

    return [(SlotBook, "_decide", decide)]


# What a new view carries.


def carry_lowest_view() -> list[Patch]:
    def lowest(slot: int, view: int, authors: Any, states: Any) -> bytes:
        found = {
            voted_in: digest
            for author in authors
            for voted_in, digest in states[author].votes.get(slot, {}).items()
            if voted_in < view and digest == carry._proposed(slot, voted_in, states)
        }
        return found[min(found)] if found else NULL_BATCH.digest

    return [(carry, "_carried", lowest)]


def carry_forgets() -> list[Patch]:
    return [(carry, "_carried", lambda *_: NULL_BATCH.digest)]


def carry_what_was_not_proposed() -> list[Patch]:
    def any_vote(slot: int, view: int, authors: Any, states: Any) -> bytes:
        best_view, best = -1, NULL_BATCH.digest
        for author in authors:
            for voted_in, digest in states[author].votes.get(slot, {}).items():
                if best_view <= voted_in < view:
                    best_view, best = voted_in, digest
        return best

    return [(carry, "_carried", any_vote)]


def few_references() -> list[Patch]:
    def decode(payload: bytes, genesis: Any) -> NewView:
        reader = Reader(payload, 1)
        view, count = reader.u64(), reader.u16()
        references = tuple(Reference(reader.u16(), reader.u64()) for _ in range(count))
        reader.finish()
        if not references or any(r.replica >= genesis.n for r in references):
            raise LayoutError("no references")
        return NewView(view, references)

    return [(entries, "_decode_new_view", decode)]


# The rules of a log.


def votes_after_change() -> list[Patch]:
    right_judge, right_apply = judge, apply_entry

    def late(state: Any, entry: Any) -> bool:
        return isinstance(entry, Prepare | Commit) and entry.view < state.view

    def lax(state: Any, entry: Any, reading: Any) -> Any:
        return None if late(state, entry) else right_judge(state, entry, reading)

    def lax_apply(state: Any, entry: Any) -> None:
        if not late(state, entry):
            right_apply(state, entry)
            return
        state.position += 1
        kept = state.votes if isinstance(entry, Prepare) else state.commits
        kept.setdefault(entry.slot, {})[entry.view] = entry.digest

    return [(machine, "judge", lax), (machine, "apply_entry", lax_apply)]


def no_wait_for_causes() -> list[Patch]:
    right = judge

    def lax(state: Any, entry: Any, reading: Any) -> Any:
        verdict = right(state, entry, reading)
        return None if isinstance(verdict, Wait) and isinstance(entry, Prepare | Commit) else verdict

    return [(machine, "judge", lax)]


def gap_by_arithmetic() -> list[Patch]:
    def hold(inbox: Any, group: Any) -> Arrival:
        inbox._take(group)
        return Arrival.TAKEN

    return [(Inbox, "_hold", hold)]


def second_proposal_accepted() -> list[Patch]:
    right_judge = judge

    def lax(state: Any, entry: Any, reading: Any) -> Any:
        verdict = right_judge(state, entry, reading)
        twice = isinstance(verdict, Violation) and verdict.rule == "proposed-twice"
        return None if twice and isinstance(entry, PrePrepare) else verdict

    return [(machine, "judge", lax)]


# View changes and patience.


def change_without_quorum() -> list[Patch]:
    """Let one wish move the view, for those who write as for those who read."""
    right = judge

    def lax(state: Any, entry: Any, reading: Any) -> Any:
        verdict = right(state, entry, reading)
        return None if isinstance(verdict, Wait) and isinstance(entry, ViewChange) else verdict

    def owed(writer: Any) -> ViewChange | None:
        wanted = max(state.wants for state in writer._states())
        return ViewChange(wanted) if wanted > writer.view else None

    return [(pen.Pen, "_owed_view_change", owed), (machine, "judge", lax)]


def any_progress_restores() -> list[Patch]:
    """Let any execution restore patience. A primary that serves others is found unfair as well: that is off too."""
    right = Patience.executed

    def executed(patience: Any, since_ms: int | None) -> None:
        right(patience, since_ms)
        patience.progress = True

    def has_ended(patience: Any, oldest_since_ms: int | None, now_ms: int) -> bool:
        if patience.__dict__.pop("progress", False):
            patience._view_began_ms = now_ms
        if oldest_since_ms is None:
            return False
        since: int = max(oldest_since_ms, patience._view_began_ms)
        return bool(now_ms - since >= patience.present_ms)

    patience = [(Patience, "executed", executed), (Patience, "has_ended", has_ended)]
    return [*patience, *slowness_never_suspected()]


def never_impatient() -> list[Patch]:
    return [(Patience, "has_ended", lambda *_: False)]


def nobody_suspects() -> list[Patch]:
    """Let neither patience end nor a primary be found slow: one that stops when something was executed is both."""
    return [*never_impatient(), *slowness_never_suspected()]


def patience_never_grows() -> list[Patch]:
    def enter_view(patience: Any, now_ms: int) -> None:
        patience._view_began_ms = now_ms

    return [(Patience, "enter_view", enter_view)]


def slowness_never_suspected() -> list[Patch]:
    return [(Expectation, "is_disappointed", lambda *_: False)]


def expectation_never_raised() -> list[Patch]:
    right = Expectation._begin

    def begin(expectation: Any, proposer: int, now_ms: int) -> None:
        right(expectation, proposer, now_ms)
        expectation.floor_ms = expectation.expected_ms

    return [(Expectation, "_begin", begin)]


def missing_never_asked_for() -> list[Patch]:
    return [(Fetcher, "due", lambda *_: []), *_heads_ask_nobody_else()]


def _heads_ask_nobody_else() -> list[Patch]:
    """Ask what peers say that they hold of its author, or of nobody."""
    right = HeadsComparer.compare

    def compare(comparer: Any, event: Any, *seen: Any) -> list[Fetch]:
        return [fetch for fetch in right(comparer, event, *seen) if fetch.log == fetch.ask]

    return [(HeadsComparer, "compare", compare)]


def fetched_from_author_only() -> list[Patch]:
    right = Fetcher.due

    def due(fetcher: Any, now_ms: int, inboxes: Any, blind: Any) -> list[Fetch]:
        return [Fetch(fetch.log, fetch.first, fetch.log) for fetch in right(fetcher, now_ms, inboxes, blind)]

    return [(Fetcher, "due", due), *_heads_ask_nobody_else()]


def no_votes_for_the_executed() -> list[Patch]:
    right = pen.Pen._owed_vote

    def owed(writer: Any, slot: int) -> Prepare | None:
        return None if slot <= writer._known.executed else right(writer, slot)

    return [(pen.Pen, "_owed_vote", owed)]


# Memory.


def nothing_pruned() -> list[Patch]:
    return [(LogState, "prune", lambda *_: None)]


# Clients and sessions.


def client_accepts_f() -> list[Patch]:
    def init(tally: Any, quorum: int) -> None:
        tally._latest, tally._quorum = {}, quorum - 1

    return [(Tally, "__init__", init)]


def replies_counted_twice() -> list[Patch]:
    def add(tally: Any, replica: int, raw: bytes) -> bool:  # noqa: ARG001
        latest = tally._latest
        latest[len(latest)] = raw
        return bool(sum([reply == raw for reply in latest.values()]) >= tally._quorum)

    return [(Tally, "add", add)]


def sessions_not_checked() -> list[Patch]:
    return [(execution, "answer", lambda *_: None)]


def answered_requests_kept() -> list[Patch]:
    return [(machine.ReplicaCore, "_drop_what_is_answered", lambda *_: [])]


def openings_answered_by_order_only() -> list[Patch]:
    right = execution.Executor.known_reply

    def known_reply(executor: Any, envelope: Any) -> bytes | None:
        return None if isinstance(envelope.content, Open) else right(executor, envelope)

    return [
        (execution.Executor, "known_reply", known_reply),
        (pen.Pen, "_carried_envelopes", _all_carried_envelopes),
    ]


def _all_carried_envelopes(writer: Any, carried: Any) -> Iterator[Any]:
    for slot, digest in carried.votes:
        if digest != NULL_BATCH.digest:
            yield from writer._known.slots.batch(slot, digest).envelopes
