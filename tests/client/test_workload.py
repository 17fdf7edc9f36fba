"""Closed and open loop in virtual time: nothing here waits, and a pause of an hour takes none."""

import asyncio
import math
import selectors

import pytest

from client import workload
from client.workload import Content, OpenLoop, closed_loop, open_loop

BEGIN = 1024.0
STEP = 1 / 128  # as all times here a sum of powers of two, so that they add up exactly
KEYS = Content([b"a", b"b", b"c", b"d"], b"v")


class VirtualSelector(selectors.DefaultSelector):
    """Time passes only when the loop has nothing else to do, and then at once."""

    def __init__(self):
        super().__init__()
        self.time = BEGIN

    def select(self, timeout=None):
        if timeout is None:
            raise AssertionError("the loop would wait for ever")
        self.time += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.clock = VirtualSelector()
        super().__init__(self.clock)

    def time(self):
        return self.clock.time


def in_virtual_time(work):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())


def now():
    return asyncio.get_running_loop().time()


class Server:
    """Answers after `takes` seconds, and not while it stands still; `places` at a time if they are limited."""

    def __init__(self, takes=STEP, stands_still=(0.0, 0.0), error=None):
        self.takes, self.stands_still, self.error = takes, stands_still, error
        self.starts, self.keys = [], []

    async def put(self, key, value):
        begin, end = (BEGIN + at for at in self.stands_still)
        self.starts.append(now() - BEGIN)
        self.keys.append(key)
        if begin <= now() < end:
            await asyncio.sleep(end - now())
        await asyncio.sleep(self.takes)
        if self.error is not None and len(self.starts) > 3:
            raise self.error
        return "done"

    def check(self, outcome):
        assert outcome == "done"


def test_a_closed_loop_keeps_so_many_under_way():
    server = Server(takes=STEP)
    recording = in_virtual_time(lambda: closed_loop([server], 4, 1.0, KEYS, now))
    assert recording.operations == 4 * 128
    assert recording.seconds == 1.0
    assert recording.latencies.percentile(1.0) == STEP
    assert recording.lateness.count == 0
    assert set(server.keys[:4]) == set(KEYS.keys)


def test_an_open_loop_starts_evenly_whatever_became_of_those_before():
    server = Server(takes=7.0)
    recording = in_virtual_time(lambda: open_loop([server], 8, 2.0, KEYS, now))
    assert server.starts == [i / 8 for i in range(16)]
    assert (recording.operations, recording.not_started) == (16, 0)
    assert recording.seconds == 15 / 8 + 7.0
    assert recording.lateness.maximum_s == 0.0
    assert server.keys == KEYS.keys * 4


def test_a_stall_is_seen_by_all_that_was_meant_to_start_and_the_closed_loop_hardly_sees_it():
    """Coordinated omission: of eight seconds the server stands still for one."""
    stalled = {"takes": STEP, "stands_still": (2.0, 3.0)}
    is_open = in_virtual_time(lambda: open_loop([Server(**stalled)], 128, 8.0, KEYS, now))
    closed = in_virtual_time(lambda: closed_loop([Server(**stalled)], 1, 8.0, KEYS, now))
    assert is_open.operations == 1024
    # The 128 operations that fell into the pause waited for 1 s, 127/128 s, and so on; the rest for one step.
    waited = sorted([STEP] * (1024 - 128) + [(128 - i) / 128 + STEP for i in range(128)])
    for share in (0.5, 0.9, 0.95, 0.99, 1.0):
        assert is_open.latencies.percentile(share) == pytest.approx(waited[math.ceil(share * 1024) - 1], rel=0.001)
    assert closed.latencies.percentile(0.99) == pytest.approx(STEP, rel=0.001)
    assert closed.latencies.maximum_s == 1.0 + STEP


def test_a_generator_that_comes_late_makes_latencies_longer_and_says_so():
    class Blocking(Server):
        async def put(self, key, value):
            outcome = await super().put(key, value)
            if len(self.starts) == 5:
                asyncio.get_running_loop().clock.time += 1.0  # the whole program was busy with something else
            return outcome

    recording = in_virtual_time(lambda: open_loop([Blocking(takes=STEP)], 8, 4.0, KEYS, now))
    assert recording.operations == 32
    assert recording.lateness.maximum_s == 1.0 + STEP - 1 / 8
    assert recording.latencies.maximum_s == 1.0 + STEP
    # The next one was meant to start at 5/8, and was started when the pause that began at 4/8 + STEP was over.
    assert recording.latencies.percentile(31 / 32) == pytest.approx(1.5 + STEP - 5 / 8 + STEP, rel=0.001)


def test_what_is_under_way_is_bounded_and_what_never_started_counts(monkeypatch):
    monkeypatch.setattr(workload, "UNDER_WAY_MAX", 3)
    server = Server(takes=1.0)
    recording = in_virtual_time(lambda: open_loop([server], 8, 2.0, KEYS, now))
    # Three at 0, 1/8 and 2/8, one when each of them ended, and a last one at the end, when there was room for one.
    assert server.starts == [0, 1 / 8, 2 / 8, 1, 9 / 8, 10 / 8, 2]
    assert (recording.operations, recording.not_started) == (7, 9)
    assert recording.latencies.count == 16
    # What never started was due from 7/8 to 15/8, and waited until the end.
    assert recording.latencies.percentile(1 / 16) == pytest.approx(1 / 8, rel=0.001)


@pytest.mark.parametrize("loop", [closed_loop, open_loop])
def test_operations_are_shared_by_all_sinks(loop):
    servers = [Server() for _ in range(3)]
    in_virtual_time(lambda: loop(servers, 6, 2.0, KEYS, now))
    counts = [len(server.starts) for server in servers]
    assert min(counts) == max(counts) > 0


def test_an_open_loop_may_start_in_bursts():
    server = Server()
    loop = OpenLoop([server], 8, 1.5, KEYS, now, burst=4)
    in_virtual_time(loop.run)
    assert server.starts == [0] * 4 + [0.5] * 4 + [1.0] * 4
    assert loop.recording.latencies.maximum_s == STEP


def test_an_open_loop_can_be_ended_before_its_time():
    server = Server(takes=0.5)
    loop = OpenLoop([server], 8, 3600.0, KEYS, now)

    async def ended_after_two_seconds():
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(2.0 - STEP)
        loop.end()
        await task

    in_virtual_time(ended_after_two_seconds)
    assert (loop.recording.operations, loop.recording.not_started) == (16, 0)
    assert loop.recording.seconds == 15 / 8 + 0.5


def test_an_error_ends_an_open_loop_when_all_have_ended():
    server = Server(takes=0.5, error=OSError("refused"))
    with pytest.raises(OSError, match="refused"):
        in_virtual_time(lambda: open_loop([server], 10, 60.0, KEYS, now))
    assert len(server.starts) < 20


def test_an_error_ends_a_closed_loop():
    with pytest.raises(ExceptionGroup) as ended:
        in_virtual_time(lambda: closed_loop([Server(error=OSError("refused"))], 4, 60.0, KEYS, now))
    assert ended.value.subgroup(OSError)
