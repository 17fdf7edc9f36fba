"""The client's shell: drives the pure core with asyncio, and holds the connections.

One future per operation, one signature and one frame per envelope; no task per operation. What is submitted
in one turn of the loop leaves in one envelope. Where the members change (`client.lists`), connections to those who stay
stand, and what waits goes on among the new ones.
"""

import asyncio
import secrets
from typing import cast

from client.connection import ReplicaLink, Timing
from client.core import ClientCore
from client.errors import ClientError, HeldBack, NotAllowed, NotExecuted, NotOffered, Overloaded, Undecided, Unreachable
from client.events import AskReports, Complete, Effect, Fail, Failure, Send, Settings, WakeAt
from client.lists import ASK_S, MemberLists
from client.queries import Queries, ReplicaStatus, StaleAnswer, StaleRound, number_in, read_report
from client.receipts import Addressed, ReceiptRound
from client.tracing import open_tracing
from client.watch import Watch
from replica.cluster.clusterfile import ClusterFile, ReplicaPlace
from replica.cluster.identities import members_of
from replica.cluster.keys import ClientKey
from replica.cluster.pbft import NO_LOGS
from replica.core.envelope import OPEN_NONCE_SIZE, Result, SessionId
from replica.core.layout import LayoutError
from replica.wire.messages import (
    RECEIPT_VERSION,
    AskReceipt,
    Changes,
    MembersShown,
    Message,
    Notice,
    ReceiptShown,
    Reply,
    Request,
    StaleRead,
    StaleResult,
    StatusQuery,
    StatusReport,
    WatchEnded,
    encode_frame,
)
from trustlog.receipts import Outcome, Receipt

CORE_QUERY = 0  # the query number of reports that the core asked for
STALE_ROUND_S = 0.05
STALE_ROUND_S_MAX = 1.0
CLOSE_S = 0.5

_Outcome = asyncio.Future[Result]


class Driver:
    """A cluster's connections and the core that speaks over them. Use it from one event loop only."""

    def __init__(
        self,
        cluster: ClusterFile,
        key: ClientKey,
        settings: Settings | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.lists = MemberLists(cluster)
        self._key = key
        self._members = members_of(cluster.genesis) if cluster.has_logs else None
        self.core = ClientCore(
            cluster.genesis,
            cluster.cluster_id,
            key.public_key,
            sign=key.sign,
            nonce=lambda: secrets.token_bytes(OPEN_NONCE_SIZE),
            settings=settings,
        )
        self._timing = Timing() if timing is None else timing
        self.tracing = open_tracing(key.public_key, cluster.cluster_id, cluster.genesis.limits)
        self.links = [self._link_to(place) for place in cluster.replicas]
        self.queries = Queries()
        self.n, self.quorum = cluster.genesis.n, cluster.genesis.quorum
        self.watches: dict[Watch, None] = {}
        self.watch_queries: dict[int, Watch] = {}
        self._last_watch_query = 0
        self._addressed: dict[_Outcome, tuple[SessionId, int] | None] = {}  # of whom the address is wanted
        self._tasks: dict[ReplicaLink, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._lists_timer: asyncio.TimerHandle | None = None
        self._flush_scheduled = False
        self._closed = False

    # Life.

    def start(self) -> None:
        """Begin to connect; returns at once."""
        for link in self.links:
            self._keep_up(link)
        if self.cluster.has_logs:
            self._lists_timer = self._loop.call_later(ASK_S, self._ask_for_lists)

    @property
    def cluster(self) -> ClusterFile:
        """The cluster under the last list of members that is known."""
        return self.lists.cluster

    def _link_to(self, place: ReplicaPlace) -> ReplicaLink:
        return ReplicaLink(self.cluster, place, self._key, self, self._timing)

    def _keep_up(self, link: ReplicaLink) -> None:
        task = self._loop.create_task(link.run(), name=f"link to replica {link.place.number}")
        self._tasks[link] = task
        task.add_done_callback(self._link_ended)

    def _link_ended(self, task: asyncio.Task[None]) -> None:
        # A link runs until it is cancelled; that it ends by an exception is a mistake in this program.
        if not task.cancelled() and task.exception() is not None:
            context = {"message": f"{task.get_name()} broke", "exception": task.exception()}
            self._loop.call_exception_handler(context)

    async def close(self) -> None:
        """Give up what waits and end the connections."""
        self._closed = True
        for watch in list(self.watches):
            await watch.close()
        self._perform(self.core.close())
        for timer in (self._timer, self._lists_timer):
            if timer is not None:
                timer.cancel()
        for link in self.links:
            link.close()
        # A connection that is closed politely spares the replica an error; a dead one is not waited for.
        await asyncio.gather(*(link.wait_closed(CLOSE_S) for link in self.links))
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.tracing.close)

    # Operations.

    def submit(self, operation: bytes, deadline_s: float) -> _Outcome:
        """Hand an operation in; the future gets a result that f+1 replicas gave, or a ClientError."""
        if self._closed:
            raise NotExecuted("the client is closed; open a new one")
        outcome: _Outcome = self._loop.create_future()
        deadline_ms = int((self._loop.time() + deadline_s) * 1000)
        refusal = self.core.submit(outcome, operation, deadline_ms)
        if refusal is not None:
            raise self._error(refusal)
        self._flush_soon()
        return outcome

    async def execute(self, operation: bytes, deadline_s: float) -> Addressed:
        """Run an operation and return its result with the session and number that it had."""
        outcome = self.submit(operation, deadline_s)
        self._addressed[outcome] = None
        try:
            result = await outcome
            return Addressed(result, *cast("tuple[SessionId, int]", self._addressed[outcome]))
        finally:
            del self._addressed[outcome]

    def _complete(self, done: Complete) -> None:
        outcomes = cast("list[_Outcome]", done.tickets)
        if self._addressed:
            for outcome, number in zip(outcomes, done.numbers, strict=True):
                if outcome in self._addressed:
                    self._addressed[outcome] = (done.session, number)
        for outcome, result in zip(outcomes, done.results, strict=True):
            if not outcome.done():
                outcome.set_result(result)

    def _flush_soon(self) -> None:
        if not self._flush_scheduled and not self._closed:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if not self._closed:
            self._perform(self.core.flush(self._now_ms()))

    def _tick(self, at_ms: int) -> None:
        self._timer = None
        # The loop's clock may round the time it was asked to wake at.
        self._perform(self.core.tick(max(at_ms, self._now_ms())))

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Complete):
                self.tracing.completed(effect.session, effect.numbers)
                self._complete(effect)
            elif isinstance(effect, Send):
                self.tracing.sent(effect.envelope)
                frame = encode_frame(Request(effect.envelope))
                for replica in effect.replicas:
                    self.links[replica].send_frame(frame)
            elif isinstance(effect, WakeAt):
                self._wake_at(effect.at_ms)
            elif isinstance(effect, Fail):
                for outcome in cast("list[_Outcome]", effect.tickets):
                    if not outcome.done():
                        outcome.set_exception(self._error(effect.reason))
            elif isinstance(effect, AskReports):
                self._send_to_all(encode_frame(StatusQuery(CORE_QUERY)))

    def _wake_at(self, at_ms: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._closed:
            self._timer = self._loop.call_at(at_ms / 1000, self._tick, at_ms)

    def _send_to_all(self, frame: bytes) -> None:
        for link in self.links:
            link.send_frame(frame)

    # What links find.

    def link_up(self, number: int, executed: int, view: int) -> None:
        """See LinkOwner."""
        self._perform(self.core.on_connected(number, executed, view))
        for watch in list(self.watches):
            watch.connected(number)
        if self.cluster.has_logs:
            self.links[number].send_frame(self.lists.question(number))
        self._flush_soon()

    def link_down(self, number: int, problem: str) -> None:  # noqa: ARG002 - the link keeps it
        """See LinkOwner."""
        self.lists.left(number)
        self._perform(self.core.on_disconnected(number))
        for watch in list(self.watches):
            watch.disconnected(number)
        self._flush_soon()

    def link_message(self, number: int, message: Message) -> None:
        """See LinkOwner."""
        if isinstance(message, Reply):
            effects = self.core.on_reply(number, message.reply)
            if effects:
                self._perform(effects)
            # A decided envelope makes room, and an opened session lets operations out.
            if self.core.waiting:
                self._flush_soon()
        elif isinstance(message, StaleResult):
            self.queries.on_stale(number, message)
        elif isinstance(message, StatusReport):
            self._on_report(number, message)
        elif isinstance(message, ReceiptShown):
            self.queries.on_receipt(number, message)
        elif isinstance(message, Changes | WatchEnded):
            watch = self.watch_queries.get(message.query)
            if watch is not None:
                watch.on_message(number, message)
        elif isinstance(message, MembersShown):
            if self.lists.shown(number, message) and not self._closed:
                self._adopt()
        elif isinstance(message, Notice):
            self.core.on_notice(number, message.code, message.text)
        else:
            raise LayoutError(f"a {type(message).__name__} to a client")

    def _on_report(self, number: int, message: StatusReport) -> None:
        report = read_report(message.json)
        if report:
            executed, view = number_in(report, "executed"), number_in(report, "view")
            self._perform(self.core.on_report(number, executed, view))
            self._flush_soon()
        if message.query != CORE_QUERY:
            self.queries.on_report(message, report)

    # Lists of members.

    def _ask_for_lists(self) -> None:
        self._lists_timer = self._loop.call_later(ASK_S, self._ask_for_lists)
        for replica in self.core.connected:
            self.links[replica].send_frame(self.lists.question(replica))

    def _adopt(self) -> None:
        """Go on among the replicas of the list that is known now.

        Rounds begin anew: f liars of the list before and f of this one could be a quorum together.
        """
        genesis = self.cluster.genesis
        self.n, self.quorum = genesis.n, genesis.quorum
        self._members = members_of(genesis)
        for watch in self.watches:
            watch.renew()
        for waiting in self.queries.stale.values():
            waiting.begin_anew(self.quorum)
        former = {link.place: link for link in self.links}
        staying = [place.number for place in self.cluster.replicas if place in former]
        self.links = [former.pop(place) if place in former else self._link_to(place) for place in self.cluster.replicas]
        for link in former.values():
            link.retire()
            self._tasks.pop(link).cancel()
        self._perform(self.core.adopt(genesis, staying))
        for link in self.links:
            if link not in self._tasks:
                self._keep_up(link)
        for replica in self.core.connected:
            for watch in self.watches:
                watch.connected(replica)
            self.links[replica].send_frame(self.lists.question(replica))
        self._flush_soon()

    def next_query(self) -> int:
        """Return a number for a watch at one replica."""
        self._last_watch_query += 1
        return self._last_watch_query

    # Questions outside the order.

    async def stale(self, operation: bytes, deadline_s: float) -> StaleAnswer:
        """Ask all replicas without ordering, again until f+1 answers are equal; Undecided at the deadline."""
        ends = self._loop.time() + deadline_s
        round_s = STALE_ROUND_S
        while True:
            query, waiting = self.queries.next(), StaleRound(self.quorum)
            self.queries.stale[query] = waiting
            self._send_to_all(encode_frame(StaleRead(query, operation)))
            try:
                async with asyncio.timeout_at(min(ends, self._loop.time() + round_s)):
                    return await waiting.future
            except TimeoutError:
                if self._loop.time() >= ends:
                    reason = Failure.UNDECIDED if self._enough_connected() else Failure.NOT_SENT
                    raise self._error(reason) from None
            finally:
                del self.queries.stale[query]
            round_s = min(2 * round_s, STALE_ROUND_S_MAX)

    async def receipt(self, said: Outcome, deadline_s: float) -> Receipt:
        """Ask the replicas for their RESULTs, again until f+1 alike are verified; Undecided says why there is none."""
        if self._members is None:
            raise NotOffered(NO_LOGS)
        members = self._members
        query, waiting = self.queries.next(), ReceiptRound(members, said)
        self.queries.receipts[query] = waiting
        frame = encode_frame(AskReceipt(RECEIPT_VERSION, query, said.slot, said.leaf))
        try:
            async with asyncio.timeout(deadline_s):
                while waiting.receipt is None:
                    if self._members is not members:
                        members = self._members
                        waiting = self.queries.receipts[query] = ReceiptRound(members, said)
                    for replica in waiting.to_ask(self._loop.time(), self.core.connected):
                        self.links[replica].send_frame(frame)
                    if waiting.is_hopeless:
                        raise Undecided(f"no receipt: {waiting.reasons()}")
                    await waiting.news()
        except TimeoutError:
            raise Undecided(f"no receipt within the deadline: {waiting.reasons()}. {self.describe_links()}") from None
        finally:
            del self.queries.receipts[query]
        return waiting.receipt

    async def status(self, deadline_s: float) -> list[ReplicaStatus]:
        """Ask every replica for its own report; an unreachable one is in the list too, and says why."""
        return list(await asyncio.gather(*(self._status_of(link, deadline_s) for link in self.links)))

    async def _status_of(self, link: ReplicaLink, deadline_s: float) -> ReplicaStatus:
        number, address = link.place.number, link.place.address
        query = self.queries.next()
        answer = self.queries.reports[query] = self._loop.create_future()
        try:
            async with asyncio.timeout(deadline_s):
                await link.settled.wait()
                if not link.send_frame(encode_frame(StatusQuery(query))):
                    return ReplicaStatus(number, address, reachable=False, problem=link.problem)
                report = await answer
        except TimeoutError:
            problem = f"no status within {deadline_s:g} s" if link.is_up else link.problem
            return ReplicaStatus(number, address, reachable=False, problem=problem)
        finally:
            del self.queries.reports[query]
        if not report:
            return ReplicaStatus(number, address, reachable=True, problem="its report is not readable")
        return ReplicaStatus(number, address, reachable=True, report=report)

    # Errors.

    def _enough_connected(self) -> bool:
        return len(self.core.connected) >= self.quorum

    def describe_links(self) -> str:
        """Say in words how things stand with every replica."""
        parts = []
        for link in self.links:
            number = link.place.number
            state = "connected" if number in self.core.connected else link.problem
            notice = self.core.notices.get(number)
            says = f", says: {notice[1]}" if notice else ""
            parts.append(f"replica {number} ({link.place.address}): {state}{says}")
        return "; ".join(parts)

    def _error(self, reason: Failure) -> ClientError:
        if reason is Failure.QUEUE_FULL:
            return Overloaded(f"{self.core.waiting} operations wait in this client already; submit them more slowly")
        if reason is Failure.CLOSED:
            return NotExecuted("the client was closed before this operation was sent")
        if reason is Failure.NOT_ALLOWED:
            return NotAllowed(
                "not sent, hence not executed: the cluster does not allow this client's key, "
                f"{self._key.public_key.hex()}; its operator may: trustlog-replica clients allow"
            )
        where = self.describe_links()
        if reason is Failure.UNDECIDED:
            return Undecided(
                f"outcome unknown: {self.quorum} replicas did not agree within the deadline; the operation may or "
                f"may not be executed. {where}"
            )
        if self._enough_connected() and self.core.is_held_back:
            return HeldBack(
                "not sent, hence not executed: the replicas take no more of this client's operations for now, and did "
                f"not until the deadline. {where}"
            )
        if self._enough_connected():
            return Unreachable(f"not sent, hence not executed: the cluster opened no session in time. {where}")
        return Unreachable(
            f"not sent, hence not executed: {len(self.core.connected)} replicas are connected, "
            f"{self.quorum} are needed. {where}{self._outdated()}"
        )

    def _outdated(self) -> str:
        """Say what else may be the cause that too few replicas are reached."""
        if not self.cluster.has_logs:
            return ""
        return (
            f". If the members changed since list {self.cluster.genesis.list_number}, which this client knows, put "
            "today's cluster.members.toml beside cluster.toml: trustlog-replica member list --update writes it"
        )
