"""PBFT as a pure state machine: the baseline without trusted logs (Castro & Liskov, OSDI 1999, section 4).

n = 3f+1, quorums of 2f+1, messages signed by their authors. Everybody follows these rules; d is a request's digest:

    PRE-PREPARE(v, s, d, m)   the primary proposes request m; a backup takes the first one for (v, s) only
    PREPARE(v, s, d)          a backup took that proposal
    prepared(v, s, d)         the proposal and PREPAREs by 2f different backups; these messages are the *certificate*
    COMMIT(v, s, d)           prepared here; 2f+1 COMMITs, and being prepared, decide
    VIEW-CHANGE(v', P)        patience with the view ended, or f+1 others want to leave; P: a certificate for each
                              slot that was prepared, of the highest view
    NEW-VIEW(v', V, O)        the primary of v': V are 2f+1 VIEW-CHANGEs, O proposes again, for each slot up to the
                              highest in V, the request of the certificate with the highest view, or a null request

A backup computes O itself and takes no other. What is left out: checkpoints, and so garbage collection, watermarks
and state transfer; batching; MACs. Of 2f+1 signers any two sets share f+1, so a correct one, and a correct replica
prepares one request per slot and view: that is what n = 3f+1 pays for. With `quorum` f+1 of 2f+1 the same code shows
what happens without it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

NULL = b""
PATIENCE_DOUBLINGS_MAX = 10
# Messages of a view that is not open yet that are kept; more are passed over.
EARLY_MAX = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """A client's operation; `number` counts each client's."""

    client: str
    number: int
    operation: str

    def digest(self) -> bytes:
        """Return d, 32 bytes."""
        return hashlib.sha256(f"{self.client}/{self.number}/{self.operation}".encode()).digest()


@dataclass(frozen=True, slots=True)
class PrePrepare:
    """See the module. request: None for the null request."""

    view: int
    slot: int
    digest: bytes
    request: Request | None


@dataclass(frozen=True, slots=True)
class Prepare:
    """See the module."""

    view: int
    slot: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """See the module."""

    view: int
    slot: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """A proposal and enough PREPAREs for it, as they were signed."""

    proposal: "Signed"
    prepares: tuple["Signed", ...]


@dataclass(frozen=True, slots=True)
class ViewChange:
    """See the module."""

    view: int
    prepared: tuple[Certificate, ...]


@dataclass(frozen=True, slots=True)
class NewView:
    """See the module."""

    view: int
    changes: tuple["Signed", ...]
    proposals: tuple["Signed", ...]


Body = PrePrepare | Prepare | Commit | ViewChange | NewView


@dataclass(frozen=True, slots=True)
class Signed:
    """A message and its author's signature over it."""

    author: int
    body: Body
    signature: bytes


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send this to all other replicas."""

    message: Signed


@dataclass(frozen=True, slots=True)
class Executed:
    """A request, or None, was executed in `slot`: tell its client."""

    slot: int
    digest: bytes
    request: Request | None


@dataclass(frozen=True, slots=True)
class Entered:
    """This replica left its view for `view`."""

    view: int


@dataclass(frozen=True, slots=True)
class Opened:
    """`view` is open; carried: slot -> what is proposed again, None for null."""

    view: int
    carried: tuple[tuple[int, Request | None], ...]
    named: tuple[int, ...]


Effect = Broadcast | Executed | Entered | Opened


@dataclass(frozen=True, slots=True)
class Cluster:
    """What all know: n, f, and how many make a quorum; sign and verify make and check signatures."""

    n: int
    f: int
    quorum: int
    sign: Callable[[int, Body], bytes]
    verify: Callable[[Signed], bool]

    def primary(self, view: int) -> int:
        """Return the number of a view's primary."""
        return view % self.n


def carried_over(changes: tuple[Signed, ...]) -> dict[int, Request | None]:
    """Return what a new view proposes again, by slot: of each slot's certificates the one of the highest view."""
    best: dict[int, PrePrepare] = {}
    for change in changes:
        if isinstance(change.body, ViewChange):
            for certificate in change.body.prepared:
                proposal = certificate.proposal.body
                if isinstance(proposal, PrePrepare):
                    known = best.get(proposal.slot)
                    if known is None or known.view < proposal.view:
                        best[proposal.slot] = proposal
    top = max(best, default=0)
    return {slot: best[slot].request if slot in best else None for slot in range(1, top + 1)}


@dataclass(slots=True)
class _Slot:
    proposals: dict[int, Signed] = field(default_factory=dict)  # view -> the first one
    prepares: dict[tuple[int, bytes], dict[int, Signed]] = field(default_factory=dict)
    commits: dict[tuple[int, bytes], set[int]] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)  # views in which this replica said COMMIT
    decided: PrePrepare | None = None


class PbftCore:
    """One replica. patience_ms: of the oldest request that is not executed; it doubles with each view."""

    def __init__(self, cluster: Cluster, number: int, patience_ms: int) -> None:
        self.cluster, self.number, self.patience_ms = cluster, number, patience_ms
        self.view, self.executed = 0, 0
        self.slots: dict[int, _Slot] = {}
        self._opened = {0}
        self._next = 1
        self._waiting: dict[tuple[str, int], tuple[Request, int]] = {}
        self._done: dict[tuple[str, int], int] = {}
        self._proposed: set[tuple[str, int]] = set()
        self._changes: dict[int, dict[int, Signed]] = {}
        self._wanted, self._wanted_at = 0, 0
        self._early: list[Signed] = []
        self._now = 0
        self._effects: list[Effect] = []

    # Events in, effects out.

    def on_request(self, request: Request) -> list[Effect]:
        """Take a request from its client."""
        key = (request.client, request.number)
        if key not in self._done:
            self._waiting.setdefault(key, (request, self._now))
            self._propose()
        return self._collect()

    def on_message(self, message: Signed) -> list[Effect]:
        """Take a message of another replica; one whose signature does not verify is passed over."""
        if 0 <= message.author < self.cluster.n and self.cluster.verify(message):
            self._take(message)
        return self._collect()

    def on_tick(self, now_ms: int) -> list[Effect]:
        """Take in that time passed."""
        self._now = now_ms
        oldest = min((since for _, since in self._waiting.values()), default=None)
        patience = self.patience_ms << min(self._wanted, PATIENCE_DOUBLINGS_MAX)
        if oldest is not None and now_ms - max(oldest, self._wanted_at) >= patience:
            self._leave(max(self.view, self._wanted) + 1)
        return self._collect()

    def executed_slot(self, request: Request) -> int | None:
        """Return where a request was executed, or None."""
        return self._done.get((request.client, request.number))

    def _collect(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def _say(self, body: Body) -> None:
        message = Signed(self.number, body, self.cluster.sign(self.number, body))
        self._effects.append(Broadcast(message))
        self._take(message)

    # The normal case.

    def _propose(self) -> None:
        if self.cluster.primary(self.view) != self.number or self.view not in self._opened or self._wanted > self.view:
            return
        for key, (request, _) in list(self._waiting.items()):
            if key not in self._proposed:
                self._proposed.add(key)
                slot, self._next = self._next, self._next + 1
                self._say(PrePrepare(self.view, slot, request.digest(), request))

    def _take(self, message: Signed) -> None:
        body = message.body
        if isinstance(body, ViewChange):
            self._on_view_change(message, body)
        elif isinstance(body, NewView):
            self._on_new_view(message, body)
        elif body.view > self.view or (body.view == self.view and body.view not in self._opened):
            if len(self._early) < EARLY_MAX:
                self._early.append(message)
        elif body.view == self.view and self._wanted <= self.view:
            self._on_ordering(message, body)

    def _on_ordering(self, message: Signed, body: PrePrepare | Prepare | Commit) -> None:
        slot = self.slots.setdefault(body.slot, _Slot())
        key = (body.view, body.digest)
        if isinstance(body, PrePrepare):
            good = body.digest == (NULL if body.request is None else body.request.digest())
            if message.author != self.cluster.primary(body.view) or not good or body.view in slot.proposals:
                return
            slot.proposals[body.view] = message
            if message.author != self.number:
                self._say(Prepare(body.view, body.slot, body.digest))
        elif isinstance(body, Prepare):
            if message.author == self.cluster.primary(body.view):
                return
            slot.prepares.setdefault(key, {}).setdefault(message.author, message)
        else:
            slot.commits.setdefault(key, set()).add(message.author)
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
        if view not in slot.committed:
            slot.committed.add(view)
            self._say(Commit(view, number, proposal.digest))
        if slot.decided is None and len(slot.commits.get((view, proposal.digest), ())) >= self.cluster.quorum:
            slot.decided = proposal
            self._execute()

    def _execute(self) -> None:
        while (slot := self.slots.get(self.executed + 1)) is not None and slot.decided is not None:
            self.executed += 1
            request = slot.decided.request
            if request is not None:
                key = (request.client, request.number)
                self._waiting.pop(key, None)
                self._done.setdefault(key, self.executed)
            self._effects.append(Executed(self.executed, slot.decided.digest, request))

    # The view change.

    def _leave(self, view: int) -> None:
        self._wanted, self._wanted_at = view, self._now
        best: list[Certificate] = []
        for number in sorted(self.slots):
            found = [self.prepared(self.slots[number], at) for at in sorted(self.slots[number].proposals, reverse=True)]
            best += [certificate for certificate in found if certificate is not None][:1]
        self._effects.append(Entered(view))
        self._say(ViewChange(view, tuple(best)))

    def _is_certified(self, certificate: Certificate) -> bool:
        """Say whether a certificate holds what it must: else anybody could have anything carried."""
        proposal, cluster = certificate.proposal, self.cluster
        body = proposal.body
        if (
            not isinstance(body, PrePrepare)
            or proposal.author != cluster.primary(body.view)
            or not cluster.verify(proposal)
        ):
            return False
        wanted = Prepare(body.view, body.slot, body.digest)
        authors = {p.author for p in certificate.prepares if p.body == wanted and cluster.verify(p)}
        return len(authors - {proposal.author}) >= cluster.quorum - 1

    def _is_sound(self, message: Signed) -> bool:
        body = message.body
        if not isinstance(body, ViewChange) or not self.cluster.verify(message):
            return False
        return all(
            isinstance(c.proposal.body, PrePrepare) and c.proposal.body.view < body.view and self._is_certified(c)
            for c in body.prepared
        )

    def _on_view_change(self, message: Signed, body: ViewChange) -> None:
        if body.view <= self.view or not self._is_sound(message):
            return
        self._changes.setdefault(body.view, {}).setdefault(message.author, message)
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
                again = PrePrepare(body.view, slot, NULL if request is None else request.digest(), request)
                proposals.append(Signed(self.number, again, self.cluster.sign(self.number, again)))
            self._say(NewView(body.view, changes, tuple(proposals)))

    def _on_new_view(self, message: Signed, body: NewView) -> None:
        if body.view <= self.view or message.author != self.cluster.primary(body.view):
            return
        authors = {change.author for change in body.changes if isinstance(change.body, ViewChange)}
        right = all(self._is_sound(c) and getattr(c.body, "view", None) == body.view for c in body.changes)
        if len(authors) < self.cluster.quorum or not right:
            return
        carried = carried_over(body.changes)
        said = [signed.body for signed in body.proposals if self.cluster.verify(signed)]
        wanted = [PrePrepare(body.view, s, NULL if r is None else r.digest(), r) for s, r in carried.items()]
        if said != wanted:
            return
        self.view = self._wanted = body.view
        self._wanted_at = self._now
        self._opened.add(body.view)
        self._next = max(carried, default=0) + 1
        again = {(request.client, request.number) for request in carried.values() if request is not None}
        self._proposed = again
        self._effects.append(Opened(body.view, tuple(carried.items()), tuple(sorted(authors))))
        for proposal in body.proposals:
            self._take(proposal)
        early, self._early = self._early, []
        for held in early:
            self._take(held)
        self._propose()
