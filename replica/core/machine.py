"""The replica: reads all logs in order, counts, executes, and says what it owes.

One cycle per event. What arrived is put into the inbox of its log; every log is read as far as its entries' causes
allow; what is decided is executed; and if no append is under way, everything that this replica owes is said as one
group. Own entries come back through Appended and are read like anyone's: a replica hears itself through its own log.

What is counted, executed and answered comes only from `Knowledge`, which holds durable, attested entries; what may be
written next is the pen's business (`replica.core.pen`).
"""

from collections import Counter
from collections.abc import Callable

from replica.application import Application
from replica.core.batch import NULL_BATCH, Batch
from replica.core.carry import Carry, carry
from replica.core.entries import Checkpoint, Commit, Entry, NewView, Prepare, PrePrepare, ViewChange, decode_entry
from replica.core.envelope import Envelope
from replica.core.events import (
    Append,
    Appended,
    Effect,
    Event,
    Executed,
    Exposed,
    Forked,
    GroupReceived,
    Halt,
    Lied,
    Refuse,
    Relay,
    RequestReceived,
    Send,
    Stable,
    Tick,
    VerifiedGroup,
    ViewEntered,
    ViewOpened,
)
from replica.core.execution import Executor
from replica.core.fetching import Fetcher
from replica.core.genesis import Genesis
from replica.core.inbox import Arrival, Inbox
from replica.core.knowledge import initial_knowledge
from replica.core.layout import LayoutError
from replica.core.patience import Patience
from replica.core.pen import Pen
from replica.core.quorum import is_quorum, primary
from replica.core.requests import QueueFullError, Waiting
from replica.core.rules import Reading, Violation, Wait, apply_entry, apply_opening, judge

# A request is handed to the primary again when it is not executed for a while, each time for twice as long.
RELAY_PAUSE_MS_MAX = 10_000
VerifyEnvelope = Callable[[Envelope], bool]


class ReplicaCore:
    """One replica's protocol state.

    genesis: the agreed values. number: this replica's. heads: every log's head before its first entry, 32 bytes each.
    verify_envelope: says whether an envelope's signature is its client's; a pure function of the bytes.
    """

    def __init__(
        self,
        genesis: Genesis,
        number: int,
        application: Application,
        heads: list[bytes],
        verify_envelope: VerifyEnvelope,
        patience: Patience | None = None,
    ) -> None:
        self.genesis = genesis
        self.number = number
        self.cluster_id = genesis.cluster_id()
        self.executor = Executor(application, genesis.limits)
        self.patience = patience or Patience()
        self.stable_digest: bytes | None = None
        self.halted: str | None = None
        self.exposed: dict[int, Violation] = {}
        self.refusals = Counter[str]()
        self._verify_envelope = verify_envelope
        self._known = initial_knowledge(genesis)
        self._pen = Pen(number, self._known, self.patience)
        self._inboxes = [Inbox(head) for head in heads]
        self._fetcher = Fetcher(number, genesis.n)
        self._heard_entry: dict[int, Entry] = {}
        self._checkpoints: dict[int, dict[int, tuple[int, bytes]]] = {}  # slot -> log -> (index, D)
        self._appending = False
        self._live = False
        self._effects: list[Effect] = []

    # What the shell may look at.

    @property
    def view(self) -> int:
        """The view this replica is in."""
        return self._pen.view

    @property
    def stable(self) -> int:
        """The slot of the newest stable checkpoint."""
        return self._known.stable

    @property
    def suspects(self) -> bool:
        """Say whether this replica has lost patience with its view."""
        return self._pen.state.suspected

    @property
    def is_open(self) -> bool:
        """Say whether the present view's primary may propose, as far as was read here."""
        return self.view in self._known.states[self.primary].opened

    @property
    def primary(self) -> int:
        """The number of the present view's primary."""
        return primary(self.view, self.genesis.n)

    @property
    def executed(self) -> int:
        """The highest slot executed here."""
        return self.executor.slot

    @property
    def is_appending(self) -> bool:
        """Say whether an Append is not yet answered."""
        return self._appending

    def received(self, log: int) -> int:
        """Return the index up to which `log` arrived here without gaps."""
        return self._inboxes[log].received

    def read(self, log: int) -> int:
        """Return the index up to which `log` was read."""
        return self._known.states[log].position

    def head(self, log: int) -> bytes:
        """Return the chain's head of `log` where it arrived without gaps."""
        return self._inboxes[log].head

    def unread(self, log: int) -> int:
        """Return how many entries of `log` arrived and are not read yet."""
        return len(self._inboxes[log].unread)

    @property
    def requests_waiting(self) -> int:
        """Return how many requests wait here to be executed."""
        return len(self._known.requests)

    def waiting_for(self, log: int) -> str | None:
        """Return what the next entry of `log` waits for, in words, or None."""
        wait = self._fetcher.waits.get(log)
        return None if wait is None else wait.why

    def handle(self, *events: Event) -> list[Effect]:
        """Take events, in this order; return what must be done about them, in this order.

        Events that arrived together are best handed in together: what they make this replica say is one group.
        """
        for event in events:
            if self.halted is not None:
                break
            if isinstance(event, GroupReceived):
                self._on_group(event.group)
            elif isinstance(event, Appended):
                self._on_appended(event.group)
            elif isinstance(event, RequestReceived):
                self._on_request(event)
            elif isinstance(event, Tick):
                self._on_tick(event)
            else:
                self._on_recovered()
        self._say_what_is_owed()
        effects, self._effects = self._effects, []
        return effects

    # Events

    def _on_group(self, group: VerifiedGroup) -> None:
        if group.author == self.number and self._live:
            # Own entries come back through Appended; from others only what this log never said could differ.
            if group.last > self._inboxes[self.number].received and not self._appending:
                self._halt_rolled_back(group)
            return
        if group.author in self.exposed:
            return
        arrival = self._inboxes[group.author].arrive(group)
        if arrival not in {Arrival.TAKEN, Arrival.EARLY}:
            self.refusals[f"group-{arrival.value}"] += 1
        if arrival is Arrival.FORKED:
            other = self._inboxes[group.author].contradiction or group
            self.exposed[group.author] = Violation("forked", "two attestations contradict each other")
            self._known.blind.add(group.author)
            self._fetcher.moved(group.author)
            self._effects.append(Forked(group.author, other.first, other))
        elif arrival is Arrival.TAKEN:
            self._fetcher.arrived(group.author)
            self._read_logs()

    def _on_appended(self, group: VerifiedGroup) -> None:
        self._appending = False
        if self._inboxes[self.number].arrive(group) is not Arrival.TAKEN:
            self._halt("the trusted log's answer does not continue this replica's own log")
            return
        self._read_logs()

    def _on_request(self, event: RequestReceived) -> None:
        envelope = event.envelope
        known = self.executor.known_reply(envelope)
        if known is not None:
            self._effects.append(Send(envelope.client, known))
            return
        try:
            waiting = self._known.requests.add(envelope, self._known.now_ms)
        except QueueFullError as full:
            self.refusals["request-queue-full"] += 1
            self._effects.append(Refuse(event.source, "busy", str(full)))
            return
        if waiting is not None and self.primary != self.number and not event.relayed:
            self._relay(waiting)

    def _on_tick(self, event: Tick) -> None:
        self._known.now_ms = event.now_ms
        self._known.wall_ms = event.wall_ms
        self._effects.extend(self._fetcher.due(event.now_ms, self._inboxes, self.exposed))
        if self.primary == self.number or self.primary in self.exposed:
            return
        for waiting in self._known.requests:
            if self._known.now_ms >= waiting.relay_at_ms:
                self._relay(waiting)

    def _relay(self, waiting: Waiting) -> None:
        """Hand a request to the primary, and plan when to do so again."""
        waiting.relay_at_ms = self._known.now_ms + waiting.relay_pause_ms
        waiting.relay_pause_ms = min(2 * waiting.relay_pause_ms, RELAY_PAUSE_MS_MAX)
        self._effects.append(Relay(self.primary, waiting.envelope))

    def _on_recovered(self) -> None:
        own = self._inboxes[self.number]
        if own.unread or own.received < own.seen or self.number in self.exposed:
            missing = "a rule broken" if self.number in self.exposed else "it is missing"
            why = self.waiting_for(self.number) or missing
            self._halt(
                f"entry {self._known.states[self.number].position + 1} of this replica's own log cannot be read again "
                f"({why}): its store lost what that entry depends on; restore the store or replace the replica"
            )
            return
        self._pen.resume()
        self._live = True

    # Reading

    def _read_logs(self) -> None:
        """Read every log as far as its entries' causes allow, executing on the way, until nothing moves."""
        moved = True
        while moved and self.halted is None:
            moved = False
            for log in range(self.genesis.n):
                while self._inboxes[log].unread and log not in self.exposed and self._read_next(log):
                    moved = True
            if self._execute_decided():
                moved = True

    def _read_next(self, log: int) -> bool:
        """Read the next entry of `log`; return False if it must wait or broke a rule."""
        index, payload, group = self._inboxes[log].unread[0]
        state = self._known.states[log]
        try:
            # An entry that waited was decoded, and what it holds verified, when it was first looked at.
            entry = self._heard_entry.get(log) or self._decode(payload)
        except LayoutError as error:
            return self._stop_reading(log, index, Violation("malformed", str(error)), group)
        verdict = judge(state, entry, Reading(self.genesis, self._known.states, self.executed, self.stable))
        if isinstance(verdict, Violation):
            return self._stop_reading(log, index, verdict, group)
        if isinstance(verdict, Wait):
            self._heard_entry[log] = entry
            self._fetcher.waiting(log, verdict, self._known.now_ms)
            return False
        self._heard_entry.pop(log, None)
        self._fetcher.moved(log)
        self._inboxes[log].pop()
        carried = carry(entry, self._known.states, self.stable) if isinstance(entry, NewView) else None
        apply_entry(state, entry)
        if isinstance(entry, PrePrepare | Prepare | Commit) and entry.slot <= self.stable:
            # A log that is read late speaks of slots that are long stable; nothing of that is kept.
            state.prune(self.stable)
        if carried is None:
            self._count(log, index, entry)
        else:
            self._open_view(log, state.view, carried)
        return True

    def _stop_reading(self, log: int, index: int, why: Violation, group: VerifiedGroup) -> bool:
        """Read `log` no further: its author broke a rule with entry `index`."""
        self.exposed[log] = why
        self._known.blind.add(log)
        self._fetcher.moved(log)
        self._effects.append(Exposed(log, index, why, group))
        if log == self.number and self._live:
            self._halt(f"entry {index} of this replica's own log breaks a rule ({why.text}); report this")
        return False

    def _open_view(self, log: int, view: int, carried: Carry) -> None:
        """Count what a NEW-VIEW proposes again: its author's votes, all of which someone proposed before, or null."""
        apply_opening(self._known.states[log], view, carried)
        for slot, digest in carried.votes:
            batch = NULL_BATCH if digest == NULL_BATCH.digest else self._known.slots.batch(slot, digest)
            self._known.slots.propose(log, view, slot, batch)
        self._effects.append(ViewOpened(view, carried.opening.base, carried.opening.top))

    def _decode(self, payload: bytes) -> Entry:
        """Decode an entry and verify what its batch holds: a pure function of the payload."""
        entry = decode_entry(payload, self.genesis, self.cluster_id)
        if isinstance(entry, PrePrepare):
            for place, envelope in enumerate(entry.batch.envelopes):
                if not self._verify_envelope(envelope):
                    raise LayoutError(f"envelope {place} of the batch has an invalid signature")
        return entry

    def _count(self, log: int, index: int, entry: Entry) -> None:
        true = True
        if isinstance(entry, PrePrepare):
            if entry.slot > self.stable:
                self._known.slots.propose(log, entry.view, entry.slot, entry.batch)
        elif isinstance(entry, Prepare):
            true = self._known.slots.vote(log, entry.view, entry.slot, entry.digest)
        elif isinstance(entry, Commit):
            true = self._known.slots.commit(log, entry.view, entry.slot, entry.digest)
        elif isinstance(entry, Checkpoint):
            self._count_checkpoint(log, index, entry)
        elif isinstance(entry, ViewChange) and log == self.number:
            self._effects.append(ViewEntered(entry.view))
        if not true:
            self._effects.append(Lied(log, index, "a vote for what was not proposed there"))

    def _count_checkpoint(self, log: int, index: int, entry: Checkpoint) -> None:
        if entry.slot <= self.stable:
            if entry.slot == self.stable and entry.digest != self.stable_digest:
                self._effects.append(Lied(log, index, "a checkpoint that differs from the stable one"))
            return
        said = self._checkpoints.setdefault(entry.slot, {})
        said[log] = (index, entry.digest)
        agreeing = sum(1 << other for other, (_, digest) in said.items() if digest == entry.digest)
        if is_quorum(agreeing, self.genesis.f):
            self._become_stable(entry.slot, entry.digest)

    def _become_stable(self, slot: int, digest: bytes) -> None:
        if self._known.own_digests[slot] != digest:
            self._halt(
                f"the state here after slot {slot} differs from the one that a quorum attested: this replica's state "
                "is corrupt or its application is not deterministic; replace its store and let it catch up"
            )
            return
        self._known.stable = slot
        self.stable_digest = digest
        self._known.slots.prune(slot)
        for state in (*self._known.states, self._pen.state):
            state.prune(slot)
        for log, (index, said) in sorted(self._checkpoints[slot].items()):
            if said != digest:
                self._effects.append(Lied(log, index, "a checkpoint that differs from the stable one"))
        for old in [s for s in self._checkpoints if s <= slot]:
            del self._checkpoints[old]
        # The own CHECKPOINT(slot) may still be owed: others can make a slot stable before this replica says so, and
        # a log that skipped it could never commit past the votes pruned here.
        for old in [s for s in self._known.own_digests if s < slot]:
            del self._known.own_digests[old]
        self._effects.append(Stable(slot, digest))

    # Executing

    def _execute_decided(self) -> bool:
        done = False
        while self.halted is None and (batch := self._known.slots.decided(self.executed + 1)) is not None:
            self._execute(self.executed + 1, batch)
            done = True
        return done

    def _execute(self, slot: int, batch: Batch) -> None:
        replies = self.executor.execute(slot, batch)
        self._known.executed = slot
        for envelope in batch.envelopes:
            self.patience.executed(self._known.requests.executed(envelope))
        answered = self._drop_what_is_answered(batch)
        if slot % self.genesis.limits.checkpoint_interval == 0:
            self._known.own_digests[slot] = self.executor.digest()
        self._effects.append(Executed(slot, batch))
        if self._live:
            self._effects.extend(Send(reply.client, reply.raw) for reply in replies)
            self._effects.extend(answered)

    def _drop_what_is_answered(self, batch: Batch) -> list[Send]:
        """Forget requests that this batch left with nothing to execute; return their replies.

        A faulty client can sign two envelopes with the same numbers, or acknowledge numbers that were never executed.
        The primary answers such a request and never orders it, so nobody may lose patience over it.
        """
        answers = []
        for client in dict.fromkeys(envelope.client for envelope in batch.envelopes):
            for waiting in list(self._known.requests.of(client)):
                reply = self.executor.known_reply(waiting.envelope)
                if reply is not None:
                    self._known.requests.drop(waiting)
                    answers.append(Send(client, reply))
        return answers

    # Saying

    def _say_what_is_owed(self) -> None:
        """Write everything that is owed as one group, unless an append is under way."""
        if not self._live or self._appending or self.halted is not None or self.number in self.exposed:
            return
        payloads = self._pen.write()
        if payloads:
            self._appending = True
            self._effects.append(Append(payloads))

    # Halting

    def _halt(self, reason: str) -> None:
        self.halted = reason
        self._effects.append(Halt(reason))

    def _halt_rolled_back(self, group: VerifiedGroup) -> None:
        self._halt(
            f"a peer holds entry {group.last} of this replica's own log, which ends at "
            f"{self._inboxes[self.number].received} here: its trusted state was rolled back"
        )
