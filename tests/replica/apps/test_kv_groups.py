"""The key-value store's operations on several keys, conditions, versions and groups; any bytes at all."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.application import Context, OperationError
from replica.apps import kv, kv_groups, kv_versions
from replica.apps.kv_layout import GROUP_OPERATIONS_MAX, KEYS_MAX, LOOKED_AT_MAX, RESERVED
from replica.core import state as state_module
from replica.core.state import ITEM_OVERHEAD, BucketedMap, bucket_of
from tests.replica.core.support import examples


class Store:
    """Commits what is done and takes back what is refused, as the platform does."""

    def __init__(self, **content: bytes) -> None:
        self.context = Context(BucketedMap())
        self.app = kv.KeyValue()
        for key, value in content.items():
            self(kv.put(key.encode(), value))

    def __call__(self, operation: bytes) -> bytes:
        self.context.state.begin()
        try:
            result = self.app.apply(operation, self.context)
        except Exception:
            self.context.state.rollback()
            raise
        self.context.state.commit()
        return result

    @property
    def content(self) -> dict[bytes, bytes]:
        return {k: v for k, v in self.context.state.scan() if not k.startswith(RESERVED)}


@pytest.mark.parametrize(
    ("present", "flags", "done"),
    [
        (b"old", 0, True),
        (None, 0, True),
        (b"old", kv_groups.IF_ABSENT, False),
        (None, kv_groups.IF_ABSENT, True),
        (b"old", kv_groups.IF_PRESENT, True),
        (None, kv_groups.IF_PRESENT, False),
    ],
)
@pytest.mark.parametrize("wants_old", [0, kv_groups.RETURN_OLD])
def test_set_under_conditions(present, flags, done, wants_old):
    store = Store(**({"k": present} if present else {}))
    result = kv_groups.read_set(store(kv_groups.set_key(b"k", b"new", flags | wants_old)))
    assert result == kv_groups.SetResult(done, present if wants_old else None)
    expected = b"new" if done else present
    assert store.content == ({b"k": expected} if expected else {})


def test_append_length_take():
    store = Store()
    assert kv_groups.read_size(store(kv_groups.length(b"k"))) == 0
    assert kv_groups.read_size(store(kv_groups.append(b"k", b"ab"))) == 2
    assert kv_groups.read_size(store(kv_groups.append(b"k", b"c"))) == 3
    assert kv_groups.read_size(store(kv_groups.length(b"k"))) == 3
    assert kv.read_value(store(kv_groups.take(b"k"))) == b"abc"
    assert kv.read_value(store(kv_groups.take(b"k"))) is None
    assert store.content == {}


def test_append_stops_at_the_record_limit():
    store = Store(k=b"x" * (kv.RECORD_BYTES_MAX - 1))
    with pytest.raises(OperationError, match="at most"):
        store(kv_groups.append(b"k", b"y"))
    assert len(store.content[b"k"]) == kv.RECORD_BYTES_MAX - 1


def test_many_keys_at_once():
    store = Store()
    assert store(kv_groups.put_many([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")])) == b"\x01"
    assert kv_groups.read_values(store(kv_groups.get_many([b"a", b"none", b"b", b"a"]))) == (b"3", None, b"2", b"3")
    assert store(kv_groups.put_many([(b"c", b"1"), (b"a", b"9")], if_absent=True)) == b"\x00"
    assert store.content == {b"a": b"3", b"b": b"2"}
    assert store(kv_groups.put_many([(b"c", b"1")], if_absent=True)) == b"\x01"
    assert kv_groups.read_size(store(kv_groups.count([b"a", b"a", b"x", b"c"]))) == 3
    assert kv_groups.read_size(store(kv_groups.size())) == 3
    assert kv_groups.read_size(store(kv_groups.delete_many([b"a", b"a", b"x"]))) == 1
    assert store.content == {b"b": b"2", b"c": b"1"}


def test_what_put_many_refuses_changes_nothing():
    store = Store()
    bad = kv_groups.put_many([(b"a", b"1"), (b"b", b"2")]).replace(b"\x00\x01b", b"\x00\x00")
    with pytest.raises(OperationError):
        store(bad)
    with pytest.raises(OperationError, match="at most"):
        store(kv_groups.put_many([(b"a", b"1"), (b"b", bytes(kv.RECORD_BYTES_MAX))]))
    assert store.content == {}


def test_values_that_are_too_much_for_one_answer_are_refused():
    store = Store(a=bytes(600_000), b=bytes(600_000))
    with pytest.raises(OperationError, match="fewer"):
        store(kv_groups.get_many([b"a", b"b"]))
    with pytest.raises(OperationError, match="less"):
        store(kv_groups.group([kv.put(b"c", b"1"), kv.get(b"a"), kv.get(b"b")]))
    assert b"c" not in store.content


def test_keys_come_in_pages():
    store = Store(**{f"k{i:03}": b"v" for i in range(25)}, other=b"v")
    pages, after = [], b""
    while True:
        page = kv_groups.read_keys(store(kv_groups.keys(b"k", 10, after)))
        pages.append(page.keys)
        if not page.more:
            break
        after = page.keys[-1]
    assert [len(page) for page in pages] == [10, 10, 5]
    assert [key for page in pages for key in page] == [b"k%03d" % i for i in range(25)]


# Versions


def version(store, *keys):
    return kv_groups.read_versions(store(kv_groups.versions(keys)))


WRITES = [
    kv.put(b"k", b"1"),
    kv.put(b"k", b"2"),
    kv.cas(b"k", b"1", b"1"),
    kv.incr(b"k"),
    kv.delete(b"k"),
    kv_groups.set_key(b"k", b"1"),
    kv_groups.append(b"k", b""),
    kv_groups.take(b"k"),
    kv_groups.put_many([(b"k", b"1")]),
    kv_groups.delete_many([b"k"]),
    kv_groups.group([kv.put(b"k", b"1")]),
]
NO_WRITES = [
    kv.get(b"k"),
    kv.put(b"other", b"2"),
    kv.cas(b"k", b"7", b"1"),
    kv.delete(b"none"),
    kv.scan(),
    kv_groups.set_key(b"k", b"1", kv_groups.IF_ABSENT),
    kv_groups.length(b"k"),
    kv_groups.take(b"none"),
    kv_groups.put_many([(b"k", b"1")], if_absent=True),
    kv_groups.versions([b"k"]),
]


@pytest.mark.parametrize("write", WRITES)
def test_every_write_ends_a_version_even_with_the_same_bytes(write):
    store = Store(k=b"1")
    guard = [(b"k", version(store, b"k")[0])]
    store(write)
    assert kv_groups.read_group(store(kv_groups.group([kv.put(b"done", b"")], guard))) is None
    assert b"done" not in store.content


@pytest.mark.parametrize("operation", NO_WRITES)
def test_what_does_not_write_ends_none(operation):
    store = Store(k=b"1")
    guard = [(b"k", version(store, b"k")[0])]
    store(operation)
    assert kv_groups.read_group(store(kv_groups.group([kv.put(b"done", b"")], guard))) is not None
    assert b"done" in store.content


def test_a_refused_write_ends_no_version():
    store = Store(k=b"text")
    guard = [(b"k", version(store, b"k")[0])]
    with pytest.raises(OperationError):
        store(kv.incr(b"k"))
    assert kv_groups.read_group(store(kv_groups.group([], guard))) == ()


def test_an_absent_key_has_a_version_that_its_creation_ends():
    store = Store()
    guard = [(b"new", version(store, b"new")[0])]
    assert kv_groups.read_group(store(kv_groups.group([kv.put(b"new", b"1")], guard))) is not None
    assert kv_groups.read_group(store(kv_groups.group([kv.put(b"new", b"2")], guard))) is None
    assert store.content == {b"new": b"1"}


def test_versions_are_shared_while_they_last_and_never_given_twice():
    store = Store(k=b"1")
    (first,) = version(store, b"k")
    assert version(store, b"k", b"k") == (first, first)
    store(kv.put(b"k", b"2"))
    assert version(store, b"k")[0] > first


def test_versions_are_bounded_and_the_oldest_goes_first():
    store = Store()
    (first,) = version(store, b"first")
    for i in range(kv_versions.VERSIONS_MAX - 1):
        version(store, b"%d" % i)
    assert kv_versions.holds(store.context.state, b"first", first)
    version(store, b"one more")
    assert not kv_versions.holds(store.context.state, b"first", first)
    for i in range(3 * kv_versions.VERSIONS_MAX):
        version(store, b"again %d" % i)
        if i % 3 == 0:
            store(kv.put(b"again %d" % i, b"x"))
    state = store.context.state
    records = [key for key, _ in state.scan(RESERVED)]
    assert len(records) == kv_versions.own_records(state) <= 2 * kv_versions.VERSIONS_MAX + 1
    assert kv_groups.read_size(store(kv_groups.size())) == len(store.content)


def test_a_store_in_which_nobody_asked_for_a_version_is_as_it_was_before_there_were_any():
    store = Store(a=b"1", b=b"2")
    store(kv.incr(b"n", 5))
    store(kv.delete(b"a"))
    assert dict(store.context.state.scan()) == {b"b": b"2", b"n": b"5"}


def test_the_stores_own_records_are_hidden_and_refused():
    store = Store(k=b"1")
    version(store, b"k")
    own = RESERVED + b"k" + hashlib.sha256(b"k").digest()
    assert own in store.context.state
    assert kv.read_scan(store(kv.scan())).items == ((b"k", b"1"),)
    assert kv_groups.read_keys(store(kv_groups.keys(b"\xff"))).keys == ()
    before = dict(store.context.state.scan())
    for raw in (
        struct.pack(">BH", kv.Code.PUT, len(own)) + own + b"x",
        struct.pack(">BH", kv.Code.GET, len(own)) + own,
        struct.pack(">BH", kv.Code.DELETE, len(own)) + own,
        struct.pack(">BHHH", kv.Code.DELETE_MANY, 0, 1, len(own)) + own,
    ):
        with pytest.raises(OperationError, match="own"):
            store(raw)
    assert dict(store.context.state.scan()) == before
    with pytest.raises(ValueError, match="own"):
        kv.put(own, b"x")


# Groups


def test_a_group_goes_on_after_a_refusal_and_keeps_the_rest():
    store = Store(text=b"abc")
    operations = [kv.put(b"a", b"1"), kv.incr(b"text"), kv.get(b"a"), b"junk"]
    found = kv_groups.read_group(store(kv_groups.group(operations)))
    assert [outcome.refused for outcome in found] == [False, True, False, True]
    assert kv.read_value(found[2].value) == b"1"
    assert b"not a whole number" in found[1].value
    assert store.content == {b"text": b"abc", b"a": b"1"}


def test_all_or_nothing():
    store = Store(text=b"abc")
    with pytest.raises(OperationError, match="operation 1: the present value"):
        store(kv_groups.group([kv.put(b"a", b"1"), kv.incr(b"text")], all_or_nothing=True))
    assert store.content == {b"text": b"abc"}
    assert store(kv_groups.group([kv.put(b"a", b"1")], all_or_nothing=True))[0] == 1
    assert store.content == {b"text": b"abc", b"a": b"1"}


def test_groups_are_bounded_and_do_not_nest():
    store = Store()
    inner = kv_groups.group([kv.put(b"a", b"1")])
    with pytest.raises(OperationError, match="no other group"):
        store(kv_groups.group([inner]))
    with pytest.raises(ValueError, match="at most"):
        kv_groups.group([kv.get(b"a")] * (GROUP_OPERATIONS_MAX + 1))
    raw = struct.pack(">BHBHH", kv.Code.GROUP, 0, 0, 0, GROUP_OPERATIONS_MAX + 1)
    with pytest.raises(OperationError, match="at most"):
        store(raw)
    with pytest.raises(OperationError, match="from 1 to"):
        store(struct.pack(">BHH", kv.Code.GET_MANY, 0, KEYS_MAX + 1))
    with pytest.raises(ValueError, match="from 1 to"):
        kv_groups.get_many([])


def watched(store):
    """Count the keys that the state looks up from now on."""
    looked = []
    irange = store.context.state._keys.irange

    def counted(*arguments, **named):
        looked.append(named)
        return irange(*arguments, **named)

    store.context.state._keys.irange = counted
    return looked


@pytest.fixture
def versioned():
    """As many records of the store's own as there can be, and keys on both sides of them."""
    store = Store()
    for start in range(0, 2 * kv_versions.VERSIONS_MAX, 512):
        store(kv_groups.versions([b"w%d" % i for i in range(start, start + 512)]))
    for key in (b"a", b"\xfftrustlog", b"\xfftrustlog.", b"\xfftrustlog0", b"\xfftrustlog0a", b"\xff\xff"):
        store(kv.put(key, b"v"))
    assert len(store.context.state) > 2000
    return store


@pytest.mark.parametrize("prefix", [b"", b"\xff", b"\xfft", b"\xfftrustlog", RESERVED, RESERVED + b"k", b"\xff\xff"])
@pytest.mark.parametrize("after", [b"", b"\xfftrustlog", RESERVED, RESERVED + b"r", b"\xfftrustlog0"])
def test_the_stores_own_records_are_stepped_over_in_one_jump(versioned, prefix, after):
    users = sorted(versioned.content)
    expected = [key for key in users if key.startswith(prefix) and key > after]
    looked = watched(versioned)
    assert [key for key, _ in kv.read_scan(versioned(kv.scan(prefix, 100, after))).items] == expected
    assert list(kv_groups.read_keys(versioned(kv_groups.keys(prefix, 100, after))).keys) == expected
    assert len(looked) <= 2 * (len(users) + 2)


@pytest.mark.parametrize("listing", [kv.scan, kv_groups.keys])
@pytest.mark.parametrize("prefix", [b"", b"\xfft", RESERVED])
def test_the_keys_that_the_worst_group_looks_at_are_bounded(versioned, listing, prefix):
    for i in range(1000):
        versioned(kv.put(b"\xfftrustlog1%d" % i, b""))
    looked = watched(versioned)
    group = kv_groups.group([listing(prefix, 1000)] * GROUP_OPERATIONS_MAX)
    found = kv_groups.read_group(versioned(group))
    # Each listing looks once more than it finds: at the end, or over the store's own records.
    assert len(looked) <= LOOKED_AT_MAX + 2 * GROUP_OPERATIONS_MAX
    assert [one.refused for one in found] == sorted(one.refused for one in found)
    if prefix == RESERVED:
        assert not looked
    else:
        assert found[-1].value == b"an operation lists at most 16384 keys; ask for less at once"
        with pytest.raises(OperationError, match="lists at most"):
            versioned(kv_groups.group([listing(prefix, 1000)] * GROUP_OPERATIONS_MAX, all_or_nothing=True))
    # The next operation has a budget of its own.
    assert not kv_groups.read_group(versioned(kv_groups.group([listing(prefix, 1000)])))[0].refused


def test_a_group_is_no_stale_read():
    store = Store()
    store.context.ordered = False
    with pytest.raises(OperationError, match="not as a stale read"):
        store(kv_groups.group([kv.get(b"a")]))
    assert kv.read_value(store(kv.get(b"a"))) is None


CONTENT_BYTES_MAX = 4096


def filled(store, like):
    """Fill the bucket of a key to the last byte; return a key of it without a value."""
    number, names, i = bucket_of(like), [], 0
    while len(names) < 2:
        if bucket_of(key := b"%d" % i) == number:
            names.append(key)
        i += 1
    room = CONTENT_BYTES_MAX - store.context.state._sizes.get(number, 0) - len(names[0]) - ITEM_OVERHEAD
    store(kv.put(names[0], bytes(room)))
    return names[-1]


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(state_module, "CONTENT_BYTES_MAX", CONTENT_BYTES_MAX)


WRITES = {
    "put": lambda key: kv.put(key, b"v"),
    "set": lambda key: kv_groups.set_key(key, b"v"),
    "cas": lambda key: kv.cas(key, None, b"v"),
    "append": lambda key: kv_groups.append(key, b"v"),
    "incr": kv.incr,
    "put_many": lambda key: kv_groups.put_many([(b"new", b"1"), (b"old", b"2"), (b"new", b"3"), (key, b"v")]),
}


@pytest.mark.usefixtures("small_buckets")
def test_a_full_bucket_is_a_refusal_with_a_reason_that_undoes_nothing_else():
    store = Store(old=b"1")
    key = filled(store, b"any")
    before = store.content
    (version,) = kv_groups.read_versions(store(kv_groups.versions([b"old"])))
    for name, write in WRITES.items():
        with pytest.raises(OperationError, match="share a bucket with this one have 4096 bytes already"):
            store(write(key))
        refused, done = kv_groups.read_group(store(kv_groups.group([write(key), kv.put(b"other", name.encode())])))
        assert refused.refused
        assert b"share a bucket" in refused.value
        assert not done.refused
        assert store.content.pop(b"other") == name.encode()
        store(kv.delete(b"other"))
        assert store.content == before
        # What was taken back did not end the version either.
        assert kv_groups.read_group(store(kv_groups.group([], [(b"old", version)]))) is not None
        store.context.state.root()
        store.context.state.check()


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("record", [b"n", b"k" + hashlib.sha256(b"asked").digest(), b"r\x00\x01"])
def test_a_full_bucket_keeps_nobody_from_asking_for_versions(record):
    store = Store()
    filled(store, RESERVED + record)
    (version,) = kv_groups.read_versions(store(kv_groups.versions([b"asked"])))
    assert kv_groups.read_group(store(kv_groups.group([], [(b"asked", version)]))) is not None
    store(kv.put(b"asked", b"v"))
    assert kv_groups.read_group(store(kv_groups.group([], [(b"asked", version)]))) is None


@examples(300)
@given(st.binary(max_size=60), st.sampled_from([code for code in kv.Code if code > kv.Code.SCAN]))
def test_any_bytes_are_a_result_or_a_refusal_and_a_refusal_changes_nothing(body, code):
    store = Store(a=b"1", b=b"2")
    before = dict(store.context.state.scan())
    for raw in (bytes([code]) + body, struct.pack(">BH", code, 0) + body, struct.pack(">BH", code, 1) + b"a" + body):
        try:
            assert type(store(raw)) is bytes
        except OperationError:
            assert dict(store.context.state.scan()) == before
        before = dict(store.context.state.scan())
