"""The key-value store: every operation, its refusals, and any bytes at all."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.application import ApplicationLoadError, Context, OperationError, load_application
from replica.apps import kv
from replica.apps.kv import I64_MAX, I64_MIN, KEY_BYTES_MAX, SCAN_BYTES_MAX, KeyValue
from replica.core.state import BucketedMap
from replica.core.tree import VALUE_BYTES_MAX
from tests.replica.core.support import examples


class Store:
    def __init__(self, **content: bytes) -> None:
        self.context = Context(BucketedMap())
        self.app = KeyValue()
        for key, value in content.items():
            self(kv.put(key.encode(), value))

    def __call__(self, operation: bytes) -> bytes:
        return self.app.apply(operation, self.context)

    @property
    def content(self) -> dict[bytes, bytes]:
        return dict(self.context.state.scan())


def test_put_get_delete():
    store = Store()
    assert kv.read_value(store(kv.get(b"k"))) is None
    assert kv.read_flag(store(kv.put(b"k", b"one"))) is False
    assert kv.read_flag(store(kv.put(b"k", b""))) is True
    assert kv.read_value(store(kv.get(b"k"))) == b""
    assert kv.read_flag(store(kv.delete(b"k"))) is True
    assert kv.read_flag(store(kv.delete(b"k"))) is False
    assert store.content == {}


@pytest.mark.parametrize(
    ("present", "expected", "swapped"),
    [
        (None, None, True),
        (None, b"", False),
        (None, b"x", False),
        (b"", None, False),
        (b"", b"", True),
        (b"x", b"x", True),
        (b"x", b"y", False),
        (b"x", None, False),
    ],
)
def test_compare_and_set(present: bytes | None, expected: bytes | None, swapped: bool):
    store = Store(**({} if present is None else {"k": present}))
    result = kv.read_cas(store(kv.cas(b"k", expected, b"new")))
    assert result == kv.CasResult(swapped, None if swapped else present)
    assert store.content.get(b"k") == (b"new" if swapped else present)


def test_counting():
    store = Store()
    assert [kv.read_number(store(kv.incr(b"n", by))) for by in (1, 41, -100, 0)] == [1, 42, -58, -58]
    assert store.content == {b"n": b"-58"}
    store(kv.put(b"n", b"0"))
    assert kv.read_number(store(kv.incr(b"n", -1))) == -1
    store(kv.delete(b"n"))
    assert kv.read_number(store(kv.incr(b"n"))) == 1


@pytest.mark.parametrize(
    "present",
    [
        *(b"x", b"1x", b" 1", b"1 ", b"+1", b"1_0", b"-", b"--1", b"1.0", b"\xd9\xa1", b"1\n", b"9" * 21, b"0x1"),
        *(b"", b"007", b"00", b"-0", b"-01", b"1\0", b"%d" % (I64_MAX + 1), b"%d" % (I64_MIN - 1), b"9" * 20),
    ],
)
def test_only_whole_numbers_are_counted(present: bytes):
    store = Store(n=present)
    with pytest.raises(OperationError, match="not a whole number"):
        store(kv.incr(b"n"))
    assert store.content == {b"n": present}


@pytest.mark.parametrize(("present", "amount"), [(I64_MAX, 1), (I64_MIN, -1), (1, I64_MAX), (-1, I64_MIN)])
def test_sums_stay_within_64_bits(present: int, amount: int):
    store = Store(n=b"%d" % present)
    with pytest.raises(OperationError, match="64 bits"):
        store(kv.incr(b"n", amount))
    assert store.content == {b"n": b"%d" % present}


def test_the_ends_of_64_bits_are_reached():
    store = Store()
    assert kv.read_number(store(kv.incr(b"n", I64_MAX))) == I64_MAX
    store(kv.put(b"n", b"%d" % I64_MIN))
    assert kv.read_number(store(kv.incr(b"n", 0))) == I64_MIN


def test_scanning_by_prefix_and_page():
    store = Store(**{name: name.encode() for name in ("a", "ab", "abc", "abd", "b", "ac")})
    page = kv.read_scan(store(kv.scan(b"ab")))
    assert page == kv.ScanResult(((b"ab", b"ab"), (b"abc", b"abc"), (b"abd", b"abd")), more=False)
    assert kv.read_scan(store(kv.scan(b"x"))) == kv.ScanResult((), more=False)
    assert kv.read_scan(store(kv.scan(b"ab", 2))).more is True
    assert kv.read_scan(store(kv.scan(b"ab", 3))).more is False
    assert [k for k, _ in kv.read_scan(store(kv.scan(b"a", 9, after=b"ab"))).items] == [b"abc", b"abd", b"ac"]
    assert [k for k, _ in kv.read_scan(store(kv.scan(b"b", 9, after=b"a"))).items] == [b"b"]
    assert kv.read_scan(store(kv.scan(b"a", 9, after=b"b"))).items == ()


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_pages_follow_each_other_without_loss(limit: int):
    names = [b"k%03d" % i for i in range(25)]
    store = Store(**{name.decode(): b"v" for name in names})
    found: list[bytes] = []
    after = b""
    while True:
        page = kv.read_scan(store(kv.scan(b"k", limit, after)))
        found += [key for key, _ in page.items]
        if not page.more:
            break
        assert len(page.items) == limit
        after = found[-1]
    assert found == names


def test_a_page_is_bounded_in_bytes_and_always_moves_on():
    big = bytes(SCAN_BYTES_MAX - 20)
    store = Store(a=big, b=b"x", c=big, d=bytes(VALUE_BYTES_MAX // 2 + 100), e=b"y")
    pages, after = [], b""
    while True:
        result = store(kv.scan(b"", 100, after))
        page = kv.read_scan(result)
        pages.append([k.decode() for k, _ in page.items])
        assert len(result) <= SCAN_BYTES_MAX + 5 or len(page.items) == 1
        if not page.more:
            break
        after = page.items[-1][0]
    assert pages == [["a", "b"], ["c"], ["d"], ["e"]]


MALFORMED = {
    "nothing": b"",
    "a code alone": b"\x01",
    "half a length": b"\x01\x00",
    "code 0": struct.pack(">BH", 0, 1) + b"k",
    "code 7": struct.pack(">BH", 7, 1) + b"k",
    "an empty key to put": struct.pack(">BH", 1, 0),
    "an empty key to count": struct.pack(">BH", 5, 0) + bytes(8),
    "a key cut off": struct.pack(">BH", 1, 5) + b"key",
    "a key too long": struct.pack(">BH", 1, KEY_BYTES_MAX + 1) + bytes(KEY_BYTES_MAX + 1),
    "get with a tail": kv.get(b"k") + b"x",
    "delete with a tail": kv.delete(b"k") + b"x",
    "cas without a body": kv.cas(b"k", b"old", b"")[:4],
    "cas cut off in what it expects": kv.cas(b"k", b"old", b"")[:-1],
    "cas that expects a third thing": kv.cas(b"k", None, b"")[:4] + b"\x02" + bytes(4),
    "cas that expects 4 GiB": kv.cas(b"k", b"", b"")[:5] + b"\xff" * 4,
    "incr cut off": kv.incr(b"k")[:-1],
    "incr with a tail": kv.incr(b"k") + b"\0",
    "scan of nothing": struct.pack(">BHIH", 6, 0, 0, 0),
    "scan of too much": struct.pack(">BHIH", 6, 0, 1001, 0),
    "scan cut off": kv.scan(b"", 5, b"a")[:-1],
    "scan with a tail": kv.scan() + b"\0",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_operations_are_refused_and_change_nothing(name: str):
    store = Store(k=b"5")
    with pytest.raises(OperationError):
        store(MALFORMED[name])
    assert store.content == {b"k": b"5"}


well_formed = st.one_of(
    st.builds(kv.put, st.binary(min_size=1, max_size=3), st.binary(max_size=5)),
    st.builds(kv.get, st.binary(min_size=1, max_size=3)),
    st.builds(kv.delete, st.binary(min_size=1, max_size=3)),
    st.builds(kv.cas, st.binary(min_size=1, max_size=3), st.none() | st.binary(max_size=3), st.binary(max_size=3)),
    st.builds(kv.incr, st.binary(min_size=1, max_size=3), st.integers(I64_MIN, I64_MAX)),
    st.builds(kv.scan, st.binary(max_size=2), st.integers(1, 5), st.binary(max_size=3)),
)
cut_short = st.tuples(well_formed, st.integers(0, 12)).map(lambda pair: pair[0][: pair[1]])
any_operation = st.one_of(
    st.binary(max_size=40),
    well_formed,
    cut_short,
    st.tuples(st.integers(0, 8), st.binary(max_size=30)).map(lambda pair: bytes([pair[0], 0, 1]) + pair[1]),
)


@examples(200)
@given(operations=st.lists(any_operation, max_size=20))
def test_any_bytes_give_a_result_or_a_refusal(operations: list[bytes]):
    store = Store(a=b"1", ab=b"x")
    for operation in operations:
        before = store.content
        try:
            assert type(store(operation)) is bytes
        except OperationError:
            assert store.content == before


@examples(100)
@given(operations=st.lists(well_formed, max_size=30))
def test_against_a_dictionary(operations: list[bytes]):
    store = Store()
    for operation in operations:
        before = store.content
        try:
            result = store(operation)
        except OperationError:
            continue
        code, size = struct.unpack_from(">BH", operation)
        key, body = operation[3 : 3 + size], operation[3 + size :]
        if code == kv.Code.PUT:
            assert kv.read_flag(result) == (key in before)
            before[key] = body
        elif code == kv.Code.GET:
            assert kv.read_value(result) == before.get(key)
        elif code == kv.Code.DELETE:
            assert kv.read_flag(result) == (before.pop(key, None) is not None)
        elif code == kv.Code.INCR:
            before[key] = b"%d" % (int(before.get(key) or b"0") + struct.unpack(">q", body)[0])
            assert kv.read_number(result) == int(before[key])
        elif code == kv.Code.CAS:
            swapped = kv.read_cas(result).swapped
            expected = body[5 : 5 + struct.unpack_from(">I", body, 1)[0]] if body[0] else None
            assert swapped == (before.get(key) == expected)
            if swapped:
                before[key] = body[5 + len(expected or b"") :]
        assert store.content == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: kv.put(b"", b"v"),
        lambda: kv.get(bytes(KEY_BYTES_MAX + 1)),
        lambda: kv.incr(b"k", I64_MAX + 1),
        lambda: kv.incr(b"k", I64_MIN - 1),
        lambda: kv.scan(limit=0),
        lambda: kv.scan(limit=1001),
        lambda: kv.scan(after=bytes(KEY_BYTES_MAX + 1)),
        lambda: kv.scan(bytes(KEY_BYTES_MAX + 1)),
    ],
)
def test_the_clients_side_refuses_what_the_store_would(make):
    with pytest.raises(ValueError, match=r"key|64 bits|scan"):
        make()


def test_applications_are_loaded_by_name():
    assert isinstance(load_application("replica.apps.kv:KeyValue"), KeyValue)
    for name, words in (
        ("replica.apps.kv", "module:Class"),
        (":KeyValue", "module:Class"),
        ("replica.apps.nowhere:X", "PYTHONPATH"),
        ("replica.apps.kv:Nothing", "no class"),
    ):
        with pytest.raises(ApplicationLoadError, match=words):
            load_application(name)
    with pytest.raises(ApplicationLoadError, match="no method apply"):
        load_application("replica.core.state:BucketedMap")
