"""What is set apart from garbage collections stays correct, and is not kept for ever."""

import gc
import weakref

import pytest

from replica.shell.garbage import give_free, set_apart


class Node:
    """Something that refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


def test_later_collections_pass_over_what_is_set_apart():
    kept = [[number] for number in range(1000)]
    set_apart()
    assert gc.get_freeze_count() >= len(kept)
    ids = set(map(id, gc.get_objects()))
    assert not ids & set(map(id, kept))
    later = [[]]
    assert id(later) in set(map(id, gc.get_objects()))


def test_what_is_garbage_already_is_freed_first():
    gone = weakref.ref(Node())
    gc.disable()
    try:
        set_apart()
    finally:
        gc.enable()
    assert gone() is None


def test_what_was_set_apart_is_freed_by_the_next_time():
    former = Node()
    gone = weakref.ref(former)
    set_apart()
    del former
    gc.collect()
    assert gone() is not None, "passed over"
    set_apart()
    assert gone() is None


def test_what_was_set_apart_can_be_given_free():
    former = Node()
    gone = weakref.ref(former)
    set_apart()
    del former
    give_free()
    assert gone() is None
    assert gc.get_freeze_count() == 0
