"""PBFT as a pure state machine: the baseline without trusted logs (Castro & Liskov, OSDI 1999, section 4).

n = 3f+1, quorums of 2f+1, messages signed by their authors. Everybody follows these rules; d is a proposal's digest:

    PRE-PREPARE(v, s, d, m)   the primary proposes m; a backup takes the first one for (v, s) only
    PREPARE(v, s, d)          a backup took that proposal
    prepared(v, s, d)         the proposal and PREPAREs by 2f different backups; these messages are the *certificate*
    COMMIT(v, s, d)           prepared here; 2f+1 COMMITs, and being prepared, decide
    CHECKPOINT(s, D)          executed up to s, where the state has digest D; 2f+1 equal ones make s *stable*
    VIEW-CHANGE(v', h, C, P)  patience with the view ended, or f+1 others want to leave; C: the CHECKPOINTs that make
                              h stable; P: a certificate for each slot above h that was prepared, of the highest view
    NEW-VIEW(v', V, O)        the primary of v': V are 2f+1 VIEW-CHANGEs, O proposes again, for each slot above the
                              highest h in V and up to the highest in V's certificates, what the certificate with the
                              highest view proposes, or a null request

    MISSING(s)                I am behind, at slot s
    DECIDED(v, s, d, m, C)    C are 2f+1 COMMITs: m was decided, whatever view the reader is in

A backup computes O itself and takes no other. Of 2f+1 signers any two sets share f+1, so a correct one, and a correct
replica prepares one proposal per slot and view: that is what n = 3f+1 pays for. With `quorum` f+1 of 2f+1 the same
code shows what happens without it.

Without an `interval` there are no checkpoints and no watermarks, so nothing is forgotten: enough for a lecture. Left
out everywhere: state transfer, so who falls behind what the others still keep stays behind; durability, so who restarts
has forgotten what it promised and must not come back; MACs in place of signatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from replica.pbft.messages import (
    Body,
    Broadcast,
    Certificate,
    Checkpoint,
    Cluster,
    Commit,
    Decided,
    Diverged,
    Effect,
    Entered,
    Executed,
    Missing,
    NewView,
    Opened,
    Ordering,
    Prepare,
    PrePrepare,
    Proposal,
    Signed,
    Stable,
    StateWanted,
    Tell,
    ViewChange,
)
from replica.pbft.pending import OneByOne, Pending

PATIENCE_DOUBLINGS_MAX = 10
# Messages of views that are not open yet that are kept of each replica; more are passed over.
EARLY_MAX = 1024
# Slots below the stable checkpoint that are kept, so that whoever is a little behind can still be told of them.
HISTORY = 256
# Slots that are told at a time to one that is behind, and how often it is told.
TOLD_MAX = 32
TOLD_PAUSE_MS = 40


def carried_over(changes: tuple[Signed, ...]) -> dict[int, Proposal | None]:
    """Return what a new view proposes again, by slot: of each slot's certificates the one of the highest view."""
    best: dict[int, PrePrepare] = {}
    lowest = 0
    for change in changes:
        if isinstance(change.body, ViewChange):
            lowest = max(lowest, change.body.stable)
            for certificate in change.body.prepared:
                proposal = certificate.proposal.body
                if isinstance(proposal, PrePrepare):
                    known = best.get(proposal.slot)
                    if known is None or known.view < proposal.view:
                        best[proposal.slot] = proposal
    top = max(best, default=0)
    return {slot: best[slot].request if slot in best else None for slot in range(lowest + 1, top + 1)}


@dataclass(slots=True)
class _Slot:
    proposals: dict[int, Signed] = field(default_factory=dict)  # view -> the first one
    prepares: dict[tuple[int, bytes], dict[int, Signed]] = field(default_factory=dict)
    commits: dict[tuple[int, bytes], dict[int, Signed]] = field(default_factory=dict)
    voted: set[tuple[type[Ordering], int, int]] = field(default_factory=set)  # kind, view, author: the first counts
    committed: set[int] = field(default_factory=set)  # views in which this replica said COMMIT
    best: Certificate | None = None  # of the views that were left
    decided: PrePrepare | None = None
    proof: tuple[Signed, ...] = ()  # 2f+1 COMMITs for it

    def forget_views(self) -> None:
        """Forget what views said that are over; their best certificate is kept."""
        self.proposals.clear()
        self.prepares.clear()
        self.commits.clear()
        self.voted.clear()


class PbftCore:
    """One replica. patience_ms: with the oldest request that is not executed; doubles with each view without any."""

    def __init__(self, cluster: Cluster, number: int, patience_ms: int, pending: Pending | None = None) -> None:
        self.cluster, self.number, self.patience_ms = cluster, number, patience_ms
        self.pending = OneByOne() if pending is None else pending
        self.view, self.executed, self.stable = 0, 0, 0
        self.slots: dict[int, _Slot] = {}
        self._opened = {0}
        self._next = 1
        self._changes: dict[int, dict[int, Signed]] = {}
        self._wanted, self._wanted_at = 0, 0
        self._calm = 0  # the view in which something was executed last
        self._early: dict[int, dict[tuple[type[Body], int, int], Signed]] = {}  # by author, then what it is about
        self._checkpoints: dict[int, dict[int, Signed]] = {}
        self._proof: tuple[Signed, ...] = ()
        self._ask_at, self._asked = 0, 0  # when somebody is asked for what is missing, and how many were
        self._told_at: dict[int, int] = {}  # by replica
        self._now = 0
        self._effects: list[Effect] = []

    # Events in, effects out.

    def on_request(self, request: Any) -> list[Effect]:  # noqa: ANN401 - of the kind that `pending` takes
        """Take a request from its client; what `pending.add` raises, nothing being changed."""
        self.pending.add(request, self._now)
        return self.propose()

    def propose(self) -> list[Effect]:
        """Propose what waits, if that is this replica's part: several requests may have been added to `pending`."""
        self._propose()
        return self._collect()

    def on_message(self, message: Signed) -> list[Effect]:
        """Take a message of another replica; one whose signature does not verify is passed over."""
        if self.cluster.is_genuine(message):
            self._take(message)
        return self._collect()

    def on_state(self, slot: int, digest: bytes) -> list[Effect]:
        """Take in the digest of the state after `slot`, as a StateWanted asked."""
        self._say(Checkpoint(slot, digest))
        self._compare(slot, digest)
        return self._collect()

    def on_tick(self, now_ms: int) -> list[Effect]:
        """Take in that time passed."""
        self._now = now_ms
        oldest = self.pending.oldest()
        patience = self.patience_ms << min(max(0, self._wanted - self._calm), PATIENCE_DOUBLINGS_MAX)
        if oldest is not None and now_ms - max(oldest, self._wanted_at) >= patience:
            self._leave(max(self.view, self._wanted) + 1)
        self._ask_for_missing()
        return self._collect()

    @property
    def is_open(self) -> bool:
        """Say whether this replica takes part in its view. One that left it signs nothing there, but learns."""
        return self._wanted <= self.view

    @property
    def is_behind(self) -> bool:
        """Say whether 2f+1 replicas executed what this one has not."""
        return self.executed < self.stable

    def _collect(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def _say(self, body: Body) -> None:
        message = Signed(self.number, body, self.cluster.sign(self.number, body))
        self._effects.append(Broadcast(message))
        self._take(message)

    # The normal case.

    def _propose(self) -> None:
        cluster = self.cluster
        if cluster.primary(self.view) != self.number or self.view not in self._opened or not self.is_open:
            return
        while self._has_room() and (proposal := self.pending.next()) is not None:
            slot, self._next = self._next, self._next + 1
            self._say(PrePrepare.of(self.view, slot, proposal))

    def _has_room(self) -> bool:
        cluster = self.cluster
        above = not cluster.interval or self._next <= self.stable + cluster.window
        return above and (not cluster.pipeline or self._next <= self.executed + cluster.pipeline)

    def _take(self, message: Signed) -> None:
        body = message.body
        if isinstance(body, ViewChange):
            self._on_view_change(message, body)
        elif isinstance(body, NewView):
            self._on_new_view(message, body)
        elif isinstance(body, Checkpoint):
            self._on_checkpoint(message, body)
        elif isinstance(body, Missing):
            self._on_missing(message.author, body)
        elif isinstance(body, Decided):
            self._on_decided(body)
        elif body.view > self.view or (body.view == self.view and body.view not in self._opened):
            kept = self._early.setdefault(message.author, {})
            if len(kept) < EARLY_MAX and (not isinstance(body, PrePrepare) or self._is_by_primary(message, body.view)):
                kept.setdefault((type(body), body.view, body.slot), message)
        elif body.view == self.view and self._is_near(body.slot):
            self._on_ordering(message, body)

    def _is_by_primary(self, message: Signed, view: int) -> bool:
        return message.author == self.cluster.primary(view)

    def _is_near(self, slot: int) -> bool:
        """Say whether a slot is neither forgotten nor so far ahead that no correct primary proposes it."""
        if not self.cluster.interval:
            return slot > 0
        # Who is behind sees the others' slots before it sees what made their checkpoints stable.
        return max(0, self.stable - HISTORY) < slot <= self.stable + HISTORY + self.cluster.window

    def _on_ordering(self, message: Signed, body: Ordering) -> None:
        slot = self.slots.setdefault(body.slot, _Slot())
        key = (body.view, body.digest)
        if isinstance(body, PrePrepare):
            if not self._is_by_primary(message, body.view) or not body.is_whole or body.view in slot.proposals:
                return
            slot.proposals[body.view] = message
            if message.author != self.number and self.is_open:
                self._say(Prepare(body.view, body.slot, body.digest))
        else:
            if (type(body), body.view, message.author) in slot.voted:
                return
            slot.voted.add((type(body), body.view, message.author))
            if isinstance(body, Commit):
                slot.commits.setdefault(key, {})[message.author] = message
            elif self._is_by_primary(message, body.view):
                return
            else:
                slot.prepares.setdefault(key, {})[message.author] = message
        self._advance(body.slot, slot, body.view)

    def prepared(self, slot: _Slot, view: int) -> Certificate | None:
        """Return the certificate of what was prepared in a view, or None."""
        proposal = slot.proposals.get(view)
        if proposal is None or not isinstance(proposal.body, PrePrepare):
            return None
        prepares = slot.prepares.get((view, proposal.body.digest), {})
        if len(prepares) < self.cluster.quorum - 1:
            return None
        return Certificate(proposal, tuple(prepares[author] for author in sorted(prepares)))

    def _advance(self, number: int, slot: _Slot, view: int) -> None:
        certificate = self.prepared(slot, view)
        if certificate is None or not isinstance(certificate.proposal.body, PrePrepare):
            return
        proposal = certificate.proposal.body
        if view not in slot.committed and self.is_open:
            slot.committed.add(view)
            self._say(Commit(view, number, proposal.digest))
        commits = slot.commits.get((view, proposal.digest), {})
        if slot.decided is None and len(commits) >= self.cluster.quorum:
            self._decide(slot, proposal, [commits[author] for author in sorted(commits)])

    def _decide(self, slot: _Slot, proposal: PrePrepare, commits: Sequence[Signed]) -> None:
        slot.decided, slot.proof = proposal, tuple(commits[: self.cluster.quorum])
        self._execute()

    def _execute(self) -> None:
        while (slot := self.slots.get(self.executed + 1)) is not None and slot.decided is not None:
            self.executed += 1
            self._calm = self.view
            self._ask_at = self._now + self.patience_ms
            request = slot.decided.request
            if request is not None:
                self.pending.executed(request, self.executed, self._now)
            self._effects.append(Executed(self.executed, slot.decided.digest, request))
            if self.cluster.interval and self.executed % self.cluster.interval == 0:
                self._effects.append(StateWanted(self.executed))
        if self.cluster.pipeline:
            self._propose()

    # Checkpoints.

    def _on_checkpoint(self, message: Signed, body: Checkpoint) -> None:
        interval = self.cluster.interval
        if not interval or body.slot % interval or not self.stable < body.slot:
            return
        if body.slot > self.stable + HISTORY + self.cluster.window:
            # The newest of each replica is enough to see that all others are far ahead.
            for said in self._checkpoints.values():
                if said.get(message.author) is not None:
                    del said[message.author]
        said = self._checkpoints.setdefault(body.slot, {})
        said.setdefault(message.author, message)
        equal = [one for one in said.values() if one.body == body]
        if len(equal) >= self.cluster.quorum:
            self._stabilise(body.slot, tuple(sorted(equal, key=lambda one: one.author)))
        self._checkpoints = {slot: by for slot, by in self._checkpoints.items() if by}

    def _stabilise(self, slot: int, proof: tuple[Signed, ...]) -> None:
        if slot <= self.stable:
            return
        self.stable, self._proof = slot, proof[: self.cluster.quorum]
        own = self._checkpoints.get(slot, {}).get(self.number)
        if own is not None and isinstance(own.body, Checkpoint):
            self._compare(slot, own.body.digest)
        forget = slot - HISTORY
        self.slots = {number: kept for number, kept in self.slots.items() if number > forget}
        self._checkpoints = {number: kept for number, kept in self._checkpoints.items() if number > slot}
        self._effects.append(Stable(slot, forget))
        self._propose()

    def _compare(self, slot: int, digest: bytes) -> None:
        """Find out if this replica's own state is another than that of 2f+1."""
        if slot == self.stable and any(one.body != Checkpoint(slot, digest) for one in self._proof):
            self._effects.append(Diverged(slot))

    def _is_stable(self, slot: int, proof: tuple[Signed, ...]) -> bool:
        """Say whether these CHECKPOINTs make a slot stable."""
        if slot == 0 or not self.cluster.interval:
            return slot == 0 and not proof
        first = proof[0].body if proof else None
        if not isinstance(first, Checkpoint) or first.slot != slot or slot % self.cluster.interval:
            return False
        authors = {one.author for one in proof if one.body == first and self.cluster.is_genuine(one)}
        return len(authors) >= self.cluster.quorum

    # Who is behind.

    def _ask_for_missing(self) -> None:
        """Ask one other after another for the next slot, if later ones were decided and patience with it has ended."""
        is_behind = self.is_behind or any(s > self.executed and one.decided for s, one in self.slots.items())
        if not self.cluster.interval or not is_behind or self._now < self._ask_at:
            return
        self._ask_at = self._now + self.patience_ms
        self._asked += 1
        peer = (self.number + 1 + self._asked % (self.cluster.n - 1)) % self.cluster.n
        self._tell(peer, Missing(self.executed + 1))

    def _on_missing(self, author: int, body: Missing) -> None:
        if author == self.number or self._now < self._told_at.get(author, 0):
            return
        self._told_at[author] = self._now + TOLD_PAUSE_MS
        for number in range(body.slot, min(body.slot + TOLD_MAX, self.executed + 1)):
            slot = self.slots.get(number)
            if slot is None or slot.decided is None:
                return
            said = slot.decided
            self._tell(author, Decided(said.view, number, said.digest, said.request, slot.proof))

    def _on_decided(self, body: Decided) -> None:
        if not self.cluster.interval or body.slot <= self.executed or not self._is_near(body.slot):
            return
        proposal = PrePrepare(body.view, body.slot, body.digest, body.request)
        wanted = Commit(body.view, body.slot, body.digest)
        authors = {one.author for one in body.commits if one.body == wanted and self.cluster.is_genuine(one)}
        slot = self.slots.setdefault(body.slot, _Slot())
        if proposal.is_whole and slot.decided is None and len(authors) >= self.cluster.quorum:
            self._decide(slot, proposal, body.commits)
            self._ask_at = self._now  # there may be more

    def _tell(self, peer: int, body: Body) -> None:
        self._effects.append(Tell(peer, Signed(self.number, body, self.cluster.sign(self.number, body))))

    # The view change.

    def _leave(self, view: int) -> None:
        self._wanted, self._wanted_at = view, self._now
        best: list[Certificate] = []
        for number in sorted(self.slots):
            if number > self.stable:
                slot = self.slots[number]
                found = [self.prepared(slot, at) for at in sorted(slot.proposals, reverse=True)]
                best += [certificate for certificate in (*found, slot.best) if certificate is not None][:1]
        self._effects.append(Entered(view))
        self._say(ViewChange(view, tuple(best), self.stable, self._proof))

    def _is_certified(self, certificate: Certificate) -> bool:
        """Say whether a certificate holds what it must: else anybody could have anything carried."""
        proposal, cluster = certificate.proposal, self.cluster
        body = proposal.body
        if not isinstance(body, PrePrepare) or not self._is_by_primary(proposal, body.view):
            return False
        # The votes are for a digest: beside another request they would carry what nobody prepared.
        if not body.is_whole or not cluster.is_genuine(proposal):
            return False
        wanted = Prepare(body.view, body.slot, body.digest)
        authors = {p.author for p in certificate.prepares if p.body == wanted and cluster.is_genuine(p)}
        return len(authors - {proposal.author}) >= cluster.quorum - 1

    def _is_sound(self, message: Signed) -> bool:
        body = message.body
        if not isinstance(body, ViewChange) or not self.cluster.is_genuine(message):
            return False
        proposals = [c.proposal.body for c in body.prepared]
        above, window = body.stable, self.cluster.window
        for proposal in proposals:
            if not isinstance(proposal, PrePrepare) or proposal.view >= body.view or proposal.slot <= above:
                return False
            if window and proposal.slot > body.stable + window:
                return False
            above = proposal.slot  # in their order, none twice
        return self._is_stable(body.stable, body.proof) and all(self._is_certified(c) for c in body.prepared)

    def _on_view_change(self, message: Signed, body: ViewChange) -> None:
        if body.view <= self.view or not self._is_sound(message):
            return
        if any(message.author in said for view, said in self._changes.items() if view > body.view):
            return
        for said in self._changes.values():
            said.pop(message.author, None)  # the latest word of each: nobody can fill this
        self._changes.setdefault(body.view, {})[message.author] = message
        self._changes = {view: said for view, said in self._changes.items() if said and view > self.view}
        higher = {
            author for view, said in self._changes.items() if view > max(self.view, self._wanted) for author in said
        }
        if len(higher) > self.cluster.f:
            # f+1 others want to leave: one of them is correct.
            self._leave(min(view for view in self._changes if view > max(self.view, self._wanted)))
            return
        said = self._changes[body.view]
        is_mine = self.cluster.primary(body.view) == self.number and self._wanted == body.view
        if is_mine and len(said) >= self.cluster.quorum:
            changes = tuple(said[author] for author in sorted(said))[: self.cluster.quorum]
            proposals = []
            for slot, request in carried_over(changes).items():
                again = PrePrepare.of(body.view, slot, request)
                proposals.append(Signed(self.number, again, self.cluster.sign(self.number, again)))
            self._say(NewView(body.view, changes, tuple(proposals)))

    def _on_new_view(self, message: Signed, body: NewView) -> None:
        if body.view <= self.view or not self._is_by_primary(message, body.view):
            return
        authors = {change.author for change in body.changes if isinstance(change.body, ViewChange)}
        right = all(self._is_sound(c) and getattr(c.body, "view", None) == body.view for c in body.changes)
        if len(authors) < self.cluster.quorum or not right:
            return
        carried = carried_over(body.changes)
        genuine = [one.body for one in body.proposals if one.author == message.author and self.cluster.is_genuine(one)]
        if genuine != [PrePrepare.of(body.view, slot, request) for slot, request in carried.items()]:
            return
        self._enter(body, carried, tuple(sorted(authors)))

    def _enter(self, body: NewView, carried: dict[int, Proposal | None], named: tuple[int, ...]) -> None:
        for slot in self.slots.values():
            found = [self.prepared(slot, at) for at in sorted(slot.proposals, reverse=True)]
            slot.best = next((one for one in found if one is not None), slot.best)
            slot.forget_views()
        self.view = self._wanted = body.view
        self._wanted_at = self._now
        self._opened = {body.view}
        changes = [change.body for change in body.changes if isinstance(change.body, ViewChange)]
        latest = max(changes, key=lambda change: change.stable)
        self._next = max(carried, default=latest.stable) + 1
        self.pending.begin_view(request for request in carried.values() if request is not None)
        self._effects.append(Opened(body.view, tuple(carried.items()), named))
        self._stabilise(latest.stable, latest.proof)
        for proposal in body.proposals:
            self._take(proposal)
        early, self._early = self._early, {}
        for author in sorted(early):
            for held in early[author].values():
                self._take(held)
        self._propose()
