"""Scripted runs about coming back, and about rules that random runs hardly ever need.

They are checked, not told: `tests/sim/test_recovery_stories.py` says what must come of each, and that it goes wrong
without its rule. Times are virtual milliseconds; checkpoints come every fourth slot, a batch holds one request.
"""

from dataclasses import replace

from replica.core.entries import (
    COMMIT,
    NEW_VIEW,
    PRE_PREPARE,
    PREPARE,
    Checkpoint,
    NewView,
    Reference,
    Suspect,
    ViewChange,
)
from replica.core.group import VerifiedGroup
from replica.sim.clones import TwoHistories
from replica.sim.cutlies import FalseCuts, with_cut
from replica.sim.faulty import Puppet
from replica.sim.lies import cut_of, view_and_slot
from replica.sim.poison import FalseParts
from replica.sim.scenario import LIMITS
from replica.sim.stage import Hide, Rewrite, Stage, Story

A, B = 0, 1
_ONE_EACH = replace(LIMITS, batch_envelopes_max=1)


def checkpoint_ahead(stage: Stage) -> None:
    """Let replica 1 say CHECKPOINT of a slot far ahead, and become primary while replica 0 is not heard."""
    liar = stage.faulty(1)

    def lie() -> None:
        if not liar.say([Checkpoint(8, bytes(32)).encode()]):
            stage.world.after(1, lie)

    def be_slow() -> None:
        # Between 0 and 2, so that whoever of them opens a view names replica 1.
        for pair in ((0, 2), (2, 0)):
            stage.setting.network.stalled[pair] = stage.world.now + 40
        stage.world.after(10, be_slow)

    stage.ask(A, 10, 250, 300)
    stage.at(200, "replica 1 says CHECKPOINT of slot 8; replica 0 is not heard", lie)
    stage.at(200, "", lambda: stage.cut((0, 1), (0, 2)))
    stage.at(3000, "replica 0 is heard again", lambda: stage.mend((0, 1), (0, 2)))
    stage.world.at(3000, be_slow)


class CutAmidVotes:
    """Votes of replica 2 for slots 5 to 8 of view 0 lie inside a cut; the proposals do, or do not.

    Replica 0 shows its proposals from slot 3 on to replica 2 only, and stops. View 1 is opened by VIEW-CHANGEs of 1, 3
    and 4, which know nothing of them. Its primary, replica 1, proposes slots 3 and 4, the latter with this cut, and
    is mute when slot 4 is stable. Replica 4 was away meanwhile, and everything before the cut is forgotten. View 2
    needs replica 4, and must carry what replica 2 voted for. Replica 1 is the first to offer it the state, without the
    votes.
    """

    def __init__(self, stage: Stage, *, is_open: bool) -> None:
        self._stage = stage
        self._cut_is_open = is_open
        self._is_mute = False

    @property
    def _liar(self) -> Puppet:
        return self._stage.puppet(1)

    def play(self) -> None:
        """Make it happen."""
        stage = self._stage
        out = tuple((2, i) for i in (1, 3, 4))
        stage.trick(0, Hide(lambda to, group: group.author == 0 and to not in {1, 2} and stage.world.now >= 200))
        stage.trick(1, Rewrite(self._say), Hide(lambda _, group: group.author in {0, 2} and stage.world.now >= 200))
        stage.ask(A, 10, 210, 211, 212, 213, 214, 215)
        stage.at(200, "replica 0 shows its log to 2 only; replica 2 reaches 1 only", lambda: stage.cut(*out[1:]))
        stage.at(300, "replica 0 stops for ever", lambda: stage.stop(0))
        stage.when(self._is_open, "replica 4 crashes; replica 2 is heard again", self._continue)
        stage.when(self._is_cut, "replica 1 says nothing more; replica 4 comes back", self._end)

    def _is_open(self) -> bool:
        return all(1 in self._stage.hosts[i].core.log_states()[1].opened for i in (3, 4))

    def _continue(self) -> None:
        self._stage.crash(4)
        self._stage.mend((2, 3), (2, 4))

    def _is_cut(self) -> bool:
        kept = [self._stage.hosts[i].kept for i in (2, 3)]
        return all(one is not None and one.slot == 4 for one in kept)

    def _end(self) -> None:
        stage = self._stage
        self._is_mute = True
        stage.trick(1, FalseParts("stripped"))
        if not self._cut_is_open:
            self._hear_the_liar_first()
        stage.restart(4)

    def _hear_the_liar_first(self) -> None:
        stage = self._stage
        late, honest = stage.hosts[4], ((2, 4), (3, 4))
        stage.cut(*honest)
        stage.when(
            lambda: late.core.transfer is not None,
            "replicas 2 and 3 reach replica 4 too",
            lambda: stage.mend(*honest),
        )

    def _say(self, payload: bytes) -> bytes | None:
        kind = payload[0]
        if self._is_mute or payload in {Suspect(1).encode(), ViewChange(2).encode()}:
            return None  # view 2 is to wait for replica 4
        if kind in {PREPARE, COMMIT} and view_and_slot(payload) >= (0, 3) and view_and_slot(payload) < (1, 0):
            return None
        if kind == NEW_VIEW:
            states = self._stage.hosts[1].core.log_states()
            if any(1 not in states[i].view_change_at for i in (1, 3, 4)):
                return None
            # These references carry nothing, so all that waits is to be proposed.
            self._liar.knowledge.requests.begin_view(())
            return NewView(1, tuple(Reference(i, states[i].view_change_at[1].index) for i in (1, 3, 4))).encode()
        if kind == PRE_PREPARE and view_and_slot(payload)[1] > 4:
            return None
        if kind == PRE_PREPARE and cut_of(payload):
            cut = cut_of(payload)
            if self._cut_is_open:
                cut[0] = self._before_the_proposals()
            return with_cut(payload, cut)
        return payload

    def _before_the_proposals(self) -> int:
        def proposes(group: VerifiedGroup) -> bool:
            return any(p[0] == PRE_PREPARE and view_and_slot(p)[1] >= 3 for p in group.payloads)

        held = self._stage.hosts[1].library.held[0]
        first = next(group for group in held if proposes(group))
        return first.first - 1


def voter_crashes(stage: Stage) -> None:
    """Let replica 2 alone see a proposal, vote and crash; let the proposal's author be silent from then on."""
    stage.trick(0, Hide(lambda to, group: group.author == 0 and to == 1 and stage.world.now >= 200))
    stage.ask(A, 10, 210)

    def has_voted() -> bool:
        said = [p for group in stage.hosts[2].library.held[2] for p in group.payloads if p[0] == PREPARE]
        return any(view_and_slot(payload)[1] >= 3 for payload in said)

    def crash() -> None:
        stage.crash(2)
        stage.stop(0)
        stage.at(stage.world.now + 50, "replica 2 comes back", lambda: stage.restart(2))

    stage.at(200, "replica 0 shows its log to replica 2 only", lambda: None)
    stage.when(has_voted, "replica 2 crashes, replica 0 stops for ever", crash)


def away_for_long(stage: Stage) -> None:
    """Let replica 6 be away across checkpoints and two changes of views, then be needed for every quorum."""
    core = stage.hosts[6].core

    def is_back() -> bool:
        return stage.hosts[6].core is not core and stage.hosts[6].core.executed >= 40

    stage.keep_asking(A, 10, 40, lambda: stage.waits(A, 60))
    stage.at(200, "replica 6 crashes", lambda: stage.crash(6))
    stage.at(400, "replica 0, the primary, stops for ever", lambda: stage.stop(0))
    stage.at(1400, "replica 1, the primary, stops for ever", lambda: stage.stop(1))
    stage.when(
        lambda: stage.hosts[3].core.executed >= 36, "replica 6 comes back with its old disk", lambda: stage.restart(6)
    )
    stage.when(is_back, "replica 5 stops for ever: from now on replica 6 must vote", lambda: stage.stop(5))


def power_cut(stage: Stage, at_ms: int = 303) -> None:
    """Let the whole cluster lose power at one moment, while both clients ask, and come back one after the other."""
    stage.ask(A, 10, 200, 300, 302, 400, 800)
    stage.ask(B, 10, 202, 302, 402, 800)
    stage.at(at_ms, "all replicas lose power", lambda: stage.crash(0, 1, 2))
    for number in (2, 0, 1):
        stage.at(at_ms + 100 + 50 * number, f"replica {number} comes back", lambda i=number: stage.restart(i))  # type: ignore[misc]


def cut_never_moves(stage: Stage) -> None:
    """Let the primary propose the cut that was agreed before, again and again."""
    stage.trick(0, FalseCuts("agreed"))
    stage.keep_asking(A, 10, 40, lambda: stage.waits(A, 40))


def left_behind(stage: Stage) -> None:
    """Cut the faulty replica 1 off until the others have forgotten what it lacks; it behaves well afterwards."""
    pairs = tuple(pair for i in (0, 2) for pair in ((i, 1), (1, i)))
    stage.keep_asking(A, 10, 40, lambda: stage.waits(A, 60))
    stage.at(200, "replica 1 is cut off", lambda: stage.cut(*pairs))
    stage.when(lambda: stage.hosts[2].core.executed >= 24, "replica 1 is connected again", lambda: stage.mend(*pairs))


def two_histories(stage: Stage) -> None:
    """Let replica 1 show one history of its log to replica 0, and another one to replica 2."""
    stage.trick(1, TwoHistories())
    stage.keep_asking(A, 10, 40, lambda: stage.waits(A, 20))


# It breaks the assumption, so it is not clean.
TWO_HISTORIES = Story("two_histories", "", two_histories, (1,), clients=1)

STORIES = (
    Story("checkpoint_ahead", "", checkpoint_ahead, (1,), clients=1, limits=_ONE_EACH),
    Story("open_cut", "", lambda s: CutAmidVotes(s, is_open=True).play(), (0, 1), f=2, clients=1, limits=_ONE_EACH),
    Story(
        "votes_in_flight", "", lambda s: CutAmidVotes(s, is_open=False).play(), (0, 1), f=2, clients=1, limits=_ONE_EACH
    ),
    Story("voter_crashes", "", voter_crashes, (0,), clients=1, limits=_ONE_EACH),
    Story("away_for_long", "", away_for_long, (0, 1, 5), f=3, clients=1, limits=_ONE_EACH),
    Story("left_behind", "", left_behind, (1,), clients=1, limits=_ONE_EACH),
    Story("power_cut", "", power_cut, (), limits=_ONE_EACH),
    Story("cut_never_moves", "", cut_never_moves, (0,), clients=1, limits=_ONE_EACH),
)
