"""Heads: what replicas tell each other of the logs' ends, so that a second history of a log is noticed.

A broken trusted part can attest two values at one index and show each to different replicas. Nobody then holds both,
until replicas compare: each says now and then up to where it holds every log, and the chain's head there. Who knows
another head at that index, or a group that reaches across it, asks for that part of the log: the peer's group and the
own one contradict each other, and the inbox finds that out (`replica.core.inbox`). Heads are hints, not evidence: a
peer that lies in them causes a question now and then, and no more.

    u16 logs, then per log: u64 index of the last group's end (0: nothing), 32 head there
"""

import struct
from collections.abc import Collection, Sequence

from replica.core.events import Fetch, HeadsReceived
from replica.core.inbox import Inbox
from replica.core.layout import LayoutError, Reader

# A peer whose heads differ is asked about one log so often at the most.
ASK_PAUSE_MS = 5000
HEAD_SIZE = 8 + 32

Heads = tuple[tuple[int, bytes], ...]


def encode_heads(heads: Heads) -> bytes:
    """Return the documented layout."""
    return struct.pack(">H", len(heads)) + b"".join(struct.pack(">Q32s", index, head) for index, head in heads)


def decode_heads(raw: bytes, n: int) -> Heads:
    """Decode the heads of a cluster of n replicas; LayoutError if these bytes are none."""
    reader = Reader(raw)
    if reader.u16() != n:
        raise LayoutError(f"heads of another number of logs than {n}")
    heads = tuple((reader.u64(), reader.take(32)) for _ in range(n))
    reader.finish()
    return heads


class HeadsComparer:
    """Compares what peers say of the logs with what is here; of replica `number`. Times in milliseconds."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._ask_at: dict[tuple[int, int], int] = {}
        self._said: dict[tuple[int, int], int] = {}  # peer and log -> up to where it held it when it last said so

    def compare(
        self, event: HeadsReceived, inboxes: Sequence[Inbox], blind: Collection[int], now_ms: int
    ) -> list[Fetch]:
        """Return the questions to ask the peer.

        For those of its groups that contradict what is here; and for what it had already when it said so the last
        time, and is still not here: the author may hide its log from this replica alone, and a primary that does not
        know of it would leave it out of the cut.
        """
        questions = []
        for log, ((index, head), inbox) in enumerate(zip(event.heads, inboxes, strict=True)):
            # Of its own log a replica knows all that it said; a copy of its trusted part is for others to notice.
            if index == 0 or log == self._number or log in blind:
                continue
            before = self._said.get((event.peer, log), 0)
            self._said[event.peer, log] = index
            if inbox.received < before <= index and inbox.has_room:
                questions.append(Fetch(log, inbox.received + 1, event.peer))
            if not inbox.differs(index, head):
                continue
            if now_ms >= self._ask_at.get((event.peer, log), 0):
                self._ask_at[event.peer, log] = now_ms + ASK_PAUSE_MS
                questions.append(Fetch(log, index, event.peer))
        return questions
