"""The synchronous twin of `client.api`: the same calls, with an event loop in a thread of its own.

    with SyncClient.from_dir("demo") as client:
        client.put("greeting", "hello")

It may be used from several threads at once; their concurrent calls share envelopes.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from client.api import DEADLINE_S, SCAN_PAGE, Bytes, Client, Watching
from client.queries import ReplicaStatus, StaleAnswer
from client.store import KeyValueCalls, Transaction
from client.watch import Change, Position, Watch
from replica.apps import kv
from replica.cluster.clusterfile import ClusterFile
from replica.cluster.passphrase import PassphraseSource
from trustlog.receipts import Receipt

_Value = TypeVar("_Value")


class SyncClient:
    """A client of one cluster for code without asyncio: a context manager."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def from_dir(
        cls, directory: Path | str, *, deadline_s: float = DEADLINE_S, passphrase: PassphraseSource | None = None
    ) -> Self:
        """Make a client from a cluster directory, as `Client.from_dir` does."""
        return cls(Client.from_dir(directory, deadline_s=deadline_s, passphrase=passphrase))

    @property
    def public_key(self) -> bytes:
        """The key by which replicas know this client, 65 bytes."""
        return self._client.public_key

    @property
    def cluster(self) -> ClusterFile:
        """See Client.cluster."""
        return self._client.cluster

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError("this client is open already; make another one")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trustlog client", daemon=True)
        self._thread.start()
        try:
            self._call(self._client.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect and end the thread; does nothing the second time."""
        if self._thread is None:
            return
        try:
            self._call(self._client.close())
        finally:
            self._stop()

    def execute(self, operation: bytes, *, deadline_s: float | None = None) -> bytes:
        """See Client.execute."""
        return self._call(self._client.execute(operation, deadline_s=deadline_s))

    def with_receipt(
        self, call: Callable[[KeyValueCalls], Awaitable[_Value]], *, deadline_s: float | None = None
    ) -> tuple[_Value, Receipt]:
        """See Client.with_receipt: `client.with_receipt(lambda calls: calls.put("greeting", "hello"))`."""
        return self._call(self._client.with_receipt(call, deadline_s=deadline_s))

    def stale(self, operation: bytes, *, deadline_s: float | None = None) -> StaleAnswer:
        """See Client.stale."""
        return self._call(self._client.stale(operation, deadline_s=deadline_s))

    def status(self, *, deadline_s: float | None = None) -> list[ReplicaStatus]:
        """See Client.status."""
        return self._call(self._client.status(deadline_s=deadline_s))

    def put(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> bool:
        """See Client.put."""
        return self._call(self._client.put(key, value, deadline_s=deadline_s))

    def get(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """See Client.get."""
        return self._call(self._client.get(key, deadline_s=deadline_s))

    def stale_get(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """See Client.stale_get."""
        return self._call(self._client.stale_get(key, deadline_s=deadline_s))

    def delete(self, key: Bytes, *, deadline_s: float | None = None) -> bool:
        """See Client.delete."""
        return self._call(self._client.delete(key, deadline_s=deadline_s))

    def cas(self, key: Bytes, expected: Bytes | None, new: Bytes, *, deadline_s: float | None = None) -> kv.CasResult:
        """See Client.cas."""
        return self._call(self._client.cas(key, expected, new, deadline_s=deadline_s))

    def incr(self, key: Bytes, amount: int = 1, *, deadline_s: float | None = None) -> int:
        """See Client.incr."""
        return self._call(self._client.incr(key, amount, deadline_s=deadline_s))

    def scan_page(
        self,
        prefix: Bytes = b"",
        *,
        limit: int = SCAN_PAGE,
        after: Bytes = b"",
        deadline_s: float | None = None,
    ) -> kv.ScanResult:
        """See Client.scan_page."""
        return self._call(self._client.scan_page(prefix, limit=limit, after=after, deadline_s=deadline_s))

    def scan(
        self, prefix: Bytes = b"", *, page: int = SCAN_PAGE, deadline_s: float | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """See Client.scan."""
        after = b""
        while True:
            found = self.scan_page(prefix, limit=page, after=after, deadline_s=deadline_s)
            yield from found.items
            if not found.more or not found.items:
                return
            after = found.items[-1][0]

    def put_new(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> bool:
        """See Client.put_new."""
        return self._call(self._client.put_new(key, value, deadline_s=deadline_s))

    def append(self, key: Bytes, value: Bytes, *, deadline_s: float | None = None) -> int:
        """See Client.append."""
        return self._call(self._client.append(key, value, deadline_s=deadline_s))

    def take(self, key: Bytes, *, deadline_s: float | None = None) -> bytes | None:
        """See Client.take."""
        return self._call(self._client.take(key, deadline_s=deadline_s))

    def get_many(self, keys: Iterable[Bytes], *, deadline_s: float | None = None) -> list[bytes | None]:
        """See Client.get_many."""
        return self._call(self._client.get_many(keys, deadline_s=deadline_s))

    def put_many(self, values: Mapping[Bytes, Bytes], *, deadline_s: float | None = None) -> None:
        """See Client.put_many."""
        self._call(self._client.put_many(values, deadline_s=deadline_s))

    def delete_many(self, keys: Iterable[Bytes], *, deadline_s: float | None = None) -> int:
        """See Client.delete_many."""
        return self._call(self._client.delete_many(keys, deadline_s=deadline_s))

    def size(self, *, deadline_s: float | None = None) -> int:
        """See Client.size."""
        return self._call(self._client.size(deadline_s=deadline_s))

    def transact(self, work: "Callable[[SyncTransaction], _Value]", *, deadline_s: float | None = None) -> _Value:
        """See Client.transact; `work` runs in a thread of its own."""

        async def run(transaction: Transaction) -> _Value:
            twin = SyncTransaction(self._call, transaction)
            return await asyncio.to_thread(work, twin)

        return self._call(self._client.transact(run, deadline_s=deadline_s))

    def watch(
        self, prefix: Bytes = b"", *, after: Position | None = None, deadline_s: float | None = None
    ) -> "SyncWatch":
        """See Client.watch: `with client.watch("user/") as changes`, then `for change in changes`."""
        return SyncWatch(self._call, self._client.watch(prefix, after=after, deadline_s=deadline_s))

    def slot(self, *, deadline_s: float | None = None) -> int:
        """See Client.slot."""
        return self._call(self._client.slot(deadline_s=deadline_s))

    def _call(self, call: Coroutine[Any, Any, _Value]) -> _Value:
        if self._loop is None:
            call.close()
            raise RuntimeError("this client is not open; use it in `with`")
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _stop(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class SyncTransaction:
    """A transaction for code without asyncio; see `client.store.Transaction`."""

    def __init__(self, call: Callable[[Coroutine[Any, Any, Any]], Any], transaction: Transaction) -> None:
        self._call = call
        self._transaction = transaction
        self.put, self.delete, self.incr = transaction.put, transaction.delete, transaction.incr

    def get(self, key: Bytes) -> bytes | None:
        """See Transaction.get."""
        value: bytes | None = self._call(self._transaction.get(key))
        return value


class SyncWatch:
    """A watch for code without asyncio: a context manager, then an iterator that blocks until something changes."""

    def __init__(self, call: Callable[[Coroutine[Any, Any, Any]], Any], watching: Watching) -> None:
        self._call, self._watching = call, watching
        self._watch: Watch | None = None

    def __enter__(self) -> Self:
        self._watch = self._call(self._watching.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(self._watching.__aexit__(kind, error, traceback))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        if self._watch is None:
            raise RuntimeError("this watch has not begun; use it in `with`")
        try:
            change: Change = self._call(self._watch.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None
        return change

    @property
    def position(self) -> Position:
        """Up to where changes were seen; pass it as `after` to resume."""
        if self._watch is None:
            raise RuntimeError("this watch has not begun; use it in `with`")
        return self._watch.position
