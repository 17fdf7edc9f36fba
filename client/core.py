"""The client's core: groups operations into signed envelopes, accepts what f+1 replicas agree on (design 5).

Pure: time, nonces and signatures come in from outside, effects (`client.events`) go out. Rules:

  R1  A reply counts for the replica over whose authenticated connection it came, never for what its bytes
      say; per envelope and replica only the latest counts. f+1 distinct replicas with equal bytes decide: one
      of them is correct, and a correct replica replies only what was ordered and executed, or that this
      client's key is not allowed.
  R2  An operation's outcome is exactly one of: a result, or a `Failure`. At its deadline it fails, whatever
      happens. One that never was in an envelope fails as NOT_SENT, one that was as UNDECIDED.
  R3  Numbers are consecutive within a session. `acknowledged` is the first number of the lowest envelope that
      is not finished (answered, or given up by all that waited), so it never divides an envelope, and
      retransmitting one gives every replica the same reply.
  R4  No envelope reaches beyond acknowledged + session_window, hence none is answered "out of window".
  R5  Retransmission sends the same bytes; replicas execute them once.
  R6  What replicas say alone (executed slot, view, "busy") is used as `client.hearsay` has it.

A session is opened when the first operation waits. Its `void_after` is R6's slot + 4 checkpoint intervals;
replicas answer VOID beyond 8 intervals, so a value that one liar could raise would lock the client out. The
opening waits for the slots of all replicas that can be reached, for a short while, and for f+1 in any case.
VOID and BUSY mean: once more, with a new nonce and newer slots. NOT_ALLOWED fails what waits; who submits
more has it tried again. A result EXPIRED or NOT_ALLOWED ends the session; the outcome of operations in it is
unknown.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from client.events import (
    AskReports,
    Complete,
    Effect,
    Fail,
    Failure,
    Send,
    Settings,
    Ticket,
    WakeAt,
)
from client.hearsay import Hearsay
from client.pace import Pace, Window
from client.pending import (
    ADDRESS_SIZE,
    COUNT_END,
    OPEN_ADDRESS_SIZE,
    OPEN_REPLY_SIZE,
    PendingEnvelope,
    PendingOpening,
    Tally,
)
from client.waiting import NEVER, WaitingQueue
from replica.core.envelope import (
    SIGNATURE_SIZE,
    Open,
    OpenReply,
    Operations,
    OperationsReply,
    SessionId,
    Status,
    decode_reply,
    encode_open,
    encode_operations,
)
from replica.core.genesis import Genesis
from replica.core.layout import U64_MAX, LayoutError

HORIZON_INTERVALS = 4  # an opening is void this many checkpoint intervals after the slot it was made at
ENVELOPE_OVERHEAD = 145 + SIGNATURE_SIZE  # header and fixed fields of an envelope of operations
NOTICE_TEXT_MAX = 200
BUSY = "busy"  # the code of a notice: a replica takes no more, from anybody or over this client's quota
# Results that end a session.
_ENDING = frozenset({Status.EXPIRED, Status.NOT_ALLOWED})


class ClientCore:
    """One client's conversation with one cluster.

    Invariants, checked by `check()`:
      1. at most `envelopes_in_flight_max` envelopes are in flight;
      2. the current session's envelopes have disjoint ranges of numbers below `_next`, in the window (R4);
      3. `_in_flight_bytes` is the size of what is in flight.

    Every event but `flush` and `tick` wants a `flush` at the end of the turn of the loop.
    """

    def __init__(
        self,
        genesis: Genesis,
        cluster_id: bytes,
        public_key: bytes,
        *,
        sign: Callable[[bytes], bytes],
        nonce: Callable[[], bytes],
        settings: Settings | None = None,
    ) -> None:
        self.settings = Settings() if settings is None else settings
        self.refused = Counter[str]()
        self.notices: dict[int, tuple[str, str]] = {}
        self._limits = genesis.limits
        self._quorum = genesis.quorum
        self._pace = Pace(self.settings.patience_ms, self.settings.patience_learned_ms_max)
        self._window = Window(self.settings.envelopes_in_flight_max)
        self._answered: list[int] = []  # when they were sent; taken in with the next `flush`, which knows the time
        self._hearsay = Hearsay(genesis.n, genesis.f)
        self._cluster_id, self._public_key = cluster_id, public_key
        self._sign, self._nonce = sign, nonce
        self._now = 0
        self._wake_at = NEVER
        self._effects: list[Effect] = []
        self._queue = WaitingQueue(self.settings.queue_operations_max, self.settings.queue_bytes_max)
        self._in_flight: dict[bytes, PendingEnvelope] = {}  # by address
        self._in_flight_bytes = 0
        self._current: dict[int, PendingEnvelope] = {}  # by first number, this session's only
        self._session: SessionId | None = None
        self._next = 1
        self._opening: PendingOpening | None = None
        self._opening_not_before = 0
        self._opening_pause_ms = self.settings.busy_retry_ms
        self._asking_until: int | None = None

    def adopt(self, genesis: Genesis, staying: Collection[int] = ()) -> list[Effect]:
        """Go on with another list of members of the same cluster.

        staying: replicas that both lists have under this number, and to which connections stand; the others are to be
        connected to anew. What waits for answers waits for those of the new list, and is sent again: what the old
        one's members said counts no more.
        """
        self._quorum = genesis.quorum
        self._hearsay = self._hearsay.renewed(genesis.n, genesis.f, staying)
        self.notices = {replica: notice for replica, notice in self.notices.items() if replica in staying}
        for attempt in self._attempts():
            attempt.tally = Tally(self._quorum)
            self._send_to_all(attempt)  # the primary may be another one
        if self._hearsay.connected:
            self._effects.append(AskReports())
        return self._take_effects()

    # Events.

    def submit(self, ticket: Ticket, operation: bytes, deadline_ms: int) -> Failure | None:
        """Take an operation; it leaves with the next `flush`. Returns why it is refused, or None.

        ValueError for an operation that no replica would accept.
        """
        size = len(operation)
        if size > self._limits.operation_bytes_max:
            raise ValueError(f"an operation of {size} bytes, the cluster's limit is {self._limits.operation_bytes_max}")
        return None if self._queue.add(ticket, operation, deadline_ms) else Failure.QUEUE_FULL

    def flush(self, now_ms: int) -> list[Effect]:
        """End a turn of the loop: put what waits into envelopes, as far as there is room."""
        self._now = max(self._now, now_ms)
        for sent_at in self._answered:
            self._pace.answered(self._now - sent_at)
        self._answered.clear()
        self._proceed()
        return self._take_effects()

    def tick(self, now_ms: int) -> list[Effect]:
        """Let time pass: deadlines, patience, retransmission."""
        self._now = max(self._now, now_ms)
        self._wake_at = NEVER
        late = self._queue.expire(self._now)
        if late:
            self._effects.append(Fail(late, Failure.NOT_SENT))
        self._expire_envelopes()
        self._retransmit()
        self._proceed()
        for pending in self._in_flight.values():
            self._wake_by(min(pending.deadline_next, pending.send_again_at))
        if self._opening is not None and self._queue:
            self._wake_by(self._opening.send_again_at)
        return self._take_effects()

    def on_connected(self, replica: int, executed: int, view: int) -> list[Effect]:
        """Take in that `replica` welcomed this client; what it should have is sent to it."""
        self._hearsay.on_connected(replica)
        self._hearsay.on_said(replica, executed, view)
        for attempt in self._attempts():
            if attempt.broadcast or replica == self._hearsay.primary:
                self._effects.append(Send((replica,), attempt.raw))
        return self._take_effects()

    def on_disconnected(self, replica: int) -> list[Effect]:
        """Take in that `replica` is not connected: a connection ended, or an attempt failed."""
        self._hearsay.on_disconnected(replica)
        if replica == self._hearsay.primary:
            # The backups must know of what waits, or nobody would grow impatient with the primary.
            for attempt in self._attempts():
                if not attempt.broadcast:
                    self._send_to_all(attempt)
        return self._take_effects()

    def on_report(self, replica: int, executed: int, view: int) -> list[Effect]:
        """Take in what `replica` says of itself; used by R6 only."""
        before = self._hearsay.primary
        self._hearsay.on_said(replica, executed, view)
        primary = self._hearsay.primary
        if primary != before and primary in self._hearsay.connected:
            for attempt in self._attempts():
                if not attempt.broadcast:
                    self._effects.append(Send((primary,), attempt.raw))
        return self._take_effects()

    def on_reply(self, replica: int, raw: bytes) -> list[Effect]:
        """Take a reply that came over the connection to `replica`."""
        self._hearsay.check(replica)
        if raw[:1] == b"\x02":
            self._on_open_reply(replica, raw)
            return self._take_effects()
        pending = self._in_flight.get(raw[:ADDRESS_SIZE])
        if pending is None:
            # Mostly the replies after the (f+1)-th.
            self.refused["reply-to-nothing"] += 1
        elif raw[ADDRESS_SIZE:COUNT_END] != pending.count:
            self.refused["reply-with-other-count"] += 1
        elif pending.tally.add(replica, raw):
            self._accept(pending, raw)
        return self._take_effects()

    def on_notice(self, replica: int, code: str, text: str) -> None:
        """Keep the last notice of each replica, to be shown with a failure; "busy" counts as R6 says."""
        self._hearsay.check(replica)
        if code == BUSY:
            self._hearsay.on_busy(replica, self._now)
        self.notices[replica] = (code[:NOTICE_TEXT_MAX], text[:NOTICE_TEXT_MAX])

    def close(self) -> list[Effect]:
        """Give up everything; operations that were sent are UNDECIDED."""
        unsent = self._queue.clear()
        if unsent:
            self._effects.append(Fail(unsent, Failure.CLOSED))
        for pending in self._in_flight.values():
            self._effects.append(Fail(pending.waiting(), Failure.UNDECIDED))
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._current.clear()
        return self._take_effects()

    # What is so.

    @property
    def connected(self) -> frozenset[int]:
        """The replicas that welcomed this client and are still connected."""
        return frozenset(self._hearsay.connected)

    @property
    def unreachable(self) -> frozenset[int]:
        """The replicas whose connection, or last attempt at one, failed."""
        return frozenset(self._hearsay.unreachable)

    @property
    def is_held_back(self) -> bool:
        """Whether f+1 replicas took no more of this client, and have said so since they were asked last."""
        at_ms = self._hearsay.busy_at_ms
        return at_ms is not None and self._now < at_ms + 2 * self.settings.busy_patience_ms

    @property
    def primary(self) -> int:
        """The replica to which envelopes are sent first."""
        return self._hearsay.primary

    @property
    def session(self) -> SessionId | None:
        """The open session, if there is one."""
        return self._session

    @property
    def waiting(self) -> int:
        """How many operations are not in an envelope yet."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many envelopes are in flight."""
        return len(self._in_flight)

    def check(self) -> None:
        """Raise RuntimeError if an invariant of this class does not hold."""
        if len(self._in_flight) > self.settings.envelopes_in_flight_max:
            raise RuntimeError(f"invariant 1: {len(self._in_flight)} envelopes in flight")
        if self._in_flight_bytes != sum(len(pending.raw) for pending in self._in_flight.values()):
            raise RuntimeError(f"invariant 3: {self._in_flight_bytes} bytes counted")
        position = 0
        for first, pending in self._current.items():
            last = first + len(pending.tickets) - 1
            if first <= position or self._in_flight.get(pending.address) is not pending:
                raise RuntimeError(f"invariant 2: numbers {first} to {last} after {position}")
            position = last
        if position >= self._next or self._next > self._acknowledged() + self._limits.session_window:
            raise RuntimeError(f"invariant 2: next {self._next}, acknowledged {self._acknowledged()}")
        self._queue.check()

    # Replies.

    def _accept(self, pending: PendingEnvelope, raw: bytes) -> None:
        try:
            reply = decode_reply(raw, self._limits)
        except LayoutError:
            # More than f replicas are faulty, or of another version. The deadlines end the wait.
            self.refused["malformed-reply"] += 1
            return
        if not isinstance(reply, OperationsReply):
            raise TypeError("a reply changed its kind")
        self._finish(pending)
        self._window.answered()
        if not pending.broadcast:
            self._answered.append(pending.sent_at)
        results = reply.results
        numbers: Sequence[int] = range(pending.first, pending.first + len(results))
        if any(result.status in _ENDING for result in results):
            self._lose_session(pending.session)
        if pending.failed:
            results = tuple([result for index, result in enumerate(results) if index not in pending.failed])
            numbers = [number for index, number in enumerate(numbers) if index not in pending.failed]
        self._effects.append(Complete(pending.waiting(), results, pending.session, numbers))

    def _on_open_reply(self, replica: int, raw: bytes) -> None:
        opening = self._opening
        if opening is None or raw[1:OPEN_ADDRESS_SIZE] != opening.nonce:
            self.refused["reply-to-nothing"] += 1
            return
        if len(raw) != OPEN_REPLY_SIZE:
            self.refused["malformed-reply"] += 1
            return
        if not opening.tally.add(replica, raw):
            return
        try:
            reply = decode_reply(raw, self._limits)
        except LayoutError:
            self.refused["malformed-reply"] += 1
            return
        if not isinstance(reply, OpenReply):
            raise TypeError("a reply changed its kind")
        self._opening = None
        if reply.status is Status.OK:
            self._session, self._next = reply.session, 1
            self._opening_pause_ms = self.settings.busy_retry_ms
            return
        self.refused[f"opening-{reply.status.name.lower()}"] += 1
        if reply.status is Status.NOT_ALLOWED:
            self._effects.append(Fail(self._queue.clear(), Failure.NOT_ALLOWED))
        elif reply.status is not Status.VOID:
            self._opening_not_before = self._now + self._opening_pause_ms
            self._opening_pause_ms = min(2 * self._opening_pause_ms, self.settings.patience_ms_max)
        self._ask_anew()

    def _lose_session(self, session: SessionId) -> None:
        if session != self._session:
            return
        self._session = None
        # What is in flight in the lost session keeps its address and gets its own answers.
        self._current = {}
        self._next = 1
        self._ask_anew()

    def _finish(self, pending: PendingEnvelope) -> None:
        del self._in_flight[pending.address]
        self._in_flight_bytes -= len(pending.raw)
        if pending.session == self._session:
            del self._current[pending.first]

    # Sessions.

    def _ask_anew(self) -> None:
        self._hearsay.forget_slots()
        self._asking_until = None

    def _knows_slots(self) -> bool:
        """Say whether an opening can be made; ask the replicas, and wait a little for all of them, if not."""
        hearsay = self._hearsay
        if len(hearsay.connected) < self._quorum:
            return False
        if self._asking_until is None:
            self._asking_until = self._now + self.settings.opening_wait_ms
            if hearsay.nothing_heard:
                self._effects.append(AskReports())
        if hearsay.enough_heard and (hearsay.all_heard or self._now >= self._asking_until):
            return True
        if self._now >= self._asking_until:
            self._asking_until = self._now + self.settings.opening_wait_ms
            self._effects.append(AskReports())
        self._wake_by(self._asking_until)
        return False

    def _open_session(self) -> None:
        if self._opening is not None:
            return
        if self._now < self._opening_not_before:
            self._wake_by(self._opening_not_before)
            return
        if not self._knows_slots():
            return
        self._asking_until = None
        horizon = HORIZON_INTERVALS * self._limits.checkpoint_interval
        content = Open(self._nonce(), min(self._hearsay.slot + horizon, U64_MAX))
        signed = encode_open(self._cluster_id, self._public_key, content)
        opening = PendingOpening(
            signed + self._sign(signed),
            self._quorum,
            self._now,
            self._pace.patience_ms,
            nonce=content.nonce,
        )
        self._opening = opening
        self._send_first(opening)
        self._wake_by(opening.send_again_at)

    # Envelopes.

    def _acknowledged(self) -> int:
        return next(iter(self._current), self._next)

    def _proceed(self) -> None:
        if not self._queue:
            return
        self._wake_by(self._queue.deadline)
        if self._session is None:
            self._open_session()
            return
        while (
            self._queue
            # With fewer there can be no answer; what stays here has a certain outcome, "not sent".
            and len(self._hearsay.connected) >= self._quorum
            and len(self._in_flight) < self._window.size
            and self._in_flight_bytes < self.settings.bytes_in_flight_max
            and not self._is_held_back(self.settings.busy_retry_ms)
        ):
            acknowledged = self._acknowledged()
            room = acknowledged + self._limits.session_window - self._next
            if room <= 0:
                break
            self._fill_envelope(self._session, acknowledged, min(room, self._limits.envelope_operations_max))

    def _fill_envelope(self, session: SessionId, acknowledged: int, count_max: int) -> None:
        tickets, operations, deadlines = self._queue.take(
            count_max, self._limits.envelope_bytes_max - ENVELOPE_OVERHEAD
        )
        first = self._next
        content = Operations(session, first, acknowledged, tuple(operations))
        signed = encode_operations(self._cluster_id, self._public_key, content)
        raw = signed + self._sign(signed)
        pending = PendingEnvelope(
            raw,
            self._quorum,
            self._now,
            self._pace.patience_ms,
            session=session,
            first=first,
            tickets=tickets,
            deadlines=deadlines,
        )
        self._next = first + len(tickets)
        self._in_flight[pending.address] = pending
        self._in_flight_bytes += len(raw)
        self._current[first] = pending
        self._send_first(pending)
        self._wake_by(min(pending.deadline_next, pending.send_again_at))

    def _attempts(self) -> list[PendingEnvelope | PendingOpening]:
        attempts: list[PendingEnvelope | PendingOpening] = list(self._in_flight.values())
        if self._opening is not None:
            attempts.append(self._opening)
        return attempts

    def _send_first(self, attempt: PendingEnvelope | PendingOpening) -> None:
        if self._hearsay.primary in self._hearsay.connected:
            self._effects.append(Send((self._hearsay.primary,), attempt.raw))
        else:
            self._send_to_all(attempt)

    def _send_to_all(self, attempt: PendingEnvelope | PendingOpening) -> None:
        attempt.broadcast = True
        if self._hearsay.connected:
            self._effects.append(Send(tuple(sorted(self._hearsay.connected)), attempt.raw))

    # Time.

    def _expire_envelopes(self) -> None:
        for pending in list(self._in_flight.values()):
            late = pending.give_up(self._now)
            if late:
                self._effects.append(Fail(late, Failure.UNDECIDED))
            if pending.is_given_up:
                self._finish(pending)

    def _retransmit(self) -> None:
        # An opening that nobody waits for any more stays as it is; its answer is welcome when it comes.
        impatient = [
            attempt
            for attempt in self._attempts()
            if attempt.send_again_at <= self._now and (self._queue or attempt is not self._opening)
        ]
        for attempt in impatient:
            self._send_to_all(attempt)
            self._pace.ended(attempt.patience_ms)
            # Whoever is over its quota asks again at an even pace, once in as long as the quota's bucket takes to fill.
            is_busy = self._is_held_back(self.settings.patience_ms_max)
            attempt.postpone(self._now, self.settings.busy_patience_ms if is_busy else self.settings.patience_ms_max)
        if impatient:
            if self._is_held_back(self.settings.patience_ms_max):
                self._window.refused()
            # Perhaps there is another primary by now.
            self._effects.append(AskReports())

    def _is_held_back(self, for_ms: int) -> bool:
        """Say whether the replicas took no more (R6) within the last `for_ms` milliseconds; be woken after."""
        at_ms = self._hearsay.busy_at_ms
        if at_ms is None or self._now >= at_ms + for_ms:
            return False
        self._wake_by(at_ms + for_ms)
        return True

    def _wake_by(self, at_ms: int) -> None:
        if at_ms < self._wake_at:
            self._wake_at = at_ms
            self._effects.append(WakeAt(at_ms))

    def _take_effects(self) -> list[Effect]:
        effects = self._effects
        self._effects = []
        return effects
