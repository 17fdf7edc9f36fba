"""The client table: opening, eviction, acknowledgement and the budget of results, alike everywhere."""

from __future__ import annotations

import pytest

from replica.core import sessions as module
from replica.core.envelope import Open, Result, SessionId, Status
from replica.core.genesis import Limits
from replica.core.layout import LayoutError
from replica.core.sessions import OPENING_INTERVALS_MAX, ClientTable, Session, answer
from tests.replica.core.harness import public_key

LIMITS = Limits(checkpoint_interval=4, window=8, sessions_max=5, sessions_per_client_max=3)
A, B, C, D = (public_key(100 + i) for i in range(4))


def nonce(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Table:
    """A table that is told of every slot in turn, as the executor does."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.table = ClientTable(limits)
        self.slot = 0
        self.nonces = 1000

    def at(self, slot: int) -> Table:
        while self.slot < slot:
            self.slot += 1
            self.table.begin_slot(self.slot)
        return self

    def open(self, client: bytes, number: int | None = None, void_after: int | None = None, place: int = 0):
        if number is None:
            self.nonces += 1
            number = self.nonces
        void = self.slot + 8 if void_after is None else void_after
        return self.table.open(client, Open(nonce(number), void), self.slot, place)

    def opened(self, client: bytes, slot: int, place: int = 0) -> SessionId:
        status, session = self.at(slot).open(client, place=place)
        assert status is Status.OK
        assert session == SessionId(slot, place)
        return session

    def alive(self) -> set[tuple[int, int]]:
        return {(s.slot, s.place) for s in self.table._sessions}

    def touch(self, session: SessionId, client: bytes, slot: int) -> None:
        found = self.table.find(session, client)
        assert found is not None
        self.at(slot).table.touch(found, slot)


def test_a_session_belongs_to_the_key_that_opened_it():
    t = Table()
    session = t.opened(A, 1)
    assert t.table.find(session, A) is not None
    assert t.table.find(session, B) is None
    assert t.table.find(SessionId(1, 1), A) is None


def test_opening_again_with_the_nonce_gives_the_same_session():
    t = Table().at(1)
    first = t.open(A, 7, void_after=9)
    assert t.at(5).open(A, 7, void_after=9, place=3) == first
    assert t.open(A, 7, void_after=12) == first, "the nonce counts, whatever else was said"
    assert t.open(B, 7, void_after=9)[1] != first[1], "another client's nonce is another nonce"
    assert len(t.table) == 2


@pytest.mark.parametrize(
    ("void_after", "status"),
    [
        (0, Status.VOID),
        (4, Status.VOID),
        (5, Status.OK),
        (5 + OPENING_INTERVALS_MAX * 4, Status.OK),
        (6 + OPENING_INTERVALS_MAX * 4, Status.VOID),
        (2**64 - 1, Status.VOID),
    ],
)
def test_an_opening_is_void_outside_its_time(void_after: int, status: Status):
    t = Table().at(5)
    got, session = t.open(A, 1, void_after=void_after)
    assert got is status
    assert session == (SessionId(5, 0) if status is Status.OK else SessionId(0, 0))
    assert len(t.table) == (status is Status.OK)


def test_an_opening_is_remembered_until_it_is_void_and_no_longer():
    t = Table().at(1)
    t.open(A, 1, void_after=6)
    assert t.at(6).open(A, 1, void_after=6) == (Status.OK, SessionId(1, 0))
    assert t.at(7).open(A, 1, void_after=6) == (Status.VOID, SessionId(0, 0))
    assert not t.table._openings
    assert not t.table._voids


def test_a_replayed_opening_after_eviction_opens_nothing():
    t = Table().at(1)
    _, first = t.open(A, 1, void_after=30)
    for slot in (2, 3, 4):
        t.opened(A, slot)
    assert first not in t.table._sessions
    before = t.alive()
    assert t.open(A, 1, void_after=30) == (Status.OK, first), "its answer is the session that is no more"
    assert t.alive() == before
    assert t.table.find(first, A) is None


def test_the_same_clients_longest_idle_session_goes_first():
    t = Table()
    old, middle, young = (t.opened(A, slot) for slot in (1, 2, 3))
    t.opened(B, 4)
    t.touch(old, A, 6)
    t.opened(A, 7)
    assert t.alive() == {(1, 0), (3, 0), (4, 0), (7, 0)}, "the second was idle longest"
    assert middle not in t.table._sessions
    t.touch(young, A, 8)
    t.opened(A, 9)
    assert t.alive() == {(3, 0), (4, 0), (7, 0), (9, 0)}


def test_when_the_table_is_full_the_own_sessions_go_before_others():
    t = Table()
    t.opened(B, 1)
    t.opened(B, 2)
    t.opened(C, 3)
    t.opened(A, 4)
    t.opened(C, 5)
    t.opened(A, 6)
    assert t.alive() == {(1, 0), (2, 0), (3, 0), (5, 0), (6, 0)}, "A's own, though others were idle longer"
    t.opened(D, 7)
    assert t.alive() == {(2, 0), (3, 0), (5, 0), (6, 0), (7, 0)}, "D has none: the longest idle of all"


def test_of_equally_idle_sessions_the_older_one_goes():
    t = Table()
    for place in (2, 0, 1):
        t.opened(A, 1, place)
    t.opened(A, 2)
    assert t.alive() == {(1, 1), (1, 2), (2, 0)}


def test_too_many_openings_are_told_to_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "OPENINGS_MAX", 2)
    t = Table().at(1)
    assert t.open(A, 1, void_after=2)[0] is Status.OK
    assert t.open(A, 2, void_after=5)[0] is Status.OK
    assert t.open(A, 3, void_after=5) == (Status.BUSY, SessionId(0, 0))
    assert t.open(A, 1, void_after=2)[0] is Status.OK, "a known one is not one more"
    assert t.at(3).open(A, 3, void_after=5)[0] is Status.OK, "the first is void, there is room"


def test_one_key_cannot_have_others_told_to_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "OPENINGS_MAX", 6)
    monkeypatch.setattr(module, "OPENINGS_PER_CLIENT_MAX", 3)
    t = Table().at(1)
    for number in range(20):
        assert t.open(A, number, void_after=10 + number, place=number)[0] is Status.OK
        assert len(t.table._openings) == min(number + 1, 3)
    for client in (B, C, D):
        assert t.open(client, 1, void_after=10, place=30)[0] is Status.OK
    assert t.open(public_key(110), 1, void_after=10, place=31)[0] is Status.BUSY, "it takes several"
    assert t.open(A, 21, void_after=32, place=32)[0] is Status.OK, "who displaces its own needs no room"


def test_the_openings_of_a_table_fit_many_keys():
    assert module.OPENINGS_MAX // module.OPENINGS_PER_CLIENT_MAX >= 512


@pytest.mark.parametrize("limit", [1, 3])
def test_a_displaced_opening_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(module, "OPENINGS_PER_CLIENT_MAX", limit)
    t = Table().at(1)
    made = [(number, void_after) for number, void_after in enumerate((20, 12, 30, 14, 14, 13, 25, 31, 32, 15))]
    opened = set()
    for number, void_after in made:
        if t.open(A, number, void_after=void_after, place=number)[0] is Status.OK:
            opened.add(number)
    assert len(opened) > limit
    sessions = set()
    for slot in range(2, 33):
        t.at(slot)
        for number, void_after in made:
            status, session = t.open(A, number, void_after=void_after, place=100 + number)
            if number in opened and status is Status.OK:
                sessions.add(session)
                assert session.slot == 1, "the session that it opened, and not another one"
    assert sessions


def test_a_new_opening_must_become_void_later_than_what_it_displaces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "OPENINGS_PER_CLIENT_MAX", 2)
    t = Table().at(1)
    assert [t.open(A, n, void_after=9, place=n)[0] for n in range(3)] == [Status.OK, Status.OK, Status.BUSY]
    assert t.open(A, 0, void_after=9) == (Status.OK, SessionId(1, 0)), "nothing was forgotten"
    assert t.open(A, 3, void_after=10, place=3)[0] is Status.OK
    assert {key[-1] for key in t.table._openings} == {1, 3}, "of those that become void at once, the older one goes"
    t.at(11)
    assert (t.table._openings, t.table._openings_of, t.table._voids) == ({}, {}, {})


def test_no_table_is_restored_in_which_one_client_has_more_openings_than_may_be(monkeypatch: pytest.MonkeyPatch):
    t = Table().at(1)
    for number in range(3):
        t.open(A, number, place=number)
    t.table.root()
    monkeypatch.setattr(module, "OPENINGS_PER_CLIENT_MAX", 3)
    assert len(ClientTable.restored(LIMITS, t.table.records)) == 3
    monkeypatch.setattr(module, "OPENINGS_PER_CLIENT_MAX", 2)
    with pytest.raises(LayoutError, match="more than 2 openings"):
        ClientTable.restored(LIMITS, t.table.records)


def test_what_a_number_gets_without_execution():
    session = Session(SessionId(1, 0), A, 1, acknowledged=4)
    session.keep(5, Result(Status.OK, 2, b"five"))
    assert answer(None, 5, 9) == Result(Status.EXPIRED, 9, b"")
    assert answer(session, 5, 9) == Result(Status.OK, 2, b"five")
    assert answer(session, 3, 9) == Result(Status.FORGOTTEN, 0, b"")
    assert answer(session, 4, 9) is None
    assert answer(session, 6, 9) is None


def test_acknowledging_forgets_and_never_goes_back():
    session = Session(SessionId(1, 0), A, 1)
    for number in (1, 2, 3, 7):
        session.keep(number, Result(Status.OK, 1, b"xx"))
    session.acknowledge(3)
    assert (sorted(session.results), session.result_bytes) == ([3, 7], 4)
    session.acknowledge(2)
    assert session.acknowledged == 3
    session.acknowledge(2**63)
    assert (session.results, session.result_bytes, session.acknowledged) == ({}, 0, 2**63)


def test_the_byte_budget_forgets_results_but_never_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SESSION_RESULT_BYTES_MAX", 10)
    session = Session(SessionId(1, 0), A, 1)
    for number, size in ((1, 4), (2, 0), (3, 4), (4, 4)):
        session.keep(number, Result(Status.OK, number, bytes(size)))
    assert session.results[1] == Result(Status.FORGOTTEN, 1, b"")
    assert session.results[2].status is Status.OK, "what takes no room is not forgotten"
    assert session.result_bytes == 8
    session.keep(5, Result(Status.OK, 5, bytes(10)))
    assert [session.results[n].status for n in (1, 3, 4, 5)] == [Status.FORGOTTEN] * 3 + [Status.OK]
    session.keep(6, Result(Status.OK, 6, bytes(99)))
    assert session.results[6].value == bytes(99), "the newest is always kept"
    assert sorted(session.results) == [1, 2, 3, 4, 5, 6]
    assert session.result_bytes == sum(len(r.value) for r in session.results.values())


def test_the_digest_covers_sessions_openings_and_results():
    def build(*steps) -> bytes:
        t = Table().at(1)
        t.open(A, 1)
        session = t.table.find(SessionId(1, 0), A)
        assert session is not None
        for step in steps:
            step(t, session)
        return t.table.root()

    base = build()
    different = [
        build(lambda t, s: t.open(A, 2, place=1)),
        build(lambda t, s: t.open(B, 2, place=1)),
        build(lambda t, s: t.table.touch(s, 2)),
        build(lambda t, s: (s.keep(1, Result(Status.OK, 1, b"x")), t.table.touch(s, 1))),
        build(lambda t, s: (s.keep(1, Result(Status.ERROR, 1, b"x")), t.table.touch(s, 1))),
        build(lambda t, s: (s.acknowledge(2), t.table.touch(s, 1))),
        build(lambda t, s: t.at(10)),
    ]
    assert build() == base
    assert len({base, *different}) == len(different) + 1


def test_the_digest_does_not_depend_on_when_it_was_asked_for():
    one, two = Table(), Table()
    for t, asked in ((one, True), (two, False)):
        for slot in range(1, 12):
            t.opened((A, B, C)[slot % 3], slot)
            if asked:
                t.table.root()
    assert one.table.root() == two.table.root()
    one.table._records.check()
