"""What an operation of the key-value store is said to read and write covers what it does, and what its result tells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.application import Context, OperationError, Right
from replica.apps import kv, kv_groups
from replica.apps.kv import KeyValue
from replica.apps.kv_layout import RESERVED, Code
from replica.core.state import BucketedMap
from tests.replica.core.support import examples

R, W = Right.READ, Right.WRITE
KEYS = [b"a", b"a/", b"a/1", b"a/2", b"b", b"b/1"]
VALUES = [b"", b"0", b"7", b"text"]

keys = st.sampled_from(KEYS)
values = st.sampled_from(VALUES)
some_keys = st.lists(keys, min_size=1, max_size=3)
prefixes = st.sampled_from([b"", b"a", b"a/", b"b", b"c"])
single = st.one_of(
    st.builds(kv.put, keys, values),
    st.builds(kv.get, keys),
    st.builds(kv.delete, keys),
    st.builds(kv.cas, keys, st.none() | values, values),
    st.builds(kv.incr, keys),
    st.builds(kv.scan, prefixes, st.integers(1, 3), st.just(b"") | keys),
    st.builds(kv_groups.set_key, keys, values, st.sampled_from([0, 1, 2, 4, 5, 6])),
    st.builds(kv_groups.append, keys, values),
    st.builds(kv_groups.length, keys),
    st.builds(kv_groups.take, keys),
    st.builds(kv_groups.get_many, some_keys),
    st.builds(
        lambda records, new: kv_groups.put_many(records, if_absent=new),
        st.lists(st.tuples(keys, values), min_size=1, max_size=3),
        st.booleans(),
    ),
    st.builds(kv_groups.delete_many, some_keys),
    st.builds(kv_groups.count, some_keys),
    st.just(kv_groups.size()),
    st.builds(kv_groups.keys, prefixes, st.integers(1, 3), st.just(b"") | keys),
    st.builds(kv_groups.versions, some_keys),
)
groups = st.builds(
    lambda held, guards, whole: kv_groups.group(held, guards, all_or_nothing=whole),
    st.lists(single, max_size=3),
    st.lists(st.tuples(keys, st.integers(0, 2)), max_size=2),
    st.booleans(),
)
operations = single | groups
states = st.dictionaries(keys, values)


def carried_out(operation: bytes, before: dict[bytes, bytes]) -> tuple[object, dict[bytes, bytes]]:
    state = BucketedMap(sorted(before.items()))
    try:
        result: object = KeyValue().apply(operation, Context(state))
        state.commit()
    except OperationError as error:
        result = str(error)
        state.rollback()
    return result, dict(state.scan(without=RESERVED))


def covers(accesses: list[tuple[Right, bytes]], right: Right, key: bytes) -> bool:
    return any(one is right and key.startswith(prefix) for one, prefix in accesses)


@given(operations, states, states)
@examples(1500)
def test_what_is_not_named_is_neither_changed_nor_told(operation: bytes, before: dict, other: dict):
    """`other` differs in what the operation is not said to read; of what it writes, only whether it was there is told."""
    accesses = list(KeyValue().accesses(operation))
    result, after = carried_out(operation, before)
    for key in KEYS:
        if after.get(key) != before.get(key):
            assert covers(accesses, W, key), f"{key!r} was written"
    mixed = {}
    for key in KEYS:
        if covers(accesses, R, key):
            source = before
        elif covers(accesses, W, key):
            source = {key: other.get(key, b"else")} if key in before else {}
        else:
            source = other
        if key in source:
            mixed[key] = source[key]
    assert carried_out(operation, mixed)[0] == result, "what was not named is told"


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (kv.put(b"k", b"v"), [(W, b"k")]),
        (kv.get(b"k"), [(R, b"k")]),
        (kv.delete(b"k"), [(W, b"k")]),
        (kv.cas(b"k", None, b"v"), [(R, b"k"), (W, b"k")]),
        (kv.incr(b"k"), [(R, b"k"), (W, b"k")]),
        (kv.scan(b"p", after=b"pq"), [(R, b"p")]),
        (kv_groups.set_key(b"k", b"v"), [(W, b"k")]),
        (kv_groups.set_key(b"k", b"v", kv_groups.RETURN_OLD), [(W, b"k"), (R, b"k")]),
        (kv_groups.append(b"k", b"v"), [(R, b"k"), (W, b"k")]),
        (kv_groups.length(b"k"), [(R, b"k")]),
        (kv_groups.take(b"k"), [(R, b"k"), (W, b"k")]),
        (kv_groups.get_many([b"k", b"l"]), [(R, b"k"), (R, b"l")]),
        (kv_groups.put_many([(b"k", b"v"), (b"l", b"")]), [(W, b"k"), (W, b"l")]),
        (kv_groups.delete_many([b"k"]), [(W, b"k")]),
        (kv_groups.count([b"k"]), [(R, b"k")]),
        (kv_groups.size(), [(R, b"")]),
        (kv_groups.keys(b"p"), [(R, b"p")]),
        (kv_groups.versions([b"k"]), [(R, b"k")]),
        (kv_groups.group([kv.put(b"k", b"v"), kv.get(b"l")], [(b"m", 1)]), [(R, b"m"), (W, b"k"), (R, b"l")]),
        (kv_groups.group([]), []),
    ],
)
def test_every_operation_has_its_accesses(operation: bytes, expected: list):
    assert list(KeyValue().accesses(operation)) == expected


def test_no_operation_was_forgotten():
    """A new operation has to be entered here and in `kv_access`."""
    assert len(Code) == 18


@pytest.mark.parametrize(
    "operation",
    [
        b"",
        b"\x01\x00",
        b"\x01\x00\x05key",
        b"\x63\x00\x01k",
        b"\x07\x00\x01k",
        b"\x0b\x00\x00\x00\x02\x00\x01k",
        b"\x0c\x00\x00\x00\x00\x01\x00\x01k\x00\x00\x00\x09v",
        b"\x0f\x00\x01k",
        b"\x02\x00\x0a" + RESERVED,
        kv_groups.group([kv.get(b"k")])[:-1],
        kv_groups.group([b""]),
        kv_groups.group([b"\x63\x00\x01k"]),
        kv_groups.group([kv_groups.group([])]),
    ],
)
def test_what_cannot_be_read_is_refused_as_a_whole(operation: bytes):
    with pytest.raises(OperationError):
        list(KeyValue().accesses(operation))
