"""All strategies by name, and how a faulty replica's are drawn."""

import random

from replica.sim import lies, strategies
from replica.sim.strategies import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        strategies.Silent,
        strategies.Crash,
        strategies.Withhold,
        strategies.ShowPrefix,
        strategies.JustUnderPatience,
        strategies.Censor,
        strategies.FriendsOnly,
        strategies.EqualLies,
        strategies.FalseReports,
        strategies.Replayer,
        strategies.Nuisance,
        lies.Abstain,
        lies.LyingVoter,
        lies.EarlyCommit,
        lies.PrematureChange,
        lies.SkipChange,
        lies.VoteAfterChange,
        lies.SecondProposal,
        lies.SkipSlot,
        lies.ChosenReferences,
        lies.CheckpointLies,
        lies.Malformed,
        lies.Drip,
        lies.OldRequests,
        lies.Rush,
    )
}
# These end a replica's influence at once, so they are drawn less often.
_ENDING = ("silent", "crash")
_OTHERS = tuple(name for name in STRATEGIES if name not in _ENDING)


def draw_strategies(chance: random.Random) -> tuple[str, ...]:
    """Draw what one faulty replica does."""
    drawn = chance.sample(_OTHERS, chance.choice((0, 1, 2, 3, 4, 6)))
    if chance.random() < 0.15:
        drawn.append(chance.choice(_ENDING))
    if chance.random() < 0.25 and "withhold" not in drawn:
        drawn.append("withhold")
    return tuple(drawn)
