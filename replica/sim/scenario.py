"""What happens in one run, drawn from its seed: the cluster, its network, its faults and its clients."""

import random
from dataclasses import dataclass, replace
from typing import Any

from replica.core import quorum
from replica.core.genesis import Limits, Ordering
from replica.sim.clients import Habits
from replica.sim.cutlies import CUT_KINDS, UNCLOSED, FalseCuts
from replica.sim.disk import Damage
from replica.sim.forgers import ForgedList
from replica.sim.hiding import HiddenView
from replica.sim.lies import REFERENCE_KINDS
from replica.sim.mutations import MUTATIONS
from replica.sim.operator import Change
from replica.sim.poison import FalseHeads, FalseHeld, FalseOffers, FalseParts, ForgedState
from replica.sim.registrar import Order
from replica.sim.releaser import Release
from replica.sim.repertoire import DRAWN, draw_late, draw_strategies
from replica.sim.rulebreakers import AT_CHANGES, BY_PROPOSERS, LIES
from replica.sim.world import Weather

REAL_SIGNATURES_EVERY = 100
LIVENESS_MS = 300_000
# Seeds from here on are about changes of the members, who may be a client, and the application's version.
MEMBERS_FROM = 1_000_000
ORDERS_FROM = 2_000_000
VERSIONS_FROM = 3_000_000
FORGED_SHARE = 0.3
OFF_SHARE = 0.5
# Of so many seeds one is about one strategy, one about coming back, one about one malformed field, and one, every other
# turn, about a rule.
FOCUS_EVERY = 4

LIMITS = Limits(
    checkpoint_interval=4,
    window=8,
    operation_bytes_max=1024,
    envelope_operations_max=8,
    envelope_bytes_max=16 * 1024,
    batch_envelopes_max=4,
    batch_bytes_max=64 * 1024,
    group_entries_max=16,
    group_bytes_max=256 * 1024,
    result_bytes_max=4096,
    sessions_per_client_max=4,
    session_window=64,
)
# Twice as many checkpoints.
NARROW = replace(LIMITS, checkpoint_interval=2, window=4)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. Times in milliseconds.

    faulty: the faulty replicas' numbers, at most f. strategies: the names of what each of them does.
    storm_ms: how long the safety phase takes. liveness_ms: how long a healed network may take.
    goes_on_ms: for how long clients go on to ask in a healed network, at least.
    partitions, stalls, crashes, disconnects: how many there are during the storm.
    damages: for each time that a correct replica is away for long, what happens to its disk meanwhile.
    power_cuts: how many times all correct replicas crash at once.
    rolled_back: a replica whose disk and trusted state are replaced by an older copy: then one of the f faulty ones.
    milestone_intervals, retained: see `Setting`. changes: of the members, see `replica.sim.operator`. orders: about
    clients, see `replica.sim.registrar`. releases: of the application, see `replica.sim.releaser`.
    """

    seed: int
    f: int
    ordering: Ordering
    limits: Limits
    faulty: tuple[int, ...]
    strategies: tuple[tuple[str, ...], ...]
    real_signatures: bool
    weather: Weather
    healed: Weather
    patience_ms: int
    append_ms_max: int
    storm_ms: int
    liveness_ms: int
    partitions: int
    stalls: int
    crashes: int
    disconnects: int
    damages: tuple[Damage, ...]
    power_cuts: int
    rolled_back: int | None
    milestone_intervals: int
    retained: int
    clients: int
    faulty_clients: int
    habits: Habits
    goes_on_ms: int = 0
    changes: tuple[Change, ...] = ()
    orders: tuple[Order, ...] = ()
    releases: tuple[Release, ...] = ()

    @property
    def n(self) -> int:
        """The number of replicas."""
        return quorum.replica_count(self.f)


def draw(seed: int) -> Scenario:
    """Draw a scenario; from MEMBERS_FROM on its members change, then who may be a client, then the version."""
    drawn = _draw(seed)
    if seed >= VERSIONS_FROM:
        return replace(drawn, releases=_releases(seed))
    if seed >= ORDERS_FROM:
        return replace(drawn, **_orders(drawn))
    return replace(drawn, **_changes(drawn)) if seed >= MEMBERS_FROM else drawn


def _orders(drawn: Scenario) -> dict[str, Any]:
    """Have faulty clients revoked and allowed, and correct ones listed."""
    chance = random.Random(f"orders {drawn.seed}")  # noqa: S311 - reproducible on purpose
    orders: list[Order] = []
    at = 0
    for _ in range(chance.choice((1, 2, 4, 6))):
        at += chance.randint(50, 2000)
        orders.append(Order(chance.choice(("revoke", "revoke", "allow", "listed", "open")), at, chance.randrange(3)))
    return {"orders": tuple(orders), "faulty_clients": max(1, drawn.faulty_clients)}


def _releases(seed: int) -> tuple[Release, ...]:
    """Put some versions in force, some left out."""
    chance = random.Random(f"releases {seed}")  # noqa: S311 - reproducible on purpose
    releases: list[Release] = []
    version = at = 0
    for _ in range(chance.choice((1, 2, 4, 6))):
        version += chance.choice((1, 1, 2, 7))
        at += chance.randint(50, 2000)
        releases.append(Release(version, at))
    return tuple(releases)


def _changes(drawn: Scenario) -> dict[str, Any]:
    """Let members change in a run: what is lost counts as one of the f, and each list has its own f."""
    chance = random.Random(f"members {drawn.seed}")  # noqa: S311 - reproducible on purpose
    changes: list[Change] = []
    f, at = drawn.f, 0
    faulty = set(drawn.faulty)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at += chance.randint(100, 3000)
        lost = [i for i in range(2 * f + 1) if i not in faulty]
        kinds = ["replace", "replace"]
        kinds += ["add"] if f < 3 else []
        kinds += ["remove"] if f > 1 and sum(i < 2 * f - 1 for i in faulty) < f else []
        kind = chance.choice(kinds)
        if kind == "replace" and len(faulty) < f and chance.random() < 0.7:
            changes.append(Change(kind, at, chance.choice(lost), lost=True))
        elif kind == "replace":
            number = chance.choice(sorted(faulty)) if faulty and chance.random() < 0.8 else chance.choice(lost)
            changes.append(Change(kind, at, number))
            faulty.discard(number)
        else:
            f += 1 if kind == "add" else -1
            faulty = {i for i in faulty if i <= 2 * f}
            changes.append(Change(kind, at))
    hasty = random.Random(f"off {drawn.seed}")  # noqa: S311 - of its own: the rest is drawn as before there was this
    changes = [replace(change, off=hasty.random() < OFF_SHARE) for change in changes]
    forged = [chance.random() < FORGED_SHARE for _ in drawn.strategies]
    strategies = tuple(
        (*chosen, ForgedList.name) if forges else chosen
        for chosen, forges in zip(drawn.strategies, forged, strict=True)
    )
    return {"changes": tuple(changes), "rolled_back": None, "strategies": strategies}


def _draw(seed: int) -> Scenario:
    chance = random.Random(f"scenario {seed}")  # noqa: S311 - reproducible on purpose
    f = chance.choice((1, 1, 1, 2, 2, 3))
    n = 2 * f + 1
    count = chance.choice((0, f, f, f, chance.randint(0, f)))
    # Consecutive faulty primaries are the common case: the first ones, or some in a row.
    start = chance.choice((0, 0, 1, chance.randrange(n)))
    in_a_row = tuple(sorted((start + i) % n for i in range(count)))
    faulty = in_a_row if chance.random() < 0.7 else tuple(sorted(chance.sample(range(n), count)))
    strategies = tuple(draw_strategies(chance) for _ in faulty)
    if strategies and chance.random() < 0.3:
        strategies = strategies[:1] * len(faulty)
    limits = LIMITS
    if chance.random() < 0.15:
        limits = NARROW
    elif chance.random() < 0.1:
        limits = Limits(**{**_fields(LIMITS), "checkpoint_interval": 16, "window": 32})
    bad = chance.random() < 0.7
    weather = Weather(
        delay_min=1,
        delay_max=chance.choice((2, 10, 30, 80)),
        loss=chance.choice((0.0, 0.01, 0.1, 0.3)) if bad else 0.0,
        duplicate=chance.choice((0.0, 0.02, 0.2)) if bad else 0.0,
        straggle=chance.choice((0.0, 0.01, 0.1)) if bad else 0.0,
        straggle_max=chance.choice((200, 1000)),
    )
    drawn = Scenario(
        seed=seed,
        f=f,
        ordering=chance.choice((Ordering.TWO_PHASE, Ordering.THREE_PHASE)),
        limits=limits,
        faulty=faulty,
        strategies=strategies,
        real_signatures=seed % REAL_SIGNATURES_EVERY == 0,
        weather=weather,
        # A healed network is timely, not fast: patience must grow until it fits.
        healed=Weather(delay_min=1, delay_max=chance.choice((4, 8, 8, 40, 200))),
        patience_ms=chance.choice((150, 300, 600)),
        append_ms_max=chance.choice((0, 2, 10)),
        liveness_ms=LIVENESS_MS,
        storm_ms=chance.choice((4000, 8000, 12000)),
        partitions=chance.choice((0, 0, 1, 3, 8)),
        stalls=chance.choice((0, 0, 1, 4)),
        crashes=chance.choice((0, 0, 0, 1, 4)),
        disconnects=chance.choice((0, 1, 4)),
        damages=tuple(chance.choice((Damage.NONE, *Damage)) for _ in range(chance.choice((0, 0, 1, 3)))),
        power_cuts=chance.choice((0, 0, 0, 0, 1)),
        rolled_back=None,
        milestone_intervals=chance.choice((1, 1, 2)),
        retained=chance.choice((0, 0, 40)),
        clients=chance.choice((1, 2, 3)),
        faulty_clients=chance.choice((0, 0, 1, 2)),
        habits=Habits(
            concurrency=chance.choice((1, 2, 4)),
            think_ms=chance.choice((50, 150, 400)),
            patience_ms=chance.choice((100, 300)),
        ),
    )
    drawn = replace(drawn, strategies=draw_late(random.Random(f"late {seed}"), drawn.strategies))  # noqa: S311
    drawn = replace(drawn, **_focus(seed))
    if len(drawn.faulty) < drawn.f and not drawn.real_signatures and chance.random() < 0.4:
        correct = [i for i in range(drawn.n) if i not in drawn.faulty]
        drawn = replace(drawn, rolled_back=chance.choice(correct))
    return drawn


_CHOICES = tuple(f"chosen-references:{kind}" for kind in REFERENCE_KINDS)
_FOCUS_STRATEGIES = (*_CHOICES, *(name for name in DRAWN if name != "chosen-references"), *_CHOICES)
# One rule after the other is broken; then votes that do not count leave gaps, which new views must fill.
_GAPS = "lying-vote:30"
_TURNS = (*(f"rule-breaker:{rule}" for rule in LIES), *[_GAPS] * 7)
# Entries that are kept in every log before a milestone's cut, so that nobody needs a transfer.
PLENTY = 10_000
# Views change all the time.
STORMY = Weather(delay_min=1, delay_max=30, loss=0.3, straggle=0.1)


def _focus(seed: int) -> dict[str, Any]:
    """Give one strategy, malformed field or broken rule after the other a replica of its own: none is left to chance.

    What is said when views change is said by replica 1, the next primary, and views are made to change. Gaps are left
    by replica 2, so that the primaries of the first two views are correct.
    """
    turn, kind = divmod(seed, FOCUS_EVERY)
    if kind == 1:
        name = _FOCUS_STRATEGIES[turn % len(_FOCUS_STRATEGIES)]
        changes_views = name in _CHOICES or name in {"skipped-change", "vote-after-change"}
        number = turn % 2
    elif kind == 2:
        return _recovery_focus(turn)
    elif kind == 3:
        mutation = tuple(MUTATIONS)[turn % len(MUTATIONS)]
        name = f"malformed:{mutation}"
        changes_views = mutation.startswith(("suspect", "view-change", "new-view"))
        number = 0 if mutation.startswith("pre-prepare") else 1
    elif turn % 2:
        name = _TURNS[turn // 2 % len(_TURNS)]
        rule = name.partition(":")[2]
        changes_views = rule in AT_CHANGES or name == _GAPS
        number = 0 if rule in BY_PROPOSERS else 1
    else:
        return {}
    focus: dict[str, Any] = {"faulty": (number,), "strategies": ((name,),)}
    if changes_views:
        # SUSPECT must come from the puppet, or it is not malformed.
        company = () if "suspect" in name else ("impatient:30",)
        # What replica 2 may choose from holds the own one last, so that choosing it makes a difference.
        who = 2 if name == _GAPS or name.endswith(":own") else 1
        focus |= {"f": 1, "faulty": (who,), "strategies": ((*company, name),), "weather": STORMY}
        # Of fields of NEW-VIEW there are most, so that each has fewer turns.
        focus |= {"patience_ms": 120 if kind == 3 else 150, "partitions": 6, "storm_ms": 12000}
    if name.startswith("rule-breaker"):
        focus["crashes"] = 0
    if "commit" in name:
        focus["ordering"] = Ordering.THREE_PHASE
    return focus


_FALSE_STATE = (
    *(f"{kind.name}:{argument}" for kind in (FalseParts, FalseOffers, FalseHeld) for argument in kind.kinds),
    ForgedState.name,
)
_FALSE_CUTS = tuple(f"{FalseCuts.name}:{kind}" for kind in CUT_KINDS)
_FALSE_HEADS = tuple(f"{FalseHeads.name}:{kind}" for kind in FalseHeads.kinds)
# These need what is in flight at a cut, and so a view that was hidden.
OPEN_CUT = "open-cut"
_DAMAGES = tuple(damage for damage in Damage if damage not in {Damage.NONE, Damage.BATCHES})
_ITEMS: tuple[str | Damage, ...] = (
    *_FALSE_STATE,
    *_FALSE_CUTS,
    *_DAMAGES,
    *(OPEN_CUT, Damage.BATCHES),
    *(OPEN_CUT, Damage.BATCHES),
    *_FALSE_HEADS,
    *(HiddenView.name, HiddenView.name),
)
# Whoever was away finds the logs gone, and needs the state.
FORGETFUL = {"retained": 0, "milestone_intervals": 1, "storm_ms": 8000}
_BUSY = {"clients": 2, "habits": Habits(concurrency=2, think_ms=50)}


def _recovery_focus(turn: int) -> dict[str, Any]:
    """Give one lie to those who were away, one kind of false cut or one damage after the other a run."""
    item = _ITEMS[turn % len(_ITEMS)]
    if item in {OPEN_CUT, HiddenView.name, Damage.BATCHES}:
        return _in_flight(item, turn)
    if isinstance(item, Damage):
        sound = {"f": 1, "faulty": (), "strategies": (), "crashes": 0, "partitions": 0}
        return {**FORGETFUL, **_BUSY, **sound, "damages": (item,) * 4}
    focus = {**FORGETFUL, **_BUSY, "f": 1, "faulty": (turn % 2,), "strategies": ((item,),)}
    if item in _FALSE_CUTS:
        return {**focus, "faulty": (0,)}
    away = (Damage.NONE, Damage.DISK, Damage.MILESTONE, Damage.NONE)
    return {**focus, "damages": away, "crashes": 0, "partitions": 0}


def _in_flight(item: str | Damage, turn: int) -> dict[str, Any]:
    """Let faulty replicas fill the window while few others see it, or none, so that cuts have something in flight."""
    f = 1 + turn % 2 if item == HiddenView.name else 2
    hidden = item if item == HiddenView.name else f"{HiddenView.name}:alone"
    # Replica 1, the next primary, leaves the proposals of replica 0 out of its cuts, and the votes for them in.
    last = (hidden, f"{FalseCuts.name}:{UNCLOSED}") if item == OPEN_CUT else (hidden,)
    strategies = ((hidden,), last)[-f:]
    scene = {"f": f, "faulty": tuple(range(f)), "strategies": strategies, "patience_ms": 300, "storm_ms": 6000}
    busy = {"clients": 2, "habits": Habits(concurrency=4, think_ms=50)}
    limits = Limits(**{**_fields(LIMITS), "batch_envelopes_max": 1})
    damages = (item,) * 4 if isinstance(item, Damage) else ()
    calm = {"damages": damages, "crashes": 0, "partitions": 0, "rolled_back": None}
    # The more is proposed before patience ends, the more is in flight.
    quick = {"weather": Weather(delay_min=1, delay_max=8), "storm_ms": 3000} if item == OPEN_CUT else {}
    return {**FORGETFUL, **scene, **busy, **calm, **quick, "limits": limits}


def _fields(limits: Limits) -> dict[str, int]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}
