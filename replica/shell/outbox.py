"""The one door through which a replica speaks: durable, then attested, then released.

For each group that the core wants appended, in this order (design section 6):

  1. one transaction makes durable: all groups received so far (the causes of what is about to be said), the
     attestation of the own group before, and the new payloads;
  2. the trusted log appends their digests, durably, and signs;
  3. the group is released: given back to the core, and only from there to readers.

No other code calls the trusted log's `append` or makes a `ReleasedGroup`, and nothing is sent that is not one. Steps 1
and 2 run off the event loop, one group at a time; what arrives meanwhile goes into the next.

If either fails, nothing is released and the replica stops: its disk may no longer hold what it is about to say.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from replica.core.group import VerifiedGroup, encode_group
from replica.shell.measures import Measures
from replica.shell.store import GroupDamagedError, Store, StoredGroup, StoreError, own_group
from replica.shell.trustedlog import TrustedLog, epoch_groups
from trustlog import AppendStatement, BackendKind, entry_digest

# Received groups are stored with the next own group, or after this many seconds, or when so many bytes wait.
STORE_AFTER_S = 0.2
STORE_AFTER_BYTES = 4 * 1024 * 1024
# What the store keeps of the logs although nothing needs it, so that a slightly late peer needs no transfer.
KEEP_BYTES = 256 * 1024 * 1024
# Groups forgotten in one turn of the outbox's thread, or pages of 4 KiB given back, and how long it may then speak
# before it goes on.
TIDY_ROWS = 64
TIDY_PAGES = 256
TIDY_PAUSE_S = 0.05
# What may wait behind a slow disk before peers' logs are read no further.
WAITING_BYTES_MAX = 32 * 1024 * 1024
ROLLED_BACK_REMEDY = (
    "put its newest state back, or replace the replica with a new log (trustlog-replica member replace); resuming "
    "would deny what was said"
)


@dataclass(frozen=True, slots=True)
class ReleasedGroup:
    """A group of the own log that is durable and attested: the only thing of it that readers are given."""

    group: VerifiedGroup


class Outbox:
    """Appends groups to the own log, and stores what was received.

    on_released is called on the loop with each released group, on_failed with what went wrong.
    """

    def __init__(
        self,
        number: int,
        log: TrustedLog,
        store: Store,
        context: bytes,
        on_released: Callable[[ReleasedGroup], None],
        on_failed: Callable[[BaseException], None],
        keep_bytes: int = KEEP_BYTES,
        measures: Measures | None = None,
    ) -> None:
        self._number = number
        self._measures = measures or Measures()
        self._keep_bytes = keep_bytes
        self._forgettable: tuple[int, ...] = ()  # every log's index up to which nothing is needed
        self._tidied_to: tuple[int, ...] = ()  # what the step under way, or the last one, was to forget
        self._tidying: asyncio.Future[bool] | None = None
        self._log = log
        self._store = store
        self._context = context
        self._on_released = on_released
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "outbox")
        self._received: dict[tuple[int, int], StoredGroup] = {}  # by log and first: a peer may send one group often
        self._received_bytes = 0
        self._to_say: tuple[bytes, ...] | None = None
        self._unstored: tuple[int, bytes] | None = None  # the last own group's attestation
        self._work: asyncio.Future[ReleasedGroup | None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failed = False
        self._closing = False

    @property
    def is_busy(self) -> bool:
        """Say whether a group or what was received is being made durable."""
        return self._work is not None or self._to_say is not None

    def received(self, group: VerifiedGroup) -> None:
        """Keep a group that the core took: durable before anything is said that may depend on it."""
        if self._failed or (group.author, group.first) in self._received:
            return
        attestation = group.raw[: -len_of_payloads(group)]
        payloads = group.raw[len(attestation) :]
        stored = StoredGroup(group.author, group.first, group.last, attestation, payloads)
        self._received[group.author, group.first] = stored
        self._received_bytes += len(group.raw)
        if self._received_bytes > STORE_AFTER_BYTES:
            self._start()
        elif self._timer is None:
            self._timer = self._loop.call_later(STORE_AFTER_S, self._start)

    @property
    def is_full(self) -> bool:
        """Say whether so much waits behind the disk that no more should be read."""
        return self._received_bytes > WAITING_BYTES_MAX

    def append(self, payloads: tuple[bytes, ...]) -> None:
        """Say `payloads` as one group. One at a time: the next only after this one was released."""
        if self._to_say is not None:
            raise RuntimeError("a second group before the first was released")
        self._to_say = payloads
        self._start()

    def forget(self, cut: Sequence[int]) -> None:
        """Let the store and the trusted log forget, bit by bit, what lies up to `cut`, as far as bytes are short."""
        self._forgettable = tuple(cut)
        self._tidy()

    def _tidy(self) -> None:
        if self._tidying is None and not self._failed and not self._closing:
            self._tidied_to = self._forgettable
            self._tidying = self._loop.run_in_executor(self._thread, self._forget_some, self._forgettable)
            self._tidying.add_done_callback(self._tidied)

    def _forget_some(self, cut: tuple[int, ...]) -> bool:
        """Forget some groups, or give back some of their room, in the outbox's thread; say whether there is more."""
        own = cut[self._number]
        # Two histories of one log can only be told apart above what its trusted part still answers for.
        if self._log.low <= own <= self._log.last:
            self._log.truncate(own + 1, context=self._context)
        before = self._store.held_bytes()
        self._store.truncate(cut, self._keep_bytes, TIDY_ROWS)
        if self._keep_bytes < self._store.held_bytes() < before:
            return True
        return self._store.give_back(TIDY_PAGES)

    def _tidied(self, work: "asyncio.Future[bool]") -> None:
        self._tidying = None
        if work.cancelled() or self._closing:
            return
        error = work.exception()
        if error is not None:
            self._failed = True
            self._on_failed(error)
        elif work.result() or self._tidied_to != self._forgettable:
            self._loop.call_later(TIDY_PAUSE_S, self._tidy)

    async def close(self) -> None:
        """Finish what was begun, store what was received, and end the thread."""
        self._closing = True
        if self._tidying is not None:
            await asyncio.wait([self._tidying])
        while self._work is not None:  # what is said next may have waited for what was only stored
            await asyncio.wait([self._work])
        if self._timer is not None:
            self._timer.cancel()
        if not self._failed and (self._received or self._unstored is not None):
            received = list(self._received.values())
            await self._loop.run_in_executor(self._thread, self._write, received, self._unstored, None)
        self._thread.shutdown(wait=True)

    def _start(self) -> None:
        if self._timer is not None:  # it may be what calls: then it is over, also if it came too early
            self._timer.cancel()
            self._timer = None
        if self._work is not None or self._failed:
            return
        if self._to_say is None and not self._received:
            return
        received, self._received = list(self._received.values()), {}
        self._received_bytes = 0
        self._work = self._loop.run_in_executor(self._thread, self._speak, received, self._unstored, self._to_say)
        self._work.add_done_callback(self._spoken)

    def _speak(
        self,
        received: list[StoredGroup],
        unstored: tuple[int, bytes] | None,
        payloads: tuple[bytes, ...] | None,
    ) -> ReleasedGroup | None:
        """Run the three steps for one group, in the outbox's own thread."""
        if payloads is None:
            self._write(received, unstored, None)
            return None
        first, before = self._log.last + 1, self._log.head
        own = own_group(self._number, first, payloads)
        digests = [entry_digest(payload) for payload in payloads]
        with self._measures.fsync_s.timed():
            self._write(received, unstored, own)
        with self._measures.attest_s.timed():
            attestation = self._log.append(digests, context=self._context)
        self._measures.group_entries.add(len(payloads))
        raw = encode_group(attestation, own.payloads)
        counted = AppendStatement.decode(attestation.statement).kind is not BackendKind.TPM
        group = VerifiedGroup(self._number, first, own.last, before, self._log.head, payloads, raw, counted)
        return ReleasedGroup(group)

    def _write(self, received: list[StoredGroup], unstored: tuple[int, bytes] | None, own: StoredGroup | None) -> None:
        for group in received:
            if group.log == self._number:
                # What the store had lost of the own log, and peers gave back.
                self._store.replace(group)
        self._store.write([group for group in received if group.log != self._number], unstored, own)

    def _spoken(self, work: "asyncio.Future[ReleasedGroup | None]") -> None:
        self._work = None
        if work.cancelled():
            return
        error = work.exception()
        if error is not None:
            # For good: what was received with this group is lost, so a later one could lack its causes.
            self._failed = True
            self._on_failed(error)
            return
        self._unstored = None
        released = work.result()
        if released is not None:
            group = released.group
            self._to_say = None
            self._unstored = (group.first, group.raw[: -len_of_payloads(group)])
            self._on_released(released)
        if self._to_say is not None:
            self._start()
        elif self._received and self._timer is None:
            self._timer = self._loop.call_later(STORE_AFTER_S, self._start)


def len_of_payloads(group: VerifiedGroup) -> int:
    """Return how many bytes of a group's raw form come after its attestation."""
    return 2 + 4 * len(group.payloads) + sum(map(len, group.payloads))


def store_epoch_groups(number: int, log: TrustedLog, store: Store) -> None:
    """Store what the trusted log itself said last, CLOSE and OPEN of its epochs, if it continues what is here."""
    for payloads, attestation in epoch_groups(log):
        last = store.last_group(number)
        group = own_group(number, AppendStatement.decode(attestation.statement).first, payloads)
        if group.first == (0 if last is None else last.last) + 1:
            store.write([], None, group)
        elif last is None or (last.first, last.attestation, last.payloads) != (group.first, None, group.payloads):
            continue
        store.write([], (group.first, attestation.raw), None)


def settle_last_group(number: int, log: TrustedLog, store: Store) -> None:
    """After a restart, bring the store's end and the trusted log's end together; StoreError if that is impossible.

    The last own group may lack its attestation: if the trusted log has it, it is issued again; if not, it was never
    said, and is dropped. What the store lost of the own log, peers are asked for later; but a trusted log that ends
    before what it attested once is an old copy of itself, and must never sign again.
    """
    try:
        store_epoch_groups(number, log, store)
        last = store.last_group(number)
    except GroupDamagedError:
        return  # damaged where it ends: what was attested of it, peers have
    if last is not None and last.attestation is None:
        if log.last_group == (last.first, last.last):
            issued = log.reissue()
            store.write([], (last.first, issued.statement + issued.signature), None)
            return
        if log.last == last.first - 1:
            store.drop_unattested(number, last.first)
            return
    trouble = rolled_back(0 if last is None else last.last, log.last)
    if trouble:
        raise StoreError(f"{store.path}: {trouble}; {ROLLED_BACK_REMEDY}")


def rolled_back(held: int, log_last: int) -> str:
    """Say that the trusted log ends before what the store holds of it, as an old copy does; "" if it does not."""
    if held <= log_last:
        return ""
    return (
        f"holds this replica's own log up to {held}, its trusted log ends at {log_last}: the trusted log's state was "
        "rolled back to an older copy"
    )
