"""What goes into the core and what comes out of it. Nothing else passes its border.

Times are milliseconds: `now_ms` from a clock that never goes back, `wall_ms` since 1970 and only advisory.
"""

from dataclasses import dataclass
from typing import Any

from replica.core.batch import Batch
from replica.core.envelope import Envelope
from replica.core.rules import Violation

# Events


@dataclass(frozen=True, slots=True)
class VerifiedGroup:
    """A group of replica `author`'s log whose attestation was verified (signature, log, epoch, context, digests).

    first and last are indexes from 1; the heads are 32 bytes; `raw` is the group as `replica.core.group` lays it out.
    """

    author: int
    first: int
    last: int
    head_before: bytes
    head_after: bytes
    payloads: tuple[bytes, ...]
    raw: bytes


@dataclass(frozen=True, slots=True)
class GroupReceived:
    """A verified group of any log arrived, in whatever order, from whomever."""

    group: VerifiedGroup


@dataclass(frozen=True, slots=True)
class Appended:
    """The group that the last Append asked for is durable and attested."""

    group: VerifiedGroup


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """An envelope arrived from a client, or relayed by a backup. `source` is returned in Refuse, and opaque here."""

    envelope: Envelope
    relayed: bool
    source: Any = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""

    now_ms: int
    wall_ms: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """Everything that the store held was handed in; from now on the core may speak."""


Event = GroupReceived | Appended | RequestReceived | Tick | Recovered

# Effects


@dataclass(frozen=True, slots=True)
class Append:
    """Make these payloads durable, have them attested as one group, then answer with Appended. One at a time."""

    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send the client with this key a reply."""

    client: bytes
    reply: bytes


@dataclass(frozen=True, slots=True)
class Relay:
    """Hand a client's envelope to the primary."""

    to: int
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask replica `ask` for log `log` from index `first` on."""

    log: int
    first: int
    ask: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell whoever sent a request that this replica does not take it, and why. Only this replica's word."""

    source: Any
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Executed:
    """A batch was executed at `slot`."""

    slot: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Stable:
    """The checkpoint at `slot` with `digest` is stable: q replicas said it."""

    slot: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ViewEntered:
    """This replica left its view for `view`."""

    view: int


@dataclass(frozen=True, slots=True)
class ViewOpened:
    """The primary of `view` opened it and proposes again what may have been decided in (base, top]."""

    view: int
    base: int
    top: int


@dataclass(frozen=True, slots=True)
class Exposed:
    """Replica `log` broke a rule with its entry `index`, which is in `group`: evidence against its author."""

    log: int
    index: int
    violation: Violation
    group: VerifiedGroup


@dataclass(frozen=True, slots=True)
class Lied:
    """Replica `log` said something about other logs that is not so, in its entry `index`. It was not counted."""

    log: int
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Forked:
    """Two valid attestations of log `log` contradict each other at `index`: its trusted part is broken."""

    log: int
    index: int
    group: VerifiedGroup


@dataclass(frozen=True, slots=True)
class Halt:
    """This replica must stop before it says anything more; `reason` says why and what to do."""

    reason: str


Effect = (
    Append
    | Send
    | Relay
    | Fetch
    | Refuse
    | Executed
    | Stable
    | ViewEntered
    | ViewOpened
    | Exposed
    | Lied
    | Forked
    | Halt
)
