"""What a replica records of changes, keeps and tells: positions, links, bounds."""

import random

import pytest

from replica.application import OperationError
from replica.apps import kv, kv_groups
from replica.core.batch import make_batch
from replica.core.envelope import Envelope, Open, Operations
from replica.core.execution import Executor
from replica.core.layout import LayoutError
from replica.shell.changes import (
    HISTORY_SLOTS_MAX,
    TURN_BYTES_MAX,
    TURN_SLOTS_MAX,
    History,
    Recorder,
    Watches,
    looked_to,
)
from replica.wire.changes import (
    BOOKMARK_SLOTS,
    LINK_BYTES_MAX,
    SLOT_BYTES_MAX,
    SLOT_CHANGES_MAX,
    VALUE_BYTES_MAX,
    Position,
    decode_changes,
    encode_change,
    make_slot,
    next_link,
    parse_position,
)
from replica.wire.messages import Changes, Watch, WatchAck, WatchEnded, decode_message, encode_frame
from tests.client.harness import make_genesis
from tests.support.waiting import on_loop, until

KEY = b"\x04" + bytes(64)


class World:
    """A real executor with a recorder, one client, and a history."""

    def __init__(self, application=None):
        self.recorder = Recorder(application or kv.KeyValue())
        self.executor = Executor(self.recorder, make_genesis())
        self.history = History()
        (opened,) = self.executor.execute(1, make_batch(0, (), [Envelope(b"", KEY, Open(bytes(16), 1))]))
        self.history.add(1, self.recorder.take())
        self.session = self.executor.table.opened(KEY, bytes(16))
        self.next = 1
        assert opened

    def run(self, *operations):
        """Execute operations in one slot."""
        content = Operations(self.session, self.next, self.next, operations)
        self.next += len(operations)
        slot = self.executor.slot + 1
        self.executor.execute(slot, make_batch(0, (), [Envelope(b"", KEY, content)]))
        self.history.add(slot, self.recorder.take())
        return slot

    def told(self, after, prefix=b""):
        return chain(self.history, after, prefix)


def chain(history, after, prefix=b""):
    """All changes after a position: (key, value, deleted), and the links' ends."""
    changes, ends, start = [], [], after
    for _, link in history.links(after, prefix, looked_to(after)):
        if link is not None:
            assert link.start == start
            assert link.end > link.start
            start = link.end
            ends.append(link.end)
            changes += decode_changes(link.changes, link.end.slot, link.end)
    return changes, ends


def brief(changes):
    return [(change.slot, change.key, change.value) for change in changes]


def test_what_was_written_is_told_and_nothing_else():
    world = World()
    start = Position(world.executor.slot)
    first = world.run(kv.put(b"a", b"1"), kv.get(b"a"), kv.put(b"a", b"1"), kv.put(b"b", b"x"), kv.incr(b"b"))
    world.run(kv.get(b"a"))
    world.executor.peek(kv.put(b"a", b"peeked"))
    second = world.run(kv.delete(b"a"), kv.delete(b"none"), kv.cas(b"b", b"no", b"2"), kv.incr(b"n"))
    changes, _ = world.told(start)
    assert brief(changes) == [
        (first, b"a", b"1"),
        (first, b"b", b"x"),
        (second, b"a", None),
        (second, b"n", b"1"),
    ]
    assert changes[2].deleted
    world.executor.peek(kv.put(b"z", b"peeked"))
    world.history.add(world.executor.slot + 1, world.recorder.take())
    assert len(world.told(start)[0]) == 4


def test_an_operation_that_is_taken_back_after_it_wrote_changes_nothing():
    class Careless:
        def apply(self, operation, context):
            context.state.put(operation, b"written")
            if operation.startswith(b"bad"):
                raise OperationError("after writing")
            return b"x" * (2 * 1024 * 1024) if operation.startswith(b"large") else b""

    world = World(Careless())
    start = Position(world.executor.slot)
    world.run(b"bad1", b"large1", b"good", b"bad2")
    assert [change.key for change in world.told(start)[0]] == [b"good"]


def test_a_group_tells_each_key_once_and_the_stores_own_records_not_at_all():
    world = World()
    start = Position(world.executor.slot)
    world.run(kv_groups.versions([b"a"]))
    world.run(kv_groups.group([kv.put(b"a", b"1"), kv.put(b"b", b"2"), kv.incr(b"a"), kv.delete(b"b")]))
    assert [(key, value) for _, key, value in brief(world.told(start)[0])] == [(b"a", b"2")]


def test_a_prefix_and_every_position_in_between():
    world = World()
    start = Position(world.executor.slot)
    for i in range(5):
        world.run(*(kv.put(b"%s/%d" % (name, j), b"%d" % i) for j in range(3) for name in (b"a", b"b")))
    all_changes, _ = world.told(start, b"a/")
    assert len(all_changes) == 15
    for number, change in enumerate(all_changes, 1):
        # Whoever stops behind any change and resumes there misses and repeats nothing.
        assert brief(world.told(change.position, b"a/")[0]) == brief(all_changes[number:])
        assert parse_position(str(change.position)) == change.position


def test_slots_without_changes_move_a_watch_on_now_and_then():
    history = History()
    for slot in range(1, 3 * BOOKMARK_SLOTS):
        history.add(slot, {slot: [(b"k", b"v")]} if slot == 100 else {})
    changes, ends = chain(history, Position(0), b"other")
    assert changes == []
    assert ends == [Position(BOOKMARK_SLOTS), Position(2 * BOOKMARK_SLOTS)]
    assert chain(history, Position(0), b"k")[1] == [Position(100), *ends]


def test_links_are_cut_alike_wherever_one_resumes():
    history = History()
    history.add(1, {1: [(b"%04d" % i, bytes(50_000)) for i in range(60)]})
    changes, ends = chain(history, Position(0))
    assert len(changes) == 60
    assert len(ends) > 2
    assert ends[-1] == Position(1)
    for end in ends[:-1]:
        rest, later = chain(history, end)
        assert later == ends[ends.index(end) + 1 :]
        assert brief(rest) == brief(changes[end.place :])
    raw = [link for _, link in history.links(Position(0), b"", 0) if link]
    assert all(len(link.changes) <= LINK_BYTES_MAX for link in raw)


def test_a_prefix_finds_what_a_walk_over_all_changes_finds():
    chance = random.Random(7)
    for _ in range(50):
        changed = [
            (bytes(chance.choices(b"ab\xff", k=chance.randint(1, 4))), b"v") for _ in range(chance.randint(0, 40))
        ]
        slot = make_slot(1, changed)
        for prefix in (b"", b"a", b"b", b"ab", b"\xff", b"\xff\xff", b"c", b"aaaaaa"):
            for seen in (0, 1, len(changed) // 2, len(changed), 1000):
                expected = [i for i, (key, _) in enumerate(changed) if key.startswith(prefix) and i >= seen]
                assert list(slot.matching(prefix, seen)) == expected


class Looked(bytes):
    """A key that counts how often keys are looked at."""

    count = 0

    def startswith(self, *arguments):
        Looked.count += 1
        return super().startswith(*arguments)

    def __getitem__(self, place):
        Looked.count += 1
        return super().__getitem__(place)

    def __lt__(self, other):
        Looked.count += 1
        return super().__lt__(other)


def test_watches_that_match_nothing_look_at_next_to_nothing():
    keys, watches = 4096, 1000
    history = History()
    history.add(1, {1: [(Looked(b"k%d" % i), b"") for i in range(keys)]})
    Looked.count = 0
    assert chain(history, Position(0), b"zz") == ([], [])
    sorting, Looked.count = Looked.count, 0
    for _ in range(watches):
        assert chain(history, Position(0), b"zz") == ([], [])
    assert 0 < Looked.count <= watches * 2 * 14, "two searches among 4,096 keys each"
    assert sorting <= keys * 14 + 30


class Listener:
    """A connection that takes everything."""

    writable = is_open = True

    def __init__(self):
        self.told = []

    def send(self, message):
        self.told.append(message)


@on_loop
async def test_all_watches_together_take_a_bounded_part_of_a_turn(monkeypatch):
    watches = Watches(Recorder(kv.KeyValue()))
    looked, told, turns = 0, 0, []

    def counted(*arguments):
        nonlocal looked, told
        link = next_link(*arguments)
        looked += 1
        told += len(link.changes) if link else 0
        return link

    pump = watches._pump

    def turn():
        nonlocal looked, told
        looked = told = 0
        pump()
        turns.append((looked, told))

    monkeypatch.setattr("replica.shell.changes.next_link", counted)
    monkeypatch.setattr(watches, "_pump", turn)
    listeners = [Listener() for _ in range(20)]
    for listener in listeners:
        for query in range(50):
            watches.on_message(listener, Watch(query, b"k" if query == 7 else b"zz", 0, 2**32 - 1))
    for slot in range(1, 10):
        watches.history.add(slot, {slot: [(b"k%d" % i, bytes(30_000)) for i in range(5)]})
    watches.history.add(10, {10: [(b"k", b"last")]})
    watches.executed(10)
    await until(lambda: sum(count for count, _ in turns) == 1000 * 10, "every watch has looked through every slot")
    assert max(count for count, _ in turns) <= TURN_SLOTS_MAX
    assert max(size for _, size in turns) <= TURN_BYTES_MAX + 5 * 31_000
    for listener in listeners:
        slots = [message.to_slot for message in listener.told if message.query == 7]
        assert slots == list(range(11))
        assert len(listener.told) == 50 + 10


def test_large_values_are_left_out_and_so_is_what_makes_a_slot_too_large():
    history = History()
    history.add(1, {1: [(b"fits", bytes(VALUE_BYTES_MAX)), (b"large", bytes(VALUE_BYTES_MAX + 1))]})
    fits, large = chain(history, Position(0))[0]
    assert (fits.value, fits.is_whole) == (bytes(VALUE_BYTES_MAX), True)
    assert (large.value, large.size, large.is_whole, large.deleted) == (None, VALUE_BYTES_MAX + 1, False, False)
    count = SLOT_BYTES_MAX // VALUE_BYTES_MAX
    history.add(2, {2: [(b"%d" % i, bytes(VALUE_BYTES_MAX)) for i in range(count + 5)]})
    found = chain(history, Position(1))[0]
    assert [change.is_whole for change in found] == [True] * count + [False] * 5


def test_what_is_kept_is_bounded_by_bytes_and_by_slots():
    history = History(bytes_max=100_000)
    for slot in range(1, 201):
        history.add(slot, {slot: [(b"k", bytes(1000))]})
    assert 100 < history.floor < 200
    assert not history.has(Position(history.floor - 1))
    assert not history.has(Position(history.floor, 1))
    assert history.has(Position(history.floor))
    assert [change.slot for change in chain(history, Position(history.floor))[0]] == list(range(history.floor + 1, 201))
    history.add(HISTORY_SLOTS_MAX + 500, {})
    assert history.floor == 500


def test_a_slot_with_too_many_changes_is_a_gap():
    history = History()
    history.add(1, {1: [(b"a", b"1")]})
    history.add(2, {2: [(b"%d" % i, b"") for i in range(SLOT_CHANGES_MAX + 1)]})
    history.add(3, {3: [(b"b", b"1")]})
    assert history.floor == 2
    assert [change.key for change in chain(history, Position(2))[0]] == [b"b"]


def test_beginning_anew_forgets():
    history = History()
    history.add(1, {1: [(b"a", b"1")], 2: [(b"b", b"1")]})
    history.begin(500)
    history.add(501, {501: [(b"c", b"1")]})
    assert not history.has(Position(1))
    assert [change.key for change in chain(history, Position(500))[0]] == [b"c"]


@pytest.mark.parametrize("text", ["", ".", "1.", ".1", "x", "-1", "1.2.3", "9" * 19, "1.4294967296", "²"])
def test_what_is_no_position_is_refused(text):
    with pytest.raises(ValueError, match="position"):
        parse_position(text)


def test_any_bytes_are_changes_or_refused():
    chance = random.Random(1)
    good = encode_change(1, b"a", b"x") + encode_change(2, b"b", None)
    assert len(decode_changes(good, 7, Position(7))) == 2
    for _ in range(500):
        raw = bytearray(good[: chance.randint(1, len(good))])
        raw[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            for change in decode_changes(bytes(raw), 7, Position(7)):
                assert change.slot == 7
        except LayoutError:
            pass
    with pytest.raises(LayoutError):
        decode_changes(encode_change(2, b"a", b"") * 2, 7, Position(7))


@pytest.mark.parametrize(
    "message",
    [
        Watch(1, b"p", 5, 4294967295),
        WatchAck(1, 5, 2),
        Changes(1, 5, 4294967295, 6, 4294967295, b"x"),
        WatchEnded(1, "gone", 7),
    ],
)
def test_messages(message):
    assert decode_message(encode_frame(message)[4:]) == message


@pytest.mark.parametrize("message", [Watch(1, bytes(4097), 5, 1), Watch(1, b"", 2**63, 1), WatchAck(1, 5, 2**32)])
def test_messages_out_of_bounds_are_refused(message):
    with pytest.raises(LayoutError):
        decode_message(encode_frame(message)[4:])
