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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from replica.core.events import VerifiedGroup
from replica.core.group import encode_group
from replica.shell.store import Store, StoredGroup, StoreError, own_group
from trustlog import Attestation, AttestedLog, entry_digest, fold

# Received groups are stored with the next own group, or after this many seconds, or when so many bytes wait.
STORE_AFTER_S = 0.2
STORE_AFTER_BYTES = 4 * 1024 * 1024
# What may wait behind a slow disk before peers' logs are read no further.
WAITING_BYTES_MAX = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ReleasedGroup:
    """A group of the own log that is durable and attested: the only thing of it that readers are given."""

    group: VerifiedGroup


class TrustedLog(Protocol):
    """The verbs that a replica needs of its trusted log."""

    @property
    def last(self) -> int:
        """The last index assigned."""
        ...

    @property
    def head(self) -> bytes:
        """The chain's head."""
        ...

    def append(self, digests: list[bytes], *, context: bytes) -> Attestation:
        """Append a group durably and attest it."""
        ...


class Outbox:
    """Appends groups to the own log, and stores what was received.

    on_released is called on the loop with each released group, on_failed with what went wrong.
    """

    def __init__(
        self,
        number: int,
        log: AttestedLog | TrustedLog,
        store: Store,
        context: bytes,
        on_released: Callable[[ReleasedGroup], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._number = number
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

    @property
    def is_busy(self) -> bool:
        """Say whether a group or what was received is being made durable."""
        return self._work is not None or self._to_say is not None

    def received(self, group: VerifiedGroup) -> None:
        """Keep a verified group of another log: durable before anything is said that may depend on it."""
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

    async def close(self) -> None:
        """Finish what was begun, store what was received, and end the thread."""
        while self._work is not None:  # what is said next may have waited for what was only stored
            await asyncio.wait([self._work])
        if self._timer is not None:
            self._timer.cancel()
        if not self._failed and (self._received or self._unstored is not None):
            received = list(self._received.values())
            await self._loop.run_in_executor(self._thread, self._store.write, received, self._unstored, None)
        self._thread.shutdown(wait=True)

    def _start(self) -> None:
        if self._work is not None or self._failed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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
            self._store.write(received, unstored, None)
            return None
        first, before = self._log.last + 1, self._log.head
        own = own_group(self._number, first, payloads)
        digests = [entry_digest(payload) for payload in payloads]
        self._store.write(received, unstored, own)
        attestation = self._log.append(digests, context=self._context)
        after = fold(before, first, digests)
        raw = encode_group(attestation, own.payloads)
        return ReleasedGroup(VerifiedGroup(self._number, first, own.last, before, after, payloads, raw))

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


def settle_last_group(number: int, log: AttestedLog, store: Store) -> None:
    """After a restart, bring the store's end and the trusted log's end together; StoreError if that is impossible.

    The last own group may lack its attestation: if the trusted log has it, it is issued again; if not, it was never
    said, and is dropped.
    """
    last = store.last_group(number)
    if last is not None and last.attestation is None:
        if log.last_group == (last.first, last.last):
            issued = log.reissue()
            store.write([], (last.first, issued.statement + issued.signature), None)
            return
        if log.last == last.first - 1:
            store.drop_unattested(number, last.first)
            return
    end = 0 if last is None else last.last
    if end != log.last:
        raise StoreError(
            f"{store.path}: holds this replica's own log up to {end}, its trusted log ends at {log.last}. "
            "One of them is not the newest: restore the right store, or replace the replica with a new log; "
            "resuming would deny what was said"
        )
