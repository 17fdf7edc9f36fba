"""The daemon's way from one list of members to the next, and signals that come on it."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest
import structlog

from replica.shell import daemon
from replica.shell.garbage import set_apart
from tests.support.waiting import on_loop, until

WHEN = ("while it closes", "when it is about to go over", "while the next begins", "later")


# It leads from list to list for ever.
HOME = SimpleNamespace(number=0, path="", is_renewed=False, waiting_trouble="", settings=SimpleNamespace(http=None))


def node_class(when: str, made: list):
    """Return a node that goes over at once; at the moment `when`, the process gets SIGTERM."""

    class FakeNode:
        def __init__(self, home, log, stopped, renew, has_read):
            made.append(self)
            assert has_read is set_apart
            self.log = structlog.get_logger()
            self.renew = renew
            if when == WHEN[2] and len(made) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def start(self):
            if len(made) < 3 and not (when == WHEN[2] and len(made) == 2):
                self.renew()
                if when == WHEN[1] and len(made) == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            elif when == WHEN[3]:
                os.kill(os.getpid(), signal.SIGTERM)

        async def close(self):
            if when == WHEN[0] and len(made) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            told = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)
            os.kill(os.getpid(), signal.SIGUSR1)
            await until(told.is_set, "signals are handled, as while a real one closes")

    return FakeNode


@pytest.mark.parametrize(("when", "lists"), [*zip(WHEN, (1, 1, 2, 3), strict=True)])
@on_loop
async def test_a_signal_ends_it_whenever_it_comes(monkeypatch, when, lists):
    made, freed = [], []
    monkeypatch.setattr(daemon, "Node", node_class(when, made))
    monkeypatch.setattr(daemon, "give_free", lambda: freed.append(len(made)))
    for name in ("with_key_kept", "under_next_list"):
        monkeypatch.setattr(daemon, name, lambda home: home)
    async with asyncio.timeout(10):
        assert await daemon._serve(HOME, None) == 0
    assert len(made) == lists
    assert freed == [*range(1, lists)], "each node before the next one is made"
