"""Checkpoints and view changes of PBFT's machine together: agreement in any order of messages, and bounded memory."""

import pytest

from replica.pbft.machine import EARLY_MAX, HISTORY, PbftCore
from replica.pbft.messages import (
    Broadcast,
    Certificate,
    Checkpoint,
    Commit,
    Decided,
    Diverged,
    Entered,
    NewView,
    Opened,
    Prepare,
    PrePrepare,
    Request,
    Signed,
    Stable,
    ViewChange,
)
from tests.replica.pbft.net import INTERVAL, WINDOW, Net, cluster, sign

SEEDS = range(40)


def names(count: int, client: str = "A") -> list[str]:
    return [f"{client}{number}" for number in range(1, count + 1)]


def said(author: int, body: object) -> Signed:
    return Signed(author, body, sign(author, body))


def proof(slot: int, *authors: int, digest: bytes = b"D") -> tuple[Signed, ...]:
    return tuple(said(author, Checkpoint(slot, digest)) for author in authors)


def proposal(slot: int, view: int = 0, name: str = "A1") -> PrePrepare:
    return PrePrepare.of(view, slot, Request(name[0], int(name[1:]), name))


def certificate(slot: int, view: int = 0, name: str = "A1", authors=(2, 3)) -> Certificate:
    body = proposal(slot, view, name)
    votes = tuple(said(author, Prepare(view, slot, body.digest)) for author in authors)
    return Certificate(said(view % 4, body), votes)


def hear(core: PbftCore, *messages: Signed) -> list:
    return [effect for message in messages for effect in core.on_message(message)]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_execute_everything_and_forget_what_is_stable(seed: int) -> None:
    net = Net(seed)
    asked = names(60)
    net.ask(*asked)
    net.run()
    net.check_agreement()
    for number, core in enumerate(net.cores):
        assert [name for name in net.executed[number] if name is not None] == asked
        assert core.stable >= 60 - INTERVAL - WINDOW


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [1, 2])
def test_primaries_that_stop_lose_nothing(seed: int, f: int) -> None:
    net = Net(seed, f)
    net.ask(*names(30))
    for victim in range(f):
        for _ in range(net.random.randrange(400)):
            net.step()
        net.kill(victim)
        net.ask(*names(20, "BC"[victim]))
        net.run()
    net.run(20_000)
    net.check_agreement(*range(f))
    for number in net.up():
        executed = net.executed[number]
        assert {*names(30), *names(20, "B")} <= set(executed)
        assert net.cores[number].view >= f
        # What a dead primary executed before is what the others did.
        for victim in range(f):
            assert executed[: len(net.executed[victim])] == net.executed[victim]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_equivocating_primary_is_replaced_and_divides_nobody(seed: int) -> None:
    net = Net(seed)

    def two_tongues(message: Signed, says: list) -> list:
        body = message.body
        if not isinstance(body, PrePrepare):
            return says if isinstance(body, ViewChange | NewView | Checkpoint) else []
        lie = said(0, PrePrepare.of(body.view, body.slot, Request("Z", body.slot, f"Z{body.slot}")))
        commit = [
            (peer, said(0, Commit(body.view, body.slot, m.body.digest))) for peer, m in says for m in (message, lie)
        ]
        first = net.random.sample([1, 2, 3], net.random.randrange(4))
        return [(peer, message if peer in first else lie) for peer, _ in says] + commit

    net.replaced[0] = two_tongues
    net.ask(*names(12))
    net.run(20_000)
    net.check_agreement(0)
    for number in (1, 2, 3):
        assert set(names(12)) <= set(net.executed[number])


@pytest.mark.parametrize("seed", SEEDS)
def test_one_that_missed_everything_is_told_what_was_decided(seed: int) -> None:
    net = Net(seed)
    apart = {(source, 3) for source in range(3)}
    net.cut |= apart
    net.ask(*names(50), to=range(3))
    net.run()
    net.cut -= apart
    net.ask(*names(10, "B"))
    net.run(10_000)
    net.check_agreement()
    assert net.executed[3] == net.executed[0]
    assert not net.cores[3].is_behind


@pytest.mark.parametrize(
    "bad",
    [
        lambda body, commits: Decided(0, 1, body.digest, body.request, commits[:2]),
        lambda body, commits: Decided(0, 1, body.digest, body.request, (*commits[:2], commits[0])),
        lambda body, commits: Decided(1, 1, body.digest, body.request, commits),  # of another view
        lambda body, commits: Decided(0, 2, body.digest, body.request, commits),
        lambda body, commits: Decided(0, 1, body.digest, Request("Z", 1, "Z1"), commits),
        lambda body, commits: Decided(
            0, 1, body.digest, body.request, (*commits[:2], Signed(3, commits[2].body, b"forged"))
        ),
    ],
)
def test_a_decision_that_2f_plus_1_commits_do_not_show_is_not_believed(bad) -> None:
    body = proposal(1)
    commits = tuple(said(author, Commit(0, 1, body.digest)) for author in (0, 1, 2))
    core = PbftCore(cluster(), 3, 300)
    assert hear(core, said(2, bad(body, commits))) == []
    assert hear(core, said(2, Decided(0, 1, body.digest, body.request, commits)))
    assert core.executed == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_one_that_hears_late_executes_the_same_from_history(seed: int) -> None:
    net = Net(seed)
    net.down.add(3)  # what is said to it waits
    net.ask(*names(50), to=range(3))
    net.run()
    assert min(net.cores[number].stable for number in range(3)) > 2 * WINDOW
    net.down.clear()
    net.run()
    net.check_agreement()
    assert net.executed[3] == net.executed[0]


def test_a_primary_stops_at_the_window_and_goes_on_when_a_checkpoint_is_stable() -> None:
    net = Net(1)
    # Nobody's CHECKPOINT arrives anywhere.
    for number in range(4):
        net.replaced[number] = lambda message, says: [] if isinstance(message.body, Checkpoint) else says
    net.ask(*names(30))
    net.run(250)
    assert [core.executed for core in net.cores] == [WINDOW] * 4
    net.replaced.clear()
    core = net.cores[0]
    digest = repr(net.executed[0][:INTERVAL]).encode()
    net.carry_out(0, hear(core, *proof(INTERVAL, 1, 2, digest=digest)))
    assert core.stable == INTERVAL
    assert core._next > WINDOW + 1


def test_2f_equal_checkpoints_or_different_ones_make_nothing_stable() -> None:
    core = PbftCore(cluster(), 1, 300)
    assert hear(core, *proof(INTERVAL, 0, 2), *proof(INTERVAL, 3, digest=b"other"), *proof(INTERVAL, 0, 2)) == []
    assert core.stable == 0
    # The first word of each counts.
    assert hear(core, *proof(INTERVAL, 3)) == []
    fresh = PbftCore(cluster(), 1, 300)
    assert hear(fresh, *proof(INTERVAL, 0, 2, 3)) == [Stable(INTERVAL, INTERVAL - HISTORY)]
    assert fresh.is_behind


@pytest.mark.parametrize("is_first", [True, False], ids=["it says its state first", "they do"])
def test_one_whose_state_is_another_than_that_of_2f_plus_1_is_told_so(is_first: bool) -> None:
    core = PbftCore(cluster(), 1, 300)
    effects = core.on_state(INTERVAL, b"mine") if is_first else []
    effects += hear(core, *proof(INTERVAL, 0, 2, 3, digest=b"theirs"))
    effects += [] if is_first else core.on_state(INTERVAL, b"mine")
    assert [effect for effect in effects if isinstance(effect, Diverged)] == [Diverged(INTERVAL)]
    good = PbftCore(cluster(), 1, 300)
    effects = good.on_state(INTERVAL, b"theirs") + hear(good, *proof(INTERVAL, 0, 2, 3, digest=b"theirs"))
    assert not [effect for effect in effects if isinstance(effect, Diverged)]


@pytest.mark.parametrize(
    "bad",
    [
        ViewChange(1, (), INTERVAL, proof(INTERVAL, 0, 2)),  # one CHECKPOINT less than 2f+1
        ViewChange(1, (), INTERVAL, proof(INTERVAL, 0, 0, 2)),
        ViewChange(1, (), INTERVAL, (*proof(INTERVAL, 0, 2), *proof(INTERVAL, 3, digest=b"other"))),
        ViewChange(1, (), INTERVAL, (*proof(INTERVAL, 0, 2), Signed(3, Checkpoint(INTERVAL, b"D"), b"forged"))),
        ViewChange(1, (), INTERVAL, proof(2 * INTERVAL, 0, 2, 3)),  # of another slot
        ViewChange(1, (), INTERVAL - 1, proof(INTERVAL - 1, 0, 2, 3)),  # where no checkpoint is
        ViewChange(1, (), 0, proof(INTERVAL, 0, 2, 3)),
        ViewChange(1, (certificate(INTERVAL),), INTERVAL, proof(INTERVAL, 0, 2, 3)),  # not above it
        ViewChange(1, (certificate(WINDOW + 1),)),  # beyond the window
        ViewChange(1, (certificate(2), certificate(1))),  # not in order
        ViewChange(1, (certificate(1), certificate(1))),
    ],
)
def test_a_view_change_whose_checkpoint_or_window_is_wrong_does_not_count(bad: ViewChange) -> None:
    core = PbftCore(cluster(), 3, 300)
    good = said(2, ViewChange(1, (certificate(INTERVAL + 1),), INTERVAL, proof(INTERVAL, 0, 1, 2)))
    hear(core, said(0, bad))
    assert not [e for e in hear(core, good) if isinstance(e, Entered)]
    # A second good one takes it along.
    assert [e for e in hear(core, said(1, ViewChange(1, ()))) if isinstance(e, Entered)]


def test_a_new_view_begins_above_the_highest_stable_checkpoint() -> None:
    core = PbftCore(cluster(), 1, 300)
    ahead = ViewChange(1, (certificate(INTERVAL + 2, name="A2"),), INTERVAL, proof(INTERVAL, 0, 2, 3))
    effects = hear(core, said(2, ahead), said(3, ViewChange(1, (certificate(1),))))
    (opened,) = [e for e in effects if isinstance(e, Opened)]
    assert [slot for slot, _ in opened.carried] == [INTERVAL + 1, INTERVAL + 2]
    assert opened.carried[0][1] is None
    assert core.stable == INTERVAL


def test_votes_beside_another_request_certify_nothing() -> None:
    """A faulty primary signs, with the digest that was voted on, another request: a new view must not carry that."""
    prepared = proposal(1)
    swapped = PrePrepare(0, 1, prepared.digest, Request("Z", 1, "Z1"))
    votes = tuple(said(author, Prepare(0, 1, prepared.digest)) for author in (2, 3))
    core = PbftCore(cluster(), 3, 300)
    hear(core, said(0, ViewChange(1, (Certificate(said(0, swapped), votes),))))
    assert not core._changes


def test_what_a_faulty_replica_can_make_another_keep_is_bounded() -> None:
    core = PbftCore(cluster(), 2, 300)
    for number in range(3 * HISTORY):
        digest = bytes([number % 256]) * 32
        hear(core, said(3, Prepare(0, number, digest)), said(3, Prepare(0, 1, digest)), said(3, Commit(0, 1, digest)))
        hear(core, said(3, Checkpoint(INTERVAL * number, digest)), said(3, ViewChange(2 * number + 1, ())))
        hear(core, said(3, Prepare(number + 1, 1, digest)), said(3, Prepare(number + 1, number, digest)))
    assert len(core.slots) <= HISTORY + WINDOW
    assert sum(map(len, core.slots[1].prepares.values())) == 1
    assert sum(map(len, core._changes.values())) == 1
    assert len(core._early[3]) <= EARLY_MAX
    assert sum(map(len, core._checkpoints.values())) <= (HISTORY + WINDOW) // INTERVAL + 2


def test_who_left_a_view_signs_nothing_there_and_still_learns() -> None:
    core = PbftCore(cluster(), 3, 300)
    core.on_request(Request("A", 9, "A9"))
    assert [e for e in core.on_tick(300) if isinstance(e, Entered)]
    body = proposal(1)
    votes = [said(author, kind(0, 1, body.digest)) for kind in (Prepare, Commit) for author in (0, 1, 2)]
    effects = hear(core, said(0, body), *votes)
    assert not [e for e in effects if isinstance(e, Broadcast)]
    assert core.executed == 1
