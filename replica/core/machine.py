"""The replica: reads all logs in order, counts, executes, and says what it owes.

One cycle per event. What arrived is put into the inbox of its log; every log is read as far as its entries' causes
allow; what is decided is executed; and if no append is under way, everything that this replica owes is said as one
group. Own entries come back through Appended and are read like anyone's: a replica hears itself through its own log.

What is counted, executed and answered comes only from `Knowledge`, which holds durable, attested entries; what may be
written next is the pen's business (`replica.core.pen`).
"""

from replica.application import Application
from replica.core.batch import NULL_BATCH, Batch
from replica.core.carry import Carry, carry
from replica.core.catchup import CatchUp
from replica.core.checkpoint import is_founding
from replica.core.checkpoints import Checkpoints
from replica.core.cut import AgreedCut
from replica.core.entries import (
    Checkpoint,
    Commit,
    Entry,
    NewView,
    Prepare,
    PrePrepare,
    SlotResult,
    VerifyEnvelope,
    ViewChange,
    decode_joining,
    decode_judged,
)
from replica.core.events import (
    Answer,
    Append,
    Appended,
    CheckpointOffered,
    Effect,
    Event,
    Executed,
    Exposed,
    Forked,
    GroupReceived,
    Halt,
    HeadsReceived,
    KnownBroken,
    Lied,
    ListEnded,
    NotSent,
    PeerHolds,
    Persist,
    Recovered,
    Refuse,
    RequestReceived,
    ResultAsked,
    Send,
    Stable,
    Taken,
    Tick,
    ViewEntered,
    ViewOpened,
)
from replica.core.execution import Executor
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.inbox import Arrival, Inbox
from replica.core.inspection import Inspection
from replica.core.knowledge import initial_knowledge, knowledge_from
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.patience import Patience
from replica.core.pen import Pen
from replica.core.quotas import NO_QUOTA
from replica.core.relays import Relays
from replica.core.replays import Replays, answered_by
from replica.core.requests import QueueFullError
from replica.core.rooms import DIRECT, GAVE_WAY
from replica.core.rules import Reading, Violation, Wait, apply_entry, apply_opening, judge
from replica.core.snapshot import MilestoneRule, Snapshot

# No limit on what is read and executed in one call, unless the shell sets one.
UNLIMITED = 1 << 62


class ReplicaCore(Inspection):
    """One replica's protocol state.

    genesis: the agreed values. number: this replica's. heads: every log's head before its first entry, 32 bytes each.
    verify_envelope: says whether an envelope's signature is its client's; a pure function of the bytes.
    snapshot: the state to begin with, instead of with nothing.

    work_max may be set: entries that one call of `handle` reads, and operations that it executes, at the most; while
    `has_more`, call it again. What waits is as if it had not arrived yet.
    """

    def __init__(
        self,
        genesis: Genesis,
        number: int,
        application: Application,
        heads: list[bytes],
        verify_envelope: VerifyEnvelope,
        patience: Patience | None = None,
        *,
        snapshot: Snapshot | None = None,
        milestones: MilestoneRule | None = None,
    ) -> None:
        self.genesis = genesis
        self.number = number
        self.cluster_id = genesis.cluster_id()
        self.patience = patience or Patience()
        self.stable_digest: bytes | None = None if snapshot is None else snapshot.digest
        self.halted: str | None = None
        self.exposed: dict[int, Violation] = {}
        self._verify_envelope = verify_envelope
        if snapshot is None:
            self.executor = Executor(application, genesis)
            self._known = initial_knowledge(genesis)
        else:
            self.executor = snapshot.executor
            self._known = knowledge_from(genesis, snapshot)
            heads = heads if is_founding(snapshot.header, genesis) else list(snapshot.header.heads)
        ends = [state.position for state in self._known.states]
        self._inboxes = [Inbox(head, received=end, seen=end) for head, end in zip(heads, ends, strict=True)]
        self._relays = Relays(self._known.requests)
        self._pen = Pen(number, self._known, self.patience)
        self._known.ends = self.executor.membership.last_slot_of(self.genesis.list_number)
        self._catch_up = CatchUp(number, genesis, self._inboxes, self.executor)
        self._catch_up.needs_state = genesis.needs_state and snapshot is None
        self.refusals = self._catch_up.refusals  # one count
        self._replays = Replays(self.refusals)
        self._cut = AgreedCut(self._known.states, heads)
        rule = milestones or MilestoneRule()
        self._checkpoints = Checkpoints(genesis, rule, self._cut, self._known.own_digests, self.patience.cut_ms)
        if snapshot is not None:
            self._checkpoints.begin(snapshot.header.slot, snapshot.digest)
        self._known.cut_offered = self._cut.ends_of_groups
        self._heard_entry: dict[int, Entry] = {}
        self.work_max = UNLIMITED
        self.has_more = False
        self._left = UNLIMITED
        self._appending = False
        self._ahead: VerifiedGroup | None = None  # of the own log, beyond its end
        self._live = False
        self._effects: list[Effect] = []
        self._halt_if_outdated()

    def handle(self, *events: Event) -> list[Effect]:
        """Take events, in this order; return what must be done about them, in this order.

        Events that arrived together are best handed in together: what they make this replica say is one group.
        """
        self._left = self.work_max
        self._replays.begin()
        if self.has_more:
            self.has_more = False
            self._read_logs()
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
            elif isinstance(event, NotSent):
                if event.to == self.primary:
                    self._relays.not_sent(event.envelope)
            elif isinstance(event, ResultAsked):
                asked = self._known.results.ask(event, self._pen.state, self.executed, live=self._live)
                self._effects.extend(asked)
            else:
                self._on_answer(event)
        self._come_home()
        if self.has_more or self._catch_up.transfer is not None:
            self._pen.expectation.excuse(self._known.now_ms, self._known.requests.work)
        self._say_what_is_owed(tick=any(isinstance(event, Tick) for event in events))
        effects, self._effects = self._effects, []
        return effects

    # Events

    def _on_group(self, group: VerifiedGroup) -> None:
        inbox = self._inboxes[group.author]
        if group.author == self.number and self._live:
            # Own entries come back through Appended; from others only what this log never said could differ.
            if group.last > inbox.received:
                self._ahead = group
                self._check_ahead()
            return
        if group.author in self.exposed:
            return
        arrival = inbox.arrive(group)
        if arrival not in {Arrival.TAKEN, Arrival.EARLY}:
            self.refusals[f"group-{arrival.value}"] += 1
        if arrival is Arrival.FORKED:
            other = inbox.contradiction or group
            # What came just before may be the other half of the evidence: it is kept, and not read.
            self._effects.extend(Taken(taken) for taken in inbox.collect())
            self._on_broken(group.author)
            self._effects.append(Forked(group.author, other.first, other))
        elif arrival is Arrival.TAKEN:
            self._effects.extend(Taken(taken) for taken in inbox.collect())
            self._catch_up.fetcher.arrived(group.author)
            self._read_logs()

    def _on_broken(self, log: int) -> None:
        self.exposed[log] = Violation("forked", "two attestations contradict each other")
        self._known.blind.add(log)
        self._catch_up.fetcher.moved(log)

    def _on_appended(self, group: VerifiedGroup) -> None:
        self._appending = False
        own = self._inboxes[self.number]
        if own.arrive(group) is not Arrival.TAKEN:
            self._halt("the trusted log's answer does not continue this replica's own log")
            return
        own.collect()
        self._check_ahead()
        self._read_logs()

    def _on_request(self, event: RequestReceived) -> None:
        envelope = event.envelope
        if self.executor.is_answered(envelope):
            if event.relayed:
                # Its client got the reply when it was executed, or asks here itself.
                self.refusals["relay-answered"] += 1
            else:
                self._effects.extend(self._replays.give(self.executor, envelope, event.source))
            return
        now_ms, is_backup = self._known.now_ms, self.primary != self.number
        pauses = 1 if event.relayed else 2
        if (event.relayed or is_backup) and self._known.requests.was_executed(envelope, now_ms, pauses=pauses):
            # What has no effect leaves no trace in the client table, and would be ordered again and again while relays
            # of it are under way. Not never: who relayed it may have skipped its execution, by a transfer.
            self.refusals["executed-lately"] += 1
            return
        quota = NO_QUOTA if event.relayed else self.executor.quota_of(envelope)
        try:
            peer = DIRECT if event.peer is None else event.peer
            waiting = self._known.requests.add(envelope, now_ms, quota, peer=peer, source=event.source)
        except QueueFullError as full:
            self.refusals["relay-queue-full" if event.relayed else full.reason] += 1
            if not event.relayed:  # whoever relays keeps the request, and tries again
                self._effects.append(Refuse(event.source, "busy", str(full)))
            return
        finally:
            for gone in self._known.requests.take_gone():
                self.refusals["request-gave-way"] += 1
                self._effects.append(Refuse(gone.source, "busy", GAVE_WAY))
        if waiting is not None and waiting.claimed_ms is not None and is_backup and not event.relayed:
            self._effects.extend(self._relays.arrived(waiting, self.primary, now_ms))

    def _on_tick(self, event: Tick) -> None:
        self._known.now_ms = event.now_ms
        self._known.wall_ms = event.wall_ms
        self._effects.extend(self._catch_up.due(event.now_ms, self.exposed))
        if self.primary == self.number or self.primary in self.exposed:
            return
        self._effects.extend(self._relays.due(self.primary, self._known.now_ms))

    def _on_answer(self, event: Answer) -> None:
        catch_up, now_ms = self._catch_up, self._known.now_ms
        if isinstance(event, Recovered):
            catch_up.homecoming.begin(event.last, event.head)
            self._effects.extend(catch_up.due(now_ms, self.exposed))
        elif isinstance(event, PeerHolds):
            self._effects.extend(catch_up.peer_holds(event, now_ms))
        elif isinstance(event, CheckpointOffered):
            self._effects.extend(catch_up.offered(event, now_ms))
        elif isinstance(event, HeadsReceived):
            self._effects.extend(catch_up.heads(event, self.exposed, now_ms))
        elif isinstance(event, KnownBroken):
            self._on_broken(event.log)
        else:
            self._effects.extend(catch_up.part(event, now_ms))

    def _come_home(self) -> None:
        """Begin to speak as soon as the own log is whole and f peers know of no more of it."""
        if self._live or self.halted is not None or self._catch_up.needs_state:
            return
        own, homecoming = self._inboxes[self.number], self._catch_up.homecoming
        contradiction = homecoming.contradiction(own)
        if contradiction is not None:
            self._halt(contradiction)
        elif self.number in self.exposed:
            why = self.exposed[self.number].text
            self._halt(f"this replica's own log breaks a rule ({why}); replace the replica with a new log")
        elif homecoming.missing(own) is None:
            self._pen.resume()
            self._live = True

    # Reading

    def _read_logs(self) -> None:
        """Read every log as far as its entries' causes allow, executing on the way, until nothing moves."""
        moved = not self._catch_up.needs_state
        while moved and self.halted is None:
            moved = False
            for log in range(self.genesis.n):
                while self._is_readable(log) and self._may(log) and self._read_next(log):
                    moved = True
            if self._execute_decided():
                moved = True

    def _is_readable(self, log: int) -> bool:
        """Say whether the next entry of `log` is here, and is this list's: CHECKPOINT of its last slot leaves it."""
        if not self._inboxes[log].unread or log in self.exposed:
            return False
        ends = self._known.ends
        return ends is None or self._known.states[log].last_checkpoint < ends

    def _may(self, log: int | None = None) -> bool:
        """Say whether to go on in this call; with the own log always, whose entries what is said next builds on."""
        if self._left > 0 or log == self.number:
            return True
        self.has_more = True
        return False

    def _read_next(self, log: int) -> bool:
        """Read the next entry of `log`; return False if it must wait or broke a rule."""
        index, payload, group = self._inboxes[log].unread[0]
        state = self._known.states[log]
        try:
            # An entry that waited was decoded, and what it holds verified, when it was first looked at.
            entry = self._heard_entry.get(log) or self._decode_next(state, payload)
        except LayoutError as error:
            return self._stop_reading(log, index, Violation("malformed", str(error)), group)
        verdict = judge(state, entry, self._reading())
        if isinstance(verdict, Violation):
            return self._stop_reading(log, index, verdict, group)
        if isinstance(verdict, Wait):
            self._heard_entry[log] = entry
            if self.executed == self._known.ends and isinstance(entry, Checkpoint):
                return False  # its author has joined the next list of members, and nothing is missing here
            self._catch_up.fetcher.waiting(log, verdict, self._known.now_ms)
            return False
        self._left -= 1
        self._heard_entry.pop(log, None)
        self._catch_up.fetcher.moved(log)
        self._inboxes[log].pop()
        carried = carry(entry, self._known.states, self.stable) if isinstance(entry, NewView) else None
        apply_entry(state, entry)
        self._cut.read(log, entry, carried, group.head_after if index == group.last else None)
        if isinstance(entry, PrePrepare | Prepare | Commit) and entry.slot <= self.stable:
            # A log that is read late speaks of slots that are long stable; nothing of that is kept.
            state.prune(self.stable)
        if carried is None:
            self._count(log, index, entry, group)
        else:
            self._open_view(log, state.view, carried)
        return True

    def _stop_reading(self, log: int, index: int, why: Violation, group: VerifiedGroup) -> bool:
        """Read `log` no further: its author broke a rule with entry `index`."""
        self.exposed[log] = why
        self._known.blind.add(log)
        self._catch_up.fetcher.moved(log)
        self._effects.append(Exposed(log, index, why, group))
        if log == self.number and self._live:  # otherwise seen in _come_home
            self._halt(f"entry {index} of this replica's own log breaks a rule ({why.text}); report this")
        return False

    def _open_view(self, log: int, view: int, carried: Carry) -> None:
        """Count what a NEW-VIEW proposes again: its author's votes, all of which someone proposed before, or null."""
        apply_opening(self._known.states[log], view, carried)
        for slot, digest in carried.votes:
            batch = NULL_BATCH if digest == NULL_BATCH.digest else self._known.slots.batch(slot, digest)
            self._known.slots.propose(log, view, slot, batch)
        self._effects.append(ViewOpened(view, carried.opening.base, carried.opening.top))

    def _reading(self) -> Reading:
        return Reading(self.genesis, self._known.states, self.executed, self.stable, self._known.ends)

    def _decode_next(self, state: LogState, payload: bytes) -> Entry:
        return self._decode(payload) if state.joined else decode_joining(payload, self.genesis)

    def _decode(self, payload: bytes) -> Entry:
        """Decode an entry and verify what its batch holds: a pure function of the payload."""
        return decode_judged(payload, self.genesis, self.cluster_id, self._verify_envelope)

    def _count(self, log: int, index: int, entry: Entry, group: VerifiedGroup) -> None:
        true = True
        if isinstance(entry, PrePrepare):
            if entry.slot > self.stable:
                self._known.slots.propose(log, entry.view, entry.slot, entry.batch)
        elif isinstance(entry, Prepare):
            true = self._known.slots.vote(log, entry.view, entry.slot, entry.digest)
        elif isinstance(entry, Commit):
            true = self._known.slots.commit(log, entry.view, entry.slot, entry.digest)
        elif isinstance(entry, Checkpoint):
            self._count_checkpoint(log, index, entry, group)
        elif isinstance(entry, SlotResult):
            self._count_result(log, index, entry, group)
        elif isinstance(entry, ViewChange) and log == self.number:
            self._checkpoints.begin_view()
            self._effects.append(ViewEntered(entry.view))
        if not true:
            self._effects.append(Lied(log, index, "a vote for what was not proposed there"))

    def _count_checkpoint(self, log: int, index: int, entry: Checkpoint, group: VerifiedGroup) -> None:
        if entry.slot > self.stable:
            if self._checkpoints.say(log, index, entry, group):
                self._become_stable(entry.slot, entry.digest)
        elif entry.slot == self.stable and entry.digest != self.stable_digest:
            self._effects.append(Lied(log, index, "a checkpoint that differs from the stable one"))

    def _count_result(self, log: int, index: int, entry: SlotResult, group: VerifiedGroup) -> None:
        if log == self.number:
            self._effects.extend(self._known.results.said(entry, index, group))
        elif not self._known.results.agrees(entry):
            self._effects.append(Lied(log, index, "a RESULT that is not what executing its slot gave here"))

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
        lowest = self._cut.lowest_view
        for state in (*self._known.states, self._pen.state):
            state.prune(slot)
            state.drop_views(lowest)
        liars, milestone = self._checkpoints.stable(slot, digest)
        for log, index in liars:
            self._effects.append(Lied(log, index, "a checkpoint that differs from the stable one"))
        self._effects.append(Stable(slot, digest))
        if milestone is not None:
            self._effects.append(Persist(milestone))
        if slot == self._known.ends:
            self._effects.append(ListEnded(slot))

    # Executing

    def _execute_decided(self) -> bool:
        done = False
        while self.halted is None and (batch := self._known.slots.decided(self.executed + 1)) is not None:
            if not self._may():
                break
            before = self.executor.operations
            self._execute(self.executed + 1, batch)
            self._left -= 1 + self.executor.operations - before
            done = True
        return done

    def _execute(self, slot: int, batch: Batch) -> None:
        replies = self.executor.execute(slot, batch)
        self._known.executed = slot
        requests, now_ms, executor = self._known.requests, self._known.now_ms, self.executor
        sources = [requests.source_of(envelope) for envelope in batch.envelopes] if self._live else []
        self._pen.expectation.executed(batch, requests, now_ms, executor.again)
        for envelope, fresh, again in zip(batch.envelopes, executor.fresh, executor.again, strict=True):
            requests.charge(envelope, fresh, executor.quota_of(envelope), now_ms)
            self.patience.executed(requests.executed(envelope, now_ms, again))
        answered = self._drop_what_is_answered(batch)
        self._known.ends = self.executor.membership.last_slot_of(self.genesis.list_number)
        last = slot == self._known.ends
        if self._checkpoints.executed(slot, batch, self.executor, self._known.slots, last=last) is not None:
            self._known.cut_lags = self._checkpoints.cut_lags(self._cut.ends_of_groups(), self._known.now_ms)
        self._effects.append(Executed(slot, batch))
        self._effects.extend(self._known.results.executed(slot, batch, replies))
        if self._live:
            for reply, source in zip(replies, sources, strict=True):
                self._effects.append(Send(reply.client, reply.raw, source))
            self._effects.extend(answered)
        self._halt_if_outdated()

    def _drop_what_is_answered(self, batch: Batch) -> list[Send]:
        """Forget requests that this batch left with nothing to execute; return their replies.

        A faulty client can sign two envelopes with the same numbers, or acknowledge numbers that were never executed;
        an operator can revoke anybody's key. The primary answers such a request and never orders it, so nobody may lose
        patience over it.
        """
        answers: list[Send] = []
        for waiting in answered_by(batch, self._known.requests, self.executor):
            self._known.requests.drop(waiting)
            answers += self._replays.give(self.executor, waiting.envelope)
        return answers

    # Saying

    def _say_what_is_owed(self, *, tick: bool) -> None:
        """Write everything that is owed as one group, unless an append is under way."""
        if not self._live or self._appending or self.halted is not None or self.number in self.exposed:
            return
        payloads = self._pen.write(tick=tick)
        if payloads:
            self._appending = True
            self._effects.append(Append(payloads))

    # Halting

    def _halt(self, reason: str) -> None:
        self.halted = reason
        self._effects.append(Halt(reason))

    def _halt_if_outdated(self) -> None:
        """Halt if the code here does not know the application's version in force from the next slot on."""
        if (outdated := self.executor.outdated) is not None:
            self._halt(outdated)

    def _check_ahead(self) -> None:
        """Halt if a group of the own log lies beyond its end; what is being appended may come back early."""
        end = self._inboxes[self.number].received
        if self._ahead is not None and not self._appending and self._ahead.last > end:
            self._halt(
                f"a peer holds entry {self._ahead.last} of this replica's own log, which ends at {end} here: "
                "its trusted state was rolled back; it must not speak again: replace this replica with a new log"
            )
        elif self._ahead is not None and self._ahead.last <= end:
            self._ahead = None
