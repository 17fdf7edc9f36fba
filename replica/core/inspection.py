"""What a shell may look at of a core: nothing here changes anything."""

from replica.core.catchup import CatchUp
from replica.core.cut import AgreedCut
from replica.core.envelope import Envelope
from replica.core.execution import Executor
from replica.core.genesis import Genesis
from replica.core.inbox import Inbox
from replica.core.knowledge import Knowledge
from replica.core.pen import Pen
from replica.core.quorum import primary
from replica.core.transfer import Transfer


class Inspection:
    """The side of a `ReplicaCore` that is for reading."""

    genesis: Genesis
    number: int
    executor: Executor
    _known: Knowledge
    _pen: Pen
    _inboxes: list[Inbox]
    _catch_up: CatchUp
    _cut: AgreedCut
    _appending: bool
    _live: bool

    @property
    def view(self) -> int:
        """The view this replica is in."""
        return self._pen.view

    @property
    def view_read(self) -> int:
        """The view that its own log shows, as far as it was read; it is in that one as soon as it may speak."""
        return max(self.view, self._known.states[self.number].view)

    @property
    def stable(self) -> int:
        """The slot of the newest stable checkpoint."""
        return self._known.stable

    @property
    def suspects(self) -> bool:
        """Say whether this replica has lost patience with its view."""
        return self._pen.state.suspected

    @property
    def is_open(self) -> bool:
        """Say whether the present view's primary may propose, as far as was read here."""
        return self.view in self._known.states[self.primary].opened

    @property
    def primary(self) -> int:
        """The number of the present view's primary."""
        return primary(self.view, self.genesis.n)

    @property
    def executed(self) -> int:
        """The highest slot executed here."""
        return self.executor.slot

    @property
    def top(self) -> int:
        """The highest slot for which any log voted, as far as was read here; perhaps it was decided elsewhere."""
        return max(state.top for state in self._known.states)

    @property
    def ends(self) -> int | None:
        """The last slot of the list of members under which this core works, once it is known."""
        return self._known.ends

    @property
    def is_appending(self) -> bool:
        """Say whether an Append is not yet answered."""
        return self._appending

    @property
    def holds_back(self) -> bool:
        """Say whether something is owed that goes with whatever is said next, or after two Ticks."""
        return self._pen.holds_back

    def received(self, log: int) -> int:
        """Return the index up to which `log` arrived here without gaps."""
        return self._inboxes[log].received

    def read(self, log: int) -> int:
        """Return the index up to which `log` was read."""
        return self._known.states[log].position

    def head(self, log: int) -> bytes:
        """Return the chain's head of `log` where it arrived without gaps."""
        return self._inboxes[log].head

    def heads(self) -> tuple[tuple[int, bytes], ...]:
        """Return up to where every log arrived, and the chain's head there: what peers compare."""
        return tuple((inbox.received, inbox.head) for inbox in self._inboxes)

    def seen(self, log: int) -> int:
        """Return the highest index of `log` that is known to exist."""
        return self._inboxes[log].seen

    def unread(self, log: int) -> int:
        """Return how many entries of `log` arrived and are not read yet."""
        return len(self._inboxes[log].unread)

    @property
    def requests_waiting(self) -> int:
        """Return how many requests wait here to be executed."""
        return len(self._known.requests)

    def has_request(self, envelope: Envelope) -> bool:
        """Say whether this very envelope waits here to be executed."""
        return self._known.requests.find(envelope) is not None

    def has_room_for(self, client: bytes) -> bool:
        """Say whether this client may have another request waiting, as far as their number goes."""
        return self._known.requests.has_room_for(client)

    def waiting_for(self, log: int) -> str | None:
        """Return what the next entry of `log` waits for, in words, or None."""
        wait = self._catch_up.fetcher.waits.get(log)
        return None if wait is None else wait.why

    def lacks(self, log: int) -> str | None:
        """Return what the next entry of `log` waits for if its author must have just that, in words, or None."""
        wait = self._catch_up.fetcher.waits.get(log)
        return wait.why if wait is not None and len(wait.logs) < self.genesis.n - 1 else None

    @property
    def is_live(self) -> bool:
        """Say whether this replica may speak; see `why_mute`."""
        return self._live

    @property
    def why_mute(self) -> str | None:
        """Return what must happen before this replica may speak, in words, or None."""
        if self.needs_state:
            return f"the state of list {self.genesis.list_number} of the members is not here; peers are asked for it"
        return None if self._live else self._catch_up.homecoming.missing(self._inboxes[self.number])

    @property
    def needs_state(self) -> bool:
        """Say whether it can read no log yet, for want of a state that a quorum of the present members attested."""
        return self._catch_up.needs_state

    @property
    def transfer(self) -> Transfer | None:
        """The transfer of another replica's state that is under way, or None."""
        return self._catch_up.transfer

    @property
    def cut(self) -> tuple[int, ...]:
        """The agreed cut: every log's index."""
        return self._cut.positions
