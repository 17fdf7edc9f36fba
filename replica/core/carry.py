"""What a new view proposes again (design section 4.2).

NEW-VIEW(v) names q VIEW-CHANGE(v) entries. Everybody computes the same from the log prefixes that end with them:

    base = the highest last_checkpoint among them
    top  = the highest slot voted for among them (at least base)
    for each slot in (base, top]: the vote of the *highest view* below v among them, counting only votes that match what
    that view's primary proposed; the null batch if there is none

Why decided operations survive: if d was decided at (w, s), q replicas voted for it, and any q VIEW-CHANGEs share a
replica with them. Its log cannot hide the vote, and log order forbids it to vote in w after its VIEW-CHANGE. By
induction every view after w carries d, so the highest view's vote is for d.

Votes at or below the reader's stable checkpoint are pruned; for these slots nothing is computed and nothing needs to
be: they are executed and agreed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from replica.core.batch import NULL_BATCH
from replica.core.entries import NewView
from replica.core.logstate import LogState, Opening
from replica.core.quorum import primary


@dataclass(frozen=True, slots=True)
class Carry:
    """A new view's opening, and the digest that it proposes for each slot in (base, top] above the stable one."""

    opening: Opening
    votes: tuple[tuple[int, bytes], ...]  # (slot, digest), slots ascending


def carry(entry: NewView, states: Sequence[LogState], stable: int) -> Carry:
    """Compute what `entry`, which the rules found good, proposes again."""
    departures = [states[r.replica].view_change_at[entry.view] for r in entry.references]
    base = max(departure.last_checkpoint for departure in departures)
    top = max(base, *(departure.top for departure in departures))
    authors = [reference.replica for reference in entry.references]
    votes = tuple((slot, _carried(slot, entry.view, authors, states)) for slot in range(max(base, stable) + 1, top + 1))
    return Carry(Opening(base, top), votes)


def _carried(slot: int, view: int, authors: Sequence[int], states: Sequence[LogState]) -> bytes:
    best_view, best = -1, NULL_BATCH.digest
    for author in authors:
        for voted_in, digest in states[author].votes.get(slot, {}).items():
            # Votes in `view` and later came after the author's VIEW-CHANGE and are no part of the named prefix.
            if best_view < voted_in < view and digest == _proposed(slot, voted_in, states):
                best_view, best = voted_in, digest
    return best


def _proposed(slot: int, view: int, states: Sequence[LogState]) -> bytes | None:
    return states[primary(view, len(states))].votes.get(slot, {}).get(view)
