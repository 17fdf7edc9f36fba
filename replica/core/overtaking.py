"""Whether the primary lets others overtake the request that has had a claim for longest (`replica.core.expectation`).

The primary serves lanes in turn by what they cost (`replica.core.line`), and one client has a lane for each replica at
most. So while a request waits that the primary was handed, another client is served no more than, in each of its
lanes, what the request costs itself (TURN_MAX at most), what its own client is served meanwhile, and what its client
still pays for. A batch with requests of whoever was served that much already has overtaken the oldest claim.

That is said of requests that came here after the oldest claim was handed over, and of all others, those that never came
here too, once more was executed meanwhile than can have been under way when it came. Of what was executed before it is
never said: it takes nobody's turn, and a primary may not hide behind it. A client that asks twice for what is executed
once has paid for it twice, however, and waits the longer.
"""

from dataclasses import dataclass

from replica.core.envelope import Envelope
from replica.core.line import TURN_MAX, cost_of
from replica.core.requests import BATCH_OPERATIONS_MAX, UNDER_WAY_MAX, RequestQueue, Waiting

# Clients of which is remembered what they were served, or still pay for; of more it is not said.
CLIENTS_MAX = 8192
# When so much was executed since a request came, nothing that was under way before it is left.
SURELY_LATER = UNDER_WAY_MAX + BATCH_OPERATIONS_MAX


@dataclass(frozen=True, slots=True)
class Done:
    """An envelope of an executed batch, and the request that waited here, if any.

    work: what executing it cost, in units: nothing for operations that had been executed before. paid: what its lane
    pays for it all the same; nothing if this very envelope had been.
    """

    envelope: Envelope
    work: int
    paid: int
    waiting: Waiting | None


class Overtaking:
    """Counts the batches that overtake the oldest claim. lanes: how many one client can have."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._debts: dict[bytes, int] = {}  # client -> what its last costly request cost beyond a turn
        self._oldest: Waiting | None = None
        self._served: dict[bytes, int] = {}  # client -> units, while the oldest waited
        self._from_ms = self._from_work = 0  # what was executed before counts for nothing

    def excuse(self, now_ms: int, work: int) -> None:
        """Begin anew: what was executed until now may have been decided before whatever waits came here."""
        self._from_ms, self._from_work = now_ms, work
        if self._oldest is not None:
            self._oldest.overtaken = 0
        self._oldest, self._served = None, {}

    def executed(self, done: list[Done], requests: RequestQueue, now_ms: int, enough_ms: int) -> None:
        """Note what a batch executed; `requests` still holds it.

        What is executed within `enough_ms` after the request was handed over may have been proposed before.
        """
        oldest = requests.claims.oldest()
        since_ms = None if oldest is None or oldest.relayed_ms is None else max(oldest.relayed_ms, self._from_ms)
        if oldest is not None and since_ms is not None and now_ms - since_ms > enough_ms:
            if oldest is not self._oldest:
                self._oldest, self._served = oldest, {}
            before = max(oldest.work_before, self._from_work)
            oldest.overtaken += self._serve(oldest, since_ms, done, requests.work - before >= SURELY_LATER)
        for one in done:
            if one.paid > TURN_MAX:
                self._debts.pop(one.envelope.client, None)
                self._debts[one.envelope.client] = one.paid - TURN_MAX
                if len(self._debts) > CLIENTS_MAX:
                    del self._debts[next(iter(self._debts))]

    def _serve(self, oldest: Waiting, since_ms: int, done: list[Done], surely_later: bool) -> bool:
        """Count what was served; say whether somebody has overtaken the oldest claim."""
        client, overtaken = oldest.envelope.client, False
        for one in done:
            if one.envelope.client == client:
                self._count(client, one.paid)
        own = min(cost_of(oldest.envelope), TURN_MAX) - 1 + self._served.get(client, 0) + self._debts.get(client, 0)
        for one in done:
            other = one.envelope.client
            if other == client or not one.work:
                continue
            is_later = one.waiting is not None and one.waiting.since_ms > since_ms
            if is_later or surely_later:
                overtaken = overtaken or self._served.get(other, 0) >= self._lanes * own
                self._count(other, one.work)
        return overtaken and all(one.waiting is not oldest for one in done)

    def _count(self, client: bytes, units: int) -> None:
        served = self._served.get(client)
        if served is not None or len(self._served) < CLIENTS_MAX:
            self._served[client] = (served or 0) + units
