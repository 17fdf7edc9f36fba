"""What all replicas of the virtual world have in common: a core, and a shell that carries out its effects.

The shell does what the daemon's does. Groups are verified before the core sees them; envelopes too. The own log is
pushed to every peer; what gets lost on the way comes when the peer subscribes again, from where it stands, which it
does every so often. Whoever holds a log serves it to whoever fetches it.
"""

from collections.abc import Sequence
from contextlib import suppress

from replica.apps.kv import KeyValue
from replica.core import events
from replica.core.chain import Link, check_link, decode_link, found
from replica.core.checkpoint import check_certificate, decode_header
from replica.core.events import Event
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.heads import decode_heads, encode_heads
from replica.core.layout import LayoutError
from replica.core.snapshot import Milestone, Snapshot
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
from replica.sim.setting import CLIENTS_FROM, NOWHERE, WALL_MS, Setting
from replica.sim.watched import WatchedCore
from replica.sim.words import effect_in_words, group_label

TICK_MS = 50
SUBSCRIBE_MS = 400
SERVED_GROUPS_MAX = 24
LEASE_MS = 10_000
# What is no replica of the present list, and no client, has its node's number above this.
STRANGERS_FROM = 1000
FORGOTTEN = 1 << 40
WALL_SKEW_MS_MAX = 30 * 86_400_000


class Host:
    """What every replica's shell does, a faulty one's too, as long as its strategies do not say otherwise."""

    def __init__(
        self,
        setting: Setting,
        number: int,
        log: Log,
        *,
        node: int | None = None,
        chain: Sequence[Genesis] = (),
    ) -> None:
        self.setting = setting
        self.world = setting.world
        self.number = number
        self.node = number if node is None else node
        self.log = log
        self.genesis = setting.genesis
        self.before: Genesis | None = None
        self._enter(setting.genesis)
        for genesis in chain:
            self._enter(genesis)
        self.is_down = False
        self.library = Library(self.genesis.n)
        self.kept: Kept | None = None  # what is handed out to whoever was away
        self.leases: dict[int, tuple[Kept, int]] = {}  # slot -> what was offered, and until when it is kept
        self._life = 0
        self._subscriptions = 0
        self._wall_skew = setting.world.random.randint(-WALL_SKEW_MS_MAX, WALL_SKEW_MS_MAX)
        setting.network.nodes[self.node] = self
        self.core = self.make_core(None)

    def _enter(self, genesis: Genesis) -> None:
        """Take in which list of members is in force; `before` is what was agreed under the one before."""
        self.before = None if not genesis.list_number else self.genesis
        self.genesis = genesis
        self.verifier = self.setting.verifier_of(genesis)
        self.peers = [i for i in range(genesis.n) if i != self.number]
        nodes = getattr(self, "_nodes", None) or list(range(genesis.n))
        for member in genesis.members:
            if member.since == genesis.list_number and member.since:
                nodes[member.number : member.number + 1] = [self.setting.places.get(member.log_public_key, NOWHERE)]
        self._nodes = nodes[: genesis.n]

    def node_of(self, number: int) -> int:
        """Return the node of a replica of the present list; of a client or another node that node."""
        if number >= STRANGERS_FROM:
            return number - STRANGERS_FROM
        return self._nodes[number] if number < len(self._nodes) else number

    def _number_of(self, node: int) -> int:
        """Return the number of a replica of the present list, or what `node_of` makes the node of."""
        if node in self._nodes:
            return self._nodes.index(node)
        return node if node >= CLIENTS_FROM else STRANGERS_FROM + node

    def next_list(self, application: KeyValue) -> Snapshot | None:
        """Go over to the list of members that the kept milestone begins; None if it begins none."""
        if self.kept is None or self.kept.genesis.list_number != self.genesis.list_number:
            return None
        snapshot = self.kept.snapshot(self.genesis, application, self.verifier.entry)
        if snapshot is None or snapshot.executor.membership.number == self.genesis.list_number:
            return None
        members = snapshot.executor.membership.current
        if members is None:
            raise RuntimeError("a list in force that is not there")
        link = Link(self.kept.header, self.kept.certificate, members.encode())
        if members.number > len(self.setting.links):
            self.setting.links.append(link.encode())
        return self._change_list(check_link(link, self.genesis, self.verifier.entry).genesis, snapshot)

    def _change_list(self, genesis: Genesis, snapshot: Snapshot) -> Snapshot | None:
        if all(member.log_public_key != self.log.public_key for member in genesis.members):
            return None  # it is no member any more, and stays to serve what it has
        self._enter(genesis)
        self.leases.clear()
        return found(snapshot, genesis, self.verifier.heads())

    def stored(self, kept: Kept, application: KeyValue) -> Snapshot | None:
        """Return what a core begins with, from what is kept; None if it is not what it should be."""
        if kept.genesis.list_number == self.genesis.list_number:
            return kept.snapshot(self.genesis, application, self.verifier.entry)
        if self.before is None or kept.genesis.list_number != self.before.list_number:
            return None
        before = kept.snapshot(self.before, application, self.setting.verifier_of(self.before).entry)
        try:
            return None if before is None else found(before, self.genesis, self.verifier.heads())
        except LayoutError:
            return None

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
        """Send a message to a replica of the present list, a client or another node."""
        self.setting.network.send(self.node, self.node_of(to), message, label, hold)

    def receive(self, source: int, message: object) -> None:
        """Take a message from the network."""
        if self.is_down:
            return
        source = self._number_of(source)
        if isinstance(message, GroupMessage):
            self.on_group(message)
        elif isinstance(message, Subscribe):
            self.serve(source, self.number, message.first, message.life)
            if message.heads:
                self._on_heads(source, message.heads)
        elif isinstance(message, FetchMessage):
            if self._is_another_log(message):
                self.send(source, Held(message.log, FORGOTTEN, FORGOTTEN - 1, message.life), f"forgot {message.log}")
            else:
                self.serve(source, message.log, message.first, message.life)
        elif isinstance(message, Held):
            if message.life == self._life and source < self.genesis.n:
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
        group = self.verifier.group(message.log, message.raw)
        if group is None:
            self.world.counts["refused-groups"] += 1
            return
        self.setting.witness.saw_group(group, self.verifier.key(group.author))
        self.handle(events.GroupReceived(group))

    def on_request(self, source: int, message: Request) -> None:
        """Verify an envelope and hand it to the core."""
        if source >= STRANGERS_FROM:
            self.world.counts["refused-strangers"] += 1  # a replica of another list is neither a peer nor a client
            return
        try:
            envelope = self.setting.decode(message.raw)
        except LayoutError:
            self.world.counts["refused-envelopes"] += 1
            return
        if not self.verifier.envelope(envelope):
            self.world.counts["refused-envelopes"] += 1
            return
        relayed = source < self.genesis.n
        self.handle(events.RequestReceived(envelope, relayed, source, source if relayed else None))

    # The state, for those who were away.

    def _on_state(self, source: int, message: AskCheckpoint | Offer | AskPart | Part) -> None:
        kept = self.kept
        if isinstance(message, AskCheckpoint):
            if kept is not None:
                self._lease(kept)
                links = tuple(self.setting.links[message.number : self.genesis.list_number])
                if message.number + len(links) >= kept.genesis.list_number:
                    self.send(source, Offer(kept.header, kept.certificate, links), f"offer {kept.slot}")
        elif isinstance(message, AskPart):
            leased = self.leases.get(message.slot)
            data = None
            if leased is not None:
                with suppress(LayoutError, IndexError):
                    data = leased[0].part(message.want)
                self._lease(leased[0])
            self.send(source, Part(message.slot, message.want, data), f"part {message.slot}")
        elif source >= self.genesis.n:
            return
        elif isinstance(message, Offer):
            self._on_offer(source, message)
        else:
            self.world.counts["parts"] += 1
            self.handle(events.PartReceived(source, message.slot, message.want, message.data))

    def _lease(self, kept: Kept) -> None:
        """Keep a milestone, and the logs from its cut on, for whoever was offered it."""
        self.leases[kept.slot] = (kept, self.world.now + LEASE_MS)

    def _on_offer(self, source: int, offer: Offer) -> None:
        lists = [self.genesis]
        try:
            for raw in offer.links:
                verify = self.setting.verifier_of(lists[-1]).entry
                lists.append(check_link(decode_link(raw), lists[-1], verify).genesis)
        except LayoutError:
            self.world.counts["refused-links"] += 1
            return
        for genesis in lists:
            if self._is_certified(offer, genesis):
                if genesis is self.genesis:
                    header = decode_header(offer.header, genesis.n)
                    self.handle(events.CheckpointOffered(source, header, offer.certificate))
                else:
                    # A quorum of that list has a state of its own, so some correct member hands it out.
                    self.jump(genesis)
                return
        if self.before is not None and self._is_certified(offer, self.before):
            header = decode_header(offer.header, self.before.n)
            if header.slot == self.genesis.base:
                self.handle(events.CheckpointOffered(source, header, offer.certificate, self.before))
                return
        self.world.counts["refused-offers"] += 1

    def _is_certified(self, offer: Offer, genesis: Genesis) -> bool:
        try:
            header = decode_header(offer.header, genesis.n)
            check_certificate(offer.certificate, header, genesis, self.setting.verifier_of(genesis).entry)
        except LayoutError:
            return False
        return header.slot > genesis.base

    def jump(self, genesis: Genesis) -> None:
        """Go on under a later list of members, without its state, which is still to be fetched."""
        raise NotImplementedError

    # Logs.

    def serve(self, reader: int, log: int, first: int, life: int) -> None:
        """Send what is held of a log from `first` on, and say what there is of it."""
        if not 0 <= log < self.genesis.n:
            return
        for group in self.library.since(log, first, SERVED_GROUPS_MAX):
            self.send(reader, GroupMessage(log, group.raw), group_label(group))
        # Groups that arrived and still wait for those before them show that the log reaches farther.
        span = (self.library.first(log), max(self.library.last(log), self.core.seen(log)))
        self.send(reader, Held(log, *span, life), f"holds {log} {span[0]}-{span[1]}")

    def _is_another_log(self, asked: FetchMessage) -> bool:
        """Say whether the log that the asker's list calls so is none of the present list's."""
        genesis = self.genesis
        if asked.number >= genesis.list_number:
            return False
        return asked.log >= genesis.n or genesis.members[asked.log].since > asked.number

    def publish(self, group: VerifiedGroup) -> None:
        """Push a new own group to every peer."""
        self.setting.audience.said(group)
        for peer in self.peers:
            self.send(peer, GroupMessage(self.number, group.raw), group_label(group))

    def _on_heads(self, source: int, raw: bytes) -> None:
        try:
            heads = decode_heads(raw, self.genesis.n)
        except LayoutError:
            self.world.counts["refused-heads"] += 1
            return
        if source >= self.genesis.n:
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
        message = FetchMessage(effect.log, effect.first, self._life, self.genesis.list_number)
        self.send(effect.ask, message, f"fetch {effect.log} from {effect.first}")

    def ask_about_state(self, effect: events.AskCheckpoint | events.AskPart) -> None:
        """Ask a replica for its checkpoint, or a part of the state there."""
        if isinstance(effect, events.AskCheckpoint):
            self.world.counts["checkpoints-asked-for"] += 1
            self.send(effect.ask, AskCheckpoint(self.genesis.list_number), "ask for a checkpoint")
        else:
            self.send(effect.ask, AskPart(effect.slot, effect.want), f"ask for a part {effect.slot}")

    def persist(self, milestone: Milestone, genesis: Genesis | None = None) -> None:
        """Keep a milestone, said under the list of `genesis`, and forget what nobody needs any more."""
        self.kept = keep(self.kept, milestone, genesis or self.genesis)
        self.leases = {slot: (kept, until) for slot, (kept, until) in self.leases.items() if until > self.world.now}
        cuts = [kept.cut(self.genesis) for kept in (self.kept, *(kept for kept, _ in self.leases.values()))]
        for log, upto in enumerate(map(min, zip(*cuts, strict=True))):
            self.library.forget(log, upto - self.setting.retained)

    def reply(self, effect: events.Send) -> None:
        """Send a reply to its client."""
        client = self.setting.clients.get(effect.client)
        if client is not None:
            self.send(client, Reply(effect.reply), "reply")
