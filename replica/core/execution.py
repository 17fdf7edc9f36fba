"""Execution of decided batches: the same everywhere, whatever a batch holds.

`Executor.execute` takes the next slot's batch and returns the replies. An application's exception is an error result
and changes nothing; a request that was executed before gets the result kept; nothing here can fail because of what a
batch holds.
"""

import hashlib
import struct
from dataclasses import dataclass

from replica.application import Application, Context, OperationError
from replica.core.batch import Batch
from replica.core.envelope import (
    Administer,
    Envelope,
    Open,
    OpenReply,
    Operations,
    Result,
    Status,
    encode_administer_reply,
    encode_open_reply,
    encode_operations_reply,
)
from replica.core.genesis import Genesis
from replica.core.members import Membership
from replica.core.sessions import ClientTable, Session, answer
from replica.core.state import BucketedMap

CHECKPOINT_TAG = b"trustlog/state\0\0"
ERROR_TEXT_BYTES_MAX = 1000

# Not the operation's doing, and not the same on every replica: these stop the replica instead of being a result.
_FATAL = (MemoryError, SystemError)


@dataclass(frozen=True, slots=True)
class Executed:
    """The reply to one envelope of an executed batch, for the client with this key."""

    client: bytes
    raw: bytes


class Executor:
    """The agreed state, and the only code that changes it."""

    def __init__(self, application: Application, genesis: Genesis) -> None:
        self._application = application
        self._limits = genesis.limits
        self._context = Context(BucketedMap())
        self.table = ClientTable(genesis.limits)
        self.membership = Membership(genesis, self.table.records)
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

    def execute(self, slot: int, batch: Batch) -> list[Executed]:
        """Execute the batch decided for `slot`, which must be the next one; return a reply per envelope."""
        if slot != self.slot + 1:
            raise RuntimeError(f"slot {slot} executed after slot {self.slot}")
        self.slot = slot
        context = self._context
        context.slot = slot
        context.time_ms = max(context.time_ms, batch.time_ms)
        self.table.begin_slot(slot)
        replies = [
            Executed(envelope.client, self._execute_envelope(envelope, slot, place))
            for place, envelope in enumerate(batch.envelopes)
        ]
        self.membership.end_slot(slot)
        self.state.settle()
        return replies

    def known_reply(self, envelope: Envelope) -> bytes | None:
        """Return the reply to an envelope that has nothing left to be executed, else None."""
        content = envelope.content
        if isinstance(content, Open):
            opened = self.table.opened(envelope.client, content.nonce)
            return None if opened is None else encode_open_reply(OpenReply(content.nonce, Status.OK, opened))
        if isinstance(content, Administer):
            known_change = self.membership.known(content)
            return None if known_change is None else encode_administer_reply(known_change)
        session = self.table.find(content.session, envelope.client)
        if session is None:
            return None
        known = [answer(session, content.first + i, self.slot) for i in range(len(content.operations))]
        results = [result for result in known if result is not None]
        if len(results) < len(known):
            return None
        return encode_operations_reply(content.session, content.first, results)

    def peek(self, operation: bytes) -> Result:
        """Return what `operation` would give now, changing nothing: an answer nobody else vouches for."""
        self._context.ordered = False
        try:
            result = self._apply(operation)
        finally:
            self._context.ordered = True
        self.state.rollback()
        return result

    def roots(self) -> tuple[bytes, bytes]:
        """Return the roots of the application's state and of the client table after the last executed slot."""
        return self.state.root(), self.table.root()

    def take_changes(self) -> tuple[list[tuple[bytes, bytes | None]], list[tuple[bytes, bytes | None]]]:
        """Return what changed since the last call in the application's state and in the client table's records.

        Each is a list of keys with their values after the last executed slot, None if deleted.
        """
        return self.state.take_changes(), self.table.take_changes()

    def digest(self) -> bytes:
        """Return D for the state after the last executed slot: application, client table and agreed time."""
        roots = b"".join(self.roots())
        return hashlib.sha256(CHECKPOINT_TAG + struct.pack(">QQ", self.slot, self._context.time_ms) + roots).digest()

    def _execute_envelope(self, envelope: Envelope, slot: int, place: int) -> bytes:
        content = envelope.content
        if isinstance(content, Open):
            status, session_id = self.table.open(envelope.client, content, slot, place)
            return encode_open_reply(OpenReply(content.nonce, status, session_id))
        if isinstance(content, Administer):
            return encode_administer_reply(self.membership.execute(envelope.client, content, slot))
        session = self.table.find(content.session, envelope.client)
        if session is None:
            expired = Result(Status.EXPIRED, slot, b"")
            return encode_operations_reply(content.session, content.first, [expired] * len(content.operations))
        self._context.client = envelope.client
        return encode_operations_reply(content.session, content.first, self._execute_operations(content, session))

    def _execute_operations(self, content: Operations, session: Session) -> list[Result]:
        slot = self.slot
        self.table.touch(session, slot)
        session.acknowledge(content.acknowledged)
        end_of_window = session.acknowledged + self._limits.session_window
        budget = self._limits.group_bytes_max
        results = []
        for number, operation in enumerate(content.operations, content.first):
            result = answer(session, number, slot)
            if result is None:
                if number >= end_of_window:
                    result = Result(Status.OUT_OF_WINDOW, slot, b"")
                else:
                    result = self._execute_operation(operation, budget)
                    session.keep(number, result)
            budget -= len(result.value)
            results.append(result)
        return results

    def _execute_operation(self, operation: bytes, budget: int) -> Result:
        result = self._apply(operation)
        if result.status == Status.OK and len(result.value) > budget:
            # Kept like any result, so that a replay of the envelope does not execute later what is refused now.
            result = Result(Status.TOO_LARGE, self.slot, b"")
        if result.status == Status.OK:
            self.state.commit()
        else:
            self.state.rollback()
        self.operations += 1
        return result

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
        return Result(Status.OK, self.slot, value)


def _text(error: OperationError) -> bytes:
    # An application may quote an operation that is not text: lone surrogates must not become an exception here.
    return str(error).encode("utf-8", "backslashreplace")[:ERROR_TEXT_BYTES_MAX]
