"""All strategies by name, and how a faulty replica's are drawn."""

import random

from replica.sim import clones, cutlies, forgers, hiding, lies, poison, rulebreakers, slow, strategies
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
        lies.Impatient,
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
        lies.NullVoter,
        rulebreakers.RuleBreaker,
        cutlies.FalseCuts,
        poison.FalseParts,
        poison.FalseOffers,
        poison.FalseHeld,
        poison.ForgedState,
        poison.FalseHeads,
        hiding.HiddenView,
        slow.SlowPrimary,
        slow.DrippingPrimary,
        clones.ClonedLog,
        clones.ClonedPrimary,
        forgers.ForgedList,
    )
}
# These end a replica's influence at once, so they are drawn less often.
_ENDING = ("silent", "crash")
# These break the assumption, and are never drawn.
_IMPOSSIBLE = ("cloned-log", "cloned-primary")
# Only for scripted runs, and for those that are about one rule.
_SCRIPTED = ("null-vote", "rule-breaker", forgers.ForgedList.name)
# These are drawn after everything else, so that what is drawn before stays as it was.
LATE = ("false-heads", "hidden-view", "slow-primary", "dripping-primary")
DRAWN = tuple(name for name in STRATEGIES if name not in {*_IMPOSSIBLE, *_SCRIPTED, *LATE})
_OTHERS = tuple(name for name in DRAWN if name not in _ENDING)


def make_strategy(name: str) -> Strategy:
    """Make a strategy by its name, or by "name:argument"."""
    name, _, argument = name.partition(":")
    return STRATEGIES[name](argument)


def draw_strategies(chance: random.Random) -> tuple[str, ...]:
    """Draw what one faulty replica does."""
    drawn = chance.sample(_OTHERS, chance.choice((0, 1, 2, 3, 4, 6)))
    if chance.random() < 0.15:
        drawn.append(chance.choice(_ENDING))
    if chance.random() < 0.25 and "withhold" not in drawn:
        drawn.append("withhold")
    return tuple(drawn)


def draw_late(chance: random.Random, strategies: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """Return the strategies of all faulty replicas, in some runs with what is drawn late added."""
    if chance.random() < 0.1:
        strategies = tuple((*chosen, "hidden-view") for chosen in strategies)
    strategies = tuple((*chosen, "false-heads") if chance.random() < 0.1 else chosen for chosen in strategies)
    drawn = [chance.random() for _ in strategies]
    slow = ["slow-primary" if one < 0.2 else "dripping-primary" if one < 0.4 else "" for one in drawn]
    return tuple((*chosen, one) if one else chosen for chosen, one in zip(strategies, slow, strict=True))
