"""The digested map against a plain dictionary."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replica.core import state as state_module
from replica.core.state import BucketedMap
from replica.core.tree import BUCKETS, EMPTY, KEY_BYTES_MAX, VALUE_BYTES_MAX, bucket_of, with_values
from tests.replica.core import state_bench
from tests.replica.core.support import examples

# Few keys, so that the same ones are met again; the last three share a bucket.
KEYS = [b"a", b"ab", b"abc", b"b", b"\x00", b"\xff", b"\xff\xff", b"k" * 40, b"0", b"16873", b"83274"]
KNOWN_BUCKETS = sorted({bucket_of(key) for key in KEYS})
keys = st.sampled_from(KEYS)
values = st.sampled_from([b"", b"1", b"v" * 50])


def digest_by_hand(content: dict[bytes, bytes]) -> bytes:
    """The tree of the module's documentation, without any caching."""
    buckets: dict[int, list[bytes]] = {}
    for key in sorted(content):
        buckets.setdefault(int.from_bytes(hashlib.sha256(key).digest()[:2], "big"), []).append(key)
    digests = [bytes(32)] * 65536
    for number, members in buckets.items():
        parts = [struct.pack(">I", len(k)) + k + struct.pack(">I", len(content[k])) + content[k] for k in members]
        digests[number] = hashlib.sha256(b"\x20" + b"".join(parts)).digest()
    nodes = []
    for node in range(256):
        inside = digests[node * 256 : node * 256 + 256]
        if any(node * 256 <= number < node * 256 + 256 for number in buckets):
            nodes.append(hashlib.sha256(b"\x21" + b"".join(inside)).digest())
        else:
            nodes.append(bytes(32))
    return hashlib.sha256(b"\x22" + b"".join(nodes) + struct.pack(">Q", len(content))).digest()


def fresh(content: dict[bytes, bytes], seed: int = 0) -> BucketedMap:
    """A map with the same content, filled in another order."""
    order = list(content)
    random.Random(seed).shuffle(order)
    filled = BucketedMap()
    for key in order:
        filled.put(key, content[key])
    filled.commit()
    return filled


class AgainstDictionary(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.map = BucketedMap()
        self.committed: dict[bytes, bytes] = {}
        self.model: dict[bytes, bytes] = {}
        self.digested: dict[bytes, bytes] = {}
        self.stored: dict[bytes, bytes] = {}
        self.map.begin()

    @rule(key=keys, value=values)
    def put(self, key: bytes, value: bytes) -> None:
        self.map.put(key, value)
        self.model[key] = value

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        assert self.map.delete(key) == (self.model.pop(key, None) is not None)

    @rule()
    def commit(self) -> None:
        self.map.commit()
        self.committed = dict(self.model)
        self.map.begin()

    @rule()
    def rollback(self) -> None:
        self.map.rollback()
        self.model = dict(self.committed)
        self.map.begin()

    @rule(prefix=st.sampled_from([b"", b"a", b"ab", b"\xff", b"x"]), after=st.none() | keys)
    def scan(self, prefix: bytes, after: bytes | None) -> None:
        wanted = [
            (k, v) for k, v in sorted(self.model.items()) if k.startswith(prefix) and (after is None or k > after)
        ]
        assert list(self.map.scan(prefix, after)) == wanted

    @precondition(lambda self: self.model == self.committed)
    @rule(seed=st.integers(0, 3))
    def root(self, seed: int) -> None:
        self.map.commit()
        root = self.map.root()
        assert root == fresh(self.committed, seed).root()
        assert root == self.map.root()
        self.digested = dict(self.committed)

    @precondition(lambda self: self.model == self.committed)
    @rule()
    def take_changes(self) -> None:
        self.map.commit()
        changes = self.map.take_changes()
        assert len(dict(changes)) == len(changes)
        for key, value in with_values(changes):
            if value is None:
                self.stored.pop(key, None)
            else:
                self.stored[key] = value
        assert self.stored == self.committed
        assert self.map.take_changes() == []

    @precondition(lambda self: self.model == self.committed)
    @rule()
    def go_on_from_a_frozen_view(self) -> None:
        self.map.commit()
        frozen, old = self.map.frozen(), self.map
        before = dict(with_values(frozen.items()))
        old.put(b"a", b"only in the old one")
        old.delete(b"ab")
        old.commit()
        old.root()
        assert dict(with_values(frozen.items())) == before == self.committed
        self.map = BucketedMap.thawed(frozen)
        assert self.map.take_changes() == []
        self.stored = dict(self.committed)
        self.digested = dict(self.committed)

    @invariant()
    def shows_what_was_digested(self) -> None:
        if not hasattr(self, "map"):
            return
        twin = fresh(self.digested)
        twin.root()
        assert self.map.nodes() == twin.nodes()
        assert self.map.count() == len(self.digested)
        for number in KNOWN_BUCKETS:
            assert self.map.bucket(number) == twin.bucket(number)
            assert self.map.bucket_digests(number // 256) == twin.bucket_digests(number // 256)

    @invariant()
    def holds_the_same(self) -> None:
        if not hasattr(self, "map"):
            return
        assert len(self.map) == len(self.model)
        for key in (b"a", b"abc", b"\xff\xff", b"nowhere"):
            assert self.map.get(key) == self.model.get(key)
            assert (key in self.map) == (key in self.model)

    @precondition(lambda self: self.model == self.committed)
    @invariant()
    def checks(self) -> None:
        if hasattr(self, "map"):
            self.map.commit()
            self.map.check()
            self.map.begin()


AgainstDictionary.TestCase.settings = examples(60)
TestAgainstDictionary = AgainstDictionary.TestCase


def test_the_digest_is_the_documented_tree():
    content = {b"key %d" % i: b"value %d" % (i * i) for i in range(300)}
    assert fresh(content).root() == digest_by_hand(content)
    assert BucketedMap().root() == digest_by_hand({})


def crowd(count: int) -> list[bytes]:
    """Keys of one bucket."""
    found: list[bytes] = []
    number = 0
    wanted = int.from_bytes(hashlib.sha256(b"0").digest()[:2], "big")
    while len(found) < count:
        key = b"%d" % number
        if int.from_bytes(hashlib.sha256(key).digest()[:2], "big") == wanted:
            found.append(key)
        number += 1
    return found


def test_keys_of_one_bucket_come_and_go():
    members = crowd(3)
    content = {key: b"v" + key for key in members}
    filled = fresh(content)
    full = filled.root()
    assert full == digest_by_hand(content)
    for gone in ([members[1]], [members[0], members[2]], members):
        for key in gone:
            filled.delete(key)
        filled.commit()
        assert filled.root() == digest_by_hand({k: x for k, x in content.items() if k not in gone})
        filled.check()
        for key in gone:
            filled.put(key, content[key])
        filled.commit()
        assert filled.root() == full
    assert len(filled._bucket_digests) == 1


def test_a_map_made_of_its_items_is_the_same_and_has_no_changes():
    content = {b"key %d" % i: b"value %d" % (i * i) for i in range(300)}
    made = BucketedMap(reversed(list(content.items())))
    assert made.nodes() == fresh_digested(content).nodes()
    assert made.count() == 300
    assert made.root() == digest_by_hand(content)
    assert list(made.scan()) == sorted(content.items())
    assert made.take_changes() == []
    made.check()


def fresh_digested(content: dict[bytes, bytes]) -> BucketedMap:
    filled = fresh(content)
    filled.root()
    return filled


def test_what_may_not_be_asked_while_an_operation_runs():
    filled = fresh_digested({b"a": b"1"})
    filled.begin()
    filled.put(b"a", b"2")
    for ask in (filled.root, filled.take_changes, filled.frozen, filled.settle):
        with pytest.raises(RuntimeError, match="an operation is running"):
            ask()
    filled.commit()
    assert dict(with_values(filled.take_changes())) == {b"a": b"2"}


def test_settling_before_leaves_the_same_root_and_less_to_do(monkeypatch):
    monkeypatch.setattr(state_module, "SETTLED_AT_ONCE", 10)
    settled, plain = BucketedMap(), BucketedMap()
    for number in range(95):
        for one in (settled, plain):
            one.begin()
            one.put(b"key %d" % (number % 60), b"%d" % number)
            if number % 7 == 0:
                one.delete(b"key %d" % (number // 2))
            one.commit()
        settled.settle()
        settled.check()
        assert len(settled._touched) < 10 + 2
    assert len(plain._touched) == 60
    assert settled.root() == plain.root()
    assert settled.frozen() == plain.frozen()


def test_a_large_map_is_sorted_bit_by_bit(monkeypatch):
    monkeypatch.setattr(state_module, "SORTED_AT_ONCE", 6)
    monkeypatch.setattr(state_module, "SAMPLED_EVERY", 3)
    for count in (0, 1, 7, 8, 100, 113):
        content = {b"key %d" % (i * 7919 % 1000): b"v%d" % i for i in range(count)}
        assert state_module._sorted(list(content)) == sorted(content)
        made = BucketedMap.thawed(BucketedMap(content.items()).frozen())
        made.check()
        assert list(made.scan()) == sorted(content.items())
        assert made.root() == digest_by_hand(content)


def test_every_change_changes_the_digest_and_undoing_it_restores_it():
    filled = fresh({b"a": b"1", b"b": b"2"})
    before = filled.root()
    for key, value in ((b"a", b"2"), (b"a", b""), (b"c", b""), (b"ab", b"12")):
        old = filled.get(key)
        filled.put(key, value)
        filled.commit()
        assert filled.root() != before
        if old is None:
            filled.delete(key)
        else:
            filled.put(key, old)
        filled.commit()
        assert filled.root() == before


def test_only_touched_buckets_are_hashed_again(monkeypatch: pytest.MonkeyPatch):
    filled = fresh({b"key %d" % i: b"v" for i in range(2000)})
    filled.root()
    hashed: list[int] = []
    whole = BucketedMap._hash_bucket
    monkeypatch.setattr(BucketedMap, "_hash_bucket", lambda self, n: (hashed.append(n), whole(self, n))[1])
    filled.root()
    assert hashed == []
    for key in (b"key 5", b"key 6", b"new"):
        filled.put(key, b"w")
    filled.put(b"key 5", b"again")
    filled.delete(b"key 7")
    filled.commit()
    filled.root()
    assert len(hashed) == 4
    hashed.clear()
    filled.begin()
    filled.put(b"key 8", b"w")
    filled.rollback()
    filled.root()
    assert hashed == [], "what was taken back touched nothing"


def test_what_is_not_committed_can_be_taken_back_as_a_whole():
    filled = fresh({b"a": b"1", b"b": b"2"})
    before = filled.root()
    filled.begin()
    filled.delete(b"a")
    filled.put(b"a", b"9")
    filled.delete(b"a")
    filled.put(b"b", b"8")
    filled.put(b"c", b"7")
    filled.delete(b"c")
    filled.rollback()
    assert dict(filled.scan()) == {b"a": b"1", b"b": b"2"}
    assert filled.root() == before
    filled.check()


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("a", b"", TypeError),
        (b"a", "b", TypeError),
        (bytearray(b"a"), b"", TypeError),
        (b"a", memoryview(b"b"), TypeError),
        (b"", b"", ValueError),
        (b"k" * (KEY_BYTES_MAX + 1), b"", ValueError),
        (b"k", bytes(VALUE_BYTES_MAX + 1), ValueError),
    ],
)
def test_what_does_not_belong_in_the_state(key: object, value: object, error: type[Exception]):
    filled = BucketedMap()
    with pytest.raises(error):
        filled.put(key, value)  # type: ignore[arg-type]
    assert len(filled) == 0


def test_the_largest_key_and_value_fit():
    filled = BucketedMap()
    filled.put(b"k" * KEY_BYTES_MAX, bytes(VALUE_BYTES_MAX))
    filled.put_unbounded(b"p", bytes(VALUE_BYTES_MAX + 1))
    filled.commit()
    assert filled.root() != BucketedMap().root()


def test_broken_invariants_are_named():
    filled = fresh({b"a": b"1"})
    filled.root()
    filled.check()
    filled._map[b"smuggled"] = b"x"
    with pytest.raises(RuntimeError, match="invariant 1"):
        filled.check()
    del filled._map[b"smuggled"]
    filled._buckets[7] = []
    with pytest.raises(RuntimeError, match="invariant 2"):
        filled.check()
    del filled._buckets[7]
    filled._bucket_digests[3] = bytearray(8192)
    with pytest.raises(RuntimeError, match="invariant 3"):
        filled.check()
    del filled._bucket_digests[3]
    filled.check()
    filled._keys.add(b"smuggled")
    with pytest.raises(RuntimeError, match="invariant 5"):
        filled.check()
    assert len(EMPTY) == 32
    assert BUCKETS == 65536


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]):
    state_bench.main(["--keys", "300"])
    assert "fetching everything" in capsys.readouterr().out


def in_bucket_of(key: bytes, count: int) -> list[bytes]:
    """Further keys that fall into the bucket of `key`: anybody can find them."""
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        other = b"%d" % number
        if bucket_of(other) == bucket_of(key):
            found.append(other)
        number += 1
    return found


def test_a_bucket_takes_no_more_than_its_limit_whatever_was_done_before(monkeypatch):
    monkeypatch.setattr(state_module, "CONTENT_BYTES_MAX", 300)
    first, second, third = in_bucket_of(b"a", 3)
    full = BucketedMap()
    full.begin()
    full.put(first, bytes(100))
    full.put(second, bytes(100))
    full.commit()
    full.begin()
    with pytest.raises(ValueError, match="share a bucket"):
        full.put(third, bytes(100))
    full.rollback()
    full.check()
    # What replaces or follows something smaller fits, and a map made from the content judges alike.
    for judged in (full, BucketedMap(full.scan()), BucketedMap.thawed(full.frozen())):
        judged.begin()
        judged.put(first, bytes(120))
        judged.delete(second)
        judged.put(third, bytes(100))
        judged.rollback()
        judged.check()
        judged.begin()
        with pytest.raises(ValueError, match="share a bucket"):
            judged.put(third, bytes(100))
        judged.rollback()
