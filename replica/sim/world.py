"""Virtual time and a virtual network: everything that happens follows from one seed.

Events are ordered by (time, sequence number), so two that fall on the same millisecond happen in the order in which
they were scheduled. Nothing depends on the order of a set, on addresses, or on a clock. Every event that is delivered
goes into a running SHA-256, the *trace hash*: the same seed gives the same hash, or the simulator itself is wrong.
"""

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

Callback = Callable[[], None]


class World:
    """The event heap, the clock, the randomness and the trace of one run."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.random = random.Random(seed)  # noqa: S311 - reproducible on purpose, no secrets here
        self.now = 0
        self.events = 0
        self.counts = Counter[str]()
        self._trace = trace
        self._heap: list[tuple[int, int, Callback]] = []
        self._scheduled = 0
        self._hash = hashlib.sha256()

    def at(self, time: int, callback: Callback) -> None:
        """Call `callback` at `time`, or now if that is past."""
        self._scheduled += 1
        heapq.heappush(self._heap, (max(time, self.now), self._scheduled, callback))

    def after(self, delay: int, callback: Callback) -> None:
        """Call `callback` in `delay` milliseconds."""
        self.at(self.now + delay, callback)

    def note(self, text: str) -> None:
        """Put what happens into the trace."""
        line = f"{self.now} {text}"
        self._hash.update(line.encode() + b"\n")
        if self._trace is not None:
            self._trace(line)

    def remark(self, text: str) -> None:
        """Show a reader of the trace something that is not part of the hash."""
        if self._trace is not None:
            self._trace(f"{self.now} # {text}")

    @property
    def is_traced(self) -> bool:
        """Say whether somebody reads the trace."""
        return self._trace is not None

    def trace_hash(self) -> str:
        """Return the hash of everything that happened so far."""
        return self._hash.hexdigest()

    def run(self, until: int, done: Callable[[], bool] = lambda: False) -> None:
        """Let events happen up to and including the time `until`, or until `done`, which is asked now and then."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, callback = heapq.heappop(self._heap)
            callback()
            self.events += 1
            if self.events % 64 == 0 and done():
                return
        self.now = max(self.now, until)


@dataclass(slots=True)
class Weather:
    """How the network behaves: delays in milliseconds, the rest probabilities per message."""

    delay_min: int = 1
    delay_max: int = 10
    loss: float = 0.0
    duplicate: float = 0.0
    straggle: float = 0.0  # a message that takes `straggle_max` milliseconds or less, but long
    straggle_max: int = 500


class Node(Protocol):
    """Somebody who can be sent a message."""

    def receive(self, source: int, message: object) -> None:
        """Take a message that the network says comes from `source`."""


@dataclass(slots=True)
class Network:
    """Carries messages between nodes, which are known by number; replicas from 0, clients from 100.

    blocked: (source, destination) pairs between which nothing arrives; one-way on purpose.
    stalled: (source, destination) -> the time before which nothing arrives: delayed, not lost.
    """

    world: World
    weather: Weather
    nodes: dict[int, Node] = field(default_factory=dict)
    blocked: dict[tuple[int, int], None] = field(default_factory=dict)
    stalled: dict[tuple[int, int], int] = field(default_factory=dict)

    def send(self, source: int, destination: int, message: object, label: str, hold: int = 0) -> None:
        """Send a message; `label` says in the trace what it is, `hold` delays it further."""
        world, weather, chance = self.world, self.weather, self.world.random
        if weather.loss and chance.random() < weather.loss:
            world.counts["net-lost"] += 1
            return
        copies = 1
        if weather.duplicate and chance.random() < weather.duplicate:
            world.counts["net-duplicated"] += 1
            copies = 2
        for _ in range(copies):
            delay = chance.randint(weather.delay_min, weather.delay_max)
            if weather.straggle and chance.random() < weather.straggle:
                world.counts["net-straggled"] += 1
                delay += chance.randint(weather.straggle_max // 2, weather.straggle_max)
            due = max(world.now + delay + hold, self.stalled.get((source, destination), 0))
            world.at(due, lambda: self._deliver(source, destination, message, label))

    def _deliver(self, source: int, destination: int, message: object, label: str) -> None:
        if (source, destination) in self.blocked:
            self.world.counts["net-blocked"] += 1
            return
        node = self.nodes.get(destination)
        if node is not None:
            self.world.note(f"{source}>{destination} {label}")
            node.receive(source, message)

    def heal(self, weather: Weather) -> None:
        """End partitions and stalls; the network behaves as `weather` says from now on."""
        self.weather = weather
        self.blocked.clear()
        self.stalled.clear()
        self.world.note("network heals")
