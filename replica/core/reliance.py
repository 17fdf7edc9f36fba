"""Whether a primary leaves COMMITs to its backups.

A slot needs q = f + 1 COMMITs, and the 2f backups can give them. With n = 3 a backup votes and commits in one group, so
a primary that commits as soon as it may says two groups for each batch where one would do, and its next proposal waits
while the other is made durable. So it relies on the backups as long as their COMMITs come in time. Its own go with what
it says next. When they did not come in time it says its own, and relies on them again only after so many slots for
which they gave enough; twice as many each time, so a backup that is late on purpose, now and then, costs little.

This is about when something is said, and about nothing else.
"""

# Slots that the backups must have committed by themselves before they are relied on again, at the most.
PROBATION_MAX = 1024


class Reliance:
    """What one primary thinks of its backups' COMMITs, in one view."""

    def __init__(self) -> None:
        self._probation = 1
        self._left = 0

    @property
    def is_given(self) -> bool:
        """Say whether COMMITs are left to the backups."""
        return self._left == 0

    def disappointed(self) -> None:
        """Take in that a slot had to wait for the own COMMIT."""
        self._probation = min(2 * self._probation, PROBATION_MAX)
        self._left = self._probation

    def satisfied(self) -> None:
        """Take in that the backups gave enough COMMITs for a slot."""
        self._left = max(0, self._left - 1)
