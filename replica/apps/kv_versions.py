"""Versions of keys, for whoever reads first and writes later only if nothing happened in between.

A version is a number that a key has from the time somebody asks for it until the key is written or deleted; equal
bytes written again end it too. Whoever asks meanwhile gets the same number. At most VERSIONS_MAX keys have one: the
newest takes the place of the oldest, whose holders are then told that the key changed, which costs them another try.

The records lie in the store's own part of the state, so they are agreed, digested and transferred like everything:

    RESERVED "n"                        u64 the last number given, u32 how many keys have one
    RESERVED "k" SHA-256(key)           u64 the key's version
    RESERVED "r" u16 version mod MAX    32 SHA-256(key), u64 version: who got it, so that the oldest can be found

A store in which nobody ever asked has none of them, and is changed by the older operations exactly as before there
were versions.
"""

import hashlib
import struct
from collections.abc import Sequence

from replica.application import OperationError
from replica.apps.kv_layout import RESERVED, U16
from replica.core.layout import U64
from replica.core.state import BucketedMap

VERSIONS_MAX = 1024

_TABLE = RESERVED + b"n"
_KEY = RESERVED + b"k"
_RING = RESERVED + b"r"
_COUNTS = struct.Struct(">QI")
_PLACE = struct.Struct(">32sQ")


def put(state: BucketedMap, key: bytes, value: bytes) -> None:
    """Set a key, which ends its version; OperationError, and nothing is changed, if its bucket of the state is full."""
    try:
        state.put(key, value)
    except ValueError as error:
        raise OperationError(str(error)) from error
    _end(state, key)


def put_all(state: BucketedMap, records: Sequence[tuple[bytes, bytes]]) -> None:
    """Set keys, which ends their versions; OperationError, and none is changed, if there is no room for all."""
    before: list[tuple[bytes, bytes | None]] = []
    try:
        for key, value in records:
            old = state.get(key)
            state.put(key, value)
            before.append((key, old))
    except ValueError as error:
        # Backwards, so that each step is to a state that was there, and had room.
        for key, old in reversed(before):
            if old is None:
                state.delete(key)
            else:
                state.put(key, old)
        raise OperationError(str(error)) from error
    for key, _ in records:
        _end(state, key)


def delete(state: BucketedMap, key: bytes) -> bool:
    """Remove a key, which ends its version; say whether it was there."""
    if not state.delete(key):
        return False
    _end(state, key)
    return True


def issue(state: BucketedMap, key: bytes) -> int:
    """Return the version of a key, a new one if it has none. A key without a value has versions too."""
    name = _KEY + hashlib.sha256(key).digest()
    present = state.get(name)
    if present is not None:
        known: int = U64.unpack(present)[0]
        return known
    last, live = _counts(state)
    version = last + 1
    place = _RING + U16.pack(version % VERSIONS_MAX)
    before = state.get(place)
    if before is not None:
        digest, older = _PLACE.unpack(before)
        if state.get(_KEY + digest) == U64.pack(older):
            state.delete(_KEY + digest)
            live -= 1
    # There are few and short records: what fills a bucket must not keep anybody from asking.
    state.put_unbounded(place, _PLACE.pack(name[len(_KEY) :], version))
    state.put_unbounded(name, U64.pack(version))
    state.put_unbounded(_TABLE, _COUNTS.pack(version, live + 1))
    return version


def holds(state: BucketedMap, key: bytes, version: int) -> bool:
    """Say whether a key still has this version."""
    return state.get(_KEY + hashlib.sha256(key).digest()) == U64.pack(version)


def own_records(state: BucketedMap) -> int:
    """Return how many of the state's keys are records of this module."""
    last, live = _counts(state)
    return live + min(last, VERSIONS_MAX) + 1 if last else 0


def _counts(state: BucketedMap) -> tuple[int, int]:
    counts = state.get(_TABLE)
    if counts is None:
        return 0, 0
    last, live = _COUNTS.unpack(counts)
    return last, live


def _end(state: BucketedMap, key: bytes) -> None:
    counts = state.get(_TABLE)
    if counts is not None and state.delete(_KEY + hashlib.sha256(key).digest()):
        last, live = _COUNTS.unpack(counts)
        state.put_unbounded(_TABLE, _COUNTS.pack(last, live - 1))
