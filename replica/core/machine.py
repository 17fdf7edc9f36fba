"""The replica: reads all logs in order, counts, executes, and says what it owes.

One cycle per event. What arrived is put into the inbox of its log; every log is read as far as its entries' causes
allow; what is decided is executed; and if no append is under way, everything that this replica owes is said as one
group. Own entries come back through Appended and are read like anyone's: a replica hears itself through its own log.

`_pen` is the state of the own log *including* what is being appended: it decides what may be written next. What is
counted, executed and answered comes only from `_states`, which hold durable, attested entries.

What is owed is said in this order (design section 4.2): CHECKPOINT, COMMIT, PREPARE or PRE-PREPARE. In this version
no replica says SUSPECT, VIEW-CHANGE or NEW-VIEW, so view 0 never ends.
"""

from collections import Counter
from collections.abc import Callable

from replica.application import Application
from replica.core.batch import Batch, make_batch
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    NewView,
    Prepare,
    PrePrepare,
    decode_entry,
)
from replica.core.envelope import Envelope
from replica.core.events import (
    Append,
    Appended,
    Effect,
    Event,
    Executed,
    Exposed,
    Fetch,
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
)
from replica.core.execution import Executor
from replica.core.genesis import Genesis, Ordering
from replica.core.inbox import Arrival, Inbox
from replica.core.layout import LayoutError
from replica.core.logstate import initial_states
from replica.core.quorum import is_quorum, primary
from replica.core.requests import QueueFullError, RequestQueue
from replica.core.rules import (
    Reading,
    Violation,
    Wait,
    apply_entry,
    judge,
    next_commit,
    next_vote,
)
from replica.core.slots import SlotBook

# A cause that is missing for this long is asked for; then again, from the next replica.
FETCH_AFTER_MS = 150
# A request handed to the primary is handed over again after this long without being executed.
RELAY_AGAIN_MS = 1000
# A request that was not ordered for this long is forgotten; its client still has it.
REQUEST_AGE_MAX_MS = 60_000

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
    ) -> None:
        self.genesis = genesis
        self.number = number
        self.cluster_id = genesis.cluster_id()
        self.executor = Executor(application, genesis.limits)
        self.stable = 0
        self.stable_digest: bytes | None = None
        self.halted: str | None = None
        self.exposed: dict[int, Violation] = {}
        self.refusals = Counter[str]()
        self._verify_envelope = verify_envelope
        self._states = initial_states(genesis.n)
        self._pen = initial_states(genesis.n)[number]
        self._inboxes = [Inbox(head) for head in heads]
        self._waits: dict[int, Wait] = {}
        self._heard_entry: dict[int, Entry] = {}
        self._slots = SlotBook(genesis.ordering, genesis.f)
        self._requests = RequestQueue(genesis.limits)
        self._checkpoints: dict[int, dict[bytes, int]] = {}
        self._own_digests: dict[int, bytes] = {}
        self._appending = False
        self._live = False
        self._now_ms = 0
        self._wall_ms = 0
        self._missing_since: dict[int, int] = {}
        self._asked: Counter[int] = Counter()
        self._effects: list[Effect] = []

    # What the shell may look at.

    @property
    def view(self) -> int:
        """The view this replica is in."""
        return self._states[self.number].view

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
        return self._states[log].position

    def head(self, log: int) -> bytes:
        """Return the chain's head of `log` where it arrived without gaps."""
        return self._inboxes[log].head

    def unread(self, log: int) -> int:
        """Return how many entries of `log` arrived and are not read yet."""
        return len(self._inboxes[log].unread)

    @property
    def requests_waiting(self) -> int:
        """Return how many requests wait here to be executed."""
        return len(self._requests)

    def waiting_for(self, log: int) -> str | None:
        """Return what the next entry of `log` waits for, in words, or None."""
        wait = self._waits.get(log)
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
            self._effects.append(Forked(group.author, other.first, other))
        elif arrival is Arrival.TAKEN:
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
            waiting = self._requests.add(envelope, self._now_ms)
        except QueueFullError as full:
            self.refusals["request-queue-full"] += 1
            self._effects.append(Refuse(event.source, "busy", str(full)))
            return
        if waiting is not None and self.primary != self.number and not event.relayed:
            waiting.relayed_ms = self._now_ms
            self._effects.append(Relay(self.primary, envelope))

    def _on_tick(self, event: Tick) -> None:
        self._now_ms = event.now_ms
        self._wall_ms = event.wall_ms
        self._ask_for_what_is_missing()
        self._requests.forget_before(self._now_ms - REQUEST_AGE_MAX_MS)
        if self.primary == self.number:
            return
        for waiting in self._requests:
            if waiting.relayed_ms is not None and self._now_ms - waiting.relayed_ms >= RELAY_AGAIN_MS:
                waiting.relayed_ms = self._now_ms
                self._effects.append(Relay(self.primary, waiting.envelope))

    def _on_recovered(self) -> None:
        own = self._inboxes[self.number]
        if own.unread or own.received < own.seen or self.number in self.exposed:
            missing = "a rule broken" if self.number in self.exposed else "it is missing"
            why = self.waiting_for(self.number) or missing
            self._halt(
                f"entry {self._states[self.number].position + 1} of this replica's own log cannot be read again "
                f"({why}): its store lost what that entry depends on; restore the store or replace the replica"
            )
            return
        self._pen = self._states[self.number].copy()
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
        entry = self._heard_entry.get(log)
        state = self._states[log]
        try:
            if entry is None:
                entry = self._decode(payload)
            reading = Reading(self.genesis, self._states, self.executed, self.stable)
            verdict = judge(state, entry, reading)
        except LayoutError as error:
            verdict = Violation("malformed", str(error))
        if isinstance(verdict, Violation):
            self.exposed[log] = verdict
            self._effects.append(Exposed(log, index, verdict, group))
            if log == self.number and self._live:
                self._halt(f"entry {index} of this replica's own log breaks a rule ({verdict.text}); report this")
            return False
        if entry is None or isinstance(entry, NewView) or isinstance(verdict, Wait):
            if entry is not None:
                self._heard_entry[log] = entry
            self._waits[log] = verdict if verdict is not None else Wait("a later version's view change", ())
            self._missing_since.setdefault(log, self._now_ms)
            return False
        self._heard_entry.pop(log, None)
        self._waits.pop(log, None)
        self._missing_since.pop(log, None)
        self._inboxes[log].pop()
        apply_entry(state, entry)
        self._count(log, index, entry)
        return True

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
                self._slots.propose(log, entry.view, entry.slot, entry.batch)
        elif isinstance(entry, Prepare):
            true = self._slots.vote(log, entry.view, entry.slot, entry.digest)
        elif isinstance(entry, Commit):
            true = self._slots.commit(log, entry.view, entry.slot, entry.digest)
        elif isinstance(entry, Checkpoint):
            self._count_checkpoint(log, index, entry)
        if not true:
            self._effects.append(Lied(log, index, "a vote for what was not proposed there"))

    def _count_checkpoint(self, log: int, index: int, entry: Checkpoint) -> None:
        if entry.slot <= self.stable:
            if entry.slot == self.stable and entry.digest != self.stable_digest:
                self._effects.append(Lied(log, index, "a checkpoint that differs from the stable one"))
            return
        tally = self._checkpoints.setdefault(entry.slot, {})
        tally[entry.digest] = tally.get(entry.digest, 0) | 1 << log
        if is_quorum(tally[entry.digest], self.genesis.f):
            self._become_stable(entry.slot, entry.digest)

    def _become_stable(self, slot: int, digest: bytes) -> None:
        if self._own_digests[slot] != digest:
            self._halt(
                f"the state here after slot {slot} differs from the one that a quorum attested: this replica's state "
                "is corrupt or its application is not deterministic; replace its store and let it catch up"
            )
            return
        self.stable = slot
        self.stable_digest = digest
        self._slots.prune(slot)
        for state in (*self._states, self._pen):
            state.prune(slot)
        for old in [s for s in self._checkpoints if s <= slot]:
            del self._checkpoints[old]
        # The own CHECKPOINT(slot) may still be owed: others can make a slot stable before this replica says so, and
        # a log that skipped it could never commit past the votes pruned here.
        for old in [s for s in self._own_digests if s < slot]:
            del self._own_digests[old]
        self._effects.append(Stable(slot, digest))

    # Executing

    def _execute_decided(self) -> bool:
        done = False
        while self.halted is None and (batch := self._slots.decided(self.executed + 1)) is not None:
            self._execute(self.executed + 1, batch)
            done = True
        return done

    def _execute(self, slot: int, batch: Batch) -> None:
        replies = self.executor.execute(slot, batch)
        for envelope in batch.envelopes:
            self._requests.executed(envelope)
        if slot % self.genesis.limits.checkpoint_interval == 0:
            self._own_digests[slot] = self.executor.digest()
        self._effects.append(Executed(slot, batch))
        if self._live:
            self._effects.extend(Send(reply.client, reply.raw) for reply in replies)

    # Saying

    def _say_what_is_owed(self) -> None:
        """Write everything that is owed as one group, unless an append is under way."""
        if not self._live or self._appending or self.halted is not None or self.number in self.exposed:
            return
        limits = self.genesis.limits
        payloads: list[bytes] = []
        size = 0
        while len(payloads) < limits.group_entries_max and (entry := self._next_owed(size)) is not None:
            apply_entry(self._pen, entry)
            payloads.append(entry.encode())
            size += len(payloads[-1])
        if payloads:
            self._appending = True
            self._effects.append(Append(tuple(payloads)))

    def _next_owed(self, size: int) -> Entry | None:
        """Return the next entry that this replica owes, given `size` bytes already in the group."""
        pen = self._pen
        for slot in sorted(self._own_digests):
            if slot > pen.last_checkpoint:
                return Checkpoint(slot, self._own_digests[slot])
        opening = self._states[self.primary].opened.get(pen.view)
        if opening is None:
            return None
        if self.genesis.ordering is Ordering.THREE_PHASE:
            commit = self._owed_commit(next_commit(pen, opening.base))
            if commit is not None:
                return commit
        if self.primary == self.number:
            return self._owed_proposal(next_vote(pen, opening.top), size)
        return self._owed_vote(next_vote(pen, opening.base))

    def _owed_commit(self, slot: int) -> Commit | None:
        # The own vote counts here before it is durable: it stands before this COMMIT in the same log, and a group is
        # attested as a whole or not at all. It decides nothing before it comes back through Appended.
        own = self._pen.votes.get(slot, {}).get(self._pen.view)
        if own is None:
            return None
        digest = self._slots.certified(self._pen.view, slot, also=1 << self.number)
        return Commit(self._pen.view, slot, digest) if digest == own else None

    def _owed_vote(self, slot: int) -> Prepare | None:
        if slot > self._pen.last_checkpoint + self.genesis.limits.window:
            return None
        digest = self._slots.proposed(self._pen.view, slot)
        return None if digest is None else Prepare(self._pen.view, slot, digest)

    def _owed_proposal(self, slot: int, size: int) -> PrePrepare | None:
        limits = self.genesis.limits
        beyond = slot > self._pen.last_checkpoint + limits.window
        if beyond or not self._requests.unproposed or size + limits.batch_bytes_max > limits.group_bytes_max:
            return None
        envelopes = self._requests.take_batch()
        if not envelopes:
            return None
        at_cut = slot % limits.checkpoint_interval == 0
        cut = [state.position for state in self._states] if at_cut else []
        return PrePrepare(self._pen.view, slot, make_batch(self._wall_ms, cut, envelopes))

    # Fetching, halting

    def _ask_for_what_is_missing(self) -> None:
        """Ask for logs that an entry has waited for, its author first, then the others in turn."""
        wanted: dict[int, int] = {}  # log -> who is asked first
        for log, wait in self._waits.items():
            if log not in self.exposed and self._now_ms - self._missing_since[log] >= FETCH_AFTER_MS:
                for missing in wait.logs:
                    wanted.setdefault(missing, log)
        for log, inbox in enumerate(self._inboxes):
            if inbox.wanting:
                wanted.setdefault(log, log)
        for log, first_asked in wanted.items():
            if log == self.number or log in self.exposed or not self._inboxes[log].has_room:
                continue
            ask = (first_asked + self._asked[log]) % self.genesis.n
            if ask == self.number:
                ask = (ask + 1) % self.genesis.n
            self._asked[log] += 1
            self._effects.append(Fetch(log, self._inboxes[log].received + 1, ask))

    def _halt(self, reason: str) -> None:
        self.halted = reason
        self._effects.append(Halt(reason))

    def _halt_rolled_back(self, group: VerifiedGroup) -> None:
        self._halt(
            f"a peer holds entry {group.last} of this replica's own log, which ends at "
            f"{self._inboxes[self.number].received} here: its trusted state was rolled back"
        )
