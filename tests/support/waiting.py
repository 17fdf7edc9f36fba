"""Waiting for conditions: never a fixed time, always with a deadline."""

import asyncio
import functools
import time

import uvloop

POLL_S = 0.005


async def until(condition, what="the condition", seconds=20.0):
    """Return the first true value of `condition()`; AssertionError at the deadline. It may be a coroutine function."""
    ends = time.monotonic() + seconds
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"{what} did not come true within {seconds:g} s")
        await asyncio.sleep(POLL_S)


def wait_for(condition, what="the condition", seconds=20.0):
    """Do the same without a loop."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > ends:
            raise AssertionError(f"{what} did not come true within {seconds:g} s")
        time.sleep(POLL_S)
    return found


def on_loop(test):
    """Run a coroutine test on uvloop, as the daemon does, with a deadline."""
    return on_loop_for(60)(test)


def on_loop_for(seconds):
    """Run it so with this deadline."""

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            async def bounded():
                async with asyncio.timeout(seconds):
                    await test(*args, **kwargs)

            uvloop.run(bounded())

        return run

    return decorate
