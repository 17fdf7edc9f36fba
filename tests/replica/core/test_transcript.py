"""The first request of a cluster as text: tests/testdata/first_light.txt, to be read by people.

TRUSTLOG_REWRITE=1 writes it anew; then read the difference.
"""

from __future__ import annotations

from pathlib import Path

from replica.apps import kv
from replica.core.entries import Checkpoint, Commit, Entry, NewView, Prepare, PrePrepare, decode_entry
from replica.core.envelope import OpenReply, Operations, decode_reply
from replica.core.events import Append, Effect, Executed, Relay, RequestReceived, Send, Stable
from replica.core.genesis import Ordering
from tests.replica.core.harness import Cluster, FakeClient, make_genesis
from tests.replica.core.support import REWRITE

PATH = Path(__file__).parents[2] / "testdata" / "first_light.txt"


def short(digest: bytes) -> str:
    return digest.hex()[:4] + ".."


def said(entry: Entry) -> str:
    if isinstance(entry, PrePrepare):
        cut = f", cut {list(entry.batch.cut)}" if entry.batch.cut else ""
        return f"PRE-PREPARE({entry.view},{entry.slot},{short(entry.batch.digest)}{cut})"
    if isinstance(entry, Prepare | Commit):
        return f"{type(entry).__name__.upper()}({entry.view},{entry.slot},{short(entry.digest)})"
    if isinstance(entry, Checkpoint):
        return f"CHECKPOINT({entry.slot},{short(entry.digest)})"
    return f"NEW-VIEW({entry.view})" if isinstance(entry, NewView) else f"{type(entry).__name__}({entry.view})"


class Told(Cluster):
    """A cluster that notes what happens, a line each."""

    def __init__(self, ordering: Ordering) -> None:
        super().__init__(make_genesis(1, ordering, interval=2))
        self.lines: list[str] = []

    def handle(self, replica: int, event) -> None:
        name = f"replica-{replica}"
        if isinstance(event, RequestReceived):
            content = event.envelope.content
            what = f"requests {content.first}.." if isinstance(content, Operations) else "an opening"
            self.lines.append(f"{name} receives {what}{', relayed' if event.relayed else ''}")
        place = len(self.effects[replica])
        first = self.logs[replica].last + 1
        super().handle(replica, event)
        for effect in self.effects[replica][place:]:
            line = self.line(effect, first)
            if line is not None:
                self.lines.append(f"{name} {line}")

    def line(self, effect: Effect, first: int) -> str | None:
        if isinstance(effect, Append):
            entries = [decode_entry(p, self.genesis, self.genesis.cluster_id()) for p in effect.payloads]
            last = first + len(entries) - 1
            return f"appends {first}..{last}: " + " ".join(map(said, entries))
        if isinstance(effect, Executed):
            return f"executes slot {effect.slot} ({short(effect.batch.digest)})"
        if isinstance(effect, Send):
            reply = decode_reply(effect.reply, self.genesis.limits)
            if isinstance(reply, OpenReply):
                return f"answers: session ({reply.session.slot},{reply.session.place}) {reply.status.name}"
            results = " ".join(f"{r.status.name}@{r.slot} {r.value.hex()}" for r in reply.results)
            return f"answers: request {reply.first} {results}"
        if isinstance(effect, Relay):
            return f"relays to replica-{effect.to}"
        if isinstance(effect, Stable):
            return f"holds slot {effect.slot} stable ({short(effect.digest)})"
        return None


def tell(ordering: Ordering) -> list[str]:
    cluster = Told(ordering)
    client = FakeClient(cluster.genesis)
    cluster.lines.append(f"# {ordering.label}: a session is opened, by way of a backup")
    cluster.request(client.open(void_after=4), to=1)
    cluster.run()
    client.session = next(reply for reply in cluster.replies(0) if isinstance(reply, OpenReply)).session
    cluster.lines.append("# put, sent to the primary; slot 2 is a checkpoint's, so its batch carries the cut")
    cluster.request(client.operations(kv.put(b"k", b"v")), to=0)
    cluster.run()
    cluster.check()
    assert all(len(cluster.history(replica)) == 2 for replica in cluster.cores)
    assert all(core.stable == 2 for core in cluster.cores.values())
    return cluster.lines


def test_the_first_requests_read_as_committed():
    lines = [line for ordering in (Ordering.THREE_PHASE, Ordering.TWO_PHASE) for line in (*tell(ordering), "")]
    text = "\n".join(lines)
    if REWRITE:
        PATH.write_text(text)
    assert text == PATH.read_text()
