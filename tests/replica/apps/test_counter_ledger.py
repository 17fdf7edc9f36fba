"""The two short examples."""

from __future__ import annotations

import pytest

from replica.application import Context, OperationError
from replica.apps.counter import Counter
from replica.apps.ledger import Ledger
from replica.core.state import BucketedMap


def context() -> Context:
    return Context(BucketedMap(), slot=7, time_ms=1234)


def test_the_counter_counts_whatever_it_is_given():
    app, where = Counter(), context()
    assert [app.apply(operation, where) for operation in (b"", b"x", bytes(100))] == [b"1", b"2", b"3"]
    assert dict(where.state.scan()) == {b"count": b"3"}


def test_all_that_the_counter_remembers_is_in_its_state():
    where = context()
    assert [Counter().apply(b"", where) for _ in range(3)] == [b"1", b"2", b"3"]


def test_the_ledger_numbers_its_records_and_returns_them():
    app, where = Ledger(), context()
    assert app.apply(b"append first entry", where) == b"1"
    where.slot, where.time_ms = 9, 2000
    assert app.apply(b"append \x00\xff", where) == b"2"
    assert app.apply(b"read 1", where) == b"7 1234 first entry"
    assert app.apply(b"read 0002", where) == b"9 2000 \x00\xff"


@pytest.mark.parametrize(
    "operation",
    [b"", b"append", b"append ", b"read", b"read ", b"read -1", b"read x", b"read 1_0", b"read 0", b"read 2",
     b"read " + b"9" * 5000, b"read 000000000000000000015", b"Append x", b"erase 1"],
)  # fmt: skip
def test_the_ledger_refuses_the_rest_and_nothing_changes(operation: bytes):
    app, where = Ledger(), context()
    app.apply(b"append only", where)
    before = dict(where.state.scan())
    with pytest.raises(OperationError):
        app.apply(operation, where)
    assert dict(where.state.scan()) == before


def test_there_is_no_way_to_change_a_record():
    app, where = Ledger(), context()
    for text in (b"a", b"b", b"a"):
        app.apply(b"append " + text, where)
    assert [app.apply(b"read %d" % n, where).split(b" ")[2] for n in (1, 2, 3)] == [b"a", b"b", b"a"]
