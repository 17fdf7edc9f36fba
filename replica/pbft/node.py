"""A replica of a PBFT cluster: the machine, the product's connections, queue and execution around it.

It keeps nothing on disk. What it said above the last stable checkpoint, and a little below, it says again to a peer
that connects anew; who misses more stays behind.
"""

import asyncio
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from replica.application import load_application
from replica.cluster.home import ReplicaHome
from replica.cluster.keys import ClientKey
from replica.cluster.pbft import pbft_replica_count
from replica.core.batch import NULL_BATCH
from replica.core.envelope import Envelope
from replica.core.execution import Executor
from replica.core.genesis import MIB
from replica.core.layout import LayoutError
from replica.core.requests import QueueFullError
from replica.pbft.connections import PbftConnection, PeerLink
from replica.pbft.layout import Codec, Signatures
from replica.pbft.machine import HISTORY, PbftCore
from replica.pbft.messages import (
    Body,
    Broadcast,
    Cluster,
    Diverged,
    Effect,
    Entered,
    Executed,
    NewView,
    Opened,
    Stable,
    StateWanted,
    Tell,
    ViewChange,
)
from replica.pbft.pending import Batches, BatchProposal
from replica.shell.accepting import Server
from replica.shell.links import Link
from replica.shell.verify import EnvelopeVerifier
from replica.wire.messages import Notice, PbftParcel, Reply, Request, encode_frame
from replica.wire.tls import client_context, server_context
from trustlog import __version__

TICK_S: Final = 0.05
HOUSEKEEPING_TICKS: Final = 40
PATIENCE_MS: Final = 1000
# Slots that a primary proposes before the first of them is decided; what waits meanwhile makes larger batches.
PIPELINE: Final = 4
# What is kept of the own messages for peers that connect anew.
SPOKEN_BYTES_MAX: Final = 16 * MIB
RELAY_PAUSE_MS_MAX: Final = 5000
PROTECTS: Final = "no trusted log: PBFT with 3f+1 replicas in memory, a baseline for measuring and teaching"


@dataclass(frozen=True, slots=True)
class _Spoken:
    """A message that this replica sent to all. slot: whose it is, None for a view change's."""

    kind: type[Body]
    slot: int | None
    frame: bytes


class PbftNode:
    """One running replica. stopped: called with the reason when it stops by itself."""

    def __init__(self, home: ReplicaHome, stopped: Callable[[str], None]) -> None:
        self.home, self.number = home, home.number
        self.refusals: Counter[str] = Counter()
        self.started = time.monotonic()
        self.log = structlog.get_logger().bind(replica=self.number)
        genesis = home.cluster.genesis
        self.verify_envelope: Callable[[Envelope], bool] = EnvelopeVerifier()
        self.codec = Codec(genesis, self.verify_envelope)
        self.signatures = Signatures(genesis, self.codec, ClientKey.from_private(home.load_signing_key()))
        self.executor = Executor(load_application(genesis.application), genesis)
        self.pending = Batches(genesis.limits, lambda: int(time.time() * 1000))
        limits = genesis.limits
        quorum = 2 * genesis.f + 1
        voices = (self.signatures.sign, self.signatures.verify)
        paces = (limits.checkpoint_interval, limits.window, PIPELINE)
        cluster = Cluster(pbft_replica_count(genesis.f), genesis.f, quorum, *voices, *paces)
        self.core = PbftCore(cluster, self.number, PATIENCE_MS, self.pending)
        certificates = [place.certificate_der for place in home.cluster.replicas]
        tls = server_context(home.certificate_path, home.key_path, certificates, home.passphrase)
        self.server = Server(self, home.cluster, tls, lambda server: PbftConnection(self, server))
        self.links = {
            place.number: Link(
                self,
                place,
                [client_context(place.certificate_der, *identity) for identity in home.tls_identities],
                lambda link, lost: PeerLink(self, link, lost),
            )
            for place in home.cluster.replicas
            if place.number != self.number
        }
        self._stopped = stopped
        self._spoken: deque[_Spoken] = deque()
        self._spoken_bytes = 0
        self._proposes = False  # once in the next turn of the loop, and not more often
        self._now_ms = 0
        self._ticks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def start(self) -> None:
        """Listen, and dial the peers. OSError if the address cannot be had."""
        self.server.start(*self.home.listen_address)
        for link in self.links.values():
            link.start()
        self._tick()
        self.log.warning(
            "a PBFT baseline, for measuring and teaching: no trusted logs, nothing on disk, never to be started again",
            address=self.home.place.address,
            replicas=self.home.cluster.genesis.n,
        )

    async def close(self) -> None:
        """Stop everything."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(link.close() for link in self.links.values()))
        await self.server.close()

    def is_allowed(self, key: bytes) -> bool:
        """Say whether this key may be a client's, as far as was executed here."""
        return self.executor.clients.is_allowed(key)

    @property
    def progress(self) -> tuple[int, int]:
        """The highest slot executed, and the view."""
        return self.core.executed, self.core.view

    @property
    def primary(self) -> int:
        """The primary of the view that this replica is in."""
        return self.core.cluster.primary(self.core.view)

    # What comes in.

    def on_request(self, envelope: Envelope, source: PbftConnection | None) -> None:
        """Take a request that its client signed; source: the client's connection, None if a replica passed it on."""
        known = self.executor.known_reply(envelope)
        if known is not None:
            self._reply(envelope.client, known)
            return
        if source is None and self.pending.queue.was_executed(envelope, self._now_ms):
            return  # without effect; passed on again and again, it would be ordered as often
        try:
            self.pending.add(envelope, self._now_ms)
        except QueueFullError as full:
            self.refusals["request-queue-full"] += 1
            if source is not None:
                source.send(Notice("busy", str(full)))
            return
        if not self._proposes:
            self._proposes = True
            asyncio.get_running_loop().call_soon(self._propose)

    def on_parcel(self, sender: int, parcel: bytes) -> None:
        """Take what a peer says; one that it did not sign, or that is malformed, is counted and passed over."""
        try:
            message = self.codec.decode(parcel, sender, self.signatures.verify)
        except LayoutError as error:
            self.refusals["parcel-refused"] += 1
            self.log.warning("message refused", sender=sender, text=str(error))
            return
        self._do(lambda: self.core.on_message(message))

    def peer_welcomed(self, connection: PeerLink, peer: int, executed: int) -> None:
        """Tell a peer that connected, and has executed up to there, what it may have missed."""
        self.log.info("connected to peer", peer=peer)
        for spoken in self._spoken:
            if spoken.slot is None or spoken.slot > executed:
                connection.send_frame(spoken.frame)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TICK_S, self._tick)
        self._now_ms = int(loop.time() * 1000)
        self._do(lambda: self.core.on_tick(self._now_ms))
        self._relay()
        self._ticks += 1
        if self._ticks % HOUSEKEEPING_TICKS == 0:
            self.server.drop_idle(loop.time())
            for link in self.links.values():
                link.ping()

    def _propose(self) -> None:
        self._proposes = False
        self._do(self.core.propose)
        self._relay()

    def _relay(self) -> None:
        """Hand what waits to the primary, at first at once, then with growing pauses."""
        if self.primary == self.number:
            return
        for waiting in self.pending.queue:
            if self._now_ms >= waiting.relay_at_ms:
                waiting.relay_at_ms = self._now_ms + waiting.relay_pause_ms
                waiting.relay_pause_ms = min(2 * waiting.relay_pause_ms, RELAY_PAUSE_MS_MAX)
                self.links[self.primary].send(Request(waiting.envelope.raw))

    # What the machine asks for.

    def _do(self, event: Callable[[], list[Effect]]) -> None:
        if self._closing:
            return
        try:
            self._carry_out(event())
        except Exception as error:
            # The machine may have changed by half: nothing more may be said.
            self.log.exception("internal error")
            self._halt(f"internal error: {type(error).__name__}: {error}")

    def _halt(self, why: str) -> None:
        self.log.error("this replica stops", why=why)
        self._closing = True
        self._stopped(why)

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        left = deque(effects)
        while left:
            effect = left.popleft()
            if isinstance(effect, Broadcast):
                self._broadcast(effect)
            elif isinstance(effect, Tell):
                self.links[effect.to].send(PbftParcel(self.codec.encode(effect.message)))
            elif isinstance(effect, Executed):
                self._execute(effect)
            elif isinstance(effect, StateWanted):
                left.extend(self.core.on_state(effect.slot, self.executor.digest()))
            elif isinstance(effect, Stable):
                self._forget(effect.forget)
            elif isinstance(effect, Diverged):
                self._halt(f"2f+1 replicas have another state after slot {effect.slot}: it must not answer any more")
            elif isinstance(effect, Entered):
                self.log.warning("leaving the view", wanted=effect.view)
            elif isinstance(effect, Opened):
                self.log.warning("view is open", view=effect.view, primary=self.primary, carried=len(effect.carried))

    def _broadcast(self, effect: Broadcast) -> None:
        body = effect.message.body
        try:
            frame = encode_frame(PbftParcel(self.codec.encode(effect.message)))
        except ValueError as error:
            self.refusals["message-too-large"] += 1
            self.log.error("cannot be said", text=str(error))  # noqa: TRY400 - no traceback
            return
        if isinstance(body, ViewChange | NewView):
            self._keep_spoken([one for one in self._spoken if one.kind is not type(body)])
        slot = None if isinstance(body, ViewChange | NewView) else body.slot
        self._spoken.append(_Spoken(type(body), slot, frame))
        self._spoken_bytes += len(frame)
        while self._spoken_bytes > SPOKEN_BYTES_MAX:
            self._spoken_bytes -= len(self._spoken.popleft().frame)
        for link in self.links.values():
            if link.is_up and link.connection is not None:
                link.connection.send_frame(frame)

    def _forget(self, slot: int) -> None:
        self._keep_spoken([one for one in self._spoken if one.slot is None or one.slot > slot])

    def _keep_spoken(self, kept: list[_Spoken]) -> None:
        self._spoken = deque(kept)
        self._spoken_bytes = sum(len(one.frame) for one in kept)

    def _execute(self, effect: Executed) -> None:
        batch = effect.request.batch if isinstance(effect.request, BatchProposal) else NULL_BATCH
        for reply in self.executor.execute(effect.slot, batch):
            self._reply(reply.client, reply.raw)
        for client in dict.fromkeys(envelope.client for envelope in batch.envelopes):
            # What this left with nothing to execute is answered and not ordered: nobody may lose patience over it.
            for waiting in list(self.pending.queue.of(client)):
                known = self.executor.known_reply(waiting.envelope)
                if known is not None:
                    self.pending.queue.drop(waiting)
                    self._reply(client, known)

    def _reply(self, client: bytes, raw: bytes) -> None:
        connections = self.server.clients.get(client, ())
        try:
            frame = encode_frame(Reply(raw)) if connections else b""
        except ValueError:
            self.refusals["reply-too-large"] += 1
            return
        for connection in connections:
            # One that does not read gets no more: its client asks again when it does, and the result is kept.
            if connection.writable:
                connection.send_frame(frame)
            else:
                self.refusals["reply-not-read"] += 1

    # What it says of itself.

    def not_ready(self) -> str | None:
        """Return why this replica is of no use to clients, in words; None if it is."""
        needed = 2 * self.home.cluster.genesis.f
        connected = sum(link.is_up for link in self.links.values())
        if self.core.is_behind:
            return (
                f"it executed slot {self.core.executed}, and the others agreed on the state after {self.core.stable}: "
                f"it is told of the last {HISTORY} slots below that; beyond them it stays behind, one of the f faulty"
            )
        return None if connected >= needed else f"connected to {connected} other replicas, {needed} are needed"

    def status_json(self) -> bytes:
        """Return what this replica says of itself, under the names that others use too."""
        cluster, core = self.home.cluster, self.core
        content: dict[str, Any] = {
            "replica": self.number,
            "version": __version__,
            "pid": os.getpid(),
            "wall_ms": int(time.time() * 1000),
            "uptime_s": round(time.monotonic() - self.started, 3),
            "cluster_id": cluster.cluster_id.hex(),
            "cluster_file": cluster.digest.hex(),
            "ordering": cluster.genesis.ordering.label,
            "application": cluster.genesis.application,
            "durability": "memory",
            "view": core.view,
            "primary": self.primary,
            "view_open": core.is_open,
            "executed": core.executed,
            "stable": core.stable,
            "mute": None,
            "halted": None,
            "not_ready": self.not_ready(),
            "operations": self.executor.operations,
            "keys": len(self.executor.state),
            "sessions": len(self.executor.table),
            "log": {"backend": "none", "protects": PROTECTS},
            "peers": [
                {
                    "replica": number,
                    "address": link.place.address,
                    "connected": link.is_up,
                    "trouble": None if link.is_up else link.trouble,
                    "cluster_file": None if link.cluster_file is None else link.cluster_file.hex(),
                }
                for number, link in self.links.items()
            ],
            "clients": self.server.client_count,
            "requests_waiting": len(self.pending.queue),
            "refused": dict(sorted(self.refusals.items())),
        }
        return json.dumps(content).encode()
