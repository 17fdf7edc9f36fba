"""One replica's daemon: events to the core, effects to disk and network.

Events of one turn of the event loop are handed to the core together, so that what they make this replica say is one
group, one transaction and one signature.
"""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import structlog

from replica.application import ApplicationLoadError, load_application
from replica.cluster.home import ReplicaHome
from replica.core.chain import header_under
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
    HeadsReceived,
    Install,
    KnownBroken,
    Lied,
    ListEnded,
    PartReceived,
    PeerHolds,
    Persist,
    Recovered,
    Send,
    Stable,
    Taken,
    ViewEntered,
    ViewOpened,
)
from replica.core.genesis import MIB
from replica.core.heads import decode_heads, encode_heads
from replica.core.layout import U16, LayoutError
from replica.core.machine import ReplicaCore
from replica.core.quorum import primary
from replica.core.snapshot import MilestoneRule, PartWanted, Snapshot
from replica.shell import recovery, status
from replica.shell.accepting import Server
from replica.shell.appraisal import Appraisals
from replica.shell.changes import Recorder, Watches
from replica.shell.detector import Detector
from replica.shell.errands import Errands
from replica.shell.keeper import StateKeeper
from replica.shell.links import LogLink
from replica.shell.lists import MemberLists
from replica.shell.measures import Measures
from replica.shell.opening import payload_seal
from replica.shell.outbox import Outbox, ReleasedGroup, settle_last_group
from replica.shell.readiness import Readiness
from replica.shell.receipts import Receipts
from replica.shell.server import ServerConnection
from replica.shell.store import Store, StoreError
from replica.shell.streams import Streams
from replica.shell.ticking import Ticking, now
from replica.shell.tracing import open_tracing
from replica.shell.trustedlog import TrustedLog, stop_waiting, trouble
from replica.shell.verify import EnvelopeVerifier, GroupVerifier
from replica.wire.messages import CheckpointOffer, GroupMessage, Held, Part
from replica.wire.messages import Heads as HeadsMessage
from replica.wire.tls import client_context, server_context
from trustlog import VerificationError

# Entries read and operations executed in one turn of the loop: some 20 ms, or one batch.
WORK_PER_TURN = 500


class Node:
    """One running replica.

    home: its folder, checked. log: its opened trusted log. stopped: called with the reason when it stops by itself.
    milestones: when the state is made durable, if not as usual; the same in all replicas, or they cannot help each
    other with parts of it. renew: called when its folder leads to another list of members, under which it is made anew.
    has_read: called when it has read a whole state and all logs, at the start or after a transfer; may take a while.
    """

    def __init__(
        self,
        home: ReplicaHome,
        log: TrustedLog,
        stopped: Callable[[str], None],
        milestones: MilestoneRule | None = None,
        renew: Callable[[], None] = lambda: None,
        has_read: Callable[[], None] = lambda: None,
    ) -> None:
        self.home = home
        self.number = home.number
        self.refusals: Counter[str] = Counter()
        self.measures = Measures()
        self.started = time.monotonic()
        self.log = structlog.get_logger().bind(replica=self.number)
        self.trusted_log = log
        self.tracing = open_tracing(self.number, lambda text: self.log.warning("tracing", why=text))
        genesis = home.cluster.genesis
        self._stopped, self._has_read = stopped, has_read
        self._milestones = milestones
        self.verify_envelope: Callable[[Envelope], bool] = EnvelopeVerifier(self.measures.verify_s["envelope"])
        self.verifier = GroupVerifier(genesis)
        self.application = Recorder(load_application(genesis.application))
        self.watches = Watches(self.application, lambda who, prefix: self.core.executor.may_watch(who.client, prefix))
        durable = home.settings.durability == "disk"
        mine = (home.cluster.cluster_id, self.number)
        self.seal = payload_seal(home, log)
        state = recovery.open_state(home.state_path, *mine, durable=durable, log=self.log, seal=self.seal)
        loaded = recovery.load_snapshot(state, home.cluster, self.application, self.verifier, self.log)
        recovery.make_shrinkable(state, self.log)
        self.core = self._make_core(loaded)
        read = partial(header_under, genesis=genesis, before=home.cluster.before)
        self.keeper = StateKeeper(state, read, self._on_forgettable, self._on_state_failed)
        self.keeper.begin(self.core.executed, self.core.cut)
        self.store = recovery.open_store(home.store_path, *mine, durable=durable, log=self.log, seal=self.seal)
        recovery.drop_former_logs(self.store, genesis, self.verifier, self.number)
        self._serving_store = Store(home.store_path, *mine, durable=durable, seal=self.seal)
        self._stored = [0] * genesis.n  # up to where each log is on disk without a gap, or on its way
        self._beyond: dict[tuple[int, int], int] = {}  # by log and first: groups on disk beyond a gap, and their ends
        self._to_install: Snapshot | None = None
        self.outbox = Outbox(
            self.number,
            log,
            self.store,
            self.verifier.context(self.number),
            self._on_released,
            self._on_failed,
            home.settings.retain_mib * MIB,
            self.measures,
        )
        serving = (self._serving_store, self._received, self._seen, self._on_serving_failed)
        self.streams = Streams(self.number, genesis.n, *serving)
        self.appraisals = Appraisals(self)
        certificate, key, passphrase = home.tls_identities[0]
        members = [place.certificate_der for place in home.cluster.replicas]
        tls = server_context(certificate, key, members, passphrase)
        self.server = Server(self, home.cluster, tls, lambda server: ServerConnection(self, server))
        self.links = {
            place.number: LogLink(
                self, place, [client_context(place.certificate_der, *identity) for identity in home.tls_identities]
            )
            for place in home.cluster.replicas
            if place.number != self.number
        }
        self.detector = Detector(self)
        self.readiness = Readiness(self)
        self.receipts = Receipts(self)
        self.lists = MemberLists(self, renew)
        self._events: list[Event] = []
        self._drains = False  # once in the next turn of the loop, and not more often
        self.ticking = Ticking(self._on_tick, self._keep_house, early=lambda: self.post(now()))
        self._held_back = False
        self._closing = False
        self._effects: dict[type, Callable[[Any], None]] = {
            Append: lambda effect: self.outbox.append(effect.payloads),
            Taken: self._on_taken,
            Persist: lambda effect: self.keeper.persist(effect.milestone),
            Install: self._install,
            Executed: self._on_executed,
            ListEnded: lambda _: self.lists.look(),
            Stable: lambda effect: self.log.debug("checkpoint stable", slot=effect.slot),
            ViewEntered: self._on_view_entered,
            ViewOpened: lambda effect: self.log.info("view open", view=effect.view, base=effect.base, top=effect.top),
            Exposed: self.detector.on_exposed,
            Lied: self.detector.on_lie,
            Forked: self.detector.on_forked,
            Halt: lambda effect: self.stop(effect.reason),
            **self.receipts.effects,
            **Errands(self).effects,
        }

    # Life

    def start(self) -> None:
        """Recover what the disk holds, listen, and dial the peers.

        StoreError, OSError if that cannot be done; ApplicationLoadError if the application's code is too old for it.
        """
        begun_at = self.core.received(self.number)
        self._replay(self.store)
        if self.core.executor.outdated is not None:
            raise ApplicationLoadError(self.core.executor.outdated)
        if self.core.halted is not None:
            raise StoreError(f"{self.store.path}: {self.core.halted}")
        recovery.name_what_is_missing(self.core, begun_at, self.trusted_log, self.store, self.log)
        self._has_read()
        host, port = self.home.listen_address
        self.server.start(host, port)
        for link in self.links.values():
            link.start()
        self.ticking.start()
        self.lists.look()
        self.log.info(
            "listening",
            address=self.home.place.address,
            view=self.core.view_read,
            executed=self.core.executed,
            log_last=self.trusted_log.last,
        )

    async def close(self) -> None:
        """Stop: finish what is being said, store what was received, hang up."""
        self._closing = True
        self.ticking.close()
        await self.server.close()
        await asyncio.gather(*(link.close() for link in self.links.values()))
        await self.streams.close()
        stop_waiting(self.trusted_log)
        self.appraisals.close()
        try:
            await self.outbox.close()
        except (OSError, sqlite3.Error) as error:
            # Nothing that was said is lost: peers have their groups, and the trusted log issues the own last one again.
            self.log.error("cannot store what was received last", error=str(error))  # noqa: TRY400 - no traceback
        finally:
            await self.keeper.close()
            self.detector.keeper.close()
            self.store.close()
            self._serving_store.close()
            self.tracing.close()

    def stop(self, reason: str) -> None:
        """Say nothing more, and have the daemon end: something is wrong with this replica itself."""
        if self._closing:
            self.log.error("trouble while stopping", reason=reason)
            return
        self._closing = True
        self.log.critical("stopping", reason=reason)
        self._stopped(reason)

    def _make_core(self, snapshot: Snapshot | None) -> ReplicaCore:
        genesis, heads = self.home.cluster.genesis, self.verifier.initial_heads()
        self.watches.begin(0 if snapshot is None else snapshot.header.slot)
        fixed = (genesis, self.number, self.application, heads, self.verify_envelope)
        return ReplicaCore(*fixed, snapshot=snapshot, milestones=self._milestones)

    def _replay(self, store: Store) -> None:
        """Read all logs again as the store holds them, in step, each as far as its causes allow."""
        settle_last_group(self.number, self.trusted_log, store)
        replay = recovery.Replay(self.core, store, self.verifier, self.log)
        self._stored, self._beyond = replay.stored, replay.beyond
        for effects in replay.run():
            self._carry_out(effects)
        self.core.work_max = WORK_PER_TURN
        broken = map(KnownBroken, self.detector.keeper.broken)
        self._carry_out(self.core.handle(*broken, Recovered(self.trusted_log.last, self.trusted_log.head)))

    def _install(self, effect: Install) -> None:
        """Make a transferred state durable, then begin anew with it."""
        fetched = effect.fetched
        keys = fetched.application.count()
        self.log.warning("state transferred", slot=fetched.header.slot, keys=keys, **asdict(fetched.moved))
        self.keeper.install(fetched, self.lists.snapshot, self._ready_to_install)

    def _ready_to_install(self, snapshot: Snapshot) -> None:
        self._to_install = snapshot
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Go on from a transferred state, once nothing is being appended."""
        snapshot = self._to_install
        if snapshot is None or self._closing or self.core.is_appending or self.outbox.is_busy:
            return
        if trouble(self.trusted_log) is not None:
            return  # its end is asked for below, and an answer may take long
        self._to_install = None
        self.refusals += self.core.refusals
        self.core = self._make_core(snapshot)
        self._carry_out(self.core.handle(now()))  # what it then knows must not seem to be known for ever
        try:
            mine = (self.home.cluster.cluster_id, self.number)
            with closing(Store(self.store.path, *mine, seal=self.seal)) as store:
                self._replay(store)
        except Exception as error:
            self.log.exception("cannot go on from the transferred state")
            self.stop(f"cannot go on from the transferred state: {type(error).__name__}: {error}")
            return
        self._has_read()
        self.log.info("state installed", slot=snapshot.header.slot, executed=self.core.executed)
        for link in self.links.values():
            link.subscribe()

    # Events

    def post(self, event: Event) -> None:
        """Hand an event to the core with all others of this turn of the loop."""
        self._events.append(event)
        self._drain_soon()

    def _drain_soon(self) -> None:
        if not self._drains:
            self._drains = True
            asyncio.get_running_loop().call_soon(self._drain)

    def on_group(self, message: GroupMessage, sender: int) -> None:
        """Verify a group that `sender` served, of its own or of another log, and hand it to the core."""
        log = message.log
        if log in self.core.exposed:
            return
        try:
            with self.measures.verify_s["group"].timed():
                group = self.verifier.verify(log, message.group)
        except (LayoutError, VerificationError) as error:
            reason = error.reason if isinstance(error, VerificationError) else "malformed"
            self.refusals[f"group-{reason}"] += 1
            self.log.warning("group refused", log=log, sender=sender, reason=reason, text=str(error))
            return
        if log == self.number and self.core.is_live and group.last <= self.trusted_log.last:
            # Only what this log never said, as far as is known here, would be news.
            self.refusals["group-own-log"] += 1
            return
        self.post(GroupReceived(group))

    def on_answer(self, message: Held | CheckpointOffer | Part, sender: int) -> None:
        """Hand the core what `sender` answers to a question."""
        genesis = self.home.cluster.genesis
        try:
            if isinstance(message, Held):
                if message.log < genesis.n:
                    self.post(PeerHolds(sender, message.log, message.first, message.last))
            elif isinstance(message, CheckpointOffer):
                self.lists.on_offer(message, sender)
            else:
                wanted = PartWanted.decode(message.source, message.number, message.want)
                self.post(PartReceived(sender, message.slot, wanted, message.data if message.has else None))
        except LayoutError as error:
            self.refusals["state-refused"] += 1
            self.log.warning("answer refused", sender=sender, kind=type(message).__name__, text=str(error))

    def on_subscribe(self, reader: int, first: int) -> None:
        """Take in where a peer wants to read on: if that is beyond the own end, it holds more than there is here."""
        if first > self.trusted_log.last + 1:
            self.post(PeerHolds(reader, self.number, 1, first - 1))

    def on_heads(self, peer: int, message: HeadsMessage) -> None:
        """Have the core compare what a peer holds; a LayoutError ends its connection."""
        genesis = self.home.cluster.genesis
        if genesis.operators and message.heads[:2] != U16.pack(genesis.n):
            self.refusals["heads-of-another-list"] += 1  # it has not gone over yet, or this replica has not
            return
        heads = decode_heads(message.heads, genesis.n)
        self.readiness.heard(peer, heads)
        self.post(HeadsReceived(peer, heads))

    def _received(self, number: int) -> int:
        return self.core.received(number)  # of the core that there is now

    def _seen(self, number: int) -> int:
        return self.core.seen(number)

    def _on_taken(self, effect: Taken) -> None:
        group = effect.group
        self.tracing.heard(group.payloads)
        if group.last <= self._stored[group.author]:
            return
        self._stored[group.author] = group.last
        self.streams.heard(group)
        if self._beyond.pop((group.author, group.first), None) == group.last:
            return  # it has been on disk all the time
        self.outbox.received(group)
        if self.outbox.is_full and not self._held_back:
            self._hold_back(pause=True)

    def _on_forgettable(self, cut: Sequence[int]) -> None:
        self.log.info("logs not needed any more", persisted=self.keeper.slot, cut=list(cut))
        self.outbox.forget(cut)
        self.lists.look()

    def _on_executed(self, effect: Executed) -> None:
        self.watches.executed(effect.slot)
        if self.core.is_live:  # what is read again after a restart was measured before
            self.measures.executed(effect.batch)
            self.tracing.executed(effect.slot, effect.batch)

    def _on_view_entered(self, effect: ViewEntered) -> None:
        self.measures.view_changes += self.core.is_live
        leader = primary(effect.view, self.home.cluster.genesis.n)
        # What is read again after a restart happened before it.
        say = self.log.warning if self.core.is_live else self.log.info
        say("entering view", view=effect.view, primary=leader)

    def _hold_back(self, *, pause: bool) -> None:
        """Read no further from peers while the disk is behind, or go on."""
        self._held_back = pause
        self.refusals["disk-behind"] += pause
        for link in self.links.values():
            link.hold_back(pause=pause)

    def _drain(self) -> None:
        self._drains = False
        events, self._events = self._events, []
        if self._closing:
            return
        try:
            self._carry_out(self.core.handle(*events))
        except Exception as error:
            # The core may have changed by half, and what it wanted done is lost: nothing more may be said.
            self.log.exception("internal error")
            self.stop(f"internal error: {type(error).__name__}: {error}; please report it with what was logged before")
        self.ticking.hurry(wanted=self.core.holds_back and not self._closing)
        if self._to_install is not None:
            self._begin_anew()
        if self.core.has_more:
            self._drain_soon()
        elif self.core.ends is not None:
            self.lists.look()

    def _on_tick(self) -> None:
        self.post(now())
        if self._held_back and not self.outbox.is_full:
            self._hold_back(pause=False)

    def _keep_house(self) -> None:
        self.server.drop_idle(asyncio.get_running_loop().time())
        self.keeper.tidy()
        self.detector.tick()
        heads = HeadsMessage(encode_heads(self.core.heads()))
        for link in self.links.values():
            link.ping()
            link.send(heads)

    def _on_released(self, released: ReleasedGroup) -> None:
        self.tracing.said(released.group.payloads)
        self.post(Appended(released.group))
        self.streams.publish(released)

    def _on_failed(self, error: BaseException) -> None:
        self.stop(f"cannot make its log durable: {type(error).__name__}: {error}. Nothing more is signed; see the disk")

    def _on_state_failed(self, error: BaseException) -> None:
        self.stop(
            f"cannot make its state durable: {type(error).__name__}: {error}. Nothing more is signed; see the disk"
        )

    def _on_serving_failed(self, error: BaseException) -> None:
        self.stop(f"cannot read its store to serve others: {type(error).__name__}: {error}; see {self.store.path}")

    # Effects

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._effects[type(effect)](effect)

    def reply(self, effect: Send) -> None:
        """Send a reply that the core need not be asked for."""
        self._effects[Send](effect)

    def has_beyond_gap(self, log: int, first: int) -> bool:
        """Say whether the store holds a group of a log behind a gap, which begins at `first`."""
        return (log, first) in self._beyond

    @property
    def is_closing(self) -> bool:
        """Say whether it is about to stop."""
        return self._closing

    def is_allowed(self, key: bytes) -> bool:
        """Say whether this key may be a client's, as far as was executed here."""
        return self.core.executor.clients.is_allowed(key)

    @property
    def progress(self) -> tuple[int, int]:
        """The highest slot executed, and the view."""
        return self.core.executed, self.core.view

    @property
    def why_mute(self) -> str | None:
        """Why this replica says nothing now; None if it may speak."""
        return trouble(self.trusted_log) or self.core.why_mute

    def status_json(self) -> bytes:
        """Return what this replica says of itself."""
        return status.report(self)
