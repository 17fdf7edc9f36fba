"""Evidence in a cluster whose members changed: nobody is accused of what the rules of his own list allow."""

from __future__ import annotations

import pytest

from replica.core.batch import make_batch
from replica.core.checkpoint import Header, encode_certificate, state_digest
from replica.core.entries import COMMIT, Checkpoint, Commit, Prepare, PrePrepare, Suspect
from replica.core.events import Exposed
from replica.core.evidence import Basis, Claim, Evidence, Kind
from replica.core.genesis import Genesis, Member
from replica.core.layout import LayoutError
from replica.core.logstate import LogState
from replica.core.proof import prove
from replica.core.proving import (
    FALSE_CHECKPOINT,
    MALFORMED,
    Replay,
    UnprovenError,
    bare,
    collect_checkpoint,
    collect_replay,
    examine_under,
)
from replica.shell.verify import GroupVerifier
from tests.replica.core.evidence_world import ACCUSED, KeyedLog, World, signed_envelope
from tests.replica.core.test_members import OPERATOR

NULL = bytes(32)
LAST = 6  # the last slot of list 0


def successor(genesis: Genesis, members: tuple[Member, ...], last: int = LAST) -> list[tuple[Genesis, int | None]]:
    return [(genesis, last), (genesis.successor(genesis.list_number + 1, last, members), None)]


def joining(*numbers: int) -> tuple[Member, ...]:
    return tuple(Member(number, 1, KeyedLog(number, 5000 + number).public_key, b"", 1) for number in numbers)


def judged(raw: bytes, spans: list[tuple[Genesis, int | None]]) -> tuple[Claim, str]:
    claim, text, member = examine_under(raw, spans, GroupVerifier, signed_envelope)
    assert any(member in genesis.members for genesis, _ in spans)
    return claim, text


def why_not(raw: bytes, spans: list[tuple[Genesis, int | None]]) -> str:
    with pytest.raises(UnprovenError) as refused:
        judged(raw, spans)
    return str(refused.value)


def follow_to_the_end(world: World) -> None:
    """Have the accused do what the others do, up to the CHECKPOINT with which list 0 ends."""
    while world.slot < LAST:
        digest, slot = world.proposed(), world.slot
        world.say(Prepare(0, slot, digest), Commit(0, slot, digest))
    world.say(Checkpoint(LAST, world.cluster.cores[0]._known.own_digests[LAST]))


def replay(world: World, index: int, genesis: Genesis) -> bytes:
    evidence = collect_replay(ACCUSED, index, genesis, GroupVerifier(genesis), None, world.groups)
    assert evidence is not None
    return evidence.encode()


def test_what_was_said_under_the_next_list_is_not_judged_by_the_rules_before():
    """SUSPECT(0) under list 0, and again under list 1, whose views begin anew."""
    world = World(4)
    world.say(Suspect(0))
    follow_to_the_end(world)
    raw = replay(world, world.say(Suspect(0)), world.genesis)
    assert judged(raw, [(world.genesis, None)])[0].rule == "suspected-twice", "who knows of no other list accuses it"
    why = why_not(raw, successor(world.genesis, world.genesis.members))
    assert "is not of list 0 of the members" in why
    assert "breaks no rule" in why


def test_a_rule_that_was_broken_under_one_list_is_proven_whoever_came_after():
    world = World(4)
    raw = replay(world, world.say(Suspect(3)), world.genesis)
    alone = judged(raw, [(world.genesis, None)])
    assert alone[0].rule == "wrong-view"
    others = world.genesis.members[:2]
    for members in (world.genesis.members, (*others, *joining(2)), (*world.genesis.members, *joining(3, 4))):
        assert judged(raw, successor(world.genesis, members)) == alone


def test_a_rule_that_was_broken_under_the_next_list_is_proven_by_its_rules():
    world = World(4)
    follow_to_the_end(world)
    world.say(Suspect(0))
    spans = successor(world.genesis, world.genesis.members)
    raw = replay(world, world.say(Suspect(0)), spans[1][0])
    assert judged(raw, spans)[0] == Claim(ACCUSED, world.log.last, "suspected-twice")
    why_not(raw, [(world.genesis, LAST)])


def test_a_vote_beyond_the_last_slot_is_collected_and_proven():
    world = World(4, operators=(OPERATOR,))
    after = world.change(*world.genesis.members[:2], *joining(2))
    index = world.overrun(after.base)
    assert {(one.index, one.violation.rule) for one in world.found(Exposed)} == {(index, "beyond-list")}
    of_list = (world.genesis, world.keys, None, world.groups)
    evidence = collect_replay(ACCUSED, index, *of_list, after.base)
    assert evidence is not None
    assert judged(evidence.encode(), [(world.genesis, after.base), (after, None)])[0].rule == "beyond-list"
    assert "lacks" in why_not(evidence.encode(), [(world.genesis, None)]), "who does not know where the list ends"
    assert collect_replay(ACCUSED, index, *of_list) is None


def shown_alone(world: World, entry: bytes | PrePrepare) -> bytes:
    index = world.say(entry)
    claim = Claim(ACCUSED, index, MALFORMED)
    return bare(claim, world.holding(ACCUSED, index), world.genesis, Kind.ENTRY).encode()


def test_an_entry_is_malformed_only_if_it_is_under_every_list_of_its_log():
    world = World(4)
    wider = (*world.genesis.members, *joining(3, 4))
    spans = successor(world.genesis, wider)
    of_five = shown_alone(world, PrePrepare(0, 8, make_batch(1, (1, 1, 1, 1, 1), ())))
    assert judged(of_five, spans[:1])[0].rule == MALFORMED, "who knows of no other list accuses it"
    assert "well-formed" in why_not(of_five, spans)
    replaced = successor(world.genesis, (*world.genesis.members[:2], *joining(2, 3, 4)))
    assert judged(of_five, replaced)[0].rule == MALFORMED, "its log was in list 0 only"


def test_rubbish_is_proven_under_any_lists():
    world = World(4)
    raw = shown_alone(world, b"\x09junk")
    alone = judged(raw, [(world.genesis, None)])
    wider = (*world.genesis.members, *joining(3, 4))
    replaced = (*world.genesis.members[:2], *joining(2))
    for members in (world.genesis.members, wider, replaced):
        assert judged(raw, successor(world.genesis, members)) == alone
    assert "was not attested by that log" in why_not(raw, successor(world.genesis, replaced)[1:])
    of_nobody = bare(Claim(3, 1, MALFORMED), world.holding(ACCUSED, 1), world.genesis, Kind.ENTRY).encode()
    assert why_not(of_nobody, [(world.genesis, None)]) == "there is no replica 3"


@pytest.mark.parametrize(("slot", "is_proof"), [(LAST - 2, True), (LAST, True), (LAST + 2, False), (1000, False)])
def test_nobody_reads_on_from_a_state_beyond_the_list(slot, is_proof):
    """Replica 2, faulty, was replaced; then replica 1 is. Together they attest a state that makes 0 a liar.

    Backdated into their list they prove what they like: two of its three logs are faulty.
    """
    world = World(4)
    logs = world.cluster.logs
    vote = next(group for group in reversed(logs[0].groups) if group.payloads[0][0] == COMMIT)
    states = (LogState(0, vote.first - 1, view=7), LogState(1, 0), LogState(2, 0))
    encoded = tuple(state.encode() for state in states)
    heads = (vote.head_before, logs[1].head, logs[2].head)
    cut = tuple(state.position for state in states)
    header = Header(slot, 0, bytes(32), bytes(32), cut, heads, tuple(map(state_digest, encoded)))
    said = {log: logs[log].say(Checkpoint(slot, header.digest)) for log in (1, 2)}
    certificate = encode_certificate({log: prove(group, group.first) for log, group in said.items()})
    claim = Claim(0, vote.first, "wrong-view")
    basis = Basis(header.encode(), certificate, encoded)
    evidence = Evidence(Kind.REPLAY, world.genesis.cluster_id(), claim, ((vote.raw,), (), ()), basis=basis)
    spans = successor(world.genesis, (*world.genesis.members[:2], *joining(2)))
    if is_proof:
        assert judged(evidence.encode(), spans)[0] == claim
    else:
        assert f"slot {slot} of the basis is not of list 0" in why_not(evidence.encode(), spans)


def test_nobody_reads_on_from_a_state_of_before_the_list():
    world = World(4)
    later = world.genesis.successor(1, LAST, world.genesis.members)
    logs = world.cluster.logs
    encoded = tuple(LogState(log, 0).encode() for log in range(3))
    for slot in (LAST - 2, LAST, LAST + 2):
        heads = tuple(world.keys.initial_heads())
        header = Header(slot, 0, NULL, NULL, (0, 0, 0), heads, tuple(map(state_digest, encoded)), 1, NULL)
        said = {log: logs[log].say(Checkpoint(slot, header.digest)) for log in (1, 2)}
        certificate = encode_certificate({log: prove(group, group.first) for log, group in said.items()})
        basis = Basis(header.encode(), certificate, encoded)
        if slot > LAST:
            Replay(later, GroupVerifier(later), basis, signed_envelope)
        else:
            with pytest.raises(LayoutError, match="is not of list 1"):
                Replay(later, GroupVerifier(later), basis, signed_envelope)


def test_a_checkpoint_is_contradicted_by_members_of_its_time_only():
    """Two of three were replaced. Later they say a CHECKPOINT above the end of their list, against the one that stayed.

    So do those that came, of a slot at which they were no members yet.
    """
    world = World(4)
    old = [KeyedLog(log) for log in (0, 1)]
    new = [KeyedLog(log, 5000 + log) for log in (0, 1)]
    members = (*joining(0, 1), world.genesis.members[ACCUSED])

    def accusing(slot: int, liars: list[KeyedLog], spans: list[tuple[Genesis, int | None]]) -> bytes:
        genesis = spans[-1][0] if liars is new else spans[0][0]
        framed = KeyedLog(ACCUSED)
        for log, context in zip((*liars, framed), genesis.contexts(), strict=True):
            log.context = context
        said = framed.say(Checkpoint(slot, b"\5" * 32))
        false = [log.say(Checkpoint(slot, b"\7" * 32)) for log in liars]
        groups = dict(enumerate(false))
        source = lambda log, _first: iter([groups[log]] if log in groups else [])  # noqa: E731
        evidence = collect_checkpoint(said, 1, (said.first, *[one.first for one in false]), genesis, source)
        assert isinstance(evidence, Evidence)
        return evidence.encode()

    spans = successor(world.genesis, members)
    raw = accusing(LAST + 2, old, spans)
    assert judged(raw, [(world.genesis, None)])[0].rule == FALSE_CHECKPOINT
    assert f"slot {LAST + 2} is not of the list" in why_not(raw, spans)
    assert judged(raw, successor(world.genesis, members, LAST + 2))[0].rule == FALSE_CHECKPOINT
    raw = accusing(LAST - 2, new, spans)
    assert f"slot {LAST - 2} is not of the list" in why_not(raw, spans)
    assert judged(raw, successor(world.genesis, members, LAST - 2))[0].rule == FALSE_CHECKPOINT
