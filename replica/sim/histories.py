"""Is a key's history linearizable? After Wing & Gong (JPDC 1993), remembering visited configurations (Lowe 2017).

An operation takes effect once, at some moment between its invocation and its response. One without a response (the
client gave up, or the run ended) may have taken effect at any later moment, or never. Keys are independent, so each
key's history is searched alone.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from replica.sim.oracle import key_value

NEVER = 1 << 62
# Configurations looked at before a search is given up, which is counted and reported.
STEPS_MAX = 30_000
PUT = 1  # an operation's first byte


@dataclass(slots=True, eq=False)
class Operation:
    """One operation of one client: what it asked, from when to when, and what it was told."""

    client: int
    key: bytes
    raw: bytes
    invoked: int
    returned: int = NEVER
    value: bytes | None = None


@dataclass(slots=True)
class History:
    """All operations of correct clients on keys that nobody else writes."""

    operations: list[Operation] = field(default_factory=list)

    def invoke(self, client: int, key: bytes, raw: bytes, now: int) -> Operation:
        """Note that a client asks for an operation."""
        operation = Operation(client, key, raw, now)
        self.operations.append(operation)
        return operation

    def problems(self, counts: Counter[str]) -> Iterator[str]:
        """Search every key's history; yield what cannot be explained."""
        by_key: dict[bytes, list[Operation]] = {}
        for operation in self.operations:
            by_key.setdefault(operation.key, []).append(operation)
        for key, operations in by_key.items():
            verdict = is_linearizable(operations)
            if verdict is None:
                counts["histories-given-up"] += 1
            elif not verdict:
                yield f"the history of key {key!r}, {len(operations)} operations, has no explanation"


def is_linearizable(operations: list[Operation], steps_max: int = STEPS_MAX) -> bool | None:
    """Say whether one key's operations can be put in order; None if that took too long to find out."""
    todo = sorted(operations, key=lambda o: (o.invoked, o.returned))
    certain = sum(1 << i for i, o in enumerate(todo) if o.value is not None)
    seen: set[tuple[int, bytes | None]] = set()
    # A configuration: which operations have taken effect, and the key's value.
    stack: list[tuple[int, bytes | None]] = [(0, None)]
    while stack:
        done, value = stack.pop()
        if done & certain == certain:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        if len(seen) > steps_max:
            return None
        stack.extend(_successors(todo, done, value))
    return False


def _successors(todo: list[Operation], done: int, value: bytes | None) -> list[tuple[int, bytes | None]]:
    """Return the configurations that one more operation leads to."""
    open_until = NEVER
    found: list[tuple[int, bytes | None]] = []
    undecided: list[tuple[int, bytes | None]] = []
    for i, operation in enumerate(todo):
        if done >> i & 1:
            continue
        # Nothing may take effect before an operation that had ended when it was asked for.
        if operation.invoked > open_until:
            break
        open_until = min(open_until, operation.returned)
        after = _effect(operation, value)
        if after is _IMPOSSIBLE:
            continue
        if operation.value is None:
            # One that changes nothing here need not have happened yet.
            if after != value:
                undecided.append((done | 1 << i, after))  # type: ignore[arg-type]
        elif after == value and operation.raw[0] != PUT:
            # With this answer it changes nothing wherever it stands, so it may as well stand here. (A PUT of the value
            # that is there may be needed later, to put it back.)
            return [(done | 1 << i, value)]
        else:
            found.append((done | 1 << i, after))  # type: ignore[arg-type]
    # The last one is looked at first: operations with answers before those that may never have happened.
    return [*undecided, *reversed(found)]


_IMPOSSIBLE = object()


def _effect(operation: Operation, value: bytes | None) -> object:
    key = operation.key
    state = {} if value is None else {key: value}
    _, result = key_value(state, operation.raw)
    if operation.value is not None and result != operation.value:
        return _IMPOSSIBLE
    return state.get(key)
