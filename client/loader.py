"""Writes a stream of records, many at a time, in bounded memory.

Two records with one key are never under way together, so the later line wins, whatever order requests take.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from client.api import Client, error_of
from client.errors import ClientError
from client.records import Record, RecordError
from replica.apps import kv
from replica.core.envelope import Result, Status

CONCURRENCY = 512
BYTES_UNDER_WAY_MAX = 16 * 1024 * 1024
RECORDS_READ_AT_ONCE = 256
BYTES_READ_AT_ONCE = 4 * 1024 * 1024


class LoadError(Exception):
    """Loading stopped at a record; `__cause__` says why, `line` where, `written` how many were written before."""

    def __init__(self, line: int, written: int) -> None:
        super().__init__(f"line {line}")
        self.line = line
        self.written = written


@dataclass(slots=True)
class Progress:
    """How far a load has come."""

    records: int = 0
    bytes: int = 0


class Loader:
    """One load. `run` returns when every record is written, or raises LoadError after what was under way ended."""

    def __init__(self, client: Client, concurrency: int, advanced: Callable[[Progress], None]) -> None:
        self._client = client
        self._concurrency = concurrency
        self._advanced = advanced
        self.progress = Progress()
        self._under_way: dict[bytes, Record] = {}
        self._bytes_under_way = 0
        self._failure: tuple[int, Exception] | None = None
        self._room = asyncio.Event()

    async def run(self, records: Iterator[Record]) -> Progress:
        """Write all records of the iterator, which is read in a thread because it may block."""
        position = 0
        while not self._has_failed():
            chunk = await asyncio.to_thread(_take, records)
            for record in chunk.records:
                await self._wait_for_room(record.key)
                if self._has_failed():
                    break
                position = record.line
                try:
                    self._submit(record)
                except (ValueError, ClientError) as error:  # a record that no replica would accept
                    self._fail(record.line, error)
            if chunk.error is not None:
                self._fail(position + 1, chunk.error)
            if not chunk.records:
                break
        while self._under_way:
            await self._pause()
        if self._failure is not None:
            line, cause = self._failure
            raise LoadError(line, self.progress.records) from cause
        return self.progress

    async def _wait_for_room(self, key: bytes) -> None:
        while not self._has_failed() and (
            len(self._under_way) >= self._concurrency
            or self._bytes_under_way >= BYTES_UNDER_WAY_MAX
            or key in self._under_way
        ):
            await self._pause()

    async def _pause(self) -> None:
        self._room.clear()
        await self._room.wait()

    def _submit(self, record: Record) -> None:
        outcome = cast("asyncio.Future[Result]", self._client.submit(kv.put(record.key, record.value)))
        self._under_way[record.key] = record
        self._bytes_under_way += len(record.key) + len(record.value)
        outcome.add_done_callback(lambda done: self._done(record, done))

    def _done(self, record: Record, outcome: "asyncio.Future[Result]") -> None:
        del self._under_way[record.key]
        size = len(record.key) + len(record.value)
        self._bytes_under_way -= size
        self._room.set()
        error = outcome.exception()
        if error is None and outcome.result().status is not Status.OK:
            error = error_of(outcome.result())
        if error is None:
            self.progress.records += 1
            self.progress.bytes += size
            self._advanced(self.progress)
        elif isinstance(error, Exception):
            self._fail(record.line, error)

    def _has_failed(self) -> bool:
        return self._failure is not None

    def _fail(self, line: int, error: Exception) -> None:
        # The first line that failed is the one to name.
        if self._failure is None or line < self._failure[0]:
            self._failure = (line, error)


@dataclass(slots=True)
class _Chunk:
    records: list[Record]
    error: Exception | None = None


def _take(records: Iterator[Record]) -> _Chunk:
    taken: list[Record] = []
    size = 0
    try:
        for record in records:
            taken.append(record)
            size += len(record.value)
            if len(taken) >= RECORDS_READ_AT_ONCE or size >= BYTES_READ_AT_ONCE:
                break
    except (RecordError, OSError) as error:
        return _Chunk(taken, error)
    return _Chunk(taken)
