"""PBFT's rules, one by one: whom a replica believes, and what a new view carries."""

from __future__ import annotations

import pytest

from replica.pbft.machine import PbftCore
from replica.pbft.messages import (
    Broadcast,
    Certificate,
    Cluster,
    Commit,
    Entered,
    Executed,
    NewView,
    Opened,
    Prepare,
    PrePrepare,
    Request,
    Signed,
    ViewChange,
)

A1, B1 = Request("A", 1, "A1"), Request("B", 1, "B1")


def sign(author: int, body: object) -> bytes:
    return f"{author} {body!r}".encode()


CLUSTER = Cluster(4, 1, 3, sign, lambda message: message.signature == sign(message.author, message.body))


def said(author: int, body: object) -> Signed:
    return Signed(author, body, sign(author, body))


def proposal(request: Request = A1, view: int = 0, slot: int = 1) -> PrePrepare:
    return PrePrepare(view, slot, request.digest(), request)


def core(number: int = 1) -> PbftCore:
    return PbftCore(CLUSTER, number, 300)


def hear(replica: PbftCore, *messages: Signed) -> list:
    return [effect for message in messages for effect in replica.on_message(message)]


def bodies(effects: list, kind: type) -> list:
    return [e.message.body for e in effects if isinstance(e, Broadcast) and isinstance(e.message.body, kind)]


def votes(kind: type, *authors: int, request: Request = A1, view: int = 0, slot: int = 1) -> list[Signed]:
    return [said(author, kind(view, slot, request.digest())) for author in authors]


def certificate(*authors: int, request: Request = A1, view: int = 0, slot: int = 1) -> Certificate:
    body = proposal(request, view, slot)
    return Certificate(said(view % 4, body), tuple(votes(Prepare, *authors, request=request, view=view, slot=slot)))


def test_a_slot_is_decided_by_a_certificate_and_2f_plus_1_commits() -> None:
    replica = core()
    assert bodies(hear(replica, said(0, proposal())), Prepare) == [Prepare(0, 1, A1.digest())]
    assert bodies(hear(replica, *votes(Prepare, 2)), Commit) == [Commit(0, 1, A1.digest())]
    assert not [e for e in hear(replica, *votes(Commit, 0)) if isinstance(e, Executed)]
    assert [e.request for e in hear(replica, *votes(Commit, 2)) if isinstance(e, Executed)] == [A1]
    assert replica.pending.executed_slot(A1) == 1


def test_one_replica_counts_once_and_the_primarys_prepare_not_at_all() -> None:
    replica = core()
    hear(replica, said(0, proposal()))
    assert not bodies(hear(replica, *votes(Prepare, 0), *votes(Prepare, 0)), Commit)
    assert bodies(hear(replica, *votes(Prepare, 3), *votes(Prepare, 3)), Commit)
    assert not [e for e in hear(replica, *votes(Commit, 3), *votes(Commit, 3)) if isinstance(e, Executed)]


def test_the_second_proposal_for_a_slot_gets_no_vote() -> None:
    replica = core()
    hear(replica, said(0, proposal()))
    assert hear(replica, said(0, proposal(B1))) == []


@pytest.mark.parametrize(
    "message",
    [
        said(2, proposal()),  # not the primary
        Signed(0, proposal(), b"forged"),
        said(0, PrePrepare(0, 1, B1.digest(), A1)),  # not its digest
        said(7, Prepare(0, 1, A1.digest())),
    ],
)
def test_what_no_correct_replica_says_is_passed_over(message: Signed) -> None:
    assert hear(core(), message) == []


def test_patience_ends_with_a_view_change_that_holds_what_was_prepared() -> None:
    replica = core()
    replica.on_request(B1)
    hear(replica, said(0, proposal()), *votes(Prepare, 2))
    assert replica.on_tick(299) == []
    effects = replica.on_tick(300)
    assert [e for e in effects if isinstance(e, Entered)] == [Entered(1)]
    (change,) = bodies(effects, ViewChange)
    assert [c.proposal.body for c in change.prepared] == [proposal()]


def test_f_plus_1_others_take_a_replica_along_and_f_do_not() -> None:
    replica = core(3)
    assert hear(replica, said(0, ViewChange(1, ()))) == []
    assert bodies(hear(replica, said(2, ViewChange(1, ()))), ViewChange) == [ViewChange(1, ())]


def test_a_new_view_carries_the_certificate_of_the_highest_view() -> None:
    older, newer = certificate(2, 3), certificate(2, 3, request=B1, view=1)
    replica = core(2)  # the primary of view 2
    hear(replica, said(0, ViewChange(2, (older,))))
    effects = hear(replica, said(3, ViewChange(2, (newer,))))
    (opened,) = [e for e in effects if isinstance(e, Opened)]
    assert opened.carried == ((1, B1),)
    assert opened.named == (0, 2, 3)


def test_a_slot_without_a_certificate_below_one_with_becomes_null() -> None:
    replica = core(1)
    hear(replica, said(0, ViewChange(1, (certificate(2, 3, slot=2),))))
    (opened,) = [e for e in hear(replica, said(3, ViewChange(1, ()))) if isinstance(e, Opened)]
    assert opened.carried == ((1, None), (2, A1))


@pytest.mark.parametrize(
    "bad",
    [
        certificate(2),  # one PREPARE less than 2f
        certificate(0, 2),  # the primary's does not count
        Certificate(said(2, proposal()), tuple(votes(Prepare, 2, 3))),  # not proposed by the primary
        Certificate(Signed(0, proposal(), b"forged"), tuple(votes(Prepare, 2, 3))),
        Certificate(said(0, proposal()), (*votes(Prepare, 2), Signed(3, Prepare(0, 1, A1.digest()), b"forged"))),
        certificate(2, 3, view=1),  # of the very view that is to be opened
    ],
)
def test_a_view_change_with_a_bad_certificate_does_not_count(bad: Certificate) -> None:
    replica = core(1)
    hear(replica, said(2, ViewChange(1, ())))
    assert hear(replica, said(0, ViewChange(1, (bad,)))) == []
    assert hear(replica, said(3, ViewChange(1, ())))  # this one does, and is the second


def new_view(*proposals: PrePrepare, changes: tuple[int, ...] = (0, 1, 3)) -> Signed:
    holds = {0: (certificate(2, 3),)}
    named = tuple(said(author, ViewChange(1, holds.get(author, ()))) for author in changes)
    return said(1, NewView(1, named, tuple(said(1, body) for body in proposals)))


def test_a_backup_computes_itself_what_a_new_view_proposes() -> None:
    good = proposal(view=1)
    assert bodies(hear(core(2), new_view(good)), Prepare) == [Prepare(1, 1, A1.digest())]
    for bad in (
        new_view(),  # leaves out what was prepared
        new_view(proposal(B1, view=1)),
        new_view(good, changes=(0, 1)),  # too few
        new_view(good, changes=(0, 0, 1)),
        Signed(2, new_view(good).body, sign(2, new_view(good).body)),  # not the primary
    ):
        assert hear(core(2), bad) == []


def test_what_comes_before_its_view_is_open_waits() -> None:
    replica = core(2)
    hear(replica, said(0, ViewChange(1, ())), said(3, ViewChange(1, ())))  # it leaves for view 1
    assert not bodies(hear(replica, said(1, proposal(B1, view=1, slot=2))), Prepare)
    effects = hear(replica, new_view(proposal(view=1)))
    assert [p.slot for p in bodies(effects, Prepare)] == [1, 2]
