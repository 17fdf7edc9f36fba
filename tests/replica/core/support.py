"""What the tests of the core share: hypothesis settings, values laid out by hand, cores driven without a cluster."""

from __future__ import annotations

import os
import struct

from hypothesis import HealthCheck, settings

from replica.core.batch import Batch, make_batch
from replica.core.checkpoint import Header, state_digest
from replica.core.events import Append, Appended, Effect, Event, Tick
from replica.core.execution import Executor
from replica.core.genesis import Genesis
from replica.core.logstate import initial_states
from replica.core.machine import ReplicaCore
from tests.replica.core.harness import FakeLog, heads

# Set it to have the committed vectors and transcripts written anew; then read the difference.
REWRITE = os.environ.get("TRUSTLOG_REWRITE") == "1"


def examples(number: int) -> settings:
    """Hypothesis settings that make a run repeatable, with `number` examples."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack(">H", len(raw)) + raw


def block(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def junk_batch(number: int, cut: tuple[int, ...] = ()) -> Batch:
    """A batch without envelopes, told from others by its time."""
    return make_batch(number, cut, ())


def header_at_zero(genesis: Genesis, executor: Executor) -> Header:
    """The checkpoint's header after the executor's last slot, while the agreed cut stands where the logs begin."""
    logs = tuple(state_digest(state.encode()) for state in initial_states(genesis.n))
    application, table = executor.roots()
    start = (0,) * genesis.n
    return Header(executor.slot, executor.time_ms, application, table, start, tuple(heads(genesis)), logs)


class Lone:
    """One core and its log; peers' groups are handed in by the test. Appended comes at once unless held back."""

    def __init__(self, core: ReplicaCore, log: FakeLog | None = None) -> None:
        self.core = core
        self.log = log or FakeLog(core.number)
        self.hold = False
        self.held: list[Appended] = []
        self.effects: list[Effect] = []
        self.now = 0

    def handle(self, *events: Event) -> list[Effect]:
        """Hand events in; return all effects, those of the answered appends included."""
        found = list(self.core.handle(*events))
        position = 0
        while position < len(found):
            effect = found[position]
            position += 1
            if isinstance(effect, Append):
                appended = Appended(self.log.append(effect.payloads))
                if self.hold:
                    self.held.append(appended)
                else:
                    found.extend(self.core.handle(appended))
        self.effects.extend(found)
        return found

    def release(self) -> list[Effect]:
        """Hand in one Appended that was held back."""
        return self.handle(self.held.pop(0))

    def tick(self, ms: int = 200) -> list[Effect]:
        self.now += ms
        return self.handle(Tick(self.now, self.now))

    def of(self, kind: type) -> list:
        return [e for e in self.effects if isinstance(e, kind)]
