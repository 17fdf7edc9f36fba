"""Milestones that wait for the one that is being written become one, with the last one's maps."""

import asyncio
import threading

from replica.core.checkpoint import Header
from replica.core.snapshot import Milestone
from replica.core.state import BucketedMap
from replica.core.tree import encode_item
from replica.shell.keeper import StateKeeper
from tests.support.waiting import on_loop, until


class SlowStore:
    """Writes when it is let; what it was given, by slot."""

    def __init__(self) -> None:
        self.may_write = threading.Semaphore(0)
        self.written = []

    def write(self, milestone, *, replace_all):
        assert not replace_all
        assert self.may_write.acquire(timeout=5)
        self.written.append((milestone, tuple(map(dict, milestone.changes))))

    def wal_bytes(self):
        return 0

    def give_back(self, pages):
        return False

    def close(self):
        pass


def header_of(raw: bytes) -> Header:
    return Header(int(raw), 0, bytes(32), bytes(32), (0, 0, 0), (bytes(32),) * 3, (bytes(32),) * 3, 0, bytes(32))


def milestone(slot: int, state: BucketedMap, **changes: bytes | None) -> Milestone:
    state.begin()
    for key, value in changes.items():
        state.delete(key.encode()) if value is None else state.put(key.encode(), value)
    state.commit()
    maps = (state.frozen(), BucketedMap().frozen())
    return Milestone(slot, b"%d" % slot, b"c", (), (), state.take_changes(), (), maps)


@on_loop
async def test_those_that_wait_become_one():
    store, state, forgettable = SlowStore(), BucketedMap(), []
    keeper = StateKeeper(store, header_of, forgettable.append, lambda error: None)
    said = [
        milestone(1, state, a=b"1"),
        milestone(2, state, a=b"2", b=b"2", c=b"2"),
        milestone(3, state, b=None, c=b"3"),
        milestone(4, state, d=b"4"),
    ]
    for one in said:
        keeper.persist(one)
    assert [one.maps is said[3].maps for one in keeper._waiting] == [True] * 3, "no others are kept"
    for count in (1, 2):
        store.may_write.release()
        await until(lambda count=count: len(forgettable) == count, "written")
    (first, changes), (last, merged) = store.written
    assert (first.slot, first.maps, changes) == (1, said[0].maps, ({b"a": b"1"}, {}))
    assert (last.slot, last.header, last.maps) == (4, b"4", said[3].maps)
    assert merged == ({b"a": b"2", b"b": None, b"c": b"3", b"d": b"4"}, {})
    held = {**changes[0], **merged[0]}
    wanted = {key: encode_item(key, value) for key, value in held.items() if value is not None}
    assert dict(last.maps[0].items()) == wanted, "what it comes to"
    closing = asyncio.ensure_future(keeper.close())
    store.may_write.release()
    await closing
