"""When a replica loses patience with a view (design section 4.2).

Patience belongs to the oldest request that this replica knows and that is not executed, and only that request's
execution ends it. Otherwise a primary that orders its friends' junk could censor one client for ever.

It doubles with each view that executed nothing. It is *halved*, not reset, when a request older than the view is
executed, and once per view: a single old request in a faulty primary's view must not make the next honest view too
short. In a round of 2f + 1 views at most f can be spoiled so, and f + 1 double it, so it grows until an honest view is
long enough. There is no upper bound, because a bound would assume one on the network.

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
        self._executed_old = False

    def enter_view(self, now_ms: int) -> None:
        """Note that a view began; if the one before executed nothing, patience doubles."""
        if not self._executed_something:
            self.present_ms *= 2
        self._executed_something = self._executed_old = False
        self._view_began_ms = now_ms

    def executed(self, since_ms: int | None) -> None:
        """Note that a request was executed, known here since `since_ms`, or not known here (None)."""
        self._executed_something = True
        if since_ms is not None and since_ms < self._view_began_ms and not self._executed_old:
            self._executed_old = True
            self.present_ms = max(self.first_ms, self.present_ms // 2)

    def has_ended(self, oldest_since_ms: int | None, now_ms: int) -> bool:
        """Say whether the oldest request, known since then, has waited too long in this view."""
        if oldest_since_ms is None:
            return False
        return now_ms - max(oldest_since_ms, self._view_began_ms) >= self.present_ms
