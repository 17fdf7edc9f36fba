"""What backups hand to the primary when the way there holds only so much."""

import pytest

from replica.apps import kv
from replica.core import relays as relays_module
from replica.core.events import NotSent, Relay, RequestReceived, Tick
from replica.core.relays import RELAY_BYTES_PER_TICK_MAX, RELAYS_PER_TICK_MAX
from replica.core.requests import RELAY_PAUSE_MS
from tests.replica.core.harness import FakeClient, make_core, make_genesis

G = make_genesis()


class Backup:
    """A core whose way to the primary takes so many requests in a tick."""

    def __init__(self, takes=10**9) -> None:
        self.core, self.takes, self.now, self.sent = make_core(G, 2), takes, 0, []

    def handle(self, *events):
        """Return what the core wanted handed over; carry it out as far as there is room."""
        wanted = [effect for effect in self.core.handle(*events) if isinstance(effect, Relay)]
        for relay in wanted:
            if self.takes:
                self.takes -= 1
                self.sent.append(relay.envelope)
            else:
                assert self.core.handle(NotSent(relay.to, relay.envelope)) == []
        return [relay.envelope for relay in wanted]

    def request(self, envelope):
        self.handle(RequestReceived(envelope, relayed=False))
        return self.core._known.requests.find(envelope)

    def tick(self, ms=50, takes=10**9):
        self.now += ms
        self.takes = takes
        return self.handle(Tick(self.now, 0))


def test_what_was_not_sent_is_not_handed_over_and_is_tried_in_the_next_tick():
    backup = Backup(takes=0)
    waiting = backup.request(FakeClient(G).operations(kv.get(b"k")))
    assert waiting.relayed_ms is None
    for _ in range(20):
        assert backup.tick(takes=0) == [waiting.envelope]
        assert waiting.relayed_ms is None
    assert backup.tick() == backup.sent == [waiting.envelope]
    assert waiting.relayed_ms == backup.now
    assert backup.tick(RELAY_PAUSE_MS - 1) == [], "its pauses begin when it was sent"
    assert backup.tick(1) == [waiting.envelope]


def test_a_later_try_that_was_not_sent_leaves_the_first_one_its_time():
    backup = Backup()
    waiting = backup.request(FakeClient(G).operations(kv.get(b"k")))
    assert backup.tick(RELAY_PAUSE_MS, takes=0) == [waiting.envelope]
    assert (waiting.relayed_ms, waiting.relay_pause_ms) == (0, 2 * RELAY_PAUSE_MS)
    assert backup.tick() == [waiting.envelope]


def test_what_comes_later_does_not_overtake_what_was_not_sent():
    backup = Backup(takes=0)
    first, second = (FakeClient(G, number) for number in (100, 101))
    waiting = backup.request(first.operations(kv.get(b"k")))
    backup.takes = 1
    late = backup.request(second.operations(kv.get(b"k")))
    assert backup.sent == []
    assert backup.tick() == [waiting.envelope, late.envelope]
    third = backup.request(second.operations(kv.get(b"k")))
    assert backup.sent[-1] == third.envelope, "nothing waits any more"


def test_a_flood_leaves_room_for_another_clients_first_request():
    backup = Backup(takes=0)
    flood, quiet = (FakeClient(G, number) for number in (100, 101))
    for _ in range(200):
        backup.request(flood.operations(kv.put(b"k", bytes(1000))))
    waiting = backup.request(quiet.operations(kv.put(b"k", b"v")))
    backup.tick(takes=3)
    assert waiting.envelope in backup.sent
    assert [one.client for one in backup.sent].count(flood.key) == 2


def test_a_tick_hands_over_only_so_many():
    backup = Backup(takes=0)
    clients = [FakeClient(G, 100 + number) for number in range(64)]
    for number in range(800):
        backup.request(clients[number % 64].operations(kv.get(b"k")))
    assert len(backup.tick()) == RELAYS_PER_TICK_MAX
    late = backup.request(FakeClient(G, 200).operations(kv.get(b"k")))
    assert late.envelope not in backup.sent, "what is left comes first"
    assert len(backup.tick()) == 801 - RELAYS_PER_TICK_MAX


def test_a_tick_hands_over_only_so_many_bytes(monkeypatch: pytest.MonkeyPatch):
    assert RELAY_BYTES_PER_TICK_MAX >= 2**20
    monkeypatch.setattr(relays_module, "RELAY_BYTES_PER_TICK_MAX", 3000)
    backup = Backup(takes=0)
    client = FakeClient(G)
    for size in (5000, 1000, 1000, 1000):
        backup.request(client.operations(kv.put(b"k", bytes(size))))
    assert [len(backup.tick()) for _ in range(3)] == [1, 2, 1], "one always"


def test_what_another_view_did_not_send_changes_nothing():
    backup = Backup()
    waiting = backup.request(FakeClient(G).operations(kv.get(b"k")))
    assert backup.core.handle(NotSent(1, waiting.envelope)) == []
    assert waiting.relayed_ms == 0
