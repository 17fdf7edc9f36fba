"""The workload of test_powercut.py, a program of its own: two runs of a replica's outbox, log store and state store.

    python -m tests.replica.shell.powercut_work FOLDER OPERATIONS PLANTED

FOLDER has a trusted log in `log`. What the replica may rely on from then on, it says in lines of JSON to the file
`said`: an own group was released (after its causes), groups may be gone below a cut, a milestone is persisted.
PLANTED is the name of a defect, or "none".
"""

import asyncio
import json
import os
import random
import sys
from contextlib import closing
from pathlib import Path

from replica.core.group import payload_bytes
from replica.shell import shrinking, sqlitefile
from replica.shell.outbox import Outbox, settle_last_group
from replica.shell.statestore import Milestone, StateStore
from replica.shell.store import Store, own_group
from tests.replica.shell.outbox_bench import CLUSTER_ID, CONTEXT, Author
from tests.replica.shell.states import frozen
from tests.support.waiting import until
from trustlog import open_log
from trustlog.sealed import Files, UnsyncedFiles

# So that the write-ahead logs are emptied many times.
WAL_PAGES = 24
# So that pages are given back, a few at a time.
FREE_PAGES = 2
GIVE_PAGES = 3
MILESTONE_EVERY = 20
KEPT_BYTES = 15_000
KEPT_INDEXES = 30
STATE_KEYS = 40


def payload(log: int, index: int) -> bytes:
    """What `log` says at `index`: known to whoever checks."""
    return b"log %d says %d " % (log, index) * (1 + index % 5)


def state_at(slot: int) -> dict[bytes, bytes]:
    """The whole application state at a milestone: all keys changed since the one before, or some of them."""
    return {b"key %d" % key: b"%d" % max(0, slot - key % 3) for key in range(STATE_KEYS) if (key + slot) % 7}


def milestone(slot: int, before: dict[bytes, bytes] | None) -> Milestone:
    now = state_at(slot)
    changes = now.items() if before is None else [(key, now.get(key)) for key in now.keys() | before.keys()]
    maps = (frozen(now), frozen({}))
    return Milestone(slot, b"header %d" % slot, b"c", (b"log",), (), (changes, ()), maps)


class AttestsFirst(Outbox):
    """A planted defect: has a group attested, then makes it durable."""

    def _speak(self, received, unstored, payloads):
        if payloads is None:
            return super()._speak(received, unstored, payloads)
        write, self._store.write = self._store.write, lambda *_: None
        try:
            released = super()._speak(received, unstored, payloads)
        finally:
            self._store.write = write
        write(received, unstored, own_group(self._number, released.group.first, payloads))
        return released


class ForgetsCauses(Outbox):
    """A planted defect: releases before what was received is durable."""

    def _start(self):
        if self._work is None:
            later, self._received = self._received, {}
            super()._start()
            self._received = later


class Work:
    """One run of the replica, from start to stop."""

    def __init__(self, folder: Path, planted: str, peers: dict[int, Author], said: int) -> None:
        self.said = said
        self.peers = peers
        self.log = open_log(folder / "log", files=UnsyncedFiles() if planted == "unsynced log" else Files())
        self.store = Store(folder / "store.sqlite", CLUSTER_ID, 0, durable=planted != "unsynced store")
        settle_last_group(0, self.log, self.store)
        self.state = StateStore(folder / "state.db", CLUSTER_ID, 0, durable=planted != "unsynced state")
        kind = {"attests first": AttestsFirst, "forgets causes": ForgetsCauses}.get(planted, Outbox)
        self.released = []
        self.failed = []
        self.outbox = kind(0, self.log, self.store, CONTEXT, self.released.append, self.failed.append)

    def say(self, **what) -> None:
        os.write(self.said, json.dumps(what).encode() + b"\n")

    def receive(self, author: int, count: int) -> None:
        peer = self.peers[author]
        first = peer.log.last + 1
        self.outbox.received(peer.say(*(payload(author, first + place) for place in range(count))))

    async def operation(self, chance: random.Random) -> None:
        """Receive something or nothing, say a group, and tell that it is out."""
        for author in (1, 2):
            if chance.random() < 0.6:
                self.receive(author, chance.randint(1, 3))
        causes = {author: peer.log.last for author, peer in self.peers.items()}
        first, count = self.log.last + 1, len(self.released)
        self.outbox.append(tuple(payload(0, first + place) for place in range(chance.randint(1, 3))))
        await until(lambda: len(self.released) > count or self.failed, "a group released")
        if self.failed:
            raise self.failed[0]
        group = self.released[-1].group
        self.say(own=[group.first, group.last], causes=causes, payloads=payload_bytes(group.raw).hex())

    async def persist(self, slot: int) -> None:
        """Persist a milestone, and delete what lies below its cut."""
        whole = slot % 4 == 1
        self.state.write(milestone(slot, None if whole else state_at(slot - 1)), replace_all=whole)
        self.say(milestone=slot)
        while self.state.give_back(GIVE_PAGES):
            pass
        await until(lambda: not self.outbox.is_busy, "the outbox at rest")
        cuts = [max(0, log.last - KEPT_INDEXES) for log in (self.log, self.peers[1].log, self.peers[2].log)]
        self.say(cuts=cuts)
        self.store.truncate(cuts, KEPT_BYTES, 20)
        while self.store.give_back(GIVE_PAGES):
            pass

    async def close(self) -> None:
        await self.outbox.close()
        for part in (self.store, self.state, self.log):
            part.close()


async def main(folder: Path, operations: int, planted: str) -> None:
    """Work, stop and start again in the middle, and work on."""
    sqlitefile.WAL_PAGES_MAX = WAL_PAGES
    shrinking.FREE_PAGES_MIN, shrinking.FREE_SHARE = FREE_PAGES, 1000
    chance = random.Random(7)
    peers = {1: Author(1), 2: Author(2)}
    with closing(os.fdopen(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), "wb", buffering=0)) as said:
        done = 0
        for end in (operations // 2, operations):
            work = Work(folder, planted, peers, said.fileno())
            while done < end:
                await work.operation(chance)
                done += 1
                if done % MILESTONE_EVERY == 0:
                    await work.persist(done // MILESTONE_EVERY)
            await work.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
