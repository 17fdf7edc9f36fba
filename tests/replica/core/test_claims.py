"""Claims: what a backup is patient for, and that a correct primary can always honour it, whatever clients do."""

from __future__ import annotations

from collections import deque

import pytest

from replica.apps import kv
from replica.core import claims as module
from replica.core import rooms
from replica.core.batch import make_batch
from replica.core.claims import CLAIMS_PER_CLIENT_MAX, Claims
from replica.core.entries import SUSPECT
from replica.core.envelope import Envelope
from replica.core.events import Append, Refuse, Relay, RequestReceived, Tick
from replica.core.genesis import Genesis, Limits
from replica.core.patience import PATIENCE_FIRST_MS
from replica.core.requests import QueueFullError, RequestQueue, Waiting
from replica.core.rooms import RELAYED_PER_CLIENT_MAX, REQUESTS_PER_CLIENT_MAX
from tests.replica.core.harness import Cluster, FakeClient, make_core, make_genesis
from tests.replica.core.support import Lone

G = make_genesis()
STEP_MS = 50


def envelopes(client: int, count: int, size: int = 1) -> list[Envelope]:
    source = FakeClient(G, client)
    return [source.operations(kv.put(b"k", bytes(size))) for _ in range(count)]


def queue_of(*sent: Envelope) -> RequestQueue:
    queue = RequestQueue(G.limits)
    for now, envelope in enumerate(sent):
        queue.add(envelope, now)
    return queue


def claimed(queue: RequestQueue) -> list[Envelope]:
    return [waiting.envelope for waiting in queue.claims]


def test_a_client_has_few_claims_at_a_time_in_the_order_in_which_its_requests_came():
    sent = envelopes(100, CLAIMS_PER_CLIENT_MAX + 3)
    queue = queue_of(*sent)
    assert claimed(queue) == sent[:CLAIMS_PER_CLIENT_MAX]
    queue.executed(sent[1], 700)
    assert claimed(queue) == [sent[0], *sent[2 : CLAIMS_PER_CLIENT_MAX + 1]]
    given = queue.find(sent[CLAIMS_PER_CLIENT_MAX])
    assert given is not None
    assert (given.since_ms, given.claimed_ms) == (CLAIMS_PER_CLIENT_MAX, 700), "patience begins with the claim"
    assert queue.claims.oldest() is queue.find(sent[0])


def test_claims_are_given_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CLAIMS_MAX", 4)
    flood, quiet, other = envelopes(100, 40), envelopes(101, 2), envelopes(102, 1)
    queue = queue_of(*flood, *quiet, *other)
    assert claimed(queue) == flood[:4]
    for done, envelope in enumerate(flood[:4]):
        queue.executed(envelope)
        assert len(queue.claims) == 4, done
    assert claimed(queue) == [flood[4], quiet[0], other[0], flood[5]]


def test_claims_are_bounded_in_bytes_and_whoever_has_none_gets_one(monkeypatch: pytest.MonkeyPatch):
    size = len(envelopes(100, 1, 1000)[0].raw)
    monkeypatch.setattr(module, "CLAIM_BYTES_PER_CLIENT_MAX", 2 * size)
    monkeypatch.setattr(module, "CLAIM_BYTES_MAX", 3 * size)
    mine, others, huge = envelopes(100, 4, 1000), envelopes(101, 2, 1000), envelopes(102, 2, 5000)
    queue = queue_of(*mine, *others, *huge)
    assert claimed(queue) == [*mine[:2], others[0]]
    for envelope in (mine[0], mine[1], others[0]):
        queue.executed(envelope)
    assert claimed(queue) == [others[1]], "what is huge comes next, and nobody comes before it"
    queue.executed(others[1])
    assert claimed(queue) == [huge[0]]
    queue.executed(huge[0])
    assert claimed(queue) == [mine[2]]


def test_nothing_is_left_of_claims_that_ended():
    found = Claims()
    waiting = [Waiting(one, one.digest(), 0, 0) for one in envelopes(100, CLAIMS_PER_CLIENT_MAX + 2)]
    for one in waiting:
        found.add(one, 0, 0)
    for one in (waiting[-1], *waiting[:-1]):
        found.remove(one, 0, 0)
    assert (len(found), found._bytes) == (0, 0)
    assert (found._held, found._others, found._line) == ({}, {}, {})


# What a primary takes.


def full_of(client: int) -> tuple[RequestQueue, FakeClient]:
    source = FakeClient(G, client)
    return queue_of(*[source.operations(kv.get(b"k")) for _ in range(REQUESTS_PER_CLIENT_MAX)]), source


def test_a_primary_that_is_full_of_a_clients_own_requests_takes_every_backups_claims():
    queue, source = full_of(100)
    for peer in (1, 2):
        for _ in range(RELAYED_PER_CLIENT_MAX):
            assert queue.add(source.operations(kv.get(b"k")), 0, peer=peer) is not None
        with pytest.raises(QueueFullError, match="relay again later"):
            queue.add(source.operations(kv.get(b"k")), 0, peer=peer)
    with pytest.raises(QueueFullError, match="this client"):
        queue.add(source.operations(kv.get(b"k")), 0)


def test_nothing_that_clients_or_other_backups_hand_over_keeps_claims_out(monkeypatch: pytest.MonkeyPatch):
    size = len(envelopes(100, 1)[0].raw)
    monkeypatch.setattr(rooms, "REQUESTS_MAX", 4)
    monkeypatch.setattr(rooms, "RELAYED_MAX", 3)
    monkeypatch.setattr(rooms, "RELAYED_BYTES_MAX", 2 * size)
    queue = RequestQueue(G.limits)
    for peer in (rooms.DIRECT, 1, 2):
        taken = 0
        for client in range(6):
            try:
                queue.add(envelopes(100 + client + 10 * (peer + 1), 1)[0], 0, peer=peer)
            except QueueFullError:
                continue
            taken += 1
        assert taken == (4 if peer == rooms.DIRECT else 2)
    assert queue.add(envelopes(140, 1, 5000)[0], 0, peer=3) is not None, "the first one fits, whatever its size"


def test_a_claim_is_served_in_its_own_turn_though_its_client_handed_over_much_before():
    queue, source = full_of(100)
    last = list(queue)[-1].envelope
    other = source.operations(kv.get(b"k"))
    queue.add(other, 0, peer=1)
    queue.add(last, 0, peer=2)  # which waits here, behind 255 others
    taken = queue.take_batch()[:6]
    assert last in taken
    assert other in taken
    assert queue._rooms.count[source.key, rooms.DIRECT] == REQUESTS_PER_CLIENT_MAX - 1, "its place is free again"


def test_what_is_proposed_stays_where_it_is():
    queue = queue_of(*envelopes(100, 1))
    (one,) = queue.take_batch()
    queue.add(one, 0, peer=1)
    assert queue._rooms.count[1] == 0
    assert queue.take_batch() == []


# The core.


def test_a_backup_hands_over_what_has_a_claim_and_nothing_else():
    core, client = make_core(G, 2), FakeClient(G)
    sent = [client.operations(kv.get(b"k")) for _ in range(CLAIMS_PER_CLIENT_MAX + 2)]
    relayed = [e.envelope for one in sent for e in core.handle(RequestReceived(one, False)) if isinstance(e, Relay)]
    assert relayed == sent[:CLAIMS_PER_CLIENT_MAX]
    again = [effect.envelope for effect in core.handle(Tick(400, 0)) if isinstance(effect, Relay)]
    assert again == sent[:CLAIMS_PER_CLIENT_MAX]
    core._known.requests.executed(sent[0], 400)
    last = [effect.envelope for effect in core.handle(Tick(450, 0)) if isinstance(effect, Relay)]
    assert last == [sent[CLAIMS_PER_CLIENT_MAX]]


def test_a_backup_takes_what_was_executed_without_effect_no_sooner_than_the_primary():
    core, client = make_core(G, 2), FakeClient(G)
    envelope = client.operations(kv.get(b"k"))  # of a session that there never was
    core.handle(Tick(1000, 0))
    core._execute(1, make_batch(0, (), [envelope]))
    queue = core._known.requests
    for relayed, at_ms in ((False, 2999), (True, 1999)):
        core._known.now_ms = at_ms
        core.handle(RequestReceived(envelope, relayed))
        assert not len(queue), "the primary, which executed it a little later, may not take it yet"
    core._known.now_ms = 3000
    assert core.handle(RequestReceived(envelope, relayed=False)) == [Relay(0, envelope)]


def test_patience_belongs_to_the_claim_that_was_given_first():
    lone = Lone(make_core(G, 2))
    flood, (quiet,) = envelopes(100, CLAIMS_PER_CLIENT_MAX + 1), envelopes(101, 1)
    for envelope in flood:
        lone.handle(RequestReceived(envelope, relayed=False))
    lone.tick(400)
    lone.handle(RequestReceived(quiet, relayed=False))
    lone.tick(400)
    lone.core._execute(1, make_batch(0, (), flood[:-1]))
    lone.tick(550)
    assert not lone.of(Append), "what had no claim for long has waited since 0, and the quiet client's since 400"
    lone.tick(50)
    assert [payload[0] for effect in lone.of(Append) for payload in effect.payloads] == [SUSPECT]
    assert lone.now == 400 + PATIENCE_FIRST_MS


class Flooded:
    """A cluster in which every message takes STEP_MS; one key keeps all its places filled, everywhere with others."""

    def __init__(self, genesis: Genesis) -> None:
        self.cluster = Cluster(genesis)
        self.client = FakeClient(genesis)
        self.refused = 0

    def step(self) -> None:
        for number, core in self.cluster.cores.items():
            taken = core._known.requests._rooms.count
            while taken[self.client.key, rooms.DIRECT] < REQUESTS_PER_CLIENT_MAX:
                before = core.requests_waiting
                self.cluster.handle(number, RequestReceived(self.client.operations(kv.get(b"k")), relayed=False))
                assert core.requests_waiting == before + 1
        arrived, self.cluster.in_flight = self.cluster.in_flight, deque()
        for replica, event in arrived:
            self.cluster.handle(replica, event)
        self.cluster.tick(STEP_MS)


def test_one_key_has_no_correct_primary_replaced_by_giving_each_replica_others_than_the_primary():
    genesis = make_genesis()
    limits = Limits(checkpoint_interval=4, window=8, batch_envelopes_max=8)
    flooded = Flooded(Genesis(**{**{k: getattr(genesis, k) for k in genesis.__dataclass_fields__}, "limits": limits}))
    for _ in range(12 * PATIENCE_FIRST_MS // STEP_MS):
        flooded.step()
    cluster = flooded.cluster
    assert {core.view for core in cluster.cores.values()} == {0}
    assert min(core.executed for core in cluster.cores.values()) > 50
    assert not any(isinstance(effect, Refuse) for found in cluster.effects.values() for effect in found)
