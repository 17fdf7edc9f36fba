"""Evidence: genuine evidence proves what the replicas found; altered, cut off or aimed at another, it proves nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from replica.core import evidence as module
from replica.core import proving
from replica.core.entries import Commit, Prepare, PrePrepare
from replica.core.events import Exposed, Forked, Lied
from replica.core.evidence import Claim, Evidence, Kind, decode_claim, decode_evidence
from replica.core.layout import LayoutError
from replica.core.proving import MALFORMED, TooLargeError, UnprovenError, bare, collect_replay
from tests.replica.core.evidence_world import ACCUSED, NAMES, World, altered, genuine, misbehave
from tests.replica.core.support import junk_batch

CASES = [*((name, 4, False) for name in NAMES), *((name, 6, True) for name in NAMES)]
IDS = [f"{name}{'-from-a-checkpoint' if basis else ''}" for name, _, basis in CASES]
# Real evidence is of these; what they are refused for is tried on every kind.
REPRESENTATIVES = [
    ("envelope", 4, False),
    ("commit-without-vote", 4, False),
    ("wrong-view", 6, True),
    ("false-vote", 6, True),
    ("false-checkpoint", 4, False),
]


def case(name: str, slots: int, basis: bool) -> tuple[World, Evidence]:
    return genuine(name, slots, with_basis=basis)


def assert_refused(world: World, raw: bytes) -> str:
    with pytest.raises(UnprovenError) as refused:
        world.examine(raw)
    return str(refused.value)


@pytest.mark.parametrize("which", CASES, ids=IDS)
def test_genuine_evidence_proves_what_the_replicas_found(which):
    world, evidence = case(*which)
    claim, text = world.examine(evidence.encode())
    assert claim == evidence.claim
    for found in world.found(Exposed):
        assert (claim.log, claim.index, claim.rule) == (found.log, found.index, found.violation.rule)
        assert text == found.violation.text
    for found in world.found(Lied):
        assert (claim.log, claim.index) == (found.log, found.index)
    assert claim.log == ACCUSED
    assert claim.rule == (MALFORMED if which[0] in {"junk", "envelope"} else which[0])
    assert decode_evidence(evidence.encode(), world.genesis.n) == evidence
    assert decode_claim(evidence.encode()[:256]) == (evidence.kind, world.genesis.cluster_id(), claim)
    assert (evidence.basis is not None) == (which[2] and evidence.kind is Kind.REPLAY)


@pytest.mark.parametrize("which", REPRESENTATIVES)
def test_any_altered_bit_is_refused(which):
    world, evidence = case(*which)
    raw = evidence.encode()
    for copy in altered(raw, random.Random(which[0]), 1200):
        assert_refused(world, copy)


@pytest.mark.parametrize("which", REPRESENTATIVES)
def test_cut_off_or_stretched(which):
    world, evidence = case(*which)
    raw = evidence.encode()
    for size in {*range(120), *range(0, len(raw), 61), *range(len(raw) - 80, len(raw))}:
        assert_refused(world, raw[:size])
    assert_refused(world, raw + b"\0")
    assert_refused(world, b"")


@pytest.mark.parametrize("which", CASES, ids=IDS)
def test_aimed_at_another_log_index_rule_or_cluster(which):
    world, evidence = case(*which)
    claim = evidence.claim
    for other in (0, 1, 3, 65535):
        assert_refused(world, replace(evidence, claim=replace(claim, log=other)).encode())
    for index in (0, 1, claim.index - 1, claim.index + 1, 2**64 - 1):
        assert_refused(world, replace(evidence, claim=replace(claim, index=index)).encode())
    for rule in ("forked", "voted-twice", claim.rule[:-1], claim.rule.upper()):
        assert_refused(world, replace(evidence, claim=replace(claim, rule=rule)).encode())
    assert "another cluster" in assert_refused(world, replace(evidence, cluster_id=bytes(32)).encode())
    swapped = (*evidence.groups[:-2], *reversed(evidence.groups[-2:]))
    if swapped != evidence.groups:
        assert_refused(world, replace(evidence, groups=swapped).encode())


@pytest.mark.parametrize("which", CASES, ids=IDS)
def test_identities_come_from_the_verifier(which):
    """The same history in a cluster that differs by its nonce has the same keys and other attestations."""
    _, evidence = case(*which)
    other = World(2, nonce=9)
    retold = replace(evidence, cluster_id=other.genesis.cluster_id())
    assert assert_refused(other, retold.encode())
    assert "another cluster" in assert_refused(other, evidence.encode())


@pytest.mark.parametrize("which", CASES, ids=IDS)
def test_no_kind_passes_as_another(which):
    world, evidence = case(*which)
    for kind in Kind:
        if kind in {evidence.kind, Kind.REPLAY} or evidence.kind is Kind.REPLAY:
            continue
        assert_refused(world, replace(evidence, kind=kind).encode())
    shown = bare(evidence.claim, world.holding(ACCUSED, evidence.claim.index), world.genesis)
    assert "not self-contained" in assert_refused(world, shown.encode())
    if evidence.claim.rule != MALFORMED:
        assert "well-formed" in assert_refused(world, replace(shown, kind=Kind.ENTRY).encode())


def test_a_replay_holds_no_more_than_is_needed():
    """Without any one group it proves nothing; logs that were not waited for are left out."""
    for which in REPRESENTATIVES:
        world, evidence = case(*which)
        if evidence.kind is not Kind.REPLAY:
            continue
        for log, groups in enumerate(evidence.groups):
            for place in range(len(groups)):
                fewer = list(evidence.groups)
                fewer[log] = groups[:place] + groups[place + 1 :]
                assert_refused(world, replace(evidence, groups=tuple(fewer)).encode())
    assert genuine("wrong-view", 6, with_basis=True)[1].groups[:2] == ((), ())


def test_what_follows_the_violation_proves_nothing():
    """A faulty primary's second proposal for a slot is never read, so who voted for the first told no lie."""
    world = World(4)
    world.cluster.cores.pop(0)
    slot = world.slot_of(1) + 1
    first, second = junk_batch(1, ()), junk_batch(2, ())
    assert slot % 2
    logs = world.cluster.logs
    logs[0].say(PrePrepare(0, slot, first), PrePrepare(0, slot, second))
    vote = logs[1].say(Prepare(0, slot, first.digest), Commit(0, slot, first.digest))
    groups = tuple(tuple(group.raw for group in log.groups) for log in logs)
    for index, rule in ((vote.first, "false-vote"), (vote.last, "false-commit")):
        claim = Claim(1, index, rule)
        forged = Evidence(Kind.REPLAY, world.genesis.cluster_id(), claim, groups)
        assert "breaks no rule" in assert_refused(world, forged.encode())
    last = logs[0].groups[-1].last
    real = collect_replay(0, last, world.genesis, world.keys, None, world.groups)
    assert world.examine(real.encode())[0] == Claim(0, last, "proposed-twice")
    after = logs[0].say(PrePrepare(0, slot + 1, junk_batch(3, (0, 0, 0))))
    with pytest.raises(UnprovenError, match="before entry"):
        collect_replay(0, after.first, world.genesis, world.keys, None, world.groups)


def test_a_basis_must_be_certified_and_whole():
    world, evidence = genuine("wrong-view", 6, with_basis=True)
    basis = evidence.basis
    older = world.basis(0)
    for wrong in (
        replace(basis, header=older.header),
        replace(basis, certificate=older.certificate),
        replace(basis, states=older.states),
        replace(basis, states=(basis.states[1], basis.states[0], basis.states[2])),
        None,
    ):
        assert_refused(world, replace(evidence, basis=wrong).encode())


def test_a_certificate_that_does_not_contradict():
    world, evidence = genuine("false-checkpoint", 4)
    agreeing = world.basis(0).certificate  # of another slot
    assert "does not contradict" in assert_refused(world, replace(evidence, certificate=agreeing).encode())
    other, wrong_view = genuine("wrong-view", 4)
    shown = bare(wrong_view.claim, other.holding(ACCUSED, wrong_view.claim.index), other.genesis, Kind.CHECKPOINT)
    assert_refused(other, replace(shown, certificate=other.basis(0).certificate).encode())


def test_a_source_that_lacks_something_gives_nothing():
    world, evidence = genuine("commit-without-vote", 4)
    index = evidence.claim.index
    for missing in (0, ACCUSED):
        source = lambda log, first, missing=missing: iter(()) if log == missing else world.groups(log, first)  # noqa: E731
        assert collect_replay(ACCUSED, index, world.genesis, world.keys, None, source) is None


def test_evidence_is_bounded(monkeypatch):
    world, evidence = genuine("commit-without-vote", 4)
    raw = evidence.encode()
    monkeypatch.setattr(proving, "EVIDENCE_BYTES_MAX", len(raw) - 1)
    with pytest.raises(TooLargeError):
        collect_replay(ACCUSED, evidence.claim.index, world.genesis, world.keys, None, world.groups)
    monkeypatch.setattr(proving, "EVIDENCE_BYTES_MAX", 1000)
    taken = []

    def source(log: int, first: int):
        return (taken.append(group) or group for group in world.groups(log, first))

    with pytest.raises(TooLargeError):
        collect_replay(ACCUSED, evidence.claim.index, world.genesis, world.keys, None, source)
    assert len(taken) < sum(map(len, evidence.groups)), "it stops when it is too much, not when it has all"
    monkeypatch.setattr(module, "EVIDENCE_BYTES_MAX", len(raw) - 1)
    with pytest.raises(LayoutError, match="more than"):
        decode_evidence(raw, 3)


@pytest.mark.parametrize("honest", ["vote", "commit", "neither"])
def test_votes_and_commits_that_differ(honest):
    """A commit is false if it differs from what was proposed, and if its author voted for something else."""
    world = World(4)
    slot, digest = world.slot + 1, world.proposed()
    false = b"\7" * 32
    said = {"vote": (digest, false), "commit": (false, digest), "neither": (false, false)}[honest]
    last = world.say(Prepare(0, slot, said[0]), Commit(0, slot, said[1]))
    wanted = [(last, "false-commit")] if honest == "vote" else [(last - 1, "false-vote"), (last, "false-commit")]
    assert {(found.log, found.index) for found in world.found(Lied)} == {(ACCUSED, index) for index, _ in wanted}
    for index, rule in wanted:
        evidence = collect_replay(ACCUSED, index, world.genesis, world.keys, None, world.groups)
        assert evidence is not None
        assert world.examine(evidence.encode())[0] == Claim(ACCUSED, index, rule)


def test_nobody_else_is_accused():
    for which in CASES:
        world, _ = case(*which)
        assert not world.found(Forked)
        assert {found.log for found in [*world.found(Exposed), *world.found(Lied)]} == {ACCUSED}


def test_misbehaviour_is_found_by_both_others():
    world = World(4)
    misbehave(world, "slot-skipped")
    assert len(world.found(Exposed)) == 2
