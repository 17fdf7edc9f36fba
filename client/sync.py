"""The synchronous twin of `client.api`: the same calls, with an event loop in a thread of its own.

    with SyncClient.from_dir("demo") as client:
        client.put("greeting", "hello")

It may be used from several threads at once; their concurrent calls share envelopes.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from client.api import DEADLINE_S, SCAN_PAGE, Bytes, Client
from client.queries import ReplicaStatus, StaleAnswer
from replica.apps import kv

_Value = TypeVar("_Value")


class SyncClient:
    """A client of one cluster for code without asyncio: a context manager."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def from_dir(cls, directory: Path | str, *, deadline_s: float = DEADLINE_S) -> Self:
        """Make a client from a cluster directory: cluster.toml and the private folder "client"."""
        return cls(Client.from_dir(directory, deadline_s=deadline_s))

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
