"""Which of the waiting requests a backup hands to the primary, and is patient for: those with a claim.

A claim is what a correct primary can always honour. Otherwise whoever has one key could sign more than the primary
takes from a client, give every backup some that the primary has no room for, and have one correct primary replaced
after the other.

A backup gives the requests that it holds claims in turn: each client CLAIMS_PER_CLIENT_MAX at a time, in the order in
which its requests came, all of them CLAIMS_MAX, and both within limits of bytes. A claim ends with the request. The
next one is given to whichever client has waited longest for one. It is never taken back, and its patience begins when
it is given: not earlier, because until then the primary was not handed the request.

The primary keeps places for each backup's claims, beside those for what clients hand it themselves
(`replica.core.rooms`): twice as many, because it may still hold what the backup has executed already. No client and no
other replica can fill them, so a correct primary that is not far behind takes each claim when it comes, or when it is
handed over again. What waits there has its own turn in the line, so that nothing but the few claims of the same client
and backup comes before it, and it is served within so many rounds. If that takes longer than patience lasts, patience
grows (`replica.core.patience`).

Whose envelopes overfill a backup's places has a claim for a few at a time, in turn, like everybody. What
contradicts an executed envelope is answered, and forgotten with its claim. What was executed lately without effect, and
comes again, a backup does not take while the primary may not (`RequestQueue.was_executed`).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from replica.core.genesis import MIB

if TYPE_CHECKING:
    from replica.core.requests import Waiting

CLAIMS_MAX = 1024
CLAIMS_PER_CLIENT_MAX = 16
# Of bytes, one claim more than fits is never given; but whoever has none gets one, whatever its size.
CLAIM_BYTES_MAX = 16 * MIB
CLAIM_BYTES_PER_CLIENT_MAX = 2 * MIB


class Claims:
    """The claims of one replica's waiting requests.

    Invariant: `_line` holds the clients that have something without a claim and may have one more, in their turn.
    """

    def __init__(self) -> None:
        self._given: dict[bytes, Waiting] = {}  # by digest, in the order in which they were given
        self._bytes = 0
        self._held: dict[bytes, tuple[int, int]] = {}  # client -> its claims and their bytes
        self._others: dict[
            bytes, dict[bytes, Waiting]
        ] = {}  # client -> digest -> what has no claim, in order of arrival
        self._line: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> "Iterator[Waiting]":
        return iter(self._given.values())

    def oldest(self) -> "Waiting | None":
        """Return the request whose claim was given first."""
        return next(iter(self._given.values()), None)

    def add(self, waiting: "Waiting", now_ms: int, work: int) -> None:
        """Note a request that came. work: the queue's, as in `remove`."""
        client = waiting.envelope.client
        self._others.setdefault(client, {})[waiting.digest] = waiting
        self._line_up(client)
        self._give(now_ms, work)

    def remove(self, waiting: "Waiting", now_ms: int, work: int) -> None:
        """Forget a request; what it leaves is given to others."""
        client = waiting.envelope.client
        if self._given.pop(waiting.digest, None) is None:
            self._withdraw(waiting)
        else:
            size = len(waiting.envelope.raw)
            count, held = self._held.pop(client)
            self._bytes -= size
            if count > 1:
                self._held[client] = count - 1, held - size
        self._line_up(client)
        self._give(now_ms, work)

    def _withdraw(self, waiting: "Waiting") -> None:
        client = waiting.envelope.client
        others = self._others[client]
        del others[waiting.digest]
        if not others:
            del self._others[client]
            self._line.pop(client, None)

    def _line_up(self, client: bytes) -> None:
        """Let a client wait for its turn, if it has something without a claim and may have one more."""
        if client in self._others:
            count, held = self._held.get(client, (0, 0))
            size = len(next(iter(self._others[client].values())).envelope.raw)
            if count < CLAIMS_PER_CLIENT_MAX and (not count or held + size <= CLAIM_BYTES_PER_CLIENT_MAX):
                self._line.setdefault(client)
            else:
                self._line.pop(client, None)

    def _give(self, now_ms: int, work: int) -> None:
        while self._line and len(self._given) < CLAIMS_MAX:
            client = next(iter(self._line))
            waiting = next(iter(self._others[client].values()))
            size = len(waiting.envelope.raw)
            if self._given and self._bytes + size > CLAIM_BYTES_MAX:
                return
            self._withdraw(waiting)
            self._line.pop(client, None)
            count, held = self._held.get(client, (0, 0))
            self._held[client] = count + 1, held + size
            self._bytes += size
            self._given[waiting.digest] = waiting
            waiting.claimed_ms, waiting.work_before = now_ms, work
            self._line_up(client)
