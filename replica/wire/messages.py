"""The messages between programs, and the one codec for them.

A frame is a u32 length (big-endian) and a msgpack array: the message's code, then its fields in the order below. The
array is flat: every field is a number, a byte string or a short text, so nothing nests, and a decoder never allocates
more than the frame has bytes. Contents that must be signed, hashed or agreed on (envelopes, groups, replies) are
opaque bytes here, laid out by `replica.core`.

Handshake, on every connection: the accepting replica sends Challenge; the dialler answers ClientHello or
ReplicaHello; the replica answers Welcome, or Refused with the reason. Then replicas appraise each other (AskEvidence
and EvidenceShown, both ways; see `replica.shell.appraisal`).
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgpack

from replica.core.layout import U32, U64_MAX, LayoutError
from replica.wire.changes import PREFIX_BYTES_MAX

WIRE_VERSION: Final = 1
RECEIPT_VERSION: Final = 1
FRAME_BYTES_MAX: Final = 8 * 1024 * 1024
HANDSHAKE_FRAME_BYTES_MAX: Final = 4096
# What a message adds to the bytes that it carries.
FRAME_OVERHEAD_MAX: Final = 64
FIELDS_MAX: Final = 12
TEXT_BYTES_MAX: Final = 2000


class Challenge(NamedTuple):
    """Replica to dialler: who I am, and a nonce to sign."""

    version: int
    cluster_id: bytes
    cluster_file_digest: bytes
    number: int
    nonce: bytes


class ClientHello(NamedTuple):
    """Client to replica: my key, and my signature over the challenge (see `replica.wire.handshake`)."""

    version: int
    cluster_id: bytes
    public_key: bytes
    signature: bytes


class ReplicaHello(NamedTuple):
    """Replica to replica: my number; the certificate of the TLS connection proves it."""

    version: int
    cluster_id: bytes
    cluster_file_digest: bytes
    number: int


class Welcome(NamedTuple):
    """Replica to dialler: go on. `executed` is the highest slot executed here, `view` the current view."""

    executed: int
    view: int


class Refused(NamedTuple):
    """Replica to dialler: no, and why; the connection is then closed."""

    code: str
    text: str


class Subscribe(NamedTuple):
    """Reader to replica: send every group of your log that ends at or above `first`, from now on."""

    first: int


class Fetch(NamedTuple):
    """Reader to replica: send what you hold of `log` from index `first` on, once, up to a limit.

    number: the list of members under which `log` is meant; another log may have that number under a later list.
    """

    log: int
    first: int
    number: int = 0


class GroupMessage(NamedTuple):
    """Replica to reader: a group of `log`, in the layout of `replica.core.group`."""

    log: int
    group: bytes


class Request(NamedTuple):
    """Client to replica, or replica to primary: an envelope to order."""

    envelope: bytes


class Reply(NamedTuple):
    """Replica to client: a reply, in the layout of `replica.core.envelope`."""

    reply: bytes


class StaleRead(NamedTuple):
    """Client to replica: run this operation on your present state, order nothing, change nothing."""

    query: int
    operation: bytes


class StaleResult(NamedTuple):
    """Replica to client: the answer to a StaleRead. `executed` is the slot up to which the state stands."""

    query: int
    status: int
    executed: int
    value: bytes


class StatusQuery(NamedTuple):
    """Ask a replica for its status."""

    query: int


class StatusReport(NamedTuple):
    """A replica's status, a JSON object in UTF-8: its own word, not agreed on."""

    query: int
    json: bytes


class Ping(NamedTuple):
    """Ask for a Pong; whoever does not hear for a while takes the connection for dead."""

    number: int


class Pong(NamedTuple):
    """The answer to Ping."""

    number: int


class Notice(NamedTuple):
    """Replica to client: something that one replica says and nobody agreed on, such as "busy"."""

    code: str
    text: str


class Held(NamedTuple):
    """Replica to reader, at the end of a Fetch's answer: of `log` I hold the indexes from `first` on.

    `last` is the highest that a group has shown me to exist, of which I may lack some before it. `first` = `last` + 1:
    I hold nothing.
    """

    log: int
    first: int
    last: int


class AskCheckpoint(NamedTuple):
    """Reader to replica: say which stable checkpoint's state you can hand out."""


class AskMembers(NamedTuple):
    """Anybody to replica: show the list of members that followed list `number`, if you know one."""

    number: int


class MembersShown(NamedTuple):
    """Replica to whoever asked: the link from list `number` to the next (`replica.core.chain`); b"" if none."""

    number: int
    link: bytes


class CheckpointOffer(NamedTuple):
    """Replica to reader: this one's. Both in the layouts of `replica.core.checkpoint`."""

    header: bytes
    certificate: bytes


class AskPart(NamedTuple):
    """Reader to replica: send a part of the state after `slot`.

    `source` says of what (`replica.core.snapshot.Source`); `want` is a want in the layout of `replica.core.treeparts`
    for a map, else empty; `number` which log's reduced state or which batch, else 0.
    """

    slot: int
    source: int
    number: int
    want: bytes


class Part(NamedTuple):
    """Replica to reader: that part. `has` is 0, and `data` empty, if this replica does not have that state any more."""

    slot: int
    source: int
    number: int
    want: bytes
    has: int
    data: bytes


class Heads(NamedTuple):
    """Replica to replica, now and then: up to where I hold every log; layout in `replica.core.heads`."""

    heads: bytes


class Watch(NamedTuple):
    """Client to replica: tell what changes at keys with this prefix, after (slot, place); see `replica.wire.changes`.

    The replica says Changes from there to there, empty, when it begins; `query` names the watch on this connection.
    """

    query: int
    prefix: bytes
    slot: int
    place: int


class WatchAck(NamedTuple):
    """Client to replica: up to here I have taken it. The replica goes a bounded way beyond, and waits."""

    query: int
    slot: int
    place: int


class Unwatch(NamedTuple):
    """Client to replica: tell no more."""

    query: int


class Changes(NamedTuple):
    """Replica to client: a link of a watch, from one position to the next, with the changes between."""

    query: int
    from_slot: int
    from_place: int
    to_slot: int
    to_place: int
    changes: bytes


class WatchEnded(NamedTuple):
    """Replica to client: this watch is over. code: "gone": only what comes after `slot` is kept; "busy": no place."""

    query: int
    code: str
    slot: int


class AskEvidence(NamedTuple):
    """Replica to replica: show which program holds your log's key; nonce: 32 random bytes."""

    version: int
    nonce: bytes


class EvidenceShown(NamedTuple):
    """The answer: a document of `trustlog.appraisal`, empty if there is none."""

    version: int
    evidence: bytes


class AskReceipt(NamedTuple):
    """Client to replica: say RESULT of `slot`, and show how the leaf with this hash leads to its root.

    See `trustlog.receipts`.
    """

    version: int
    query: int
    slot: int
    leaf: bytes


class ReceiptShown(NamedTuple):
    """The answer. code: empty, or why there is none (`replica.core.results`, "version"); then the rest is empty.

    proof: of the RESULT, in the layout of `replica.core.proof`; place and size: the leaf's, and of the tree; path: the
    hashes from the leaf to the root, 32 bytes each.
    """

    version: int
    query: int
    code: str
    proof: bytes
    place: int
    size: int
    path: bytes


class PbftParcel(NamedTuple):
    """Replica to replica, in a PBFT cluster only: a signed message, in the layout of `replica.pbft.layout`."""

    parcel: bytes


Message = (
    Challenge
    | ClientHello
    | ReplicaHello
    | Welcome
    | Refused
    | Subscribe
    | Fetch
    | GroupMessage
    | Request
    | Reply
    | StaleRead
    | StaleResult
    | StatusQuery
    | StatusReport
    | Ping
    | Pong
    | Notice
    | Held
    | AskCheckpoint
    | CheckpointOffer
    | AskMembers
    | MembersShown
    | AskPart
    | Part
    | Heads
    | AskEvidence
    | EvidenceShown
    | Watch
    | WatchAck
    | Unwatch
    | Changes
    | WatchEnded
    | AskReceipt
    | ReceiptShown
    | PbftParcel
)

_Check = Callable[[object], bool]


def _number(value: object) -> bool:
    return type(value) is int and 0 <= value <= U64_MAX


def _index(value: object) -> bool:
    # As large as a store can count; a log never gets there.
    return type(value) is int and 0 <= value < 2**63


def _place(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _prefix(value: object) -> bool:
    return type(value) is bytes and len(value) <= PREFIX_BYTES_MAX


def _text(value: object) -> bool:
    return type(value) is str


def _blob(value: object) -> bool:
    return type(value) is bytes


def _exactly(size: int) -> _Check:
    return lambda value: type(value) is bytes and len(value) == size


# Code -> (message, check of each field in order). Codes are never given to another message.
_SCHEMA: Final[dict[int, tuple[type[Any], tuple[_Check, ...]]]] = {
    1: (Challenge, (_number, _exactly(32), _exactly(32), _number, _exactly(32))),
    2: (ClientHello, (_number, _exactly(32), _exactly(65), _exactly(64))),
    3: (ReplicaHello, (_number, _exactly(32), _exactly(32), _number)),
    4: (Welcome, (_number, _number)),
    5: (Refused, (_text, _text)),
    6: (Subscribe, (_index,)),
    7: (Fetch, (_number, _index, _index)),
    8: (GroupMessage, (_number, _blob)),
    9: (Request, (_blob,)),
    10: (Reply, (_blob,)),
    11: (StaleRead, (_number, _blob)),
    12: (StaleResult, (_number, _number, _number, _blob)),
    13: (StatusQuery, (_number,)),
    14: (StatusReport, (_number, _blob)),
    15: (Ping, (_number,)),
    16: (Pong, (_number,)),
    17: (Notice, (_text, _text)),
    18: (Held, (_number, _index, _index)),
    19: (AskCheckpoint, ()),
    20: (CheckpointOffer, (_blob, _blob)),
    21: (AskPart, (_index, _number, _number, _blob)),
    22: (Part, (_index, _number, _number, _blob, _number, _blob)),
    23: (Heads, (_blob,)),
    24: (Watch, (_number, _prefix, _index, _place)),
    25: (WatchAck, (_number, _index, _place)),
    26: (Unwatch, (_number,)),
    27: (Changes, (_number, _index, _place, _index, _place, _blob)),
    28: (WatchEnded, (_number, _text, _index)),
    32: (AskEvidence, (_number, _exactly(32))),
    33: (EvidenceShown, (_number, _blob)),
    34: (AskReceipt, (_number, _number, _index, _exactly(32))),
    35: (ReceiptShown, (_number, _number, _text, _blob, _place, _place, _blob)),
    36: (PbftParcel, (_blob,)),
    37: (AskMembers, (_index,)),
    38: (MembersShown, (_index, _blob)),
}
_CODES: Final = {message: code for code, (message, _) in _SCHEMA.items()}


def encode_frame(message: Message) -> bytes:
    """Return the message's frame, its length included. ValueError above the frame limit."""
    body: bytes = msgpack.packb((_CODES[type(message)], *message), use_bin_type=True)
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes, the limit is {FRAME_BYTES_MAX}")
    return U32.pack(len(body)) + body


def decode_message(body: bytes) -> Message:
    """Decode a frame's content; LayoutError for anything but one well-formed message."""
    try:
        fields = msgpack.unpackb(
            body,
            use_list=False,
            raw=False,
            max_array_len=FIELDS_MAX,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=TEXT_BYTES_MAX,
            max_bin_len=FRAME_BYTES_MAX,
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise LayoutError(f"not a message: {type(error).__name__} {error}") from None
    if type(fields) is not tuple or not fields or type(fields[0]) is not int or fields[0] not in _SCHEMA:
        raise LayoutError("not a message of a kind that this program knows")
    message, checks = _SCHEMA[fields[0]]
    if len(fields) != len(checks) + 1:
        raise LayoutError(f"a {message.__name__} has {len(checks)} fields, not {len(fields) - 1}")
    for check, value in zip(checks, fields[1:], strict=True):
        if not check(value):
            raise LayoutError(f"a {message.__name__} with a wrong field")
    decoded: Message = message._make(fields[1:])
    return decoded
