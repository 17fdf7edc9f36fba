"""The scenarios of a view change, each a scripted run, to be read and to be checked.

Times are virtual milliseconds. Every story is told in both orderings; `tests/testdata/view_change` holds what happens.
"""

from collections.abc import Callable
from dataclasses import replace

from replica.core.entries import COMMIT, NEW_VIEW, PRE_PREPARE, PREPARE
from replica.core.group import VerifiedGroup
from replica.sim.lies import view_and_slot
from replica.sim.scenario import LIMITS
from replica.sim.stage import Hide, Rewrite, Stage, Story
from replica.sim.strategies import Censor, FriendsOnly

A, B = 0, 1  # the clients


def primary_stops(stage: Stage, at_ms: int = 303) -> None:
    """Let the primary stop while both clients ask, and go on asking."""
    stage.ask(A, 10, 200, 300, 400, 500, 800)
    stage.ask(B, 10, 202, 302, 402, 800)
    stage.at(at_ms, "replica 0, the primary, stops for ever", lambda: stage.stop(0))


def one_client_ignored(stage: Stage) -> None:
    """Let the primary serve B, who asks as long as A waits, and never A."""
    stage.cabal.censored = stage.clients[A].key.public
    stage.trick(0, Censor())
    stage.chronicle.direct("replica 0, the primary, drops whatever client A asks for")
    stage.ask(A, 200)
    stage.keep_asking(B, 10, 150, lambda: stage.waits(A, 1))


def junk(stage: Stage) -> None:
    """Let the primary order only what its friend B asks for, a little at a time, as long as A waits."""
    stage.cabal.friends = {stage.clients[B].key.public}
    stage.ask(A, 10, 310)
    stage.keep_asking(B, 10, 150, lambda: stage.waits(A, 2))
    stage.at(
        200, "replica 0, the primary, orders only client B's junk from now on", lambda: stage.trick(0, FriendsOnly())
    )


def two_in_a_row(stage: Stage) -> None:
    """Let the first primary stop, and the second open its view and propose nothing."""
    stage.trick(1, Rewrite(lambda payload: None if payload[0] == PRE_PREPARE else payload))
    stage.ask(A, 10, 300, 420)
    stage.at(200, "replica 0, the primary, stops for ever; replica 1 will propose nothing", lambda: stage.stop(0))


def new_view_withheld(stage: Stage) -> None:
    """Let the second primary open its view, and show that to nobody before the others have left for the next."""
    correct = (2, 3, 4)

    def all_have_left() -> bool:
        return all(stage.hosts[i].core.view >= 2 for i in correct)

    hidden = _from_the_first(stage, 1, lambda payload: payload[0] == NEW_VIEW)
    stage.trick(1, Hide(lambda _, group: hidden(group) and not all_have_left()))
    stage.ask(A, 10, 300)
    stage.at(200, "replica 0, the primary, stops for ever; replica 1 will hide its NEW-VIEW", lambda: stage.stop(0))
    stage.when(all_have_left, "replica 1 now shows its NEW-VIEW", lambda: None)


def new_view_lost(stage: Stage) -> None:
    """Let the network lose what the second primary, a correct one, says after VIEW-CHANGE."""
    first, second = stage.hosts[1].core, stage.hosts[2].core
    stage.ask(A, 10, 300)
    stage.at(200, "replica 0, the primary, stops for ever", lambda: stage.stop(0))
    stage.when(
        lambda: second.view == 1, "from now on nothing of replica 1 reaches replica 2", lambda: stage.cut((1, 2))
    )
    stage.when(lambda: first.view == 2, "replica 1 reaches replica 2 again", lambda: stage.mend((1, 2)))


def decided_by_some(stage: Stage) -> None:
    """Let replicas 3 and 4 decide a slot with the primary, which then stops; of them only 3 is heard."""

    def is_hidden(to: int, group: VerifiedGroup) -> bool:
        return group.author == 0 and to in {1, 2} and stage.world.now >= 200

    stage.trick(0, Hide(is_hidden))
    stage.ask(A, 10, 210)
    stage.ask(B, 10, 350)
    apart, asunder = ((3, 1), (3, 2)), ((4, 1), (4, 2))
    stage.at(
        200,
        "replica 0, the primary, shows its log to 3 and 4 only; nothing of 3 and 4 reaches 1 and 2",
        lambda: stage.cut(*apart, *asunder),
    )
    stage.at(300, "replica 0 stops for ever", lambda: stage.stop(0))
    stage.when(
        lambda: stage.all_suspect(1, 2, 3),
        "replica 3 reaches 1 and 2 again; replica 4 does not",
        lambda: stage.mend(*apart),
    )
    stage.when(lambda: not stage.waits(B, 2), "replica 4 reaches 1 and 2 again", lambda: stage.mend(*asunder))


def highest_view(stage: Stage) -> None:
    """Let replica 4 alone hold a vote of view 0, while view 1, without it, decides something else for that slot."""

    def is_hidden(to: int, group: VerifiedGroup) -> bool:
        return group.author == 0 and to != 4 and stage.world.now >= 200

    def no_vote(payload: bytes) -> bytes | None:
        # Replica 1 knows what its friend proposes; it keeps that to itself, and out of its log.
        return None if payload[0] in {PREPARE, COMMIT} and (0, 3) <= view_and_slot(payload) < (1, 0) else payload

    stage.trick(0, Hide(is_hidden))
    stage.trick(1, Rewrite(no_vote), Hide(lambda to, group: group.author == 0 and to != 4))
    stage.ask(A, 10, 210, 320, 750)
    out, back = [(4, i) for i in (1, 2, 3)], [(i, 4) for i in (1, 2, 3)]
    stage.at(
        200,
        "replica 0, the primary, shows its log to replica 4 only; nothing of replica 4 reaches 1, 2 and 3",
        lambda: stage.cut(*out),
    )
    stage.at(
        300,
        "nothing of 1, 2 and 3 reaches replica 4 either",
        lambda: stage.cut(*back),
    )
    stage.at(300, "replica 0 stops for ever", lambda: stage.stop(0))
    stage.at(700, "replica 1 stops for ever", lambda: stage.stop(1))
    stage.when(
        lambda: all(stage.hosts[i].core.view == 1 and stage.hosts[i].core.suspects for i in (2, 3)),
        "replica 4 is connected again",
        lambda: stage.mend(*out, *back),
    )


def gap(stage: Stage) -> None:
    """Let all that is left of slot 4 be a lying vote, with a true vote for the slot after it."""

    def lie(payload: bytes) -> bytes | None:
        if payload[0] not in {PREPARE, COMMIT} or view_and_slot(payload) < (0, 4) or view_and_slot(payload) > (0, 5):
            return payload
        if payload[0] == COMMIT:
            return None
        return payload[:17] + bytes(32) if view_and_slot(payload) == (0, 4) else payload

    def is_hidden(to: int, group: VerifiedGroup) -> bool:
        # What is said of slots 3 to 5 must not reach replica 1 while it could still vote for them.
        return group.author == 2 and to == 1 and stage.world.now >= 200 and not stage.all_suspect(1)

    stage.trick(2, Rewrite(lie), Hide(is_hidden))
    stage.ask(A, 10, 210, 211, 212)
    client = stage.clients[A].number
    # Its requests reach the primary together, so that it proposes s4 and s5 in one group.
    stage.world.at(200, lambda: stage.setting.network.stalled.update({(client, 0): 215}))
    stage.at(
        200,
        "nothing of replica 0, the primary, reaches replica 1; replica 2 hides its log from replica 1",
        lambda: stage.cut((0, 1)),
    )
    others = ((0, 2), (1, 0), (2, 0), (0, client))
    stage.at(250, "replica 0 is cut off", lambda: stage.cut(*others))
    stage.at(1000, "replica 0 is connected again", lambda: stage.mend((0, 1), *others))


def different_prefixes(stage: Stage) -> None:
    """Let the primary show each backup another prefix of its log, and its friend, who says nothing, all of it."""
    last = {1: 3, 2: 4, 3: 5}  # backup -> the last slot whose proposal it is shown

    def is_hidden(to: int, group: VerifiedGroup) -> bool:
        def is_beyond(payload: bytes) -> bool:
            return payload[0] == PRE_PREPARE and to in last and view_and_slot(payload)[1] > last[to]

        return _from_the_first(stage, 0, is_beyond)(group)

    stage.trick(0, Hide(is_hidden))
    stage.trick(4, Hide(lambda *_: stage.world.now >= 200))
    stage.ask(A, 10, 210, 220, 230, 240)
    backups = [(a, b) for a in last for b in last if a != b]
    stage.at(
        200,
        "replica 0, the primary, shows s3 to 1, to s4 to 2, to s5 to 3; its friend 4 sees all and is silent; "
        "1, 2 and 3 do not reach each other",
        lambda: stage.cut(*backups),
    )
    stage.when(
        lambda: stage.all_suspect(*last), "replicas 1, 2 and 3 reach each other again", lambda: stage.mend(*backups)
    )


def _from_the_first(stage: Stage, replica: int, is_it: Callable[[bytes], bool]) -> Callable[[VerifiedGroup], bool]:
    """Say of a group of this replica's log whether it lies at or beyond the first one that holds such an entry."""

    def is_beyond(group: VerifiedGroup) -> bool:
        if group.author != replica:
            return False
        held = stage.hosts[replica].library.held[replica]
        first = next((own.first for own in held if any(map(is_it, own.payloads))), None)
        return first is not None and group.first >= first

    return is_beyond


_ONE_EACH = replace(LIMITS, checkpoint_interval=32, window=64, batch_envelopes_max=1)

STORIES = (
    Story(
        "primary_stops",
        """The primary stops under load. Some of what the clients ask for it has proposed, some it has not even seen.
The clients send to everybody what is not answered; the backups lose patience and change to view 1, whose primary,
replica 1, proposes again what was voted for, and then what waits. No client sees more than a pause.""",
        primary_stops,
        (0,),
    ),
    Story(
        "one_client_ignored",
        """The primary orders everybody's requests but those of client A. A's patience ends, it asks the backups,
they hand its request to the primary and begin to wait; that B is served does not console them. View 1 serves A.""",
        one_client_ignored,
        (0,),
    ),
    Story(
        "junk",
        """The primary orders its friend B's junk, and nothing else, so that something is always executed. Patience
belongs to the oldest request that waits, which is A's: junk does not restore it. View 1 serves A.""",
        junk,
        (0,),
    ),
    Story(
        "two_in_a_row",
        """Two faulty primaries in a row, of five replicas. Replica 0 stops. Replica 1 opens view 1 as it should, so
that everybody is busy with what it carries, and then proposes nothing. Replica 2, in view 2, serves the client.""",
        two_in_a_row,
        (0, 1),
        f=2,
        clients=1,
    ),
    Story(
        "new_view_withheld",
        """A view change while the one before is unfinished. Replica 0 stops; replica 1 says NEW-VIEW and proposes, but
shows that to nobody. The others' patience ends in a view that was never open to them, and they leave it for view 2.
Then replica 1 shows what it said: everybody reads it, and it changes nothing.""",
        new_view_withheld,
        (0, 1),
        f=2,
        clients=1,
    ),
    Story(
        "new_view_lost",
        """The same without a lie: replica 0 stops, and NEW-VIEW of the correct replica 1 is lost on its way to 2.
Both lose patience with view 1. What replica 1 proposed there is carried into view 2.""",
        new_view_lost,
        (0,),
        clients=1,
    ),
    Story(
        "decided_by_some",
        """A slot that was decided is carried, though hardly anybody knows. Replica 0 shows its proposal for s5 to
replicas 3 and 4 only; the three are a quorum, they execute it, and the client has its answer. Replica 0 stops, and
replica 4 is not heard. The VIEW-CHANGEs that open view 1 are those of 1, 2 and 3: the one vote of replica 3 brings s5
into view 1, and 1 and 2 fetch what replica 0 proposed from replica 3.""",
        decided_by_some,
        (0,),
        f=2,
    ),
    Story(
        "highest_view",
        """Two views, two values. In view 0 replica 4 alone sees A2 proposed for s3, and votes for it. It is cut off;
view 1, of 1, 2 and 3, knows nothing of that and decides A2 and A3 for s3. Then its primary stops too. For view 2 there
are votes for either, by correct replicas: the one of the highest view is carried.""",
        highest_view,
        (0, 1),
        f=2,
        clients=1,
    ),
    Story(
        "gap",
        """A slot is left empty. Replica 2 is faulty; replica 0, the primary, is correct, but loses touch after it has
proposed s3 to s5 to replica 2 alone. Replica 2 votes for s3 and s5, and for s4 for something that nobody proposed. Such
a vote is not counted: view 1 carries s3 and s5, puts the null batch into s4, and orders anew what was there.""",
        gap,
        (2,),
        clients=1,
        limits=_ONE_EACH,
    ),
    Story(
        "different_prefixes",
        """A primary whose log cannot say two things does the next best: it shows each backup another prefix of it.
Replica 1 sees its proposals up to s3, replica 2 up to s4, replica 3 up to s5; s6 is seen by its friend, replica 4,
which says nothing. Nobody can go on. When 1, 2 and 3 hear each other they fetch from each other what they miss. With
that s3 and s4 are decided still; s5, which replica 3 alone voted for, is carried; what s6 held is ordered anew.""",
        different_prefixes,
        (0, 4),
        f=2,
        clients=1,
    ),
)
