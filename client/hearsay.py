"""What single replicas say of themselves, and how much of it a client may use.

A replica's word on its executed slot or its view is agreed on by nobody. The client uses the (f+1)-th highest
of what it heard: at most f replicas lie, so at least one of the f+1 highest values was said by a correct
replica, and what is used does not exceed it. A lie can only make the value smaller, and no smaller than the
lowest that a correct replica said once all correct ones were heard.
"""

from collections.abc import Collection

from replica.core import quorum


class Hearsay:
    """Who is connected, who cannot be reached, and what each replica last said."""

    def __init__(self, n: int, f: int) -> None:
        self.connected: set[int] = set()
        self.unreachable: set[int] = set()
        self.primary = 0
        self._n, self._f = n, f
        self._executed: dict[int, int] = {}
        self._views: dict[int, int] = {}

    def on_connected(self, replica: int) -> None:
        """Take in that `replica` welcomed this client."""
        self.check(replica)
        self.connected.add(replica)
        self.unreachable.discard(replica)

    def on_disconnected(self, replica: int) -> None:
        """Take in that the connection to `replica`, or an attempt at one, failed."""
        self.check(replica)
        self.connected.discard(replica)
        self.unreachable.add(replica)

    def on_said(self, replica: int, executed: int, view: int) -> None:
        """Take in which slot `replica` says it executed last, and in which view it is."""
        self.check(replica)
        self._executed[replica] = max(executed, self._executed.get(replica, 0))
        self._views[replica] = view
        if len(self._views) > self._f:
            self.primary = quorum.primary(self._usable(self._views), self._n)

    def renewed(self, n: int, f: int, staying: Collection[int]) -> "Hearsay":
        """Return what is known among other replicas: connections and slots of who stays; views are a list's own."""
        made = Hearsay(n, f)
        made.connected.update(self.connected.intersection(staying))
        made._executed.update({number: slot for number, slot in self._executed.items() if number in staying})
        return made

    def forget_slots(self) -> None:
        """Forget what was heard of executed slots: it is too old to be of use."""
        self._executed.clear()

    @property
    def nothing_heard(self) -> bool:
        """Say whether no replica's slot is known."""
        return not self._executed

    @property
    def enough_heard(self) -> bool:
        """Say whether f+1 replicas' slots are known."""
        return len(self._executed) > self._f

    @property
    def all_heard(self) -> bool:
        """Say whether every replica's slot is known or the replica cannot be reached."""
        return len(self._executed) + len(self.unreachable.difference(self._executed)) >= self._n

    @property
    def slot(self) -> int:
        """A slot that some correct replica said it executed, or a lower one."""
        return self._usable(self._executed)

    def check(self, replica: int) -> None:
        """Raise ValueError for a number that no replica of this cluster has."""
        if not 0 <= replica < self._n:
            raise ValueError(f"there is no replica {replica}, this cluster has {self._n}")

    def _usable(self, said: dict[int, int]) -> int:
        return sorted(said.values(), reverse=True)[self._f]
