"""Execution of decided batches: the same everywhere, whatever a batch holds.

`Executor.execute` takes the next slot's batch and returns the replies. An application's exception is an error result
and changes nothing; a request that was executed before gets the result kept; nothing here can fail because of what a
batch holds. What its key is not allowed (`replica.core.clients`) is not executed, ordered or not.

The application does what the version in force does (`replica.core.versions`). Code that does not know that one executes
nothing: `outdated` says so, and what to do.
"""

import hashlib
import struct
from dataclasses import dataclass

from replica.application import Application, Context, OperationError, Right, accesses_of, known_version
from replica.core.batch import Batch
from replica.core.clients import Clients, is_about_clients
from replica.core.envelope import (
    Administer,
    AdministerReply,
    Envelope,
    Open,
    OpenReply,
    Operations,
    Result,
    SessionId,
    Status,
    encode_administer_reply,
    encode_open_reply,
    encode_operations_reply,
)
from replica.core.frozen import FrozenMap
from replica.core.genesis import Genesis
from replica.core.members import Membership
from replica.core.quotas import NO_QUOTA, Quota
from replica.core.sessions import ClientTable, Session, answer
from replica.core.state import BucketedMap
from replica.core.versions import Versions, is_about_versions

CHECKPOINT_TAG = b"trustlog/state\0\0"
ERROR_TEXT_BYTES_MAX = 1000
KEY_BYTES_SHOWN_MAX = 100  # of a key that a client may not use

# Looking a member of an enumeration up takes as long as half of what else is done about a result.
_OK = Status.OK

# Not the operation's doing, and not the same on every replica: these stop the replica instead of being a result.
_FATAL = (MemoryError, SystemError)


@dataclass(frozen=True, slots=True)
class Executed:
    """The reply to one envelope of an executed batch, for the client with this key."""

    client: bytes
    raw: bytes


class Executor:
    """The agreed state, and the only code that changes it.

    clients_changed: whether the last slot changed who may be a client. fresh: for each envelope of the last slot, how
    many of its operations were executed, and not only answered again.
    again: likewise, how many had been executed before and were only answered again; an opening or a command is one.
    knows_version: the newest version of the application's behaviour that the code here knows.
    """

    def __init__(self, application: Application, genesis: Genesis) -> None:
        self._application = application
        self._accesses = accesses_of(application)
        self._name = genesis.application
        self.knows_version = known_version(application)
        self._limits = genesis.limits
        self._operators = genesis.operators
        self._context = Context(BucketedMap())
        self.table = ClientTable(genesis.limits)
        self.membership = Membership(genesis, self.table.records)
        self.clients = Clients(self.table.records, by_prefix=self._accesses is not None)
        self.clients_changed = False
        self.fresh: list[int] = []
        self.versions = Versions(self.table.records)
        self.again: list[int] = []
        self.slot = 0
        self.operations = 0

    @classmethod
    def restored(
        cls,
        application: Application,
        genesis: Genesis,
        slot: int,
        time_ms: int,
        state: BucketedMap,
        records: BucketedMap,
    ) -> "Executor":
        """Return an executor that goes on after `slot` with this agreed state; it keeps both maps.

        LayoutError if `records` are no client table's. `operations` counts from 0 again: it is not agreed.
        """
        executor = cls(application, genesis)
        executor._context = Context(state, slot, time_ms)
        executor.table = ClientTable.restored(genesis.limits, records)
        executor.membership = Membership.restored(genesis, records)
        executor.clients = Clients.restored(records, by_prefix=executor._accesses is not None)
        executor.versions = Versions.restored(records)
        executor.slot = slot
        return executor

    @property
    def time_ms(self) -> int:
        """The agreed time after the last executed slot."""
        return self._context.time_ms

    @property
    def state(self) -> BucketedMap:
        """The application's state."""
        return self._context.state

    @property
    def outdated(self) -> str | None:
        """Why nothing more may be executed here: the code does not know the version in force. None if it does."""
        wanted, known = self.versions.present, self.knows_version
        if wanted <= known:
            return None
        return (
            f"application {self._name}: version {wanted} is in force after slot {self.versions.after}, and the code "
            f"here knows no version above {known}: install the code that knows version {wanted}, and start this "
            "replica again; nothing is lost, it goes on where it was"
        )

    def execute(self, slot: int, batch: Batch) -> list[Executed]:
        """Execute the batch decided for `slot`, which must be the next one; return a reply per envelope."""
        if slot != self.slot + 1:
            raise RuntimeError(f"slot {slot} executed after slot {self.slot}")
        if self.outdated is not None:
            raise RuntimeError(f"slot {slot} executed by code that is too old: {self.outdated}")
        self.slot = slot
        context = self._context
        context.slot = slot
        context.version = self.versions.present
        context.time_ms = max(context.time_ms, batch.time_ms)
        self.table.begin_slot(slot)
        commands_before = self.clients.number
        replies = []
        self.fresh, self.again = [], []
        for place, envelope in enumerate(batch.envelopes):
            before = self.operations
            replies.append(Executed(envelope.client, self._execute_envelope(envelope, slot, place)))
            self.fresh.append(self.operations - before)
        self.clients_changed = self.clients.number != commands_before
        self.membership.end_slot(slot)
        self.versions.end_slot()
        self.state.settle()
        return replies

    def known_reply(self, envelope: Envelope) -> bytes | None:
        """Return the reply to an envelope that has nothing left to be executed, else None."""
        content = envelope.content
        refused = self._refused(envelope)
        if refused is not None:
            return refused
        if isinstance(content, Open):
            opened = self.table.opened(envelope.client, content.nonce)
            return None if opened is None else encode_open_reply(OpenReply(content.nonce, Status.OK, opened))
        if isinstance(content, Administer):
            known_change = self._about(content.command).known(content)
            return None if known_change is None else encode_administer_reply(known_change)
        if self.answered(envelope.client, content) < len(content.operations):
            return None
        session = self.table.find(content.session, envelope.client)
        known = (answer(session, content.first + i, self.slot) for i in range(len(content.operations)))
        return encode_operations_reply(content.session, content.first, [one for one in known if one is not None])

    def is_answered(self, envelope: Envelope) -> bool:
        """Say whether an envelope has nothing left to be executed, without making the reply."""
        content = envelope.content
        if isinstance(content, Operations) and self.clients.is_allowed(envelope.client):
            return self.answered(envelope.client, content) == len(content.operations)
        return self.known_reply(envelope) is not None

    def answered(self, client: bytes, content: Operations, known: int = 0) -> int:
        """Return how many of these operations, from the first one on, have an answer; that so many have is known.

        As long as their session lasts, what has an answer keeps one.
        """
        session = self.table.find(content.session, client)
        if session is None:
            return 0
        for number in range(known, len(content.operations)):
            if answer(session, content.first + number, self.slot) is None:
                return number
        return len(content.operations)

    def quota_of(self, envelope: Envelope) -> Quota:
        """Return the quota that an envelope of a client counts for; an operator's commands count for none."""
        return NO_QUOTA if isinstance(envelope.content, Administer) else self.clients.quota_of(envelope.client)

    def peek(self, operation: bytes, client: bytes = b"") -> Result:
        """Return what `operation` would give `client` now, changing nothing: an answer nobody else vouches for."""
        if not self.clients.is_allowed(client):
            return Result(Status.NOT_ALLOWED, 0, b"")
        outdated = self.outdated
        if outdated is not None:
            return Result(Status.ERROR, self.slot, outdated.encode())
        self._context.ordered = False
        self._context.client = client
        self._context.version = self.versions.present
        try:
            result = self._not_permitted(operation) or self._apply(operation)
        finally:
            self._context.ordered = True
        self.state.rollback()
        return result

    def may_watch(self, client: bytes, prefix: bytes) -> bool:
        """Say whether `client` may be told of all changes to keys that begin with `prefix`."""
        return self.clients.is_allowed(client) and self.clients.permits(client, Right.READ, prefix)

    def roots(self) -> tuple[bytes, bytes]:
        """Return the roots of the application's state and of the client table after the last executed slot."""
        return self.state.root(), self.table.root()

    def frozen(self) -> tuple[FrozenMap, FrozenMap]:
        """Return both maps as they are after the last executed slot, for good."""
        return self.state.frozen(), self.table.frozen()

    def take_changes(self) -> tuple[list[tuple[bytes, bytes | None]], list[tuple[bytes, bytes | None]]]:
        """Return what changed since the last call in the application's state and in the client table's records.

        Each is a list of keys with their items after the last executed slot, None if deleted.
        """
        return self.state.take_changes(), self.table.take_changes()

    def digest(self) -> bytes:
        """Return D for the state after the last executed slot: application, client table and agreed time."""
        roots = b"".join(self.roots())
        return hashlib.sha256(CHECKPOINT_TAG + struct.pack(">QQ", self.slot, self._context.time_ms) + roots).digest()

    def _execute_envelope(self, envelope: Envelope, slot: int, place: int) -> bytes:
        content = envelope.content
        self.again.append(0)
        refused = self._refused(envelope)
        if refused is not None:
            return refused
        if isinstance(content, Open):
            self.again[-1] = int(self.table.opened(envelope.client, content.nonce) is not None)
            status, session_id = self.table.open(envelope.client, content, slot, place)
            return encode_open_reply(OpenReply(content.nonce, status, session_id))
        if isinstance(content, Administer):
            return encode_administer_reply(self._administer(content, slot))
        session = self.table.find(content.session, envelope.client)
        if session is None:
            expired = Result(Status.EXPIRED, slot, b"")
            return encode_operations_reply(content.session, content.first, [expired] * len(content.operations))
        self._context.client = envelope.client
        return encode_operations_reply(content.session, content.first, self._execute_operations(content, session))

    def _refused(self, envelope: Envelope) -> bytes | None:
        """Return the reply to an envelope of a key that may not ask for that, else None.

        It names no slot: the answers of replicas that are not equally far are the same bytes.
        """
        content, client = envelope.content, envelope.client
        if isinstance(content, Administer):
            if client in self._operators:
                return None
            text = "this key is no operator's of this cluster"
            return encode_administer_reply(AdministerReply.to(content, Status.ERROR, 0, text))
        if self.clients.is_allowed(client):
            return None
        if isinstance(content, Open):
            return encode_open_reply(OpenReply(content.nonce, Status.NOT_ALLOWED, SessionId(0, 0)))
        results = [Result(Status.NOT_ALLOWED, 0, b"")] * len(content.operations)
        return encode_operations_reply(content.session, content.first, results)

    def _about(self, command: bytes) -> Clients | Versions | Membership:
        """Return what an operator's command is about; what is of no kind is refused as a list of members."""
        if is_about_clients(command):
            return self.clients
        return self.versions if is_about_versions(command) else self.membership

    def _administer(self, content: Administer, slot: int) -> AdministerReply:
        about = self._about(content.command)
        self.again[-1] = int(about.known(content) is not None)
        before = self.clients.number
        reply = about.execute(content, slot)
        if self.clients.number != before:
            self.table.end_sessions(self.clients.is_allowed)
        return reply

    def _execute_operations(self, content: Operations, session: Session) -> list[Result]:
        slot = self.slot
        self.table.touch(session, slot)
        session.acknowledge(content.acknowledged)
        end_of_window = session.acknowledged + self._limits.session_window
        budget = self._limits.group_bytes_max
        restricted = self.clients.is_restricted(session.client)
        results = []
        for number, operation in enumerate(content.operations, content.first):
            result = answer(session, number, slot)
            if result is not None:
                self.again[-1] += 1
            elif number >= end_of_window:
                result = Result(Status.OUT_OF_WINDOW, slot, b"")
            else:
                result = self._not_permitted(operation) if restricted else None
                result = self._execute_operation(operation, budget) if result is None else result
                self.operations += 1
                session.keep(number, result)
            budget -= len(result.value)
            results.append(result)
        return results

    def _execute_operation(self, operation: bytes, budget: int) -> Result:
        result = self._apply(operation)
        if result.status is _OK:
            if len(result.value) <= budget:
                self.state.commit()
                return result
            # Kept like any result, so that a replay of the envelope does not execute later what is refused now.
            result = Result(Status.TOO_LARGE, self.slot, b"")
        self.state.rollback()
        return result

    def _not_permitted(self, operation: bytes) -> Result | None:
        """Return the result of an operation that the context's client may not ask for, else None."""
        client = self._context.client
        if not self.clients.is_restricted(client):
            return None
        if self._accesses is None:
            return Result(Status.NOT_PERMITTED, self.slot, b"the application no longer says which keys it uses")
        try:
            for right, key in self._accesses(operation, self._context.version):
                if not self.clients.permits(client, right, key):
                    return Result(Status.NOT_PERMITTED, self.slot, _may_not(right, key))
        except OperationError as error:
            return Result(Status.ERROR, self.slot, _text(error))
        except _FATAL:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as in `_apply`
            return Result(Status.ERROR, self.slot, f"operation failed: {type(error).__name__}".encode())
        return None

    def _apply(self, operation: bytes) -> Result:
        """Run the application; the caller commits or rolls back."""
        self.state.begin()
        try:
            value = self._application.apply(operation, self._context)
        except OperationError as error:
            return Result(Status.ERROR, self.slot, _text(error))
        except _FATAL:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an application raises is a result, alike everywhere
            return Result(Status.ERROR, self.slot, f"operation failed: {type(error).__name__}".encode())
        if type(value) is not bytes:
            return Result(Status.ERROR, self.slot, b"the application did not return bytes")
        if len(value) > self._limits.result_bytes_max:
            return Result(Status.ERROR, self.slot, b"the result is too large")
        return Result(_OK, self.slot, value)


def _may_not(right: Right, key: bytes) -> bytes:
    what = "read" if right is Right.READ else "write"
    shown = key[:KEY_BYTES_SHOWN_MAX].decode("utf-8", "backslashreplace")
    return f'this key may not {what} "{shown}"'.encode()


def _text(error: OperationError) -> bytes:
    # An application may quote an operation that is not text: lone surrogates must not become an exception here.
    return str(error).encode("utf-8", "backslashreplace")[:ERROR_TEXT_BYTES_MAX]
