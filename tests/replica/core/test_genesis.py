"""Values that no cluster can run with are refused, all problems at once; every value is bound by the cluster id."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from replica.core.genesis import MIB, Limits, Member, Ordering
from tests.replica.core.harness import make_genesis, public_key

G = make_genesis()


@pytest.mark.parametrize("name", [f.name for f in fields(Limits)])
def test_each_limit_must_be_positive_and_changes_the_cluster_id(name: str):
    assert any(name in problem for problem in replace(Limits(), **{name: 0}).problems())
    usual = getattr(Limits(), name)
    # Smaller where smaller is possible, or else larger: both remain consistent.
    changed = next(
        limits for limits in (replace(Limits(), **{name: usual + d}) for d in (-1, 1)) if not limits.problems()
    )
    assert replace(G, limits=changed).cluster_id() != replace(G, limits=Limits()).cluster_id()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 255}, "at least twice"),
        ({"operation_bytes_max": 2 * MIB}, "exceed operation_bytes_max"),
        ({"envelope_bytes_max": 4 * MIB}, "exceed envelope_bytes_max"),
        ({"batch_bytes_max": 6 * MIB}, "exceed batch_bytes_max"),
        ({"group_bytes_max": 8 * MIB}, "fits a frame"),
        ({"session_window": 1000}, "session_window"),
        ({"envelope_operations_max": 65536, "session_window": 65536}, "at most 65535"),
        ({"batch_envelopes_max": 65536}, "at most 65535"),
        ({"group_entries_max": 1025}, "at most 1024"),
    ],
)
def test_limits_that_contradict_each_other(changes: dict, words: str):
    assert any(words in problem for problem in replace(Limits(), **changes).problems())
    with pytest.raises(ValueError, match=words):
        replace(G, limits=replace(Limits(), **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonce": bytes(31)}, "nonce"),
        ({"f": 2}, "needs members 0 to 4"),
        ({"f": 0}, "f must be from 1"),
        ({"members": G.members[::-1]}, "in this order"),
        ({"members": (*G.members[:2], Member(2, 1, public_key(1)))}, "same log key"),
        ({"members": (*G.members[:2], Member(2, 1, bytes(64)))}, "65 bytes"),
        ({"members": (*G.members[:2], Member(2, 3, public_key(2)))}, "has pins of 75 bytes"),
        ({"members": (*G.members[:2], Member(2, 3, public_key(2), bytes(74)))}, "has pins of 75 bytes"),
        ({"members": (*G.members[:2], Member(2, 2, public_key(2), bytes(75)))}, "has pins of 75 bytes"),
        ({"name": ""}, "name must have"),
        ({"application": "é" * 101}, "application must have"),
    ],
)
def test_a_genesis_that_cannot_be(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        replace(G, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"nonce": b"\1" * 32},
        {"ordering": Ordering.TWO_PHASE},
        {"application": "replica.apps.counter:Counter"},
        {"members": (*G.members[:2], Member(2, 2, public_key(2)))},
        {"members": (*G.members[:2], Member(2, 1, public_key(9)))},
        {"members": (*G.members[:2], Member(2, 3, public_key(2), bytes(75)))},
    ],
)
def test_every_value_changes_the_cluster_id_and_the_context(changes: dict):
    other = replace(G, **changes)
    assert other.cluster_id() != G.cluster_id()
    assert other.context() != G.context()


def test_contexts_differ_by_member_list():
    assert len({G.context(number) for number in range(5)}) == 5


def test_what_is_pinned_for_a_tpm_stands_in_the_genesis():
    ids = {
        replace(G, members=(*G.members[:2], Member(2, 3, public_key(2), pins))).cluster_id()
        for pins in (bytes(75), b"\x0e" + bytes(74))
    }
    assert len(ids) == 2
    pinned = replace(G, members=(*G.members[:2], Member(2, 3, public_key(2), bytes(range(75)))))
    assert pinned.encode().endswith(b"\x00\x02\x03" + public_key(2) + bytes(range(75)))
