"""How large what a correct replica keeps may become: as tight as the rules allow in one scenario."""

from collections.abc import Mapping

from replica.core.inbox import EARLY_GROUPS_MAX, WAITING_ENTRIES_MAX
from replica.core.rooms import REQUESTS_PER_CLIENT_MAX
from replica.sim.scenario import Scenario
from replica.sim.witness import Bound

# Patiences for which a slow primary (`replica.sim.slow`) may stay in one view of a healed network. Where nothing is
# there to compare it with, the expectation falls from one patience to a quarter, by a sixteenth of itself in each met
# period: that takes 12, and as long again where periods end with the next request only; then five are missed.
SLOW_PATIENCES_MAX = 30


def bounds(scenario: Scenario) -> Mapping[str, Bound]:
    """Return the largest sizes that a correct replica's collections may have.

    Nobody says anything more than two windows above its stable checkpoint, and its reader is less than a window behind
    that. What waits behind a gap in a log is taken at once when the gap closes, on top of what waits for its causes.
    What lies beyond the cut is generous: primaries in a row may leave the cut for some checkpoints and sixty patiences
    each (`replica.core.patience.CUT_PATIENCES`), and between two of them views may change again and again, which takes
    its time. In seed 312978 it came to 1,814 entries with n = 3 after 50 s; then such a primary was left, and it fell
    to a hundred.
    """
    limits = scenario.limits
    reach = 3 * limits.window
    checkpoints = reach // limits.checkpoint_interval
    return {
        "slots": reach,
        "votes": reach,
        "commits": reach,
        # The stable one is kept.
        "checkpoints": checkpoints + 1,
        "own-digests": checkpoints + 1,
        "unread": WAITING_ENTRIES_MAX + (EARLY_GROUPS_MAX + 1) * limits.group_entries_max,
        "requests": REQUESTS_PER_CLIENT_MAX * (scenario.clients + scenario.faulty_clients),
        "beyond-cut": lambda now_ms: (
            3 * scenario.n * (100 + 24 * limits.checkpoint_interval) + scenario.n * now_ms // 1000
        ),
        "views": lambda now_ms: views_bound(scenario, now_ms),
    }


def views_bound(scenario: Scenario, now_ms: int) -> int:
    """Return how many views can have been entered by `now_ms`.

    A view is left when q replicas want that, so a correct one does. It says SUSPECT at once if the view's primary was
    exposed, which at most f of n primaries in a row are, or else when its patience ended, which is never shorter than
    the first one and begins when q replicas wanted the view. It never finds a primary slow or unfair sooner.
    """
    patient = now_ms // scenario.patience_ms + 1
    return -(-patient * scenario.n // (scenario.n - scenario.f)) + scenario.n
