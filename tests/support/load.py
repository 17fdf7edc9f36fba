"""Requests that go on for as long as a test needs them, and what was acknowledged."""

import asyncio
import contextlib

from tests.support.waiting import until

SAMPLED = 200


class Load(contextlib.AbstractAsyncContextManager):
    """Some workers that put ever new keys; ending it checks that none of them failed."""

    def __init__(self, client, workers=4, size=100, deadline_s=30.0, prefix="") -> None:
        self.client = client
        self.acknowledged: dict[str, str] = {}
        self._workers, self._size, self._deadline_s = workers, size, deadline_s
        self._prefix = prefix
        self._tasks: list[asyncio.Task] = []
        self._stopping = False

    @property
    def count(self) -> int:
        return len(self.acknowledged)

    async def _work(self, worker: int) -> None:
        number = 0
        while not self._stopping:
            key = f"{self._prefix}{worker}-{number}"
            value = f"{key}-{'x' * self._size}"
            await self.client.put(key, value, deadline_s=self._deadline_s)
            self.acknowledged[key] = value
            number += 1

    async def more(self, count: int, seconds=30.0) -> None:
        """Wait until so many more are acknowledged."""
        wanted = self.count + count
        await until(lambda: self.count >= wanted or any(task.done() for task in self._tasks), "more done", seconds)

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in range(self._workers)]
        return self

    async def __aexit__(self, kind, *_):
        self._stopping = True
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        if kind is None:
            failed = [error for error in ended if error is not None]
            assert not failed, failed


async def check_acknowledged(client, acknowledged: dict[str, str]) -> None:
    """Check that a sample of what was acknowledged is there."""
    keys = list(acknowledged)
    for key in keys[:: max(1, len(keys) // SAMPLED)]:
        assert await client.get(key) == acknowledged[key].encode(), key
