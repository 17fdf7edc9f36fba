"""Whether the primary lets others overtake the request that has had a claim for longest (`replica.core.expectation`).

The primary serves lanes in turn by what they cost (`replica.core.line`), and one client has a lane for each replica at
most. So while a request waits that the primary was handed, another client is served no more than, in each of its
lanes, what the request costs itself (TURN_MAX at most), what its own client is served meanwhile, and what its client
still pays for. A batch with requests of whoever was served that much already has overtaken the oldest claim.

That is said of requests that came here after the oldest claim was handed over, and of all others, those that never came
here too, once more was executed meanwhile than can have been under way when it came. Of what was executed before it is
never said: it takes nobody's turn, and a primary may not hide behind it.
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
    """An envelope of an executed batch, what executing it cost in units, and the request that waited here, if any."""

    envelope: Envelope
    work: int
    waiting: Waiting | None


class Overtaking:
    """Counts the batches that overtake the oldest claim. lanes: how many one client can have."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._debts: dict[bytes, int] = {}  # client -> what its last costly request cost beyond a turn
        self._oldest: Waiting | None = None
        self._served: dict[bytes, int] = {}  # client -> units, while the oldest waited

    def executed(self, done: list[Done], requests: RequestQueue, now_ms: int, enough_ms: int) -> None:
        """Note what a batch executed; `requests` still holds it.

        What is executed within `enough_ms` after the request was handed over may have been proposed before.
        """
        oldest = requests.claims.oldest()
        if oldest is not None and oldest.relayed_ms is not None and now_ms - oldest.relayed_ms > enough_ms:
            if oldest is not self._oldest:
                self._oldest, self._served = oldest, {}
            overtaken = self._serve(oldest, done, requests.work - oldest.work_before >= SURELY_LATER)
            oldest.overtaken += overtaken
        for one in done:
            if one.work > TURN_MAX:
                self._debts.pop(one.envelope.client, None)
                self._debts[one.envelope.client] = one.work - TURN_MAX
                if len(self._debts) > CLIENTS_MAX:
                    del self._debts[next(iter(self._debts))]

    def _serve(self, oldest: Waiting, done: list[Done], surely_later: bool) -> bool:
        """Count what was served; say whether somebody has overtaken the oldest claim."""
        client, overtaken = oldest.envelope.client, False
        for one in done:
            if one.envelope.client == client:
                self._count(one)
        own = min(cost_of(oldest.envelope), TURN_MAX) - 1 + self._served.get(client, 0) + self._debts.get(client, 0)
        for one in done:
            other = one.envelope.client
            if other == client or not one.work:
                continue
            is_later = one.waiting is not None and one.waiting.since_ms > (oldest.relayed_ms or 0)
            if is_later or surely_later:
                overtaken = overtaken or self._served.get(other, 0) >= self._lanes * own
                self._count(one)
        return overtaken and all(one.waiting is not oldest for one in done)

    def _count(self, one: Done) -> None:
        served = self._served.get(one.envelope.client)
        if served is not None or len(self._served) < CLIENTS_MAX:
            self._served[one.envelope.client] = (served or 0) + one.work
