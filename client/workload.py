"""Load on anything that takes puts: closed loop and open loop.

Closed loop: so many workers, each with one operation under way, start the next at once. It finds what a system can do;
but a system that stalls is asked less, so its stalls are hardly seen (coordinated omission).

Open loop: operations are *meant* to start at a rate, whatever became of those before, as requests of many people come.
Latency counts from the intended start. A stall is then seen by everything that was meant to start while it lasted,
and a load generator that comes late itself makes latencies longer, never shorter. How late it came is recorded too.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter  # a loop may count in whole milliseconds
from typing import Generic, Protocol, TypeVar

from client.histogram import Recorder

# Above this an open loop starts nothing more until something ends: memory is bounded, and what waits counts as waiting.
UNDER_WAY_MAX = 16_384

Now = Callable[[], float]
Outcome = TypeVar("Outcome")


class Sink(Protocol[Outcome]):
    """What is loaded: one client, or one connection, of some system."""

    def put(self, key: bytes, value: bytes) -> Awaitable[Outcome]:
        """Begin an operation; what is returned ends when it is done."""

    def check(self, outcome: Outcome) -> None:
        """Raise if the outcome is no success."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is put: each operation takes the next key, and all the same value."""

    keys: Sequence[bytes]
    value: bytes


@dataclass(slots=True)
class Recording:
    """What a loop did, in seconds.

    latencies: of what was done; in an open loop also, as far as they had waited, of operations that were due and not
    started when it ended, which `not_started` counts. lateness: of the load generator itself, open loop only.
    """

    seconds: float = 0.0
    operations: int = 0
    not_started: int = 0
    latencies: Recorder = field(default_factory=Recorder)
    lateness: Recorder = field(default_factory=Recorder)


async def closed_loop(
    sinks: Sequence[Sink[Outcome]], concurrency: int, seconds: float, content: Content, now: Now = perf_counter
) -> Recording:
    """Keep `concurrency` operations under way, shared evenly by the sinks, for `seconds`."""
    recording = Recording()
    record = recording.latencies.record
    keys, value = content.keys, content.value
    began = now()
    ends = began + seconds

    async def worker(number: int) -> None:
        sink = sinks[number % len(sinks)]
        put, check = sink.put, sink.check
        # Each worker walks through all keys from its own place, so that all loads write to the same keys.
        position = number * (len(keys) // concurrency)
        ended = began
        while ended < ends:  # so once at least, however late this worker gets its turn
            started = now()
            check(await put(keys[position % len(keys)], value))
            ended = now()
            record(ended - started)
            position += 1

    async with asyncio.TaskGroup() as group:
        for number in range(concurrency):
            group.create_task(worker(number))
    recording.seconds = now() - began
    recording.operations = recording.latencies.count
    return recording


async def open_loop(
    sinks: Sequence[Sink[Outcome]], rate: float, seconds: float, content: Content, now: Now = perf_counter
) -> Recording:
    """Start `rate` operations per second, evenly, for `seconds`, in turn at the sinks; wait until all have ended."""
    loop = OpenLoop(sinks, rate, seconds, content, now)
    await loop.run()
    return loop.recording


class OpenLoop(Generic[Outcome]):
    """One open loop. Operation i is meant to start i / rate seconds after the beginning, or with its burst's first."""

    def __init__(
        self,
        sinks: Sequence[Sink[Outcome]],
        rate: float,
        seconds: float,
        content: Content,
        now: Now,
        burst: int = 1,
    ) -> None:
        self.recording = Recording()
        self._sinks, self._content, self._now = sinks, content, now
        self._rate, self._seconds = rate, seconds
        self._burst = burst
        self._began = 0.0
        self._total = max(1, math.ceil(rate * seconds))
        self._started = 0
        self._under_way = 0
        self._failure: BaseException | None = None
        self._ended: asyncio.Future[None] | None = None  # set when any operation ends, if somebody waits for that

    async def run(self) -> None:
        """Run it; the first error of an operation is raised when all have ended."""
        began = self._began = self._now()
        while self._started < self._total and self._failure is None:
            moment = self._now()
            while self._started < self._total and self._intended() <= moment and self._under_way < UNDER_WAY_MAX:
                self._start()
            if self._under_way >= UNDER_WAY_MAX:
                if moment - began >= self._seconds:
                    break
                await self._any_end()
            elif self._started < self._total:
                await asyncio.sleep(max(0.0, self._intended() - self._now()))
        self._give_up_waiting()
        while self._under_way:
            await self._any_end()
        self.recording.seconds = self._now() - began
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Start nothing more, long before the time is over; `run` returns when what is under way has ended."""
        self._total = self._started

    def _intended(self) -> float:
        return self._began + self._started // self._burst * self._burst / self._rate

    def _start(self) -> None:
        intended, number = self._intended(), self._started
        sink, keys = self._sinks[number % len(self._sinks)], self._content.keys
        self.recording.lateness.record(max(0.0, self._now() - intended))
        self._started += 1
        self._under_way += 1
        operation = asyncio.ensure_future(sink.put(keys[number % len(keys)], self._content.value))
        operation.add_done_callback(partial(self._on_end, sink, intended))

    def _on_end(self, sink: Sink[Outcome], intended: float, operation: "asyncio.Future[Outcome]") -> None:
        self._under_way -= 1
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        try:
            sink.check(operation.result())
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised by `run`
            self._failure = self._failure or error
            return
        self.recording.operations += 1
        self.recording.latencies.record(max(0.0, self._now() - intended))

    def _give_up_waiting(self) -> None:
        """Count what was due and found no room: it waited at least until now."""
        while self._started < self._total and self._failure is None:
            self.recording.not_started += 1
            self.recording.latencies.record(max(0.0, self._now() - self._intended()))
            self._started += 1

    async def _any_end(self) -> None:
        self._ended = asyncio.get_running_loop().create_future()
        await self._ended
