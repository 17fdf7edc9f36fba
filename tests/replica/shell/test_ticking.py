"""A replica's clock: even ticks, one early when something is held back, and how late they came."""

import asyncio
import time

import pytest

from replica.shell import ticking
from replica.shell.ticking import Ticking
from tests.support.waiting import on_loop, until


def clock(said: list[str]) -> Ticking:
    return Ticking(lambda: said.append("tick"), lambda: said.append("house"), early=lambda: said.append("early"))


@on_loop
async def test_what_is_held_back_is_not_left_until_the_next_tick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ticking, "TICK_S", 3600)
    said: list[str] = []
    one = clock(said)
    one.start()
    for _ in range(3):
        one.hurry(wanted=True)
    await until(lambda: "early" in said, "the early call")
    assert said == ["tick", "early"], "asked for thrice, it comes once"
    one.hurry(wanted=True)
    one.hurry(wanted=False)
    another = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * ticking.HELD_S, another.set)
    await another.wait()
    assert said == ["tick", "early"], "it was not wanted any more"
    one.hurry(wanted=True)
    one.close()
    assert one._early_timer is not None
    assert one._early_timer.cancelled()


@on_loop
async def test_the_house_is_kept_now_and_then_and_long_turns_are_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ticking, "TICK_S", 0.001)
    monkeypatch.setattr(ticking, "HOUSEKEEPING_TICKS", 3)
    said: list[str] = []
    one = clock(said)
    one.start()
    ends = time.monotonic() + 0.05
    while time.monotonic() < ends:
        pass  # the loop is busy with one thing
    await until(lambda: said.count("house") >= 2, "two times of housekeeping")
    one.close()
    assert said[:8] == ["tick", "tick", "tick", "house", "tick", "tick", "tick", "house"]
    assert one.longest_turn_ms > 40
