"""Coming back: what must be known before a restarted replica says its first word (design section 6).

A replica begins by reading what its store holds. It may speak when

  1. its own log, as read here, ends where its trusted log does, with the same head, and
  2. f peers have said up to where they hold this replica's log, and that is not beyond its end.

A group that is signed by the own log and lies beyond its end proves that the trusted state was rolled back; then it
must never speak again. Peers may lie, by silence too, and those that crashed at the same time may have forgotten what
none of their own entries depended on: a rollback of which no honest one among those asked knows is not found (the `tpm`
backend exists for that). A peer therefore says all that it knows to exist, even what it cannot show yet because it
waits for what lies before. What its store lost of its own log, peers may still have: it asks for that.
"""

from replica.core.events import Fetch
from replica.core.inbox import Inbox

ASK_AGAIN_MS = 300
ASK_AGAIN_MS_MAX = 5000


class Homecoming:
    """Replica `number`'s way back into a cluster of n with f faults. Times in milliseconds."""

    def __init__(self, number: int, n: int, f: int) -> None:
        self._number = number
        self._peers = [peer for peer in range(n) if peer != number]
        self._f = f
        self._heard: set[int] = set()
        self._end: tuple[int, bytes] | None = None
        self._ask_at = 0
        self._pause = ASK_AGAIN_MS

    @property
    def last(self) -> int | None:
        """Where the trusted log ended when the store had been read; None before."""
        return None if self._end is None else self._end[0]

    def begin(self, last: int, head: bytes) -> None:
        """Note the trusted log's end."""
        self._end = (last, head)

    def heard(self, peer: int, last: int) -> None:
        """Note up to where `peer` says that it holds the own log. More than there is must be shown, not said."""
        if self._end is not None and last <= self._end[0]:
            self._heard.add(peer)

    def contradiction(self, own: Inbox) -> str | None:
        """Return why this replica must never speak again, or None."""
        if self._end is None:
            return None
        last, head = self._end
        at_end = own.head_at(last)
        if own.seen > last:
            return (
                f"entry {own.seen} of this replica's own log exists, and its trusted log ends at {last}: its trusted "
                "state was rolled back; it must not speak again: replace this replica with a new log"
            )
        if own.received == last and at_end != head:
            return (
                f"this replica's own log and its trusted log differ at entry {last}: they do not belong together; "
                "restore the right files, or replace this replica with a new log"
            )
        return None

    def missing(self, own: Inbox) -> str | None:
        """Return what must still come before this replica may speak, in words, or None."""
        if self._end is None:
            return "its store is being read"
        if own.received < self._end[0]:
            return f"entries {own.received + 1} to {self._end[0]} of its own log are not here; peers are asked for them"
        if own.unread:
            return f"entry {own.unread[0][0]} of its own log cannot be read again yet"
        if len(self._heard) < self._f:
            return f"{self._f} peers must say what they hold of its log, {len(self._heard)} did"
        return None

    def due(self, now_ms: int, own: Inbox) -> list[Fetch]:
        """Return the questions to ask now."""
        if self._end is None or now_ms < self._ask_at or self.missing(own) is None:
            return []
        self._ask_at = now_ms + self._pause
        self._pause = min(2 * self._pause, ASK_AGAIN_MS_MAX)
        incomplete = own.received < self._end[0]
        asked = [peer for peer in self._peers if incomplete or peer not in self._heard]
        return [Fetch(self._number, own.received + 1, peer) for peer in asked]
