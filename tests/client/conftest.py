"""Fixtures of the client's tests."""

import asyncio
import threading

import pytest

from tests.client.fake_cluster import make_fleet


@pytest.fixture
def fleet(tmp_path):
    """Three fake replicas, not started: `async with fleet`. Its directory's name has a space."""
    return make_fleet(tmp_path / "a cluster")


@pytest.fixture
def served(fleet):
    """The same, running in a loop of its own, for clients that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def in_loop(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    try:
        in_loop(fleet.__aenter__())
        yield fleet
        in_loop(fleet.__aexit__())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
