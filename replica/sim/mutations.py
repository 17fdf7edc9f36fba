"""Entries malformed in each of their fields.

A mutation takes a right payload and changes one field: to a neighbour's value, to nothing, to the largest number, to
noise; or it cuts the payload, or adds to it. What results may be malformed, a broken rule, a lie, a wait for ever, or
by chance right: whatever it is, correct replicas must all treat it alike.
"""

import random

from replica.core.entries import (
    CHECKPOINT,
    COMMIT,
    NEW_VIEW,
    PRE_PREPARE,
    PREPARE,
    SUSPECT,
    VIEW_CHANGE,
)

# kind -> field -> (offset, size); the layout is that of `replica.core.entries` and `replica.core.batch`.
FIELDS: dict[int, dict[str, tuple[int, int]]] = {
    PRE_PREPARE: {"view": (1, 8), "slot": (9, 8), "time": (17, 8), "positions": (25, 2), "cut-or-envelopes": (27, 8)},
    PREPARE: {"view": (1, 8), "slot": (9, 8), "digest": (17, 32)},
    COMMIT: {"view": (1, 8), "slot": (9, 8), "digest": (17, 32)},
    CHECKPOINT: {"slot": (1, 8), "digest": (9, 32)},
    SUSPECT: {"view": (1, 8)},
    VIEW_CHANGE: {"view": (1, 8)},
    NEW_VIEW: {"view": (1, 8), "count": (9, 2), "replica": (11, 2), "index": (13, 8)},
}
NAMES = {
    PRE_PREPARE: "pre-prepare",
    PREPARE: "prepare",
    COMMIT: "commit",
    CHECKPOINT: "checkpoint",
    SUSPECT: "suspect",
    VIEW_CHANGE: "view-change",
    NEW_VIEW: "new-view",
}
WHOLE = ("kind", "short", "long")


def fields_of(kind: int) -> tuple[str, ...]:
    """Return the names of what can be changed in an entry of this kind."""
    return (*FIELDS[kind], *WHOLE, *(("signature",) if kind == PRE_PREPARE else ()))


# "new-view-count" and so on -> (kind, field)
MUTATIONS = {f"{NAMES[kind]}-{field}": (kind, field) for kind in FIELDS for field in fields_of(kind)}


def mutate(payload: bytes, field: str, chance: random.Random) -> bytes:
    """Change one field of a right payload."""
    if field == "kind":
        return bytes([chance.choice((0, 8, 255, 1 + payload[0] % 7))]) + payload[1:]
    if field == "short":
        return payload[: chance.randrange(1, len(payload))]
    if field == "long":
        return payload + chance.randbytes(chance.choice((1, 8, 64)))
    if field == "signature":
        # The last bytes of a proposal that holds an envelope are its client's signature.
        return payload[:-1] + bytes([payload[-1] ^ 1])
    at, size = FIELDS[payload[0]][field]
    old = payload[at : at + size]
    return payload[:at] + _other(old, chance) + payload[at + len(old) :]


def _other(old: bytes, chance: random.Random) -> bytes:
    if len(old) > 8:
        return chance.choice((bytes(len(old)), chance.randbytes(len(old))))
    number: int = int.from_bytes(old, "big")
    top: int = (1 << 8 * len(old)) - 1
    near = number + chance.choice((-2, -1, 1, 1, 2, 3))
    return min(max(0, chance.choice((near, near, 0, top, top // 2, number ^ 1))), top).to_bytes(len(old), "big")
