"""Watches the correct replicas and clients, and says what must never happen.

Takes bytes, numbers and the cores' effects; none of the code that decides is used. What can be judged at once is
judged at once; `settle` judges the whole run, with the model of `replica.sim.oracle` and the histories of
`replica.sim.histories`.

kinds of violation
  agreement         two correct replicas executed different batches at one slot, or one skipped a slot
  state             two correct replicas have different states after one slot, or another state than the model
  exactly-once      an operation was carried out twice, or one that should not have been
  durability        an acknowledged result is not what the agreed order gives, or is gone
  linearizability   a key's history has no order that explains it
  log-conflict      one trusted log attested two values at one index
  forked            a correct replica noticed that; the text names the log
  accuracy          a correct replica was exposed, called a liar, or its log called forked
  bounds            a collection grew beyond its limit, or an invariant does not hold
  halted            a correct replica stopped
  rollback          a replica whose disk and trusted state were rolled back did not stop
  exception         a core raised
  reply             a correct client was answered twice, or with an error that it could not have earned
  liveness          after the network healed, a correct client's request was not answered
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from replica.core import events
from replica.core.group import VerifiedGroup
from replica.sim.histories import History
from replica.sim.oracle import Oracle

# A size, or what it may be at a time, in milliseconds since the beginning.
Bound = int | Callable[[int], int]
LOOK_EVERY = 50
VIOLATIONS_MAX = 20


class Sized(Protocol):
    """What of a core the witness looks at."""

    def sizes(self) -> dict[str, int]:
        """Return the sizes of everything that grows."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must never happen, and did."""

    kind: str
    text: str
    at_ms: int


@dataclass(slots=True)
class _Life:
    """One correct replica between its start, or restart, and its end."""

    executed: int = 0
    since: int = 0
    looked: int = 0
    view: int = 0
    opened: set[int] = field(default_factory=lambda: {0})


class Witness:
    """Collects what happened to correct replicas and clients.

    correct: numbers of the correct replicas. bounds: name of a collection -> its largest size, or that at a time.
    """

    def __init__(
        self, cluster_id: bytes, n: int, correct: frozenset[int], oracle: Oracle, bounds: Mapping[str, Bound]
    ) -> None:
        self.cluster_id = cluster_id
        self._n = n
        self.correct = correct
        self.violations: list[Violation] = []
        self.counts = Counter[str]()
        self.history = History()
        self.clock: Callable[[], int] = lambda: 0
        self._oracle = oracle
        self._bounds = bounds
        self._lives: dict[int, _Life] = {}
        self._agreed: list[bytes] = []  # the batch of slot i + 1
        self._digests: dict[tuple[str, int], tuple[int, bytes]] = {}  # of what, slot -> (replica, digest)
        self._applied: dict[int, dict[int, list[tuple[bytes, bytes]]]] = {}  # replica -> slot -> (client, operation)
        self._acknowledged: list[tuple[bytes, bytes, int, int, bytes]] = []
        self._indexes: dict[tuple[bytes, int, int], bytes] = {}  # (key, log, index) -> digest of its payload
        self._seen: set[bytes] = set()
        self._openings: set[tuple[int, int]] = set()
        self._excused: set[int] = set()

    def violation(self, kind: str, text: str) -> None:
        """Note a violation."""
        self.counts[f"violation-{kind}"] += 1
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(Violation(kind, text, self.clock()))

    # Replicas.

    def excuse(self, replica: int) -> None:
        """Take in that a replica was rolled back: it must stop, and say that this is why."""
        self._excused.add(replica)

    def born(self, replica: int, slot: int = 0) -> None:
        """Take in that a correct replica starts, or starts again, with the state after `slot`."""
        self._lives[replica] = _Life(executed=slot, since=slot)
        self._applied[replica] = {}

    def executed(self, replica: int, slot: int, batch: bytes) -> None:
        """Take in that a correct replica executed a batch."""
        life = self._lives[replica]
        if slot != life.executed + 1:
            self.violation("agreement", f"replica {replica} executed slot {slot} after slot {life.executed}")
        life.executed = slot
        if slot > len(self._agreed):
            if slot == len(self._agreed) + 1:
                self._agreed.append(batch)
                self.counts["slots"] += 1
                if len(batch) <= 12 + 8 * 64 and not int.from_bytes(batch[-2:], "big"):
                    self.counts["slots-null"] += 1
        elif self._agreed[slot - 1] != batch:
            ours, theirs = (hashlib.sha256(b).hexdigest()[:8] for b in (batch, self._agreed[slot - 1]))
            self.violation("agreement", f"replica {replica} executed {ours} at slot {slot}, another one {theirs}")

    def applied(self, replica: int, slot: int, client: bytes, operation: bytes) -> None:
        """Take in that a correct replica carried out an operation."""
        self._applied[replica].setdefault(slot, []).append((client, operation))

    def state_digest(self, replica: int, slot: int, digest: bytes, of: str = "application and clients") -> None:
        """Take in a correct replica's digest of its state after a slot."""
        first, known = self._digests.setdefault((of, slot), (replica, digest))
        if known != digest:
            self.violation("state", f"replicas {first} and {replica} have different states after slot {slot}")

    def heard(self, replica: int, effect: events.Effect, accused: int | None = None) -> None:
        """Take in any other effect of a correct replica's core; accused: the node of the log that it names."""
        if isinstance(effect, events.Stable):
            self.counts["stable"] += 1
            self.state_digest(replica, effect.slot, effect.digest, "checkpoint")
        elif isinstance(effect, events.ViewEntered):
            self._entered(replica, effect.view)
        elif isinstance(effect, events.ViewOpened):
            self._lives[replica].opened.add(effect.view)
            self._openings.add((effect.view, effect.top - effect.base))
        elif isinstance(effect, events.Exposed):
            self.counts[f"exposed-{effect.violation.rule}"] += 1
            self._accuse(
                replica, _either(accused, effect.log), f"exposed ({effect.violation.rule}: {effect.violation.text})"
            )
        elif isinstance(effect, events.Lied):
            self.counts["lies"] += 1
            self._accuse(replica, _either(accused, effect.log), f"called a liar ({effect.text})")
        elif isinstance(effect, events.Forked):
            self._accuse(replica, _either(accused, effect.log), "called forked")
            self.violation("forked", f"replica {replica} noticed that log {effect.log} is forked at {effect.index}")
        elif isinstance(effect, events.Halt):
            if replica in self._excused and "rolled back" in effect.reason:
                self.counts["rollbacks-refused"] += 1
                return
            self.violation("halted", f"replica {replica}: {effect.reason}")

    def _entered(self, replica: int, view: int) -> None:
        life = self._lives[replica]
        self.counts["views-entered"] += 1
        if life.view not in life.opened:
            self.counts["views-left-unopened"] += 1
        if (view - 1) % self._n not in self.correct and view % self._n not in self.correct:
            self.counts["consecutive-faulty-primaries"] += 1
        life.view = view

    def _accuse(self, by: int, log: int, how: str) -> None:
        if log in self.correct:
            self.violation("accuracy", f"replica {log}, which is correct, was {how} by replica {by}")

    def look_at(self, replica: int, core: Sized) -> None:
        """Look now and then at how large a core has become."""
        life = self._lives[replica]
        life.looked += 1
        if life.looked % LOOK_EVERY:
            return
        for name, size in core.sizes().items():
            bound = self._bounds.get(name)
            if bound is None:
                continue
            limit = bound(self.clock()) if callable(bound) else bound
            fullest = f"percent-of-bound-{name}-max"
            self.counts[fullest] = max(self.counts[fullest], 100 * size // limit)
            if size > limit:
                self.violation("bounds", f"replica {replica} holds {size} {name}, the limit is {limit}")

    # Logs.

    def saw_group(self, group: VerifiedGroup, key: bytes = b"") -> None:
        """Take in a group whose attestation is valid; key: its log's, if other logs had its author's number."""
        mark = group.head_before + group.head_after
        if mark in self._seen:
            return
        self._seen.add(mark)
        self.counts["groups"] += 1
        for index, payload in enumerate(group.payloads, group.first):
            digest = hashlib.sha256(payload).digest()
            if self._indexes.setdefault((key, group.author, index), digest) != digest:
                self.violation("log-conflict", f"log {group.author} has two values at index {index}")

    # Clients.

    def acknowledged(self, client: bytes, operation: bytes, status: int, slot: int, value: bytes) -> None:
        """Take in a result that a correct client accepted."""
        self.counts["acknowledged"] += 1
        self._acknowledged.append((client, operation, status, slot, value))

    # The whole run.

    def settle(self, states: dict[int, tuple[int, dict[bytes, bytes]]]) -> None:
        """Judge the run. states: correct replica -> its last slot, and its application's whole state."""
        self.counts["views-opened"] = len({view for view, _ in self._openings})
        self._replay(states)
        for problem in self.history.problems(self.counts):
            self.violation("linearizability", problem)

    def _replay(self, states: dict[int, tuple[int, dict[bytes, bytes]]]) -> None:
        oracle = self._oracle
        results: Counter[tuple[bytes, bytes, int, int, bytes]] = Counter()
        for slot, batch in enumerate(self._agreed, 1):
            done = oracle.execute(slot, batch)
            carried_out = [(d.client, d.operation) for d in done]
            for replica in sorted(self._applied):
                life = self._lives[replica]
                if life.since < slot <= life.executed and self._applied[replica].get(slot, []) != carried_out:
                    self.violation(
                        "exactly-once", f"replica {replica} carried out other operations at slot {slot} than agreed"
                    )
            results.update((d.client, d.operation, d.status, slot, d.value) for d in done)
            for replica, (reached, state) in sorted(states.items()):
                if reached == slot and state != oracle.state:
                    self.violation("state", f"replica {replica}'s state after slot {slot} is not what the model has")
        for accepted in self._acknowledged:
            results[accepted] -= 1
            if results[accepted] < 0:
                _, operation, status, slot, value = accepted
                self.violation(
                    "durability",
                    f"a client was told that {operation!r} gave {value!r} (status {status}) at slot {slot}; it did not",
                )


def _either(node: int | None, log: int) -> int:
    return log if node is None else node
