"""Asking for what is missing: the author of the waiting entry first, who has it, then the others in turn.

Entries prove themselves, so it does not matter who serves them. An entry that waits for what nobody will ever say
(a faulty author can write one) must not cost its readers more and more, so the pauses between questions double.
"""

from collections.abc import Collection, Sequence

from replica.core.events import Fetch
from replica.core.inbox import Inbox
from replica.core.rules import Wait

# A cause that is missing for this long is asked for, and again from the next replica; once all were asked, twice as
# slowly: one that could not answer when it was asked is asked again soon.
FETCH_AFTER_MS = 150
FETCH_PAUSE_MS_MAX = 5000


class Fetcher:
    """What the logs' next entries wait for, and who was asked for it when. Times in milliseconds."""

    def __init__(self, number: int, n: int) -> None:
        self.waits: dict[int, Wait] = {}
        self._number = number
        self._n = n
        self._since: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._ask_at: dict[int, int] = {}

    def waiting(self, log: int, wait: Wait, now_ms: int) -> None:
        """Note what the next entry of `log` waits for."""
        self.waits[log] = wait
        self._since.setdefault(log, now_ms)

    def moved(self, log: int) -> None:
        """Note that the next entry of `log` was read, or never will be."""
        self.waits.pop(log, None)
        self._since.pop(log, None)

    def arrived(self, log: int) -> None:
        """Note that more of `log` came: if yet more is missing, ask soon and from the start."""
        self._asked.pop(log, None)
        self._ask_at.pop(log, None)

    def asks_for(self, log: int) -> bool:
        """Say whether something waits for more of `log`, which was asked for and has not come."""
        return log in self._asked

    def due(self, now_ms: int, inboxes: Sequence[Inbox], blind: Collection[int]) -> list[Fetch]:
        """Return the questions to ask now."""
        wanted: dict[int, int] = {}  # log -> who is asked first
        for log, wait in self.waits.items():
            if now_ms - self._since[log] >= FETCH_AFTER_MS:
                for missing in wait.logs:
                    wanted.setdefault(missing, log)
        for log, inbox in enumerate(inboxes):
            if inbox.wanting:
                wanted.setdefault(log, log)
        for log in [log for log in self._asked if log not in wanted]:
            self.arrived(log)
        questions = []
        for log, first in wanted.items():
            if log == self._number or log in blind or not inboxes[log].has_room:
                continue
            if now_ms >= self._ask_at.get(log, 0):
                questions.append(Fetch(log, inboxes[log].received + 1, self._next_to_ask(log, first, now_ms)))
        return questions

    def _next_to_ask(self, log: int, first: int, now_ms: int) -> int:
        others = [number for i in range(self._n) if (number := (first + i) % self._n) != self._number]
        count = self._asked.get(log, 0)
        self._asked[log] = count + 1
        self._ask_at[log] = now_ms + min(FETCH_AFTER_MS << min(count // len(others), 16), FETCH_PAUSE_MS_MAX)
        return others[count % len(others)]
