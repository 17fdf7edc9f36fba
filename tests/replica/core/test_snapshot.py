"""What may be asked for of a state, as it stands in messages."""

from __future__ import annotations

import pytest

from replica.core.layout import LayoutError
from replica.core.snapshot import PARTS_MAX, PartWanted, Source
from replica.core.treeparts import Kind, Want

NODES = Want(Kind.NODES).encode()
GOOD = [
    (Source.APPLICATION, 0, NODES),
    (Source.TABLE, 0, Want(Kind.BUCKETS, 7, (3, 9)).encode()),
    (Source.LOGS, 2, b""),
    (Source.BATCHES, PARTS_MAX - 1, b""),
]


@pytest.mark.parametrize(("source", "number", "want"), GOOD)
def test_wants_are_read_as_they_are_written(source: Source, number: int, want: bytes):
    wanted = PartWanted.decode(int(source), number, want)
    assert (wanted.source, wanted.number) == (source, number)
    assert (b"" if wanted.want is None else wanted.want.encode()) == want


@pytest.mark.parametrize(
    ("source", "number", "want"),
    [
        (4, 0, b""),
        (255, 0, NODES),
        (Source.APPLICATION, 0, b""),
        (Source.APPLICATION, 1, NODES),
        (Source.TABLE, 0, NODES[:-1]),
        (Source.LOGS, 0, NODES),
        (Source.LOGS, PARTS_MAX, b""),
        (Source.BATCHES, 0, b"\0"),
        (Source.BATCHES, PARTS_MAX, b""),
    ],
)
def test_wants_that_ask_for_nothing_that_can_be(source: int, number: int, want: bytes):
    with pytest.raises(LayoutError):
        PartWanted.decode(source, number, want)
