"""What this replica expects of a primary: slow and unfair ones are suspected, not only dead ones (design section 4.2).

After Aardvark (Clement et al., NSDI 2009, sections 4.3 and 5): what a primary must achieve begins as a fraction of the
best that was seen in the last n views, and rises as long as it is met. It is one replica's opinion. It leads to SUSPECT
and to nothing else, and q replicas must share it.

*Slow.* Only requests that this replica handed to the primary, which those with a claim are (`replica.core.claims`), and
still waits for are looked at: where nobody waits, nothing is expected. A request is late if it waits longer than is
expected *and* less was executed in the meantime than the best view would have done in that time: a primary with much to
do is not slow. Time is judged in periods, each
as long as the present expectation. One in which as many requests were late as were not is missed, else it is met.
Misses count twice; so many more misses than met periods that MISSES_MAX is reached, and the primary is slow.
The same is judged of each client by itself, where there is something to compare with: nobody who is served late is
outvoted by others who are served at once.

  - With views of f other primaries to compare with, of which one is correct if the present one is faulty, the best of
    them waited b ms on average. The expectation begins at BEGIN x b and falls with every met period, to END x b.
  - With fewer, it begins at the present patience and falls to ENOUGH, a part of the first patience: so a primary that
    always stays just under the time-out is left, and so is, at most f times, a correct one in a network that slow.
    Then its view is what others are compared with, and nobody is left for that any more.
  - It never falls below ENOUGH, so that what lasts a moment anywhere is not taken for slowness.

*Unfair.* The oldest claim here, handed to the primary, was overtaken by OVERTAKEN_MAX batches
(`replica.core.overtaking`).

What was executed before counts for nothing: else a primary would pad its batches with it.

Why correct primaries are not left for ever: a view that executed nothing is the business of patience alone, so each
view left for this reason brought something, and the rules of doubling and halving are as they were. Each view that this
replica left as slow is one failure, and at most f in a row can be a faulty primary's; from the (f + 1)-th on, what is
expected halves with each. A view that ended otherwise and had met a period takes one failure back, so f faulty
primaries in a round of 2f + 1 take back f at most, while f + 1 correct ones that are left add f + 1. What was expected
of them therefore falls until they meet it. Whoever is behind itself, by a transfer or by its own work, judges nobody.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from replica.core.batch import Batch
from replica.core.overtaking import Done, Overtaking
from replica.core.patience import Patience
from replica.core.requests import RequestQueue, Waiting

# Whoever executes what waits within this part of the first patience (250 ms at the usual one) is never called slow.
ENOUGH_PART = 4
# How many times as long as in the best view a request may wait: when a view begins, when it has lasted. A view that
# begins has what the last one left behind to execute; half of the best is what Aardvark's primaries come to as well
# before one of them is left, and averages of correct primaries in one network lie closer together.
BEGIN_TIMES = 4
END_TIMES = 2
# A met period shortens the expectation by this part of itself.
RAISE_PART = 16
# A missed period counts MISS, a met one -1, and a primary with MISSES_MAX is slow: five periods missed one after the
# other, or more than a third of many. Five of ENOUGH last longer than a first patience: no view is left sooner.
MISS = 2
MISSES_MAX = 10
# A view in which fewer requests that waited here were executed is compared with nothing.
MEASURED_MIN = 5
# Batches that may overtake the oldest request: some may have been proposed before it came.
OVERTAKEN_MAX = 16
# Clients that are judged by themselves at a time; of more the oldest are forgotten.
CLIENTS_MAX = 8192
# More failures than this change nothing any more.
FAILURES_MAX = 40


@dataclass(frozen=True, slots=True)
class Seen:
    """What one view achieved: how long requests waited on average, and units executed in so many milliseconds."""

    primary: int
    wait_ms: int
    work: int
    span_ms: int


@dataclass(slots=True)
class Tally:
    """Requests of a period, one client's or all: those that were late, and those that were not; and the misses."""

    late: int = 0
    on_time: int = 0
    misses: int = 0

    def count(self, is_late: bool) -> None:
        """Count a request."""
        if is_late:
            self.late += 1
        else:
            self.on_time += 1

    def end(self) -> bool | None:
        """End a period; say whether it was met, None if nothing can be said of it."""
        late, on_time = self.late, self.on_time
        self.late = self.on_time = 0
        if not late + on_time:
            return None
        if late >= on_time:
            self.misses += MISS
            return False
        self.misses = max(0, self.misses - 1)
        return True


class Expectation:
    """One replica's; times in milliseconds of a clock that never goes back, work in units of `line.cost_of`.

    Invariant: enough_ms <= floor_ms <= expected_ms.
    """

    def __init__(self, patience: Patience, f: int) -> None:
        self.enough_ms = max(1, patience.first_ms // ENOUGH_PART)
        self._patience = patience
        self._f = f
        self._seen: deque[Seen] = deque(maxlen=2 * f + 1)
        self._failures = 0
        self._begin(0, 0)

    def _begin(self, primary: int, now_ms: int) -> None:
        self.primary = primary
        self._began_ms = now_ms
        self._from_ms = now_ms  # what waited before is not this primary's doing
        self._judged_ms = now_ms
        self._met = 0
        self._all = Tally()
        self._clients: dict[bytes, Tally] = {}
        self._overtaking = Overtaking(2 * self._f + 1)
        self._executed = self._has_failed = False
        self._waits = self._waited_ms = 0
        self._work = self._span_ms = 0
        self._bucket = -1
        others = [seen for seen in self._seen if seen.primary != primary]
        self._lenience = max(0, self._failures - self._f)
        self.best: Seen | None = None
        if others and len({seen.primary for seen in others}) >= self._f:
            wait_ms = min(seen.wait_ms for seen in others)
            fastest = max(others, key=lambda seen: seen.work / seen.span_ms)
            self.best = Seen(fastest.primary, wait_ms, fastest.work, fastest.span_ms)
            begin_ms, end_ms = BEGIN_TIMES * wait_ms, END_TIMES * wait_ms
        else:
            begin_ms, end_ms = self._patience.present_ms, 0
        self.expected_ms = max(self.enough_ms, begin_ms) << self._lenience
        self.floor_ms = max(self.enough_ms, end_ms) << self._lenience

    def enter_view(self, primary: int, now_ms: int) -> None:
        """Note that a view began, whose primary is this replica; what the one before achieved is kept."""
        if self._waits >= MEASURED_MIN:
            self._seen.append(Seen(self.primary, max(1, self._waited_ms // self._waits), self._work, self._span_ms))
        if self._has_failed:
            self._failures = min(self._failures + 1, FAILURES_MAX)
        elif self._met:
            self._failures = max(0, self._failures - 1)
        self._begin(primary, now_ms)

    def excuse(self, now_ms: int, work: int) -> None:
        """Note that this replica is behind by itself: what waited until now is nobody else's doing.

        work: what it has executed in all (`RequestQueue.work`).
        """
        self._from_ms = self._judged_ms = now_ms
        self._overtaking.excuse(now_ms, work)
        for tally in (self._all, *self._clients.values()):
            tally.late = tally.on_time = 0

    def executed(self, batch: Batch, requests: RequestQueue, now_ms: int, again: Sequence[int] = ()) -> None:
        """Note that this batch was executed; `requests` still holds what of it waited here.

        again: how many operations of each envelope had been executed before; () if none.
        """
        self._executed = True
        done = _done(batch, requests, again)
        self._count_work(sum(one.work for one in done), now_ms)
        for waiting in (one.waiting for one in done):
            if waiting is not None and waiting.claimed_ms is not None:
                self._waits += 1
                self._waited_ms += self._waited(waiting, now_ms)
                is_late = self._is_late(waiting, requests.work, now_ms)
                self._all.count(is_late)
                self._tally(waiting).count(is_late)
        self._overtaking.executed(done, requests, now_ms, self.enough_ms)

    def is_disappointed(self, requests: RequestQueue, now_ms: int) -> bool:
        """Say whether the present primary is too slow or unfair. Once it was, that is this view's failure."""
        if not self._executed:
            return False
        oldest = requests.claims.oldest()
        late = oldest if oldest is not None and self._is_late(oldest, requests.work, now_ms) else None
        self._judge(late, now_ms)
        is_unfair = oldest is not None and oldest.overtaken >= OVERTAKEN_MAX << self._lenience
        is_unfair = is_unfair and now_ms - self._began_ms >= self._patience.first_ms
        if not (is_unfair or self._is_slow):
            return False
        self._has_failed = True
        return True

    @property
    def _is_slow(self) -> bool:
        if self._all.misses >= MISSES_MAX:
            return True
        return self.best is not None and any(tally.misses >= MISSES_MAX for tally in self._clients.values())

    def _tally(self, waiting: Waiting) -> Tally:
        tally = self._clients.setdefault(waiting.envelope.client, Tally())
        if len(self._clients) > CLIENTS_MAX:
            del self._clients[next(iter(self._clients))]
        return tally

    def _waited(self, waiting: Waiting, now_ms: int) -> int:
        since_ms = waiting.since_ms if waiting.claimed_ms is None else waiting.claimed_ms
        return now_ms - max(since_ms, self._from_ms)

    def _is_late(self, waiting: Waiting, work: int, now_ms: int) -> bool:
        """Say whether a request waits, or waited, too long, and too little was executed meanwhile."""
        waited_ms = self._waited(waiting, now_ms)
        if waited_ms <= self.expected_ms:
            return False
        if self.best is None:
            return True
        # The same fraction of the best is asked for as with the wait: expected work = best work x (best / expected).
        done = (work - waiting.work_before) * self.best.span_ms * self.expected_ms
        return done < self.best.work * waited_ms * self.best.wait_ms

    def _judge(self, late: Waiting | None, now_ms: int) -> None:
        """End a period, if it has lasted as long as one and something can be said of it. late: what still waits."""
        if now_ms - self._judged_ms < self.expected_ms:
            return
        if late is not None:
            self._all.late += 1
            self._tally(late).late += 1
        met = self._all.end()
        if met is None:
            return
        for tally in self._clients.values():
            tally.end()
        if met:
            self._met += 1
            shorter = self.expected_ms - max(1, self.expected_ms // RAISE_PART)
            self.expected_ms = max(self.floor_ms, shorter)
        self._judged_ms = now_ms

    def _count_work(self, work: int, now_ms: int) -> None:
        # Time in which nothing was executed at all does not count: nobody may have asked for anything.
        bucket = now_ms // self._patience.first_ms
        if bucket != self._bucket:
            self._bucket = bucket
            self._span_ms += self._patience.first_ms
        self._work += work


def _done(batch: Batch, requests: RequestQueue, again: Sequence[int]) -> list[Done]:
    """Return what a batch executed, each envelope once."""
    found: dict[bytes, Done] = {}
    for envelope, before in zip(batch.envelopes, again or [0] * len(batch.envelopes), strict=True):
        work = requests.work_of(envelope, before)
        paid = requests.work_of(envelope, 0) if before else work
        done = Done(envelope, work, paid, requests.find(envelope))
        found.setdefault(envelope.digest(), done)
    return list(found.values())
