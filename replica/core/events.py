"""What goes into the core and what comes out of it. Nothing else passes its border.

Times are milliseconds: `now_ms` from a clock that never goes back, `wall_ms` since 1970 and only advisory.
"""

from dataclasses import dataclass
from typing import Any

from replica.core.batch import Batch
from replica.core.checkpoint import Header
from replica.core.envelope import Envelope
from replica.core.genesis import Genesis
from replica.core.group import VerifiedGroup
from replica.core.proof import EntryProof
from replica.core.rules import Violation
from replica.core.snapshot import Fetched, Milestone, PartWanted

# Events


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
    """An envelope arrived from a client, or relayed by a backup. `source` is returned in answers, and opaque here.

    peer: the number of the replica that relayed it.
    """

    envelope: Envelope
    relayed: bool
    source: Any = None
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""

    now_ms: int
    wall_ms: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """Everything that the store held was handed in. The own trusted log ends at `last` with `head`, 32 bytes."""

    last: int
    head: bytes


@dataclass(frozen=True, slots=True)
class PeerHolds:
    """Replica `peer` answered a Fetch: of `log` it holds what lies from `first` on, and knows that `last` exists.

    `first` = `last` + 1: it holds nothing.
    """

    peer: int
    log: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class CheckpointOffered:
    """Replica `peer` offers the state after a stable checkpoint; `certificate` was checked against `header`.

    before: if it is the last checkpoint of the list of members before the present one, what was agreed under that.
    """

    peer: int
    header: Header
    certificate: bytes
    before: Genesis | None = None


@dataclass(frozen=True, slots=True)
class PartReceived:
    """Replica `peer` answered AskPart; `data` is as it came. None: it does not have that state any more."""

    peer: int
    slot: int
    want: PartWanted
    data: bytes | None


@dataclass(frozen=True, slots=True)
class HeadsReceived:
    """Replica `peer` says up to where it holds every log: (index of a group's end, 32 head there) per log."""

    peer: int
    heads: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class KnownBroken:
    """Evidence from before shows that the trusted part of `log` attested two histories: it is read no further."""

    log: int


@dataclass(frozen=True, slots=True)
class ResultAsked:
    """The client with this key wants a receipt of an operation of `slot`; leaf: its hash (`trustlog.receipts`).

    `source` is returned in ResultShown or ResultRefused, and opaque here.
    """

    client: bytes
    slot: int
    leaf: bytes
    source: Any = None


@dataclass(frozen=True, slots=True)
class NotSent:
    """A Relay was not carried out: the way to that replica is closed or full."""

    to: int
    envelope: Envelope


Answer = Recovered | PeerHolds | CheckpointOffered | PartReceived | HeadsReceived | KnownBroken
Event = GroupReceived | Appended | RequestReceived | ResultAsked | Tick | NotSent | Answer

# Effects


@dataclass(frozen=True, slots=True)
class Append:
    """Make these payloads durable, have them attested as one group, then answer with Appended. One at a time."""

    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send the client with this key a reply.

    source: of its request, if that came from there and not from another replica. again: it was given before, and is
    for whoever asked once more only.
    """

    client: bytes
    reply: bytes
    source: Any = None
    again: bool = False


@dataclass(frozen=True, slots=True)
class ResultShown:
    """Show whoever asked the own RESULT, and how the leaf at `place` of `size` leads to its root: 32 bytes a step."""

    source: Any
    proof: EntryProof
    place: int
    size: int
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ResultRefused:
    """Tell whoever asked for a RESULT that there is none; code: see `replica.core.results`."""

    source: Any
    code: str


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
class Taken:
    """A group of any log was taken, in order: it must be durable before anything that is appended from now on."""

    group: VerifiedGroup


@dataclass(frozen=True, slots=True)
class Persist:
    """A stable milestone: make it durable some time; logs up to its cut are needed no more once it is."""

    milestone: Milestone


@dataclass(frozen=True, slots=True)
class AskCheckpoint:
    """Ask replica `ask` for the newest stable checkpoint that it can hand out."""

    ask: int


@dataclass(frozen=True, slots=True)
class AskPart:
    """Ask replica `ask` for a part of the state after `slot`."""

    ask: int
    slot: int
    want: PartWanted


@dataclass(frozen=True, slots=True)
class Install:
    """The state after a checkpoint is here, verified: make it durable, then begin anew with a core made from it."""

    fetched: Fetched


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a client that this replica does not take its request, and why. Only this replica's word."""

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
class ListEnded:
    """The last slot of this list of members is stable: go on with a core of the next one. This core says no more."""

    slot: int


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
    | Taken
    | Persist
    | AskCheckpoint
    | AskPart
    | Install
    | Send
    | ResultShown
    | ResultRefused
    | Relay
    | Fetch
    | Refuse
    | Executed
    | Stable
    | ListEnded
    | ViewEntered
    | ViewOpened
    | Exposed
    | Lied
    | Forked
    | Halt
)
