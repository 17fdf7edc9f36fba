"""When a replica loses patience with a view (design section 4.2).

Patience belongs to the oldest request that this replica knows, that is not executed, and that the primary must accept:
the one that has had a claim for longest (`replica.core.claims`). Only that request's execution ends it. Otherwise a
primary that orders its friends' junk could censor one client for ever.

It doubles with each view that executed nothing, and with each in which it ended, whatever that view executed: under
enough load a correct primary serves everybody and yet not soon enough, and would be left again and again. It is
*halved*, not reset, when a request older than the view is executed, and once per view: a single old request in a faulty
primary's view must not make the next honest view too short. A view takes its halving back if patience ended in it, or
if it did not last as long as patience did when it began: that it was long enough nobody can say. So a view that was too
short never makes patience shorter. In a round of 2f + 1 views at most f, the faulty primaries', halve it, and f + 1
double it, so it grows until an honest view is long enough. There is no upper bound, because a bound would assume one on
the network.

A primary that executes things, only slowly, is judged in `replica.core.expectation`.
"""

PATIENCE_FIRST_MS = 1000
# The agreed cut may lag for so many first patiences before the primary is suspected for it.
CUT_PATIENCES = 60


class Patience:
    """One replica's patience; times in milliseconds of a clock that never goes back."""

    def __init__(self, first_ms: int = PATIENCE_FIRST_MS, cut_patiences: int = CUT_PATIENCES) -> None:
        self.first_ms = first_ms
        self.cut_ms = cut_patiences * first_ms
        self.present_ms = first_ms
        self._view_began_ms = 0
        self._executed_something = False
        self._has_ended = False
        self._before_halving_ms: int | None = None

    def enter_view(self, now_ms: int) -> None:
        """Note that a view began; if the one before executed nothing, or was too short, patience doubles."""
        before_ms = self._before_halving_ms
        if before_ms is not None and (self._has_ended or now_ms - self._view_began_ms < before_ms):
            self.present_ms = before_ms
        if self._has_ended or not self._executed_something:
            self.present_ms *= 2
        self._executed_something = self._has_ended = False
        self._before_halving_ms = None
        self._view_began_ms = now_ms

    def executed(self, since_ms: int | None) -> None:
        """Note that a request was executed, known here since `since_ms`, or not known here (None)."""
        self._executed_something = True
        if since_ms is not None and since_ms < self._view_began_ms and self._before_halving_ms is None:
            self._before_halving_ms = self.present_ms
            self.present_ms = max(self.first_ms, self.present_ms // 2)

    def has_ended(self, oldest_since_ms: int | None, now_ms: int) -> bool:
        """Say whether the oldest request, known since then, has waited too long in this view. It is noted if it has."""
        if oldest_since_ms is None or now_ms - max(oldest_since_ms, self._view_began_ms) < self.present_ms:
            return False
        self._has_ended = True
        return True
