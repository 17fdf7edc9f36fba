"""What all replicas of the virtual world have in common: a core, and a shell that carries out its effects.

The shell does what the daemon's does. Groups are verified before the core sees them; envelopes too. The own log is
pushed to every peer; what gets lost on the way comes when the peer subscribes again, from where it stands, which it
does every so often. Whoever holds a log serves it to whoever fetches it.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from replica.application import Context
from replica.apps.kv import KeyValue
from replica.core import events
from replica.core.batch import NULL_BATCH, Batch
from replica.core.carry import Carry
from replica.core.checkpoint import check_certificate, decode_header
from replica.core.entries import Entry, ViewChange
from replica.core.events import Event
from replica.core.group import VerifiedGroup
from replica.core.heads import decode_heads, encode_heads
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.machine import ReplicaCore
from replica.core.snapshot import Milestone, Snapshot
from replica.sim.audience import Audience, Vote
from replica.sim.library import Kept, Library, keep
from replica.sim.logs import Log
from replica.sim.messages import (
    AskCheckpoint,
    AskPart,
    AskReport,
    Connected,
    FetchMessage,
    GroupMessage,
    Held,
    Offer,
    Part,
    Reply,
    Report,
    Request,
    Subscribe,
)
from replica.sim.setting import WALL_MS, Setting
from replica.sim.words import effect_in_words, group_label

TICK_MS = 50
SUBSCRIBE_MS = 400
SERVED_GROUPS_MAX = 24
LEASE_MS = 10_000
WALL_SKEW_MS_MAX = 30 * 86_400_000


class WatchedKeyValue(KeyValue):
    """The real application; the witness hears of every operation that it carries out."""

    def __init__(self, heard: Callable[[int, bytes, bytes], None]) -> None:
        self._heard = heard

    def apply(self, operation: bytes, context: Context) -> bytes:
        """See `KeyValue`."""
        self._heard(context.slot, context.client, operation)
        return super().apply(operation, context)


class WatchedCore(ReplicaCore):
    """The real core; it lets the simulator see how large its collections are and what new views carried."""

    carries: Counter[str]
    audience: Audience
    is_puppet = False
    decoded: dict[bytes, Entry]

    def _decode(self, payload: bytes) -> Entry:
        # A function of the payload alone, and every replica reads every payload.
        entry = self.decoded.get(payload)
        if entry is None:
            entry = self.decoded[payload] = super()._decode(payload)
        return entry

    def _open_view(self, log: int, view: int, carried: Carry) -> None:
        super()._open_view(log, view, carried)
        if not carried.votes:
            self.carries["carried-none"] += 1
        for _, digest in carried.votes:
            self.carries["carried-null" if digest == NULL_BATCH.digest else "carried-vote"] += 1
        batches = {slot: self._known.slots.batch(slot, digest) for slot, digest in carried.votes}
        votes = {slot: self._votes_before(view, slot) for slot in batches}
        self.audience.opened(self.number, view, carried.opening, batches, votes)

    def _votes_before(self, view: int, slot: int) -> list[Vote]:
        by_author = [(state.author, state.votes.get(slot, {})) for state in self._known.states]
        return [
            Vote(at, author, digest) for author, by_view in by_author for at, digest in by_view.items() if at < view
        ]

    def _execute(self, slot: int, batch: Batch) -> None:
        before = dict(self._cut.verdicts)
        super()._execute(slot, batch)
        for verdict, count in self._cut.verdicts.items():
            if count > before.get(verdict, 0):
                self.carries[f"cuts-{verdict}"] += 1

    def _count(self, log: int, index: int, entry: Entry, group: VerifiedGroup) -> None:
        if isinstance(entry, ViewChange) and log == self.number and self._known.cut_lags and not self.is_puppet:
            self.carries["primaries-left-for-the-cut"] += 1
        super()._count(log, index, entry, group)

    def log_states(self) -> list[LogState]:
        """Return every log's reduced state."""
        return self._known.states

    def all_refusals(self) -> Counter[str]:
        """Return what it did not take, by reason."""
        return self.refusals + self._catch_up.refusals

    def sizes(self) -> dict[str, int]:
        """Return the size of everything that grows."""
        return {
            "slots": len(self._known.slots),
            "requests": len(self._known.requests),
            "unread": max(len(inbox.unread) for inbox in self._inboxes),
            "beyond-cut": len(self._cut),
            "votes": max(len(state.votes) for state in self._known.states),
            "commits": max(len(state.commits) for state in self._known.states),
            "checkpoints": len(self._checkpoints),
            "own-digests": len(self._known.own_digests),
            "views": max(len(state.view_change_at) for state in self._known.states),
        }

    def tallies(self) -> list[tuple[int, list[tuple[int, bytes, int, int]]]]:
        """Return what is counted: per slot, per view its digest and the masks of voters and committers."""
        return [
            (slot, [(view, tally.digest, tally.voters, tally.committers) for view, tally in found.views.items()])
            for slot, found in self._known.slots._slots.items()  # noqa: SLF001 - nobody else looks at it
        ]

    def head_at(self, log: int, index: int) -> bytes | None:
        """Return the head of a log as it arrived here, where a group ends at `index`, if that is remembered."""
        return self._inboxes[log].head_at(index)

    def waiting_requests(self) -> list[bytes]:
        """Return the digests of the requests that wait."""
        return [waiting.digest for waiting in self._known.requests]

    def check(self) -> None:
        """Raise RuntimeError if an invariant of a log's reduced state is broken."""
        for state in self._known.states:
            state.check()

    def contents(self) -> dict[bytes, bytes]:
        """Return the application's whole state."""
        return dict(self.executor.state.scan())


class Host:
    """What every replica's shell does, a faulty one's too, as long as its strategies do not say otherwise."""

    def __init__(self, setting: Setting, number: int, log: Log) -> None:
        self.setting = setting
        self.world = setting.world
        self.number = number
        self.log = log
        self.peers = [i for i in range(setting.genesis.n) if i != number]
        self.is_down = False
        self.library = Library(setting.genesis.n)
        self.kept: Kept | None = None  # what is handed out to whoever was away
        self.leases: dict[int, tuple[Kept, int]] = {}  # slot -> what was offered, and until when it is kept
        self._life = 0
        self._subscriptions = 0
        self._wall_skew = setting.world.random.randint(-WALL_SKEW_MS_MAX, WALL_SKEW_MS_MAX)
        setting.network.nodes[number] = self
        self.core = self.make_core(None)

    # What differs between correct and faulty replicas.

    def _make_core(self, snapshot: Snapshot | None) -> WatchedCore:
        raise NotImplementedError

    def carry_out(self, effect: events.Effect) -> None:
        """Do what the core asks for."""
        raise NotImplementedError

    def make_core(self, snapshot: Snapshot | None) -> WatchedCore:
        """Make a core that begins with a snapshot, or with nothing."""
        core = self._make_core(snapshot)
        core.carries, core.audience, core.decoded = self.world.counts, self.setting.audience, self.setting.entries
        return core

    # Time.

    def start(self) -> None:
        """Begin to live."""
        life = self._life
        offset = self.world.random.randrange(TICK_MS)

        def tick() -> None:
            if self._life == life and not self.is_down:
                wall = max(0, WALL_MS + self.world.now + self._wall_skew)
                self.handle(events.Tick(self.world.now, wall))
                self.world.after(TICK_MS, tick)

        def subscribe() -> None:
            if self._life == life and not self.is_down:
                self.subscribe()
                self.world.after(SUBSCRIBE_MS, subscribe)

        self.world.after(offset, tick)
        self.world.after(offset * 3, subscribe)

    def subscribe(self) -> None:
        """Ask every peer for what follows in its log; tell one after the other the heads of all logs here."""
        told = self.peers[self._subscriptions % len(self.peers)]
        self._subscriptions += 1
        for peer in self.peers:
            first = self.core.received(peer) + 1
            heads = encode_heads(self.core.heads()) if peer == told else b""
            self.send(peer, Subscribe(first, self._life, heads), f"subscribe {first}")

    # Messages.

    def send(self, to: int, message: object, label: str, hold: int = 0) -> None:
        """Send a message to a node."""
        self.setting.network.send(self.number, to, message, label, hold)

    def receive(self, source: int, message: object) -> None:
        """Take a message from the network."""
        if self.is_down:
            return
        if isinstance(message, GroupMessage):
            self.on_group(message)
        elif isinstance(message, Subscribe):
            self.serve(source, self.number, message.first, message.life)
            if message.heads:
                self._on_heads(source, message.heads)
        elif isinstance(message, FetchMessage):
            self.serve(source, message.log, message.first, message.life)
        elif isinstance(message, Held):
            if message.life == self._life:
                self.handle(events.PeerHolds(source, message.log, message.first, message.last))
        elif isinstance(message, AskCheckpoint | Offer | AskPart | Part):
            self._on_state(source, message)
        elif isinstance(message, Request):
            self.on_request(source, message)
        elif isinstance(message, AskReport):
            self.send(source, self.report(), "report")

    def report(self) -> Report:
        """Return what this replica says of itself."""
        return Report(self.core.executed, self.core.view)

    def welcome(self, client: int) -> None:
        """Let a client's connection to this replica stand."""
        if not self.is_down:
            self.send(client, Connected(self.core.executed, self.core.view), "connected")

    def on_group(self, message: GroupMessage) -> None:
        """Verify a group, keep it and hand it to the core."""
        group = self.setting.verifier.group(message.log, message.raw)
        if group is None:
            self.world.counts["refused-groups"] += 1
            return
        self.setting.witness.saw_group(group)
        self.handle(events.GroupReceived(group))

    def on_request(self, source: int, message: Request) -> None:
        """Verify an envelope and hand it to the core."""
        try:
            envelope = self.setting.decode(message.raw)
        except LayoutError:
            self.world.counts["refused-envelopes"] += 1
            return
        if not self.setting.verifier.envelope(envelope):
            self.world.counts["refused-envelopes"] += 1
            return
        relayed = source < self.setting.genesis.n
        self.handle(events.RequestReceived(envelope, relayed, source))

    # The state, for those who were away.

    def _on_state(self, source: int, message: AskCheckpoint | Offer | AskPart | Part) -> None:
        kept = self.kept
        if isinstance(message, AskCheckpoint):
            if kept is not None:
                self._lease(kept)
                self.send(source, Offer(kept.header, kept.certificate), f"offer {kept.slot}")
        elif isinstance(message, AskPart):
            leased = self.leases.get(message.slot)
            data = None
            if leased is not None:
                with suppress(LayoutError, IndexError):
                    data = leased[0].part(message.want)
                self._lease(leased[0])
            self.send(source, Part(message.slot, message.want, data), f"part {message.slot}")
        elif isinstance(message, Offer):
            self._on_offer(source, message)
        else:
            self.world.counts["parts"] += 1
            self.handle(events.PartReceived(source, message.slot, message.want, message.data))

    def _lease(self, kept: Kept) -> None:
        """Keep a milestone, and the logs from its cut on, for whoever was offered it."""
        self.leases[kept.slot] = (kept, self.world.now + LEASE_MS)

    def _on_offer(self, source: int, offer: Offer) -> None:
        genesis = self.setting.genesis
        try:
            header = decode_header(offer.header, genesis.n)
            check_certificate(offer.certificate, header, genesis, self.setting.verifier.entry)
        except LayoutError:
            self.world.counts["refused-offers"] += 1
            return
        self.handle(events.CheckpointOffered(source, header, offer.certificate))

    # Logs.

    def serve(self, reader: int, log: int, first: int, life: int) -> None:
        """Send what is held of a log from `first` on, and say what there is of it."""
        if not 0 <= log < self.setting.genesis.n:
            return
        for group in self.library.since(log, first, SERVED_GROUPS_MAX):
            self.send(reader, GroupMessage(log, group.raw), group_label(group))
        # Groups that arrived and still wait for those before them show that the log reaches farther.
        span = (self.library.first(log), max(self.library.last(log), self.core.seen(log)))
        self.send(reader, Held(log, *span, life), f"holds {log} {span[0]}-{span[1]}")

    def publish(self, group: VerifiedGroup) -> None:
        """Push a new own group to every peer."""
        self.setting.audience.said(group)
        for peer in self.peers:
            self.send(peer, GroupMessage(self.number, group.raw), group_label(group))

    def _on_heads(self, source: int, raw: bytes) -> None:
        try:
            heads = decode_heads(raw, self.setting.genesis.n)
        except LayoutError:
            self.world.counts["refused-heads"] += 1
            return
        self.world.counts["heads-compared"] += 1
        self.handle(events.HeadsReceived(source, heads))

    # The core.

    def handle(self, event: Event) -> None:
        """Hand an event to the core and carry out what it asks for."""
        for effect in self.core.handle(event):
            if self.world.is_traced and (said := effect_in_words(effect)):
                self.world.remark(f"replica {self.number}: {said}")
            self.setting.audience.effect(self.number, effect)
            self.carry_out(effect)

    def relay(self, effect: events.Relay) -> None:
        """Hand a request to the primary."""
        self.send(effect.to, Request(effect.envelope.raw), "relay")

    def fetch(self, effect: events.Fetch) -> None:
        """Ask a replica for part of a log."""
        self.world.counts["fetches"] += 1
        message = FetchMessage(effect.log, effect.first, self._life)
        self.send(effect.ask, message, f"fetch {effect.log} from {effect.first}")

    def ask_about_state(self, effect: events.AskCheckpoint | events.AskPart) -> None:
        """Ask a replica for its checkpoint, or a part of the state there."""
        if isinstance(effect, events.AskCheckpoint):
            self.world.counts["checkpoints-asked-for"] += 1
            self.send(effect.ask, AskCheckpoint(), "ask for a checkpoint")
        else:
            self.send(effect.ask, AskPart(effect.slot, effect.want), f"ask for a part {effect.slot}")

    def persist(self, milestone: Milestone) -> None:
        """Keep a milestone, and forget what nobody needs any more."""
        self.kept = keep(self.kept, milestone)
        self.leases = {slot: (kept, until) for slot, (kept, until) in self.leases.items() if until > self.world.now}
        n = self.setting.genesis.n
        cuts = [kept.cut(n) for kept in (self.kept, *(kept for kept, _ in self.leases.values()))]
        for log, upto in enumerate(map(min, zip(*cuts, strict=True))):
            self.library.forget(log, upto - self.setting.retained)

    def reply(self, effect: events.Send) -> None:
        """Send a reply to its client."""
        client = self.setting.clients.get(effect.client)
        if client is not None:
            self.send(client, Reply(effect.reply), "reply")
