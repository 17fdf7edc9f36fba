"""A correct replica: the real core, and a shell that carries out its effects in virtual time.

The shell does what the daemon's does. Groups are verified before the core sees them; envelopes too. Append is answered
after a while by Appended, and only then does anybody hear of the group. The own log is pushed to every peer; what gets
lost on the way comes when the peer subscribes again, from where it stands, which it does every so often. Whoever holds
a log serves it to whoever fetches it.

A correct replica may crash and come back. It then has what was durable: everything that was handed to its core before
the last Append (a replica makes an entry's causes durable before the entry), its own entries, the last group included
if the trusted part took it. What arrived later may be lost.
"""

import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from replica.application import Context
from replica.apps.kv import KeyValue
from replica.core import events
from replica.core.batch import NULL_BATCH
from replica.core.carry import Carry
from replica.core.events import Event, VerifiedGroup
from replica.core.layout import LayoutError
from replica.core.machine import ReplicaCore
from replica.core.patience import Patience
from replica.sim.logs import Log
from replica.sim.messages import AskReport, Connected, FetchMessage, GroupMessage, Reply, Report, Request, Subscribe
from replica.sim.setting import WALL_MS, Setting
from replica.sim.words import effect_in_words, group_label

TICK_MS = 50
SUBSCRIBE_MS = 400
SERVED_GROUPS_MAX = 24
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

    def _open_view(self, log: int, view: int, carried: Carry) -> None:
        super()._open_view(log, view, carried)
        if not carried.votes:
            self.carries["carried-none"] += 1
        for _, digest in carried.votes:
            self.carries["carried-null" if digest == NULL_BATCH.digest else "carried-vote"] += 1

    def sizes(self) -> dict[str, int]:
        """Return the size of everything that grows."""
        return {
            "slots": len(self._known.slots),
            "requests": len(self._known.requests),
            "unread": max(len(inbox.unread) for inbox in self._inboxes),
            "votes": max(len(state.votes) for state in self._known.states),
            "commits": max(len(state.commits) for state in self._known.states),
            "checkpoints": len(self._checkpoints),
            "own-digests": len(self._known.own_digests),
            "views": max(len(state.view_change_at) for state in self._known.states),
        }

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
        # Per log, what is held without gaps, and what came too early.
        self.held: list[list[VerifiedGroup]] = [[] for _ in range(setting.genesis.n)]
        self._early: list[dict[int, VerifiedGroup]] = [{} for _ in range(setting.genesis.n)]
        self._life = 0
        self._wall_skew = setting.world.random.randint(-WALL_SKEW_MS_MAX, WALL_SKEW_MS_MAX)
        setting.network.nodes[number] = self
        self.core = self._make_core()
        self.core.carries = self.world.counts

    # What differs between correct and faulty replicas.

    def _make_core(self) -> WatchedCore:
        raise NotImplementedError

    def carry_out(self, effect: events.Effect) -> None:
        """Do what the core asks for."""
        raise NotImplementedError

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
        """Ask every peer for what follows in its log."""
        for peer in self.peers:
            first = self.core.received(peer) + 1
            self.send(peer, Subscribe(first), f"subscribe {first}")

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
            self.serve(source, self.number, message.first)
        elif isinstance(message, FetchMessage):
            self.serve(source, message.log, message.first)
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
        self.keep(group)
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

    # Logs.

    def keep(self, group: VerifiedGroup) -> None:
        """Keep a group for those who fetch it."""
        held, early = self.held[group.author], self._early[group.author]
        early[group.first] = group
        following = held[-1].last + 1 if held else 1
        while (found := early.pop(following, None)) is not None:
            held.append(found)
            following = found.last + 1
        for first in [first for first in early if first < following]:
            del early[first]

    def serve(self, reader: int, log: int, first: int) -> None:
        """Send what is held of a log from `first` on."""
        if not 0 <= log < len(self.held):
            return
        held = self.held[log]
        at = bisect_left(held, first, key=lambda group: group.last)
        for group in held[at : at + SERVED_GROUPS_MAX]:
            self.send(reader, GroupMessage(log, group.raw), group_label(group))

    def publish(self, group: VerifiedGroup) -> None:
        """Push a new own group to every peer."""
        for peer in self.peers:
            self.send(peer, GroupMessage(self.number, group.raw), group_label(group))

    # The core.

    def handle(self, event: Event) -> None:
        """Hand an event to the core and carry out what it asks for."""
        for effect in self.core.handle(event):
            if self.world.is_traced and (said := effect_in_words(effect)):
                self.world.remark(f"replica {self.number}: {said}")
            self.carry_out(effect)

    def relay(self, effect: events.Relay) -> None:
        """Hand a request to the primary."""
        self.send(effect.to, Request(effect.envelope.raw), "relay")

    def fetch(self, effect: events.Fetch) -> None:
        """Ask a replica for part of a log."""
        self.world.counts["fetches"] += 1
        self.send(effect.ask, FetchMessage(effect.log, effect.first), f"fetch {effect.log} from {effect.first}")

    def reply(self, effect: events.Send) -> None:
        """Send a reply to its client."""
        client = self.setting.clients.get(effect.client)
        if client is not None:
            self.send(client, Reply(effect.reply), "reply")


class CorrectReplica(Host):
    """A replica that does what it should, and may crash and come back."""

    def __init__(self, setting: Setting, number: int, log: Log) -> None:
        self._journal: list[VerifiedGroup] = []
        self._durable = 0
        self._appending: tuple[bytes, ...] | None = None
        super().__init__(setting, number, log)
        self.handle(events.Recovered())

    def _make_core(self) -> WatchedCore:
        setting, witness, number = self.setting, self.setting.witness, self.number
        witness.born(number)
        return WatchedCore(
            setting.genesis,
            number,
            WatchedKeyValue(lambda slot, client, operation: witness.applied(number, slot, client, operation)),
            setting.verifier.heads(),
            setting.verifier.envelope,
            Patience(setting.patience_ms),
        )

    def handle(self, event: Event) -> None:
        """See `Host`; an exception of the core is a violation, not the end of the simulator."""
        if self.is_down:
            return
        if isinstance(event, events.GroupReceived) and event.group.author != self.number:
            self._journal.append(event.group)
        try:
            super().handle(event)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be reported with its seed
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} in {where.name}, line {where.lineno} of {where.filename}"
            self.setting.witness.violation("exception", f"replica {self.number}: {text}")
            self.is_down = True
            return
        self.setting.witness.look_at(self.number, self.core)

    def carry_out(self, effect: events.Effect) -> None:
        """See `Host`."""
        witness, number = self.setting.witness, self.number
        if isinstance(effect, events.Append):
            self._append(effect)
        elif isinstance(effect, events.Send):
            self.reply(effect)
        elif isinstance(effect, events.Relay):
            self.relay(effect)
        elif isinstance(effect, events.Fetch):
            self.fetch(effect)
        elif isinstance(effect, events.Executed):
            witness.executed(number, effect.slot, effect.batch.raw)
        else:
            witness.heard(number, effect)

    def _append(self, effect: events.Append) -> None:
        life = self._life
        self._durable = len(self._journal)
        self._appending = effect.payloads

        def appended() -> None:
            if self._life == life and not self.is_down:
                self._release(effect.payloads)

        self.world.after(self.world.random.randint(0, self.setting.append_ms_max), appended)

    def _release(self, payloads: tuple[bytes, ...]) -> None:
        group = self._attest(payloads)
        self.world.note(f"{self.number} appended {group_label(group)}")
        self.publish(group)
        self.handle(events.Appended(group))

    def _attest(self, payloads: tuple[bytes, ...]) -> VerifiedGroup:
        group = self.setting.verifier.group(self.number, self.log.append(payloads))
        if group is None:
            raise RuntimeError("the simulated log attested what does not verify")
        self._appending = None
        self.setting.witness.saw_group(group)
        self.keep(group)
        return group

    # Crashes.

    def crash(self) -> None:
        """Stop at once."""
        if not self.is_down:
            self.is_down = True
            self._life += 1
            self.world.counts["crashes"] += 1
            self.world.note(f"{self.number} crashes")

    def restart(self) -> None:
        """Come back with what was durable."""
        if not self.is_down:
            return
        chance = self.world.random
        self.is_down = False
        self.world.note(f"{self.number} restarts")
        if self._appending is not None and chance.random() < 0.5:
            # The trusted part took the group before the crash; its one statement is issued again.
            self._attest(self._appending)
        self._appending = None
        kept = self._journal[: chance.randint(self._durable, len(self._journal))]
        own = self.held[self.number]
        self.held = [[] for _ in self.held]
        self._early = [{} for _ in self._early]
        self._journal = []
        self.core = self._make_core()
        self.core.carries = self.world.counts
        self.handle(events.Tick(self.world.now, WALL_MS + self.world.now))
        for group in (*own, *kept):
            self.keep(group)
            self.handle(events.GroupReceived(group))
        self._durable = len(self._journal)
        self.handle(events.Recovered())
        self.start()
