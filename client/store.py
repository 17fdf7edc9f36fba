"""The key-value store's calls, as `client.api.Client` has them, and transactions.

Keys and values are bytes; texts are taken as UTF-8. Every call is one ordered operation unless it says otherwise.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from client.connection import printable
from client.errors import NotAllowed, NotExecuted, NotPermitted, OperationFailed
from client.queries import StaleAnswer
from replica.apps import kv, kv_groups
from replica.core.envelope import Status
from replica.core.layout import LayoutError

SCAN_PAGE = 100
# Between the attempts of a transaction that others disturb: the first pause, and the longest.
PAUSE_S = 0.005
PAUSE_S_MAX = 0.2

Bytes = bytes | str
_Read = TypeVar("_Read")
_Value = TypeVar("_Value")


def to_bytes(value: Bytes) -> bytes:
    """Return bytes as they are, a text as UTF-8; TypeError for anything else."""
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        raise TypeError(f"keys and values are bytes or str, not {type(value).__name__}")
    return value


class KeyValueCalls:
    """Calls of the key-value store, made of `execute` and `stale`."""

    async def execute(self, operation: bytes, *, deadline_s: float | None = None) -> bytes:
        """Run an operation of any application and return its result."""
        raise NotImplementedError

    async def stale(self, operation: bytes, *, deadline_s: float | None = None) -> StaleAnswer:
        """Run a reading operation outside the order."""
        raise NotImplementedError

    def _deadline(self, deadline_s: float | None) -> float:
        raise NotImplementedError

    async def put(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> bool:
        """Set a key; say whether it had a value before."""
        operation = kv.put(to_bytes(key), to_bytes(value))
        return read(kv.read_flag, await self.execute(operation, deadline_s=deadline_s))

    async def get(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """Return a key's value, None if it has none; linearizable."""
        return read(kv.read_value, await self.execute(kv.get(to_bytes(key)), deadline_s=deadline_s))

    async def stale_get(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """Return a value that f+1 replicas hold; perhaps not the latest, because nothing was ordered."""
        answer = await self.stale(kv.get(to_bytes(key)), deadline_s=deadline_s)
        check_stale(answer)
        return read(kv.read_value, answer.value)

    async def delete(self, key: Bytes, *, deadline_s: float | None = None) -> bool:
        """Remove a key; say whether it had a value."""
        operation = kv.delete(to_bytes(key))
        return read(kv.read_flag, await self.execute(operation, deadline_s=deadline_s))

    async def cas(
        self, key: Bytes, expected: Bytes | None, new: Bytes, *, deadline_s: float | None = None
    ) -> kv.CasResult:
        """Set a key if its value is the expected one (None: if it has none); say whether, else what it is."""
        wanted = None if expected is None else to_bytes(expected)
        operation = kv.cas(to_bytes(key), wanted, to_bytes(new))
        return read(kv.read_cas, await self.execute(operation, deadline_s=deadline_s))

    async def incr(self, key: Bytes, amount: int = 1, *, deadline_s: float | None = None) -> int:
        """Add to the decimal number at a key (absent: 0) and return the sum."""
        if not isinstance(amount, int):
            raise TypeError(f"the amount is an int, not {type(amount).__name__}")
        operation = kv.incr(to_bytes(key), amount)
        return read(kv.read_number, await self.execute(operation, deadline_s=deadline_s))

    async def scan_page(
        self,
        prefix: Bytes = b"",
        *,
        limit: int = SCAN_PAGE,
        after: Bytes = b"",
        deadline_s: float | None = None,
    ) -> kv.ScanResult:
        """Return up to `limit` keys with a prefix and their values in byte order, from above `after` on."""
        operation = kv.scan(to_bytes(prefix), limit, to_bytes(after))
        return read(kv.read_scan, await self.execute(operation, deadline_s=deadline_s))

    async def scan(
        self, prefix: Bytes = b"", *, page: int = SCAN_PAGE, deadline_s: float | None = None
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """Yield all keys with a prefix and their values, page by page; each page is one linearizable read."""
        after = b""
        while True:
            found = await self.scan_page(prefix, limit=page, after=after, deadline_s=deadline_s)
            for key, value in found.items:
                yield key, value
            if not found.more or not found.items:
                return
            after = found.items[-1][0]

    # Several keys, conditions

    async def put_new(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> bool:
        """Set a key only if it has no value; say whether it was set."""
        operation = kv_groups.set_key(to_bytes(key), to_bytes(value), kv_groups.IF_ABSENT)
        return read(kv_groups.read_set, await self.execute(operation, deadline_s=deadline_s)).done

    async def append(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> int:
        """Add to the end of a value (absent: nothing); return its new length in bytes."""
        operation = kv_groups.append(to_bytes(key), to_bytes(value))
        return read(kv_groups.read_size, await self.execute(operation, deadline_s=deadline_s))

    async def take(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """Return a key's value and remove it, at one time; None if it has none."""
        return read(kv.read_value, await self.execute(kv_groups.take(to_bytes(key)), deadline_s=deadline_s))

    async def get_many(self, keys: Iterable[Bytes], *, deadline_s: float | None = None) -> list[bytes | None]:
        """Return the values of up to 4096 keys as they are at one time, None where there is none."""
        operation = kv_groups.get_many([to_bytes(key) for key in keys])
        return list(read(kv_groups.read_values, await self.execute(operation, deadline_s=deadline_s)))

    async def put_many(self, values: Mapping[Bytes, Bytes], *, deadline_s: float | None = None) -> None:
        """Set up to 4096 keys at one time."""
        records = [(to_bytes(key), to_bytes(value)) for key, value in values.items()]
        await self.execute(kv_groups.put_many(records), deadline_s=deadline_s)

    async def delete_many(self, keys: Iterable[Bytes], *, deadline_s: float | None = None) -> int:
        """Remove up to 4096 keys at one time; return how many had a value."""
        operation = kv_groups.delete_many([to_bytes(key) for key in keys])
        return read(kv_groups.read_size, await self.execute(operation, deadline_s=deadline_s))

    async def size(self, *, deadline_s: float | None = None) -> int:
        """Return how many keys there are."""
        return read(kv_groups.read_size, await self.execute(kv_groups.size(), deadline_s=deadline_s))

    async def transact(
        self, work: "Callable[[Transaction], Awaitable[_Value]]", *, deadline_s: float | None = None
    ) -> _Value:
        """Run `work`, then do all that it asked for as one operation, if nothing that it read has changed since.

            async def move(transaction):
                left = int(await transaction.get("a") or b"0")
                transaction.put("a", str(left - 1))
                transaction.incr("b")

            await client.transact(move)

        If something changed, nothing was done, and `work` runs again: it must change nothing else. NotExecuted at the
        deadline. OperationFailed if one of its operations is refused; then none is done. Undecided is never repeated.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._deadline(deadline_s)
        pause_s = PAUSE_S
        while True:
            transaction = Transaction(self, ends)
            value = await work(transaction)
            if await transaction.commit():
                return value
            if loop.time() + pause_s >= ends:
                raise NotExecuted("not executed: what the transaction read was changed by others, at every attempt")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)


class Transaction:
    """What a transaction reads and wants done; see `KeyValueCalls.transact`. It sees what it has read, not its writes.

    ends: when its time is over, on the loop's clock.
    """

    def __init__(self, calls: KeyValueCalls, ends: float) -> None:
        self._calls, self._ends = calls, ends
        self._read: dict[bytes, tuple[int, bytes | None]] = {}
        self._operations: list[bytes] = []

    async def get(self, key: Bytes) -> bytes | None:
        """Return a key's value, None if it has none; the transaction is done only if it stays so until then."""
        name = to_bytes(key)
        if name not in self._read:
            both = kv_groups.group([kv_groups.versions([name]), kv.get(name)], all_or_nothing=True)
            outcomes = read(kv_groups.read_group, await self._calls.execute(both, deadline_s=self._left()))
            if outcomes is None or len(outcomes) != 2:
                raise OperationFailed("a group without conditions was not carried out; is this a key-value store?")
            version = read(kv_groups.read_versions, outcomes[0].value)[0]
            self._read[name] = (version, read(kv.read_value, outcomes[1].value))
        return self._read[name][1]

    def put(self, key: Bytes, value: Bytes) -> None:
        """Set a key, if the transaction is done."""
        self._operations.append(kv.put(to_bytes(key), to_bytes(value)))

    def delete(self, key: Bytes) -> None:
        """Remove a key, if the transaction is done."""
        self._operations.append(kv.delete(to_bytes(key)))

    def incr(self, key: Bytes, amount: int = 1) -> None:
        """Add to the whole number at a key, if the transaction is done."""
        self._operations.append(kv.incr(to_bytes(key), amount))

    async def commit(self) -> bool:
        """Do what was asked for; False if something that was read has changed, and nothing was done."""
        guards = [(key, version) for key, (version, _) in self._read.items()]
        operation = kv_groups.group(self._operations, guards, all_or_nothing=True)
        return read(kv_groups.read_group, await self._calls.execute(operation, deadline_s=self._left())) is not None

    def _left(self) -> float:
        # What is too late fails by itself, and says whether it was sent.
        return max(self._ends - asyncio.get_running_loop().time(), 0.001)


def read(reader: Callable[[bytes], _Read], value: bytes) -> _Read:
    """Read a result; OperationFailed if it is not one of the key-value store."""
    try:
        return reader(value)
    except (LayoutError, struct.error) as error:
        raise OperationFailed(
            f"the result is not one of the key-value store ({error}); if this cluster runs another "
            "application, use execute"
        ) from error


def check_stale(answer: StaleAnswer) -> None:
    """Raise ClientError unless f+1 replicas answered a stale read with a value."""
    if answer.status is Status.NOT_ALLOWED:
        raise NotAllowed("not read: this client's key was revoked, or is not allowed")
    if answer.status is Status.NOT_PERMITTED:
        raise not_permitted(answer.value)
    if answer.status is not Status.OK:
        raise refusal(answer.value)


def not_permitted(value: bytes) -> NotPermitted:
    """Return the error for an operation that this client's key may not do."""
    reason = printable(value.decode(errors="replace"))
    return NotPermitted(f"not permitted: {reason}", reason)


def refusal(value: bytes) -> OperationFailed:
    """Return the error for what an application said when it refused an operation."""
    reason = printable(value.decode(errors="replace"))
    return OperationFailed(f"the application refused the operation: {reason}", reason)
