"""What is answered without being executed: which requests that is, and how many replies are given once more.

An envelope of some hundred bytes can ask again for all the results that a session keeps, which is megabytes, as often
as its client likes. So each reply is given once in a call, and together they may take some bytes; what is beyond is
counted and not given. Its client asks again, and the result is kept.
"""

from collections import Counter
from typing import Any, Final

from replica.core.batch import Batch
from replica.core.envelope import Administer, Envelope, Operations
from replica.core.events import Send
from replica.core.execution import Executor
from replica.core.genesis import MIB
from replica.core.requests import RequestQueue, Waiting

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
        return [Send(envelope.client, reply, source, again=True)]


def answered_by(batch: Batch, requests: RequestQueue, executor: Executor) -> list[Waiting]:
    """Return what waits and has nothing left to be executed since this batch was.

    Thousands of envelopes may wait that ask for a thousand operations each, and every batch may answer one more. So
    only what it can have touched is looked at, from the first operation on that had no answer before.
    """
    if executor.clients_changed:
        return [waiting for waiting in requests if executor.is_answered(waiting.envelope)]
    touched = {_scope(envelope) for envelope in batch.envelopes}
    clients = dict.fromkeys(envelope.client for envelope in batch.envelopes)
    answered = []
    if any(isinstance(envelope.content, Administer) for envelope in batch.envelopes):
        # One operator's command answers another's that says the same.
        commands = [one for one in requests if isinstance(one.envelope.content, Administer)]
        answered = [one for one in commands if executor.is_answered(one.envelope)]
    for waiting in (one for client in clients for one in requests.of(client)):
        envelope, content = waiting.envelope, waiting.envelope.content
        if _scope(envelope) not in touched or isinstance(content, Administer):
            continue
        if isinstance(content, Operations):
            waiting.answered = executor.answered(envelope.client, content, waiting.answered)
            is_answered = waiting.answered == len(content.operations)
        else:
            is_answered = executor.is_answered(envelope)
        if is_answered:
            answered.append(waiting)
    return answered


def _scope(envelope: Envelope) -> object:
    """Return what two envelopes have in common of which one can answer the other."""
    content = envelope.content
    return envelope.client, content.session if isinstance(content, Operations) else type(content)


def _numbers(envelope: Envelope) -> object:
    """Return what two envelopes have in common that get the same reply, however they are signed."""
    content = envelope.content
    if isinstance(content, Operations):
        return envelope.client, content.session, content.first, len(content.operations)
    return envelope.client, content
