"""The linearizability checker, on histories made by hand."""

from collections import Counter

from replica.apps import kv
from replica.sim.histories import NEVER, History, Operation, is_linearizable

KEY = b"k"
PUT_1, PUT_2, GET = kv.put(KEY, b"1"), kv.put(KEY, b"2"), kv.get(KEY)
FRESH, REPLACED = b"\0", b"\1"


def op(raw: bytes, invoked: int, returned: int = NEVER, value: bytes | None = None) -> Operation:
    return Operation(1, KEY, raw, invoked, returned, value)


def test_one_after_the_other():
    assert is_linearizable([op(PUT_1, 0, 1, FRESH), op(GET, 2, 3, b"\x011"), op(PUT_2, 4, 5, REPLACED)])


def test_a_stale_read_is_found():
    history = [op(PUT_1, 0, 1, FRESH), op(PUT_2, 2, 3, REPLACED), op(GET, 4, 5, b"\x011")]
    assert is_linearizable(history) is False


def test_a_concurrent_read_may_see_either():
    for seen in (b"\x011", b"\x012"):
        assert is_linearizable([op(PUT_1, 0, 1, FRESH), op(PUT_2, 2, 9, REPLACED), op(GET, 3, 8, seen)])


def test_reads_must_not_go_back_in_time():
    history = [op(PUT_1, 0, 1, FRESH), op(PUT_2, 2, 20, REPLACED), op(GET, 3, 5, b"\x012"), op(GET, 6, 8, b"\x011")]
    assert is_linearizable(history) is False


def test_an_undecided_operation_may_have_happened_or_not():
    assert is_linearizable([op(PUT_1, 0), op(GET, 5, 6, b"\x011")])
    assert is_linearizable([op(PUT_1, 0), op(GET, 5, 6, b"\0")])


def test_an_undecided_operation_happens_once():
    history = [op(kv.incr(KEY, 1), 0), op(GET, 5, 6, b"\x011"), op(GET, 7, 8, b"\x012")]
    assert is_linearizable(history) is False


def test_an_undecided_operation_does_not_happen_before_it_was_asked_for():
    assert is_linearizable([op(GET, 0, 1, b"\x011"), op(PUT_1, 2)]) is False


def test_a_lost_increment_is_found():
    one = kv.incr(KEY, 1)
    assert is_linearizable([op(one, 0, 1, (1).to_bytes(8, "big")), op(one, 2, 3, (1).to_bytes(8, "big"))]) is False


def test_a_put_of_the_present_value_may_be_needed_later():
    # put 1, delete, put 1 again, all but the delete overlapping: the second put must not be taken early.
    history = [
        op(PUT_1, 0, 1, FRESH),
        op(PUT_1, 2, 20, REPLACED),
        op(PUT_2, 3, 4, REPLACED),
        op(GET, 15, 16, b"\x011"),
    ]
    assert is_linearizable(history)


def test_a_search_that_takes_too_long_says_so():
    history = [op(kv.incr(KEY, i), 0) for i in range(1, 12)] + [op(GET, 5, 6, b"\x01-1")]
    assert is_linearizable(history, steps_max=50) is None


def test_keys_are_judged_apart_and_problems_name_them():
    history = History()
    good = history.invoke(1, b"a", kv.get(b"a"), 0)
    good.returned, good.value = 1, b"\0"
    bad = history.invoke(1, b"b", kv.get(b"b"), 0)
    bad.returned, bad.value = 1, b"\x01x"
    problems = list(history.problems(Counter()))
    assert len(problems) == 1
    assert "b'b'" in problems[0]
