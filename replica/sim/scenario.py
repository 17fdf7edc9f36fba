"""What happens in one run, drawn from its seed: the cluster, its network, its faults and its clients."""

import random
from dataclasses import dataclass, replace
from typing import Any

from replica.core.genesis import Limits, Ordering
from replica.sim.clients import Habits
from replica.sim.lies import REFERENCE_KINDS
from replica.sim.mutations import MUTATIONS
from replica.sim.repertoire import DRAWN, draw_strategies
from replica.sim.world import Weather

REAL_SIGNATURES_EVERY = 100
LIVENESS_MS = 300_000
# Two of so many seeds are about one strategy, and about one malformed field.
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


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. Times in milliseconds.

    faulty: the faulty replicas' numbers, at most f. strategies: the names of what each of them does.
    storm_ms: how long the safety phase takes. liveness_ms: how long a healed network may take.
    partitions, stalls, crashes, disconnects: how many there are during the storm.
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
    clients: int
    faulty_clients: int
    habits: Habits

    @property
    def n(self) -> int:
        """The number of replicas."""
        return 2 * self.f + 1


def draw(seed: int) -> Scenario:
    """Draw a scenario."""
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
        limits = Limits(**{**_fields(LIMITS), "checkpoint_interval": 2, "window": 4})
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
        clients=chance.choice((1, 2, 3)),
        faulty_clients=chance.choice((0, 0, 1, 2)),
        habits=Habits(
            concurrency=chance.choice((1, 2, 4)),
            think_ms=chance.choice((50, 150, 400)),
            patience_ms=chance.choice((100, 300)),
        ),
    )
    return replace(drawn, **_focus(seed))


_CHOICES = tuple(f"chosen-references:{kind}" for kind in REFERENCE_KINDS)
_FOCUS_STRATEGIES = (*(name for name in DRAWN if name != "chosen-references"), *_CHOICES)
# Views change all the time.
STORMY = Weather(delay_min=1, delay_max=30, loss=0.3, straggle=0.1)


def _focus(seed: int) -> dict[str, Any]:
    """Give one strategy, or one malformed field, after the other a replica of its own: none is left to chance.

    What is said when views change is said by replica 1, the next primary, and views are made to change.
    """
    turn, kind = divmod(seed, FOCUS_EVERY)
    if kind == 1:
        name = _FOCUS_STRATEGIES[turn % len(_FOCUS_STRATEGIES)]
        changes_views = name in _CHOICES or name in {"skipped-change", "vote-after-change"}
        number = turn % 2
    elif kind == 3:
        mutation = tuple(MUTATIONS)[turn % len(MUTATIONS)]
        name = f"malformed:{mutation}"
        changes_views = mutation.startswith(("suspect", "view-change", "new-view"))
        number = 0 if mutation.startswith("pre-prepare") else 1
    else:
        return {}
    focus: dict[str, Any] = {"faulty": (number,), "strategies": ((name,),)}
    if changes_views:
        # SUSPECT must come from the puppet, or it is not malformed.
        company = () if "suspect" in name else ("impatient:30",)
        focus |= {"f": 1, "faulty": (1,), "strategies": ((*company, name),), "weather": STORMY}
        focus |= {"patience_ms": 150, "partitions": 6, "storm_ms": 12000}
    if "commit" in name:
        focus["ordering"] = Ordering.THREE_PHASE
    return focus


def _fields(limits: Limits) -> dict[str, int]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}
