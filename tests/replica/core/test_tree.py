"""The content of a bucket, wants and parts: what they are, and everything that they are not."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.core import treeparts
from replica.core.layout import LayoutError
from replica.core.state import BucketedMap
from replica.core.tree import (
    EMPTY,
    KEY_BYTES_MAX,
    bucket_digest,
    bucket_of,
    decode_bucket,
    encode_bucket,
    node_digest,
    root_digest,
    split_digests,
)
from replica.core.treeparts import (
    BUCKET_BYTES_MAX,
    PART_BYTES_MAX,
    SLICE_BYTES_MAX,
    WANT_SIZE,
    Kind,
    Want,
    decode_nodes,
    decode_pieces,
    part_of,
)
from tests.replica.core.support import block, examples
from tests.replica.core.test_state import crowd


def item(key: bytes, value: bytes = b"v") -> bytes:
    return block(key) + block(value)


ONE, TWO, THREE = sorted(crowd(3))
HOME = bucket_of(ONE)


@examples(50)
@given(st.dictionaries(st.sampled_from([ONE, TWO, THREE]), st.binary(max_size=20)))
def test_a_bucket_is_read_as_it_was_written(content: dict[bytes, bytes]):
    items = sorted(content.items())
    raw = encode_bucket(items)
    assert raw == b"".join(item(key, value) for key, value in items)
    assert decode_bucket(HOME, raw, 20) == items
    assert bucket_digest(raw) == (hashlib.sha256(b"\x20" + raw).digest() if items else EMPTY)


@pytest.mark.parametrize("size", [1, 2046, 2047, 2048, 3 * 2047 - 1, 3 * 2047, 65_535, 65_536, 65_537, 131_072])
def test_a_digest_is_the_same_whether_made_in_pieces_or_not(size: int):
    content = random.Random(size).randbytes(size)
    assert bucket_digest(content) == hashlib.sha256(b"\x20" + content).digest()
    assert node_digest(content) == hashlib.sha256(b"\x21" + content).digest()


@pytest.mark.parametrize(
    "content",
    [
        item(TWO) + item(ONE),
        item(ONE) + item(ONE),
        item(ONE) + item(THREE) + item(TWO),
        item(b"stranger"),
        item(ONE) + item(b""),
        item(b"") + item(ONE),
        item(ONE) + b"\0",
        item(ONE)[:-1],
        item(ONE, b"x" * 21),
        item(b"k" * (KEY_BYTES_MAX + 1)),
        b"\xff\xff\xff\xff" + ONE,
    ],
)
def test_contents_that_no_bucket_has(content: bytes):
    with pytest.raises(LayoutError):
        decode_bucket(HOME, content, 20)


def test_the_empty_key_is_refused_even_in_its_own_bucket():
    with pytest.raises(LayoutError, match="empty"):
        decode_bucket(bucket_of(b""), item(b""), 20)


def test_digests_are_joined_as_documented():
    digests = [EMPTY] * 255 + [b"d" * 32]
    joined = b"".join(digests)
    assert node_digest(joined) == hashlib.sha256(b"\x21" + joined).digest()
    assert node_digest(bytes(8192)) == EMPTY
    assert split_digests(joined) == tuple(digests)
    assert root_digest(digests, 7) == hashlib.sha256(b"\x22" + joined + struct.pack(">Q", 7)).digest()
    for wrong in (b"", joined[:-1], joined + b"x"):
        with pytest.raises(LayoutError):
            split_digests(wrong)


def want(kind: int, node: int = 0, mask: int = 0, offset: int = 0) -> bytes:
    return bytes([kind, node]) + mask.to_bytes(32, "big") + struct.pack(">I", offset)


@pytest.mark.parametrize(
    ("raw", "decoded"),
    [
        (want(1), Want(Kind.NODES)),
        (want(2, 255), Want(Kind.DIGESTS, 255)),
        (want(3, 1, 1), Want(Kind.BUCKETS, 1, (0,))),
        (want(3, 1, 0b1010 | 1 << 255), Want(Kind.BUCKETS, 1, (1, 3, 255))),
        (want(3, 1, 2, 77), Want(Kind.BUCKETS, 1, (1,), 77)),
    ],
)
def test_wants(raw: bytes, decoded: Want):
    assert Want.decode(raw) == decoded
    assert decoded.encode() == raw
    assert len(raw) == WANT_SIZE


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        want(1)[:-1],
        want(1) + b"\0",
        want(0),
        want(4),
        want(1, 1),
        want(1, 0, 1),
        want(1, 0, 0, 1),
        want(2, 0, 1),
        want(2, 0, 0, 1),
        want(3, 0, 0),
        want(3, 0, 0, 1),
        want(3, 0, 3, 1),
    ],
)
def test_requests_that_are_no_wants(raw: bytes):
    with pytest.raises(LayoutError):
        Want.decode(raw)


@examples(200)
@given(st.binary(min_size=WANT_SIZE, max_size=WANT_SIZE) | st.integers(0, 4).map(lambda kind: want(kind, 3, kind)))
def test_whatever_is_decoded_is_encoded_alike(raw: bytes):
    try:
        decoded = Want.decode(raw)
    except LayoutError:
        return
    assert decoded.encode() == raw


class Shelf:
    """A source whose buckets are what the test says."""

    def __init__(self, **sizes: int) -> None:
        self.contents = {512 + int(bucket[1:]): bytes([int(bucket[1:])]) * size for bucket, size in sizes.items()}
        self.read: list[int] = []

    def nodes(self) -> tuple[bytes, ...]:
        return tuple(bytes([i]) * 32 for i in range(256))

    def count(self) -> int:
        return 2**40

    def bucket_digests(self, node: int) -> tuple[bytes, ...]:
        return tuple(bytes([node ^ i]) * 32 for i in range(256))

    def bucket(self, number: int) -> bytes:
        self.read.append(number)
        return self.contents.get(number, b"")


def piece(bucket: int, data: bytes, total: int | None = None, offset: int = 0) -> bytes:
    return struct.pack(">HIII", 512 + bucket, len(data) if total is None else total, offset, len(data)) + data


def test_digests_as_parts():
    shelf = Shelf()
    part = part_of(shelf, Want(Kind.NODES))
    assert part == b"".join(shelf.nodes()) + struct.pack(">Q", 2**40)
    assert decode_nodes(part) == (shelf.nodes(), 2**40)
    assert part_of(shelf, Want(Kind.DIGESTS, 9)) == b"".join(shelf.bucket_digests(9))
    for wrong in (part[:-1], part + b"x", b""):
        with pytest.raises(LayoutError):
            decode_nodes(wrong)


def test_as_many_whole_buckets_as_fit():
    shelf = Shelf(b1=10, b2=0, b3=PART_BYTES_MAX - 10 - 3 * 14, b4=0, b5=9)
    wanted = Want(Kind.BUCKETS, 2, (1, 2, 3, 4, 5))
    part = part_of(shelf, wanted)
    assert part == piece(1, bytes([1]) * 10) + piece(2, b"") + piece(3, shelf.contents[515])
    assert len(part) == PART_BYTES_MAX
    assert shelf.read == [513, 514, 515, 516], "one beyond what fits is read, and no more"
    assert [(p.bucket, p.total, p.is_whole) for p in decode_pieces(wanted, part)] == [
        (1, 10, True),
        (2, 0, True),
        (3, len(shelf.contents[515]), True),
    ]


def test_the_largest_bucket_that_is_sent_whole():
    for size, whole in ((SLICE_BYTES_MAX, True), (SLICE_BYTES_MAX + 1, False)):
        shelf = Shelf(b1=size, b2=1)
        wanted = Want(Kind.BUCKETS, 2, (1, 2))
        part = part_of(shelf, wanted)
        (got,) = decode_pieces(wanted, part)
        assert len(part) == PART_BYTES_MAX
        assert (got.is_whole, len(got.data), got.total) == (whole, SLICE_BYTES_MAX, size)


def test_a_large_bucket_comes_in_slices_and_never_beside_others():
    size = 2 * SLICE_BYTES_MAX + 5
    shelf = Shelf(b1=4, b2=size, b3=4)
    assert len(decode_pieces(Want(Kind.BUCKETS, 2, (1, 2, 3)), part_of(shelf, Want(Kind.BUCKETS, 2, (1, 2, 3))))) == 1
    together = b""
    for length in (SLICE_BYTES_MAX, SLICE_BYTES_MAX, 5):
        wanted = Want(Kind.BUCKETS, 2, (2,), len(together))
        (got,) = decode_pieces(wanted, part_of(shelf, wanted))
        assert (got.total, got.offset, len(got.data)) == (size, len(together), length)
        together += got.data
    assert together == shelf.contents[514]
    for offset in (size, size + 1):
        with pytest.raises(LayoutError):
            part_of(shelf, Want(Kind.BUCKETS, 2, (2,), offset))
    with pytest.raises(LayoutError):
        part_of(shelf, Want(Kind.BUCKETS, 2, (1,), 1))


def test_a_bucket_beyond_the_limit_is_not_served():
    with pytest.raises(LayoutError, match="bytes"):
        part_of(Shelf(b1=BUCKET_BYTES_MAX + 1), Want(Kind.BUCKETS, 2, (1,)))


LONG = 100  # what SLICE_BYTES_MAX is in the test below


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ((1, 2), b""),
        ((1, 2), piece(2, b"x")),
        ((1, 2), piece(2, b"x") + piece(1, b"x")),
        ((1, 2), piece(1, b"x") + piece(1, b"x")),
        ((1, 3), piece(1, b"x") + piece(2, b"x")),
        ((1,), piece(257, b"x")),
        ((1,), piece(1, b"x") + piece(2, b"x")),
        ((1,), piece(1, b"x") + b"\0"),
        ((1,), piece(1, b"x")[:-1]),
        ((1,), piece(1, b"xx")[:-1]),
        ((1,), piece(1, b"x", 1, 1)),
        ((1,), piece(1, b"", 1)),
        ((1,), piece(1, b"x", LONG)),
        ((1,), piece(1, b"x" * (LONG - 1), LONG + 1)),
        ((1,), piece(1, b"x" * LONG, LONG + 1, 1)),
        ((1,), piece(1, b"x" * LONG, BUCKET_BYTES_MAX + 1)),
        ((1,), piece(1, b"x" * LONG, 2**32 - 1)),
        ((1,), piece(1, b"x" * (LONG + 1))),
        ((1, 2), piece(1, b"x") + piece(2, b"x" * (LONG - 15), LONG + 1)),
    ],
)
def test_parts_that_answer_another_want(wanted: tuple[int, ...], part: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(treeparts, "SLICE_BYTES_MAX", LONG)
    monkeypatch.setattr(treeparts, "PART_BYTES_MAX", LONG + 14)
    with pytest.raises(LayoutError):
        decode_pieces(Want(Kind.BUCKETS, 2, wanted), part)


@pytest.mark.parametrize(
    "part",
    [
        piece(1, b"x" * 20, 120, 0),
        piece(1, b"x" * 20, 120, 99),
        piece(1, b"x" * 19, 120, 100),
        piece(1, b"x" * 21, 120, 100),
        piece(1, b"x" * 20, 20, 0),
        piece(1, b"", 100, 100),
        piece(1, b"", 101, 101),
        piece(2, b"x" * 20, 120, 100),
        piece(1, b"x" * 20, 120, 100) + b"x",
    ],
)
def test_slices_that_are_not_the_next_one(part: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(treeparts, "SLICE_BYTES_MAX", LONG)
    monkeypatch.setattr(treeparts, "PART_BYTES_MAX", LONG + 14)
    wanted = Want(Kind.BUCKETS, 2, (1,), 100)
    (right,) = decode_pieces(wanted, piece(1, b"x" * 20, 120, 100))
    assert right.data == b"x" * 20
    with pytest.raises(LayoutError):
        decode_pieces(wanted, part)


def test_a_map_serves_what_it_digested_last():
    source = BucketedMap()
    source.put(ONE, b"1")
    source.put(TWO, b"2")
    source.commit()
    source.root()
    node, place = divmod(HOME, 256)
    before = [part_of(source, w) for w in (Want(Kind.NODES), Want(Kind.DIGESTS, node))]
    bucket = part_of(source, Want(Kind.BUCKETS, node, (place,)))
    assert bucket[14:] == item(ONE, b"1") + item(TWO, b"2")
    source.begin()
    source.put(ONE, b"changed")
    source.delete(TWO)
    source.put(THREE, b"new")
    source.commit()
    source.begin()
    source.put(ONE, b"changed again")
    source.put(TWO, b"back, not committed")
    assert part_of(source, Want(Kind.BUCKETS, node, (place,))) == bucket
    assert [part_of(source, w) for w in (Want(Kind.NODES), Want(Kind.DIGESTS, node))] == before
    source.rollback()
    source.root()
    assert part_of(source, Want(Kind.BUCKETS, node, (place,)))[14:] == item(ONE, b"changed") + item(THREE, b"new")
    assert part_of(source, Want(Kind.NODES)) != before[0]
