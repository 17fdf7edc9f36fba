"""MULTI, EXEC, DISCARD, WATCH, UNWATCH: a transaction is one ordered operation.

Between MULTI and EXEC commands are kept; EXEC sends them as one group, which every replica carries out with nothing in
between. WATCH asks for the keys' versions by an ordered operation, and EXEC has the group carried out only if every
watched key still has its version: a write by anybody, of whatever bytes, ends it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from client.gateway.resp import NULL_ARRAY, OK, RESP2, ErrorReply, Reply, encode
from client.gateway.table import Command, Later, Now, Ordered, Refusal, Step, command
from replica.apps import kv_groups
from replica.apps.kv_layout import GROUP_OPERATIONS_MAX
from replica.apps.kv_versions import VERSIONS_MAX

if TYPE_CHECKING:
    from client.gateway.session import Session

# What may wait between MULTI and EXEC; an operation of the cluster has at most 1 MiB.
QUEUED_MAX: Final = GROUP_OPERATIONS_MAX
QUEUED_BYTES_MAX: Final = 1024 * 1024
WATCHED_MAX: Final = VERSIONS_MAX // 2


class Transaction:
    """What was said since MULTI: `size` bytes. `broken` is set by a refused command: EXEC then refuses all."""

    def __init__(self) -> None:
        self.steps: list[Now | Ordered] = []
        self.size = 0
        self.broken = False

    def queue(self, found: Command, step: Step, words: Sequence[bytes]) -> None:
        """Keep a command; Refusal if it cannot be part of a transaction."""
        if isinstance(step, Later):
            raise Refusal(f"ERR {found.name.upper()} is not possible between MULTI and EXEC here")
        # What is kept: an operation of about the words' length, or an answer that may be longer than they are.
        size = max(
            sum(map(len, words)), len(step.operation if isinstance(step, Ordered) else encode(step.reply, RESP2))
        )
        if len(self.steps) >= QUEUED_MAX or self.size + size > QUEUED_BYTES_MAX:
            raise Refusal(f"ERR a transaction has at most {QUEUED_MAX} commands and {QUEUED_BYTES_MAX} bytes")
        self.steps.append(step)
        self.size += size


@command("multi", 1, "Begins a transaction.", "transactions", flags="noscript loading stale fast", while_queued=True)
def _multi(session: "Session", _: Sequence[bytes]) -> Step:
    if session.transaction is not None:
        raise Refusal("ERR MULTI calls can not be nested")

    # What came before must be done first: with an unknown outcome there, nothing of this transaction is carried out.
    async def work() -> Reply:
        session.transaction = Transaction()
        return OK

    return Later(work)


@command(
    "discard", 1, "Gives a transaction up.", "transactions", flags="noscript loading stale fast", while_queued=True
)
def _discard(session: "Session", _: Sequence[bytes]) -> Step:
    if session.transaction is None:
        raise Refusal("ERR DISCARD without MULTI")
    session.transaction = None

    async def work() -> Reply:
        session.watched.clear()
        return OK

    return Later(work)


@command(
    "exec",
    1,
    "Carries a transaction out as one ordered operation.",
    "transactions",
    flags="noscript",
    while_queued=True,
)
def _exec(session: "Session", _: Sequence[bytes]) -> Step:
    transaction, session.transaction = session.transaction, None
    if transaction is None:
        raise Refusal("ERR EXEC without MULTI")

    async def work() -> Reply:
        watched = dict(session.watched)
        session.watched.clear()
        if transaction.broken:
            return ErrorReply("EXECABORT Transaction discarded because of previous errors.")
        ordered = [step for step in transaction.steps if isinstance(step, Ordered)]
        replies: list[Reply] = []
        if ordered or watched:
            operation = kv_groups.group([step.operation for step in ordered], watched.items())
            outcomes = kv_groups.read_group(await session.execute(operation))
            if outcomes is None:
                return NULL_ARRAY
            replies = session.read_group(ordered, outcomes)
        following = iter(replies)
        return [step.reply if isinstance(step, Now) else next(following) for step in transaction.steps]

    return Later(work)


@command(
    "watch",
    -2,
    "Has EXEC do nothing if one of these keys is written before.",
    "transactions",
    flags="noscript loading stale fast",
    keys=(1, -1, 1),
    while_queued=True,
)
def _watch(session: "Session", args: Sequence[bytes]) -> Step:
    if session.transaction is not None:
        raise Refusal("ERR WATCH inside MULTI is not allowed")
    wanted = list(dict.fromkeys(args))

    async def work() -> Reply:
        # A key that is watched already keeps its first version: what happened since then counts.
        new = [key for key in wanted if key not in session.watched]
        if len(new) + len(session.watched) > WATCHED_MAX:
            return ErrorReply(f"ERR at most {WATCHED_MAX} keys can be watched")
        if new:
            versions = kv_groups.read_versions(await session.execute(kv_groups.versions(new)))
            session.watched.update(zip(new, versions, strict=True))
        return OK

    return Later(work)


@command("unwatch", 1, "Forgets what was watched.", "transactions", flags="noscript loading stale fast")
def _unwatch(session: "Session", _: Sequence[bytes]) -> Step:
    if session.transaction is not None:
        return Now(OK)

    async def work() -> Reply:
        session.watched.clear()
        return OK

    return Later(work)
