"""Replies that are given once more, to what was executed before: bounded in each call of the core.

An envelope of some hundred bytes can ask again for all the results that a session keeps, which is megabytes, as often
as its client likes. So each reply is given once in a call, and together they may take some bytes; what is beyond is
counted and not given. Its client asks again, and the result is kept.
"""

from collections import Counter
from typing import Any, Final

from replica.core.envelope import Envelope, Operations
from replica.core.events import Send
from replica.core.execution import Executor
from replica.core.genesis import MIB

# What a call gives before it refuses the rest; the largest reply always fits, and the last one given may exceed it.
REPLAY_BYTES_MAX: Final = 8 * MIB


class Replays:
    """The replies given once more in one call. refusals: where those not given are counted."""

    def __init__(self, refusals: Counter[str]) -> None:
        self._refusals = refusals
        self._given: set[object] = set()
        self._left = REPLAY_BYTES_MAX

    def begin(self) -> None:
        """Begin a call."""
        self._given.clear()
        self._left = REPLAY_BYTES_MAX

    def give(self, executor: Executor, envelope: Envelope, source: Any = None) -> list[Send]:  # noqa: ANN401 - opaque
        """Return the reply to an envelope that has nothing left to be executed, unless there was enough of that."""
        what = _numbers(envelope)
        reply = None if self._left <= 0 or (what, source) in self._given else executor.known_reply(envelope)
        if reply is None:
            self._refusals["replay-again"] += 1
            return []
        self._given.add((what, source))
        self._left -= len(reply)
        return [Send(envelope.client, reply, source)]


def _numbers(envelope: Envelope) -> object:
    """Return what two envelopes have in common that get the same reply, however they are signed."""
    content = envelope.content
    if isinstance(content, Operations):
        return envelope.client, content.session, content.first, len(content.operations)
    return envelope.client, content
