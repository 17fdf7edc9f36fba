"""Fetching what differs: whatever else than the truth is handed in, the outcome is the wanted map."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from replica.core import treefetch, treeparts
from replica.core.layout import LayoutError
from replica.core.state import BucketedMap
from replica.core.tree import VALUE_BYTES_MAX, bucket_of, root_digest, with_values
from replica.core.treefetch import TreeFetch
from replica.core.treeparts import Kind, Want, part_of
from tests.replica.core.support import examples
from tests.replica.core.test_state import crowd

CROWD = crowd(4)
# Keys of the same node, most of them of different buckets.
NEIGHBOURS = [key for key in (b"%d" % i for i in range(8000)) if bucket_of(key) // 256 == bucket_of(CROWD[0]) // 256]


def random_content(rng: random.Random, count: int) -> dict[bytes, bytes]:
    return {b"key %d" % rng.randrange(10**6): rng.randbytes(rng.randrange(40)) for _ in range(count)}


def changed(content: dict[bytes, bytes], rng: random.Random, count: int) -> dict[bytes, bytes]:
    """The content with up to `count` keys added, deleted or given another value."""
    other = dict(content)
    for _ in range(count):
        key = rng.choice(
            [rng.choice([*content, b"first"]), b"new %d" % rng.randrange(10**6), *CROWD[:2], *NEIGHBOURS[:4]]
        )
        if key in other and rng.random() < 0.4:
            del other[key]
        else:
            other[key] = rng.randbytes(5) * rng.choice([1, 1, 1, 40])
    return other


def differing_buckets(mine: dict[bytes, bytes], wanted: dict[bytes, bytes]) -> set[int]:
    return {bucket_of(key) for key in mine.keys() | wanted.keys() if mine.get(key) != wanted.get(key)}


def thawed(fetch: TreeFetch) -> BucketedMap:
    """What was fetched, as a map; its digests are what a map made of its content has."""
    frozen = fetch.result()
    made = BucketedMap.thawed(frozen)
    made.check()
    fresh = BucketedMap(made.scan())
    assert frozen == fresh.frozen()
    assert made.take_changes() == []
    assert dict(with_values(frozen.items())) == dict(made.scan())
    return made


def fetch_honestly(fetch: TreeFetch, source: BucketedMap, at_once: int = 3) -> int:
    """Answer every want; return how many there were."""
    parts = 0
    while not fetch.is_complete:
        wants = fetch.wants(at_once)
        assert wants, "not complete, nothing outstanding, and nothing to ask"
        for want in wants:
            fetch.take(want, part_of(source, Want.decode(want.encode())))
            parts += 1
    assert fetch.wants(at_once) == []
    return parts


@examples(60)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 30))
def test_what_is_fetched_follows_what_differs(seed: int, size: int, differences: int):
    rng = random.Random(seed)
    ours = random_content(rng, size)
    theirs = changed(ours, rng, differences)
    mine, source = BucketedMap(ours.items()), BucketedMap(theirs.items())
    fetch = TreeFetch(source.root(), mine, VALUE_BYTES_MAX)
    parts = fetch_honestly(fetch, source, rng.randrange(1, 10))
    result = thawed(fetch)
    result.check()
    assert dict(result.scan()) == theirs
    assert result.root() == source.root()
    assert dict(mine.scan()) == ours
    buckets = differing_buckets(ours, theirs)
    filled = {bucket_of(key) for key in theirs}
    progress = fetch.progress
    assert progress.buckets_known == progress.buckets_fetched + progress.buckets_dropped == len(buckets)
    assert progress.buckets_fetched == len(buckets & filled)
    assert progress.keys_fetched == sum(bucket_of(key) in buckets for key in theirs)
    assert parts == progress.parts_taken <= 1 + 2 * len({number // 256 for number in buckets})
    assert parts == 0 or buckets


def test_equal_maps_need_nothing():
    mine = BucketedMap([(b"a", b"1")])
    fetch = TreeFetch(mine.root(), mine, 10)
    assert fetch.is_complete
    assert fetch.wants(5) == []
    assert thawed(fetch).root() == mine.root()


def test_one_difference_among_many_is_three_parts():
    content = {b"key %d" % i: b"v" for i in range(5000)}
    source = BucketedMap((content | {b"key 77": b"w"}).items())
    fetch = TreeFetch(source.root(), BucketedMap(content.items()), 10)
    assert fetch_honestly(fetch, source) == 3
    assert fetch.progress.buckets_fetched == 1
    assert fetch.progress.bytes_taken < 17_000


def test_from_nothing_and_to_nothing():
    full, empty = BucketedMap({b"key %d" % i: b"v" for i in range(3000)}.items()), BucketedMap()
    up = TreeFetch(full.root(), empty, 10)
    assert fetch_honestly(up, full) <= 1 + 2 * 256
    assert list(thawed(up).scan()) == list(full.scan())
    down = TreeFetch(empty.root(), full, 10)
    assert fetch_honestly(down, empty) == 1
    assert len(thawed(down)) == 0
    thawed(down).check()


def test_the_own_map_may_change_meanwhile():
    mine, source = BucketedMap([(b"a", b"1"), (b"b", b"1")]), BucketedMap([(b"a", b"1"), (b"b", b"2")])
    fetch = TreeFetch(source.root(), mine, 10)
    mine.put(b"a", b"changed")
    mine.delete(b"b")
    mine.commit()
    mine.root()
    fetch_honestly(fetch, source)
    assert list(thawed(fetch).scan()) == [(b"a", b"1"), (b"b", b"2")]


def test_what_was_not_digested_yet_counts_as_mine():
    mine, source = BucketedMap([(b"a", b"1")]), BucketedMap([(b"a", b"1"), (b"b", b"2")])
    mine.put(b"b", b"2")
    mine.commit()
    fetch = TreeFetch(source.root(), mine, 10)
    assert fetch.is_complete
    assert list(thawed(fetch).scan()) == [(b"a", b"1"), (b"b", b"2")]


# Liars.


@dataclass
class Liar:
    """Turns the truth into what it is not."""

    rng: random.Random
    sources: list[BucketedMap]
    seen: list[bytes]
    lied_in_slices: bool = False

    def lie(self, want: Want, truth: bytes) -> bytes:
        how = self.rng.randrange(8)
        if how == 0:
            return truth[: self.rng.randrange(len(truth))]
        if how == 1:
            return truth + self.rng.randbytes(self.rng.choice([1, 14, 40]))
        if how == 2:
            return self.rng.choice(self.seen)
        if how == 3:
            return b""
        if how == 4:
            return truth[::-1]
        if how == 5:
            other = Want(want.kind, self.rng.randrange(256), want.buckets, want.offset)
            return self.answer(other, truth)
        if how == 6:
            return self.answer(want, truth)
        place = self.rng.randrange(len(truth))
        return truth[:place] + bytes([truth[place] ^ 1 << self.rng.randrange(8)]) + truth[place + 1 :]

    def answer(self, want: Want, truth: bytes) -> bytes:
        """What another map has there: an old one, or a later one."""
        try:
            return part_of(self.rng.choice(self.sources), want)
        except LayoutError:
            return truth[1:]


def snapshot(fetch: TreeFetch) -> tuple:
    parts = (fetch._nodes_known, fetch._nodes_wanted, fetch._buckets_wanted, fetch._nodes, fetch._count)
    return (*map(repr, parts), dict(fetch._buckets), dict(fetch._digests))


def among_liars(seed: int, size: int, differences: int) -> TreeFetch:
    rng = random.Random(seed)
    ours = random_content(rng, size)
    theirs = changed(ours, rng, differences)
    source = BucketedMap(theirs.items())
    old, late = (BucketedMap(changed(theirs, rng, 20).items()) for _ in range(2))
    fetch = TreeFetch(source.root(), BucketedMap(ours.items()), VALUE_BYTES_MAX)
    liar = Liar(rng, [old, late], [b"?"])
    open_wants: list[Want] = []
    past: list[Want] = [Want(Kind.NODES)]
    for _ in range(3000):
        if fetch.is_complete:
            assert fetch.wants(1) == []
            result = thawed(fetch)
            result.check()
            assert dict(result.scan()) == theirs
            return fetch
        step(fetch, source, liar, open_wants, past)
    raise AssertionError("never complete")


def step(fetch: TreeFetch, source: BucketedMap, liar: Liar, open_wants: list[Want], past: list[Want]) -> None:
    rng = liar.rng
    open_wants += fetch.wants(rng.randrange(4))
    past += open_wants
    if rng.random() < 0.2:
        stale = rng.choice(past)
        if stale not in open_wants:
            before = snapshot(fetch)
            assert fetch.take(stale, rng.choice(liar.seen)) is False
            fetch.lost(stale)
            assert snapshot(fetch) == before
        return
    if not open_wants:
        return
    want = open_wants.pop(rng.randrange(len(open_wants)))
    # Slices that never come through begin again for ever: most times they do.
    calm = want.offset > 0 and rng.random() < 0.8
    if not calm and rng.random() < 0.2:
        fetch.lost(want)
        return
    try:
        truth = part_of(source, want)
    except LayoutError:
        # The first slice was a lie: there is no bucket so large.
        assert liar.lied_in_slices
        fetch.lost(want)
        liar.lied_in_slices = False
        return
    liar.seen.append(truth)
    part = truth if calm or rng.random() < 0.6 else liar.lie(want, truth)
    before = snapshot(fetch)
    try:
        taken = fetch.take(want, part)
    except LayoutError:
        # Slices show what they are when all of them are there; who gave the last one need not have lied.
        assert part != truth or (want.offset and liar.lied_in_slices)
        assert snapshot(fetch) == before
    else:
        if fetch._slices is not None and taken and part != truth and want.kind is Kind.BUCKETS:
            liar.lied_in_slices |= fetch._slices.node == want.node
        # Less than the truth is no lie.
        sliced = len(part) > 14 and treeparts._PIECE.unpack_from(part)[1] > treeparts.SLICE_BYTES_MAX
        assert part == truth or (want.kind is Kind.BUCKETS and (sliced or (taken and truth.startswith(part))))
    liar.lied_in_slices &= fetch._slices is not None


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Parts so small that some buckets are larger."""
    monkeypatch.setattr(treeparts, "PART_BYTES_MAX", 100)
    monkeypatch.setattr(treeparts, "SLICE_BYTES_MAX", 86)
    return monkeypatch


def search(how: settings) -> None:
    @how
    @given(st.integers(0, 2**32), st.integers(0, 20), st.integers(0, 12))
    def run(seed: int, size: int, differences: int) -> None:
        among_liars(seed, size, differences)

    run()


def test_liars_change_nothing(sliced: pytest.MonkeyPatch):
    search(examples(300))


def test_liars_do_happen(sliced: pytest.MonkeyPatch):
    fetches = [among_liars(seed, 20, 12) for seed in range(10)]
    assert all(fetch.progress.parts_refused > 0 for fetch in fetches)
    assert any(fetch.progress.parts_taken > fetch.progress.buckets_fetched for fetch in fetches)


class Whatever:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def replaced(name: str, wrong: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(treefetch, name, wrong)


def method(name: str, wrong: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(TreeFetch, name, wrong)


def keep_slices(fetch: TreeFetch, want: Want, *, dropping_slices: bool) -> None:
    del fetch._outstanding[treefetch._place(want)]


def replace_one_by_one(fetch: TreeFetch, node: int, buckets: list[tuple[int, bytes]]) -> None:
    for bucket in buckets:
        right_take_buckets(fetch, node, [bucket])


right_take_buckets = TreeFetch._take_buckets

BROKEN = {
    "node digests are not checked": replaced("root_digest", lambda nodes, count: Whatever()),
    "bucket digests are not checked": replaced("node_digest", lambda digests: Whatever()),
    "buckets are not checked": replaced("bucket_digest", lambda content: Whatever()),
    "what was taken before a wrong bucket stays": method("_take_buckets", replace_one_by_one),
    "slices stay after a wrong one": method("_close", keep_slices),
    "what is not asked is taken": replaced("decode_pieces", lambda want, data: sloppy(data)),
}


def sloppy(data: bytes) -> list[treeparts.Piece]:
    if len(data) < 14:
        return [treeparts.Piece(0, 0, 0, b"")]
    number, total, offset, _ = treeparts._PIECE.unpack_from(data)
    return [treeparts.Piece(number % 256, total, offset, data[14:])]


@pytest.mark.parametrize("name", BROKEN)
def test_the_comparison_notices(name: str, sliced: pytest.MonkeyPatch):
    BROKEN[name](sliced)
    with pytest.raises((AssertionError, KeyError, LayoutError)):
        search(settings(examples(300), phases=[Phase.generate], report_multiple_bugs=False))


# Slices.


def two_large() -> tuple[BucketedMap, Want, Want]:
    source = BucketedMap([(CROWD[0], b"x" * 300), (b"other", b"y" * 300)])
    wants = [Want(Kind.BUCKETS, n // 256, (n % 256,)) for n in (bucket_of(CROWD[0]), bucket_of(b"other"))]
    return source, wants[0], wants[1]


def past_digests(fetch: TreeFetch, source: BucketedMap) -> None:
    for _ in range(2):
        for want in fetch.wants(10):
            fetch.take(want, part_of(source, want))


def test_slices_of_one_bucket_at_a_time(sliced: pytest.MonkeyPatch):
    source, first, second = two_large()
    fetch = TreeFetch(source.root(), BucketedMap(), 400)
    past_digests(fetch, source)
    assert set(fetch.wants(10)) == {first, second}
    assert fetch.take(first, part_of(source, first)) is True
    assert fetch.take(second, part_of(source, second)) is False, "it has to wait"
    for _ in range(3):
        (want,) = fetch.wants(10)
        assert want.offset
        assert fetch._slices is not None
        assert len(fetch._slices.data) <= 300 + 12
        assert fetch.take(want, part_of(source, want)) is True
    assert fetch._slices is None
    assert fetch.wants(10) == [second]
    fetch.lost(second)
    fetch_honestly(fetch, source)
    assert thawed(fetch).root() == source.root()


@pytest.mark.parametrize("end", ["lost", "poisoned", "another size"])
def test_slices_are_asked_again_from_the_first(end: str, sliced: pytest.MonkeyPatch):
    source, first, _ = two_large()
    fetch = TreeFetch(source.root(), BucketedMap([(b"other", b"y" * 300)]), 400)
    past_digests(fetch, source)
    assert fetch.wants(10) == [first]
    wrong = bytearray(part_of(source, first))
    wrong[-1] ^= 1
    assert fetch.take(first, bytes(wrong)), "nobody can know yet"
    (want,) = fetch.wants(10)
    if end == "lost":
        fetch.lost(want)
    elif end == "another size":
        part = bytearray(part_of(source, want))
        part[5] += 1
        with pytest.raises(LayoutError, match="in all"):
            fetch.take(want, bytes(part))
    else:
        for _ in range(2):
            assert fetch.take(want, part_of(source, want))
            (want,) = fetch.wants(10)
        with pytest.raises(LayoutError, match="digest"):
            fetch.take(want, part_of(source, want))
    assert fetch._slices is None
    assert fetch.wants(10) == [first]
    fetch.lost(first)
    fetch_honestly(fetch, source)
    assert thawed(fetch).root() == source.root()


def test_a_bucket_of_many_parts_at_the_real_sizes():
    big = {key: bytes([i]) * VALUE_BYTES_MAX for i, key in enumerate(CROWD)}
    source = BucketedMap(big.items())
    fetch = TreeFetch(source.root(), BucketedMap(), VALUE_BYTES_MAX)
    parts = fetch_honestly(fetch, source)
    assert parts == 2 + 5
    assert fetch.progress.bytes_taken > 4 * VALUE_BYTES_MAX
    assert dict(thawed(fetch).scan()) == big


# The rest.


def test_not_before_it_is_complete():
    source = BucketedMap([(b"a", b"1")])
    fetch = TreeFetch(source.root(), BucketedMap(), 10)
    with pytest.raises(RuntimeError, match="not complete"):
        thawed(fetch)
    assert fetch.wants(0) == []
    assert fetch.wants(5) == [Want(Kind.NODES)]
    assert fetch.wants(5) == [], "it is outstanding"
    fetch.lost(Want(Kind.NODES))
    assert fetch.wants(5) == [Want(Kind.NODES)]


def test_a_root_that_is_no_maps():
    source = BucketedMap([(b"a", b"1")])
    source._count = 2
    fetch = TreeFetch(root_digest(source.nodes(), 2), BucketedMap(), 10)
    fetch_honestly(fetch, source)
    with pytest.raises(LayoutError, match="number of keys"):
        thawed(fetch)


def test_values_beyond_the_limit_are_refused():
    source = BucketedMap([(b"a", b"1" * 11)])
    fetch = TreeFetch(source.root(), BucketedMap(), 10)
    with pytest.raises(LayoutError, match="limit is 10"):
        fetch_honestly(fetch, source)
    assert not fetch.is_complete
    assert fetch.progress.parts_refused == 1
