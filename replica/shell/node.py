"""One replica's daemon: events to the core, effects to disk and network.

Events of one turn of the event loop are handed to the core together, so that what they make this replica say is one
group, one transaction and one signature.
"""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog

from replica.application import load_application
from replica.cluster.home import ReplicaHome
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
    Recovered,
    Refuse,
    Relay,
    Send,
    Stable,
    Tick,
    VerifiedGroup,
    ViewEntered,
    ViewOpened,
)
from replica.core.layout import LayoutError
from replica.core.machine import ReplicaCore
from replica.shell import status
from replica.shell.links import Link
from replica.shell.outbox import Outbox, ReleasedGroup, settle_last_group
from replica.shell.server import Server, ServerConnection
from replica.shell.store import RESTORE, Store, StoredGroup, StoreError
from replica.shell.streams import Streams
from replica.shell.verify import EnvelopeVerifier, GroupVerifier
from replica.wire.messages import Fetch as FetchMessage
from replica.wire.messages import GroupMessage, Notice, Reply, Request, encode_frame
from replica.wire.tls import client_context, server_context
from trustlog import AttestedLog, VerificationError

TICK_S = 0.05
HOUSEKEEPING_TICKS = 40
# Unread entries of one log that recovery lets pile up before it turns to another log.
RECOVERY_UNREAD_MAX = 256


class Node:
    """One running replica.

    home: its folder, checked. log: its opened trusted log. stopped: called with the reason when it stops by itself.
    """

    def __init__(self, home: ReplicaHome, log: AttestedLog, stopped: Callable[[str], None]) -> None:
        self.home = home
        self.number = home.number
        self.refusals: Counter[str] = Counter()
        self.started = time.monotonic()
        self.log = structlog.get_logger().bind(replica=self.number)
        self.trusted_log = log
        genesis = home.cluster.genesis
        self._stopped = stopped
        self.verify_envelope: Callable[[Envelope], bool] = EnvelopeVerifier()
        self.verifier = GroupVerifier(genesis)
        self.core = ReplicaCore(
            genesis,
            self.number,
            load_application(genesis.application),
            self.verifier.initial_heads(),
            self.verify_envelope,
        )
        durable = home.settings.durability == "disk"
        cluster_id = home.cluster.cluster_id
        self.store = Store(home.store_path, cluster_id, self.number, durable=durable)
        self._serving_store = Store(home.store_path, cluster_id, self.number, durable=durable)
        self.outbox = Outbox(self.number, log, self.store, self.verifier.context, self._on_released, self._on_failed)
        self.streams = Streams(
            self.number,
            genesis.n,
            self._serving_store,
            lambda: self.core.received(self.number),
            self._on_serving_failed,
        )
        certificates = [place.certificate_der for place in home.cluster.replicas]
        self.server = Server(self, home.cluster, server_context(home.certificate_path, home.key_path, certificates))
        self.links = {
            place.number: Link(self, place, client_context(place.certificate_der, home.certificate_path, home.key_path))
            for place in home.cluster.replicas
            if place.number != self.number
        }
        self._events: list[Event] = []
        self._ticks = 0
        self._held_back = False
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._effects: dict[type, Callable[[Any], None]] = {
            Append: lambda effect: self.outbox.append(effect.payloads),
            Send: self._send_reply,
            Relay: self._relay,
            Fetch: self._fetch,
            Refuse: self._refuse,
            Executed: lambda _: None,
            Stable: lambda effect: self.log.debug("checkpoint stable", slot=effect.slot),
            ViewEntered: lambda effect: self.log.warning("entering view", view=effect.view, primary=self.core.primary),
            ViewOpened: lambda effect: self.log.info("view open", view=effect.view, base=effect.base, top=effect.top),
            Exposed: self._on_exposed,
            Lied: self._on_lie,
            Forked: self._on_forked,
            Halt: lambda effect: self.stop(effect.reason),
        }

    # Life

    def start(self) -> None:
        """Recover what the store holds, listen, and dial the peers. StoreError, OSError if that cannot be done."""
        self._recover()
        host, port = self.home.listen_address
        self.server.start(host, port)
        for link in self.links.values():
            link.start()
        self._tick()
        self.log.info(
            "listening",
            address=self.home.place.address,
            view=self.core.view,
            executed=self.core.executed,
            log_last=self.trusted_log.last,
        )

    async def close(self) -> None:
        """Stop: finish what is being said, store what was received, hang up."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        await self.server.close()
        await asyncio.gather(*(link.close() for link in self.links.values()))
        await self.streams.close()
        try:
            await self.outbox.close()
        except (OSError, sqlite3.Error) as error:
            # Nothing that was said is lost: peers have their groups, and the trusted log issues the own last one again.
            self.log.error("cannot store what was received last", error=str(error))  # noqa: TRY400 - no traceback
        finally:
            self.store.close()
            self._serving_store.close()

    def stop(self, reason: str) -> None:
        """Say nothing more, and have the daemon end: something is wrong with this replica itself."""
        if self._closing:
            self.log.error("trouble while stopping", reason=reason)
            return
        self._closing = True
        self.log.critical("stopping", reason=reason)
        self._stopped(reason)

    def _recover(self) -> None:
        """Read all logs again as the store holds them, in step, each as far as its causes allow."""
        settle_last_group(self.number, self.trusted_log, self.store)
        logs = range(len(self.links) + 1)
        rows = {log: self.store.groups(log) for log in logs}
        held: dict[int, StoredGroup | None] = {log: next(rows[log], None) for log in logs}
        moved = True
        while moved and self.core.halted is None:
            moved = False
            for log in logs:
                while (row := held[log]) is not None and self.core.unread(log) < RECOVERY_UNREAD_MAX:
                    self._carry_out(self.core.handle(GroupReceived(self._verify_stored(row))))
                    held[log] = next(rows[log], None)
                    moved = True
        own = self.trusted_log
        # Compared before Recovered: what the core says at once is appended by another thread from then on.
        ends_alike = (own.last, own.head) == (self.core.received(self.number), self.core.head(self.number))
        effects = self.core.handle(Recovered())
        if self.core.halted is not None:
            raise StoreError(f"{self.store.path}: {self.core.halted}")
        if not ends_alike:
            raise StoreError(
                f"{self.store.path}: the own log read from it ends at {self.core.received(self.number)}, the trusted "
                f"log at {own.last} or with another head; restore the right store"
            )
        self._carry_out(effects)

    def _verify_stored(self, row: StoredGroup) -> VerifiedGroup:
        try:
            return self.verifier.verify(row.log, row.raw)
        except (LayoutError, VerificationError) as error:
            raise StoreError(
                f"{self.store.path}: the group {row.first} to {row.last} of log {row.log} is damaged ({error}); "
                f"{RESTORE}"
            ) from error

    # Events

    def post(self, event: Event) -> None:
        """Hand an event to the core with all others of this turn of the loop."""
        if not self._events:
            asyncio.get_running_loop().call_soon(self._drain)
        self._events.append(event)

    def on_group(self, message: GroupMessage, sender: int) -> None:
        """Verify a group that `sender` served, of its own or of another log, and hand it to the core."""
        log = message.log
        if log == self.number:
            self.refusals["group-own-log"] += 1
            return
        if log in self.core.exposed:
            return
        try:
            group = self.verifier.verify(log, message.group)
        except (LayoutError, VerificationError) as error:
            reason = error.reason if isinstance(error, VerificationError) else "malformed"
            self.refusals[f"group-{reason}"] += 1
            self.log.warning("group refused", log=log, sender=sender, reason=reason, text=str(error))
            return
        if group.last > self.core.received(log):
            self.outbox.received(group)
            self.streams.heard(group)
            if self.outbox.is_full and not self._held_back:
                self._hold_back(pause=True)
        self.post(GroupReceived(group))

    def _hold_back(self, *, pause: bool) -> None:
        """Read no further from peers while the disk is behind, or go on."""
        self._held_back = pause
        self.refusals["disk-behind"] += pause
        for link in self.links.values():
            link.hold_back(pause=pause)

    def _drain(self) -> None:
        events, self._events = self._events, []
        if self._closing:
            return
        try:
            self._carry_out(self.core.handle(*events))
        except Exception as error:
            # The core may have changed by half, and what it wanted done is lost: nothing more may be said.
            self.log.exception("internal error")
            self.stop(f"internal error: {type(error).__name__}: {error}; please report it with what was logged before")

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TICK_S, self._tick)
        self.post(Tick(int(loop.time() * 1000), int(time.time() * 1000)))
        self._ticks += 1
        if self._held_back and not self.outbox.is_full:
            self._hold_back(pause=False)
        if self._ticks % HOUSEKEEPING_TICKS == 0:
            self.server.drop_idle(loop.time())
            for link in self.links.values():
                link.ping()

    def _on_released(self, released: ReleasedGroup) -> None:
        self.post(Appended(released.group))
        self.streams.publish(released)

    def _on_failed(self, error: BaseException) -> None:
        self.stop(f"cannot make its log durable: {type(error).__name__}: {error}. Nothing more is signed; see the disk")

    def _on_serving_failed(self, error: BaseException) -> None:
        self.stop(f"cannot read its store to serve others: {type(error).__name__}: {error}; see {self.store.path}")

    # Effects

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._effects[type(effect)](effect)

    def _send_reply(self, effect: Send) -> None:
        connections = self.server.clients.get(effect.client)
        if not connections:
            return
        message = Reply(effect.reply)
        try:
            frame = encode_frame(message)
        except ValueError:
            self.refusals["reply-too-large"] += 1
            return
        for connection in connections:
            # One that does not read gets no more: its client asks again when it does, and the result is kept.
            if connection.writable:
                connection.send_frame(frame)
            else:
                self.refusals["reply-not-read"] += 1

    def _relay(self, effect: Relay) -> None:
        self.links[effect.to].send(Request(effect.envelope.raw))

    def _fetch(self, effect: Fetch) -> None:
        self.links[effect.ask].send(FetchMessage(effect.log, effect.first))

    def _refuse(self, effect: Refuse) -> None:
        if isinstance(effect.source, ServerConnection) and effect.source.is_open:
            effect.source.send(Notice(effect.code, effect.text))

    def _on_exposed(self, effect: Exposed) -> None:
        self.log.error(
            "replica exposed: its log breaks a rule and is read no further",
            log=effect.log,
            index=effect.index,
            rule=effect.violation.rule,
            text=effect.violation.text,
        )

    def _on_lie(self, effect: Lied) -> None:
        self.refusals["lie"] += 1
        self.log.warning("replica lied; not counted", log=effect.log, index=effect.index, text=effect.text)

    def _on_forked(self, effect: Forked) -> None:
        self.log.critical(
            "trusted log broken: two attestations contradict each other; the log is read no further",
            log=effect.log,
            index=effect.index,
        )

    def status_json(self) -> bytes:
        """Return what this replica says of itself."""
        return status.report(self)
