"""One conversation in Redis' protocol: what a pipeline, a transaction and an unknown outcome mean.

Commands are answered in the order in which they came, and carried out in that order. Those that came together go out
together: as one operation, a group of the key-value store, so nobody can order a connection's commands otherwise, and
an envelope of the client carries what many connections want. A group that is refused as a whole (its results are too
large for one answer) changed nothing, and is sent again in halves.

Errors say what is known, by their first word:

    UNDECIDED    sent, and not answered alike by f+1 replicas within the deadline: it may be executed or not, or later
    NOTEXECUTED  certain not to be executed
    ERR          refused, by the gateway or, alike everywhere, by the replicas: it changed nothing
    NOPERM       refused likewise, because the gateway's key may not do it

Nothing is ever sent a second time under a new number. After an unknown outcome, commands of the same pipeline are not
carried out, because what is unknown could still be executed after them.
"""

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from client.errors import ClientError, NotExecuted, NotPermitted, OperationFailed
from client.gateway.resp import RESP2, ErrorReply, Reply, Simple, encode
from client.gateway.table import Command, Later, Now, Ordered, Refusal, Step, find
from client.gateway.transactions import Transaction
from replica.apps import kv_groups
from replica.core.layout import LayoutError

if TYPE_CHECKING:
    from client.gateway.server import Gateway

# How many commands, and how many bytes of them, go out as one operation.
GROUP_COMMANDS_MAX: Final = 512
GROUP_BYTES_MAX: Final = 512 * 1024

# What the replicas' refusals are called in Redis.
_TEXTS: Final = {
    "the present value is not a whole number": "value is not an integer or out of range",
    "the sum does not fit 64 bits": "increment or decrement would overflow",
}
_OF_HTTP: Final = frozenset({b"post", b"host:"})
_QUEUED: Final = Simple("QUEUED")
_SKIPPED: Final = ErrorReply(
    "NOTEXECUTED not executed: the outcome of an earlier command of this pipeline is unknown, and it could come after "
    "this one"
)


@dataclass(slots=True)
class Session:
    """What a connection has said of itself, and what waits to be sent for it.

    `write` sends bytes, and returns when there is room for more.
    """

    gateway: "Gateway"
    number: int
    write: Callable[[bytes], Awaitable[None]]
    protocol: int = RESP2
    authenticated: bool = False
    closing: bool = False
    name: bytes = b""
    library: dict[bytes, bytes] = field(default_factory=dict)
    transaction: Transaction | None = None
    watched: dict[bytes, int] = field(default_factory=dict)
    _pending: list[tuple[Now | Ordered, int]] = field(default_factory=list)
    _pending_bytes: int = 0
    _failed: bool = False

    async def handle(self, words: Sequence[bytes]) -> None:
        """Take a command; its answer is written with the next `flush`, at the latest."""
        if words[0].lower() in _OF_HTTP:
            # A page in a browser may have a request sent here, and its body could hold commands.
            self.gateway.refusals["http"] += 1
            self.closing = True
            return
        step = self._skip(words) if self._failed else self._plan(words)
        if isinstance(step, Later):
            await self.flush()
            # What came before it may have failed just now.
            step = self._skip(words) if self._failed else Now(await self._guarded(step.work))
        await self._add(step)

    async def idle(self) -> None:
        """Answer what waits, because nothing more has come; what comes from now on is a new pipeline."""
        await self.flush()
        self._failed = False

    async def flush(self) -> None:
        """Carry out and answer what waits."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not pending:
            return
        at = 0
        async for replies in self._carry_out([step for step, _ in pending if isinstance(step, Ordered)]):
            # Written as they come: all answers of a pipeline together may be large.
            parts: list[bytes] = []
            left = len(replies)
            following = iter(replies)
            while at < len(pending) and (left or isinstance(pending[at][0], Now)):
                step, protocol = pending[at]
                parts.append(encode(step.reply if isinstance(step, Now) else next(following), protocol))
                left -= isinstance(step, Ordered)
                at += 1
            await self.write(b"".join(parts))

    async def execute(self, operation: bytes) -> bytes:
        """Run one operation; ClientError as the client has it."""
        return await self.gateway.client.execute(operation)

    def read_group(self, steps: Sequence[Ordered], outcomes: Sequence[kv_groups.Outcome]) -> list[Reply]:
        """Return the replies to the members of a group."""
        if len(steps) != len(outcomes):
            raise LayoutError(f"{len(outcomes)} results of {len(steps)} operations")
        return [
            ErrorReply(_refused(outcome.value.decode(errors="replace")))
            if outcome.refused
            else step.read(outcome.value)
            for step, outcome in zip(steps, outcomes, strict=True)
        ]

    # One command

    def _plan(self, words: Sequence[bytes]) -> Step:
        found: Command | None = None
        try:
            found = find(words)
            self.gateway.commands[found.name] += 1
            self._check_allowed(found)
            step = found.handler(self, words[1:])
            if self.transaction is not None and not found.while_queued:
                self.transaction.queue(found, step, words)
                return Now(_QUEUED)
        except (Refusal, ValueError) as error:
            if self.transaction is not None and not (found and found.while_queued):
                self.transaction.broken = True
            text = str(error)
            return Now(ErrorReply(text if isinstance(error, Refusal) else f"ERR {text}"))
        return step

    def _check_allowed(self, found: Command) -> None:
        if not (self.authenticated or found.open):
            raise Refusal("NOAUTH Authentication required.")

    def _skip(self, words: Sequence[bytes]) -> Now:
        name = words[0].lower()
        # A transaction of which a part is skipped must not become single commands, or half a transaction.
        if name == b"multi" or (self.transaction is not None and name not in {b"exec", b"discard"}):
            self.transaction = self.transaction or Transaction()
            self.transaction.broken = True
        elif name in {b"exec", b"discard"}:
            self.transaction = None
            self.watched.clear()
        return Now(_SKIPPED)

    async def _add(self, step: Now | Ordered) -> None:
        size = len(step.operation) if isinstance(step, Ordered) else 0
        if self._pending and self._pending_bytes + size > GROUP_BYTES_MAX:
            await self.flush()
            if self._failed:
                step, size = Now(_SKIPPED), 0
        self._pending.append((step, self.protocol))
        self._pending_bytes += size
        if len(self._pending) >= GROUP_COMMANDS_MAX:
            await self.flush()

    # Many

    async def _carry_out(self, steps: Sequence[Ordered]) -> AsyncIterator[list[Reply]]:
        """Yield the replies in order, as they become known; at least once, if only to say that there are none."""
        if self._failed:
            yield [_SKIPPED] * len(steps)
        elif len(steps) < 2:
            yield [await self._guarded(partial(self._one, step)) for step in steps]
        else:
            replies = await self._together(steps)
            if replies is not None:
                yield replies
                return
            half = len(steps) // 2
            for part in (steps[:half], steps[half:]):
                async for replies in self._carry_out(part):
                    yield replies

    async def _together(self, steps: Sequence[Ordered]) -> list[Reply] | None:
        """Carry steps out as one operation; None if it was too much for one, and nothing was changed."""
        try:
            outcomes = kv_groups.read_group(await self.execute(kv_groups.group([step.operation for step in steps])))
        except OperationFailed:
            return None
        except ClientError as error:
            return [self._error(error)] * len(steps)
        except LayoutError:
            raise
        except ValueError:
            return None  # refused before anything was sent
        if outcomes is None:
            raise LayoutError("a group without conditions was not carried out")
        return self.read_group(steps, outcomes)

    async def _one(self, step: Ordered) -> Reply:
        return step.read(await self.execute(step.operation))

    async def _guarded(self, work: Callable[[], Awaitable[Reply]]) -> Reply:
        try:
            return await work()
        except Refusal as error:
            return ErrorReply(str(error))
        except ClientError as error:
            return self._error(error)
        except (LayoutError, struct.error):
            raise
        except ValueError as error:
            return ErrorReply(f"ERR {error}")

    def _error(self, error: ClientError) -> ErrorReply:
        if isinstance(error, NotPermitted):
            return ErrorReply(f"NOPERM {error.reason}")
        if isinstance(error, OperationFailed):
            return ErrorReply(_refused(error.reason))
        self._failed = True
        if isinstance(error, NotExecuted):
            self.gateway.outcomes["not-executed"] += 1
            return ErrorReply(f"NOTEXECUTED {error}")
        self.gateway.outcomes["undecided"] += 1
        return ErrorReply(f"UNDECIDED {error}")


def _refused(reason: str) -> str:
    return f"ERR {_TEXTS.get(reason, reason)}"
