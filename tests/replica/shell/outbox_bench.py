"""A real outbox over a real store and a real trusted log, with every step written down; and the check of the order."""

import asyncio
import sqlite3
import threading
from dataclasses import dataclass, field

from replica.core.group import VerifiedGroup, encode_group, encode_payloads
from replica.shell.outbox import Outbox, ReleasedGroup
from replica.shell.store import Store
from tests.support.waiting import until
from trustlog import AttestedLog, entry_digest, fold, in_memory

CLUSTER_ID = bytes(32)
CONTEXT = bytes([7]) * 32


@dataclass
class Steps:
    """What happened, in order, from all threads."""

    taken: list[tuple] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, *step) -> None:
        with self._lock:
            self.taken.append(step)


class NotedStore(Store):
    """Notes what a commit made durable, after it returned, as another connection to the file sees it."""

    steps: Steps

    def write(self, received, attested, own):
        super().write(received, attested, own)
        self.steps.note("stored", self.visible())

    def visible(self) -> frozenset[tuple[int, int]]:
        with sqlite3.connect(self.path) as other:
            found = frozenset(other.execute("select log, first from groups").fetchall())
        other.close()
        return found


class NotedLog:
    """A trusted log that notes every append."""

    def __init__(self, log: AttestedLog, steps: Steps) -> None:
        self._log, self._steps = log, steps

    @property
    def last(self):
        return self._log.last

    @property
    def head(self):
        return self._log.head

    def append(self, digests, *, context):
        first = self._log.last + 1
        attestation = self._log.append(digests, context=context)
        self._steps.note("attested", first)
        return attestation


class Author:
    """Another replica: makes real groups of its own log."""

    def __init__(self, number: int) -> None:
        self.number, self.log = number, in_memory()

    def say(self, *payloads: bytes) -> VerifiedGroup:
        first, before = self.log.last + 1, self.log.head
        digests = [entry_digest(payload) for payload in payloads]
        attestation = self.log.append(digests, context=CONTEXT)
        raw = encode_group(attestation, encode_payloads(payloads))
        after = fold(before, first, digests)
        return VerifiedGroup(self.number, first, self.log.last, before, after, payloads, raw)


class Bench:
    """Replica 0's outbox. `received` and `append` are noted before they are handed to it."""

    def __init__(self, folder, outbox_type=Outbox, log=None) -> None:
        self.steps = Steps()
        self.store = NotedStore(folder / "store.sqlite", CLUSTER_ID, 0)
        self.store.steps = self.steps
        self.log = log or in_memory()
        self.released: list[ReleasedGroup] = []
        self.failed: list[BaseException] = []
        self.outbox = outbox_type(
            0, NotedLog(self.log, self.steps), self.store, CONTEXT, self._on_released, self.failed.append
        )
        self.peers = {1: Author(1), 2: Author(2)}

    def _on_released(self, released: ReleasedGroup) -> None:
        self.steps.note("released", released.group.first)
        self.released.append(released)

    def receive(self, author: int, *payloads: bytes) -> None:
        group = self.peers[author].say(*payloads)
        self.steps.note("received", (author, group.first))
        self.outbox.received(group)

    def append(self, *payloads: bytes) -> None:
        self.steps.note("asked", None)
        self.outbox.append(payloads)

    async def say(self, *payloads: bytes) -> None:
        """Append and wait until the group is released, or the outbox failed."""
        count = len(self.released)
        self.append(*payloads)
        await until(lambda: len(self.released) > count or self.failed, "a group released")

    async def close(self) -> None:
        try:
            await self.outbox.close()
        finally:
            self.store.close()
            self.log.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()


def check_order(steps: Steps) -> int:
    """Check that each released group was durable with all its causes, then attested, then released; return how many.

    A cause is every group received before the append was asked for.
    """
    received: set[tuple[int, int]] = set()
    causes: list[frozenset[tuple[int, int]]] = []  # of each append asked for
    stored: frozenset[tuple[int, int]] = frozenset()
    attested: list[int] = []
    released = 0
    for what, value in steps.taken:
        if what == "received":
            received.add(value)
        elif what == "asked":
            causes.append(frozenset(received))
        elif what == "stored":
            assert stored <= value, "something stored was lost"
            stored = value
        elif what == "attested":
            assert (0, value) in stored, f"own group {value} was attested before its payloads were durable"
            missing = causes[len(attested)] - stored
            assert not missing, f"own group {value} was attested before its causes {sorted(missing)} were durable"
            attested.append(value)
        else:
            assert value == attested[released], f"group {value} was released before it was attested"
            released += 1
    assert len(attested) == len(causes) == released, "something asked for was never said"
    return released


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
