r"""Receipts: that a cluster executed an operation with this result, shown to whoever has the cluster's public file.

After a slot was executed, each member that is asked appends one entry to its attested log (integers big-endian):

    RESULT     u8 10, u64 slot, u32 size, 32 root      the root of a tree (``trustlog.merkle``) and how many leaves
    leaf       32 operation digest, u8 status, the result
    operation  SHA-256("trustlog/operate" || 65 client's public key || u64 slot, u32 place of its session
               || u64 number in the session || the operation)

A receipt holds the operation and its result, the path from their leaf to the root, and the append statements of f+1
members whose logs hold that RESULT. With at most f faulty members, one of these executed the slot and found this
result. A receipt names members by number only: whose keys count, how many it takes, and of which cluster the statements
must be comes from the verifier's own file, never from the receipt. It says nothing of what was executed since.

The file is one JSON object with exactly these fields, numbers as they are and bytes in lower-case hex digits:

    receipt   1, the version            cluster    the cluster id, 32 bytes
    client, session [slot, place], number, operation        slot, status, result
    place, size, path [...]             of the leaf in the tree
    entries   f+1 or more, members ascending: {member, statement, signature, digests [...], place of RESULT among them}
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from trustlog.errors import VerificationError
from trustlog.hashing import HASH_SIZE, entry_digest
from trustlog.keys import PUBLIC_KEY_SIZE
from trustlog.merkle import leaf_hash, root_of_path
from trustlog.verification import GROUP_ENTRIES_MAX, Attestation, LogIdentity, verify_append

RECEIPT_VERSION = 1
RECEIPT_BYTES_MAX = 32 * 1024 * 1024  # the largest operation and result, in hex digits
PATH_MAX = 32  # a tree of 2^32 leaves
FIELDS_MAX = 4096  # what is no digest: more than 21 members' fields; a digest takes more than 64 bytes of the file
RESULT = 10  # the first byte of the entry

_OPERATION_TAG = b"trustlog/operate"
_OPERATION = struct.Struct(f">16s{PUBLIC_KEY_SIZE}sQIQ")
_RESULT = struct.Struct(">BQI32s")
_U32_MAX, _U64_MAX = 2**32 - 1, 2**64 - 1


@dataclass(frozen=True, slots=True)
class Members:
    """The verifier's own word on a cluster: every member's log by number, how many must agree (f+1), the contexts.

    cluster_id: 32 bytes. contexts: per member, the 32 bytes that every statement of its log carries.
    """

    identities: tuple[LogIdentity, ...]
    quorum: int
    cluster_id: bytes
    contexts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """An operation of a client, and how it ended. client: 65 bytes; session: slot and place at which it was opened."""

    client: bytes
    session: tuple[int, int]
    number: int
    operation: bytes
    slot: int
    status: int
    result: bytes

    @property
    def leaf(self) -> bytes:
        """The hash of the leaf, 32 bytes, in the tree of ``slot``."""
        packed = _OPERATION.pack(_OPERATION_TAG, self.client, *self.session, self.number)
        digest = hashlib.sha256(packed + self.operation).digest()
        return leaf_hash(digest + bytes([self.status]) + self.result)


@dataclass(frozen=True, slots=True)
class Entry:
    """A RESULT in the log of ``member``: its group's statement and digests (32 bytes each), and its place there."""

    member: int
    attestation: Attestation
    digests: tuple[bytes, ...]
    place: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt as it was made or read; nothing is verified here. place, size, path: of the leaf in the tree."""

    cluster_id: bytes
    outcome: Outcome
    place: int
    size: int
    path: tuple[bytes, ...]
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        """Return the file."""
        said = self.outcome
        content = {
            "receipt": RECEIPT_VERSION,
            "cluster": self.cluster_id.hex(),
            "client": said.client.hex(),
            "session": list(said.session),
            "number": said.number,
            "operation": said.operation.hex(),
            "slot": said.slot,
            "status": said.status,
            "result": said.result.hex(),
            "place": self.place,
            "size": self.size,
            "path": [one.hex() for one in self.path],
            "entries": [_entry_fields(entry) for entry in self.entries],
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a file; VerificationError("malformed") unless it is UTF-8, and what is laid out above and nothing else.

        Its JSON may be written in another way: other spaces, escapes.
        """
        if len(data) > RECEIPT_BYTES_MAX:
            raise VerificationError("malformed", f"a receipt of more than {RECEIPT_BYTES_MAX} bytes")
        # A decoded value takes up to fifty times its bytes here: so not more of them than a receipt can have.
        values = sum(map(data.count, (b",", b":", b"[", b"{")))
        _require(values <= FIELDS_MAX + len(data) // 64, "more values than a receipt of this size can have")
        try:
            content = json.loads(data.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise VerificationError("malformed", "not JSON, cut off, or a field that stands twice") from error
        if isinstance(content, dict) and "receipt" in content:  # another version may have other fields
            version = _number(content["receipt"], "receipt", _U32_MAX)
            _require(version == RECEIPT_VERSION, f"a receipt of version {version}, which this program does not know")
        _only(content, _FIELDS)
        session = _list(content["session"], "session", 2)
        _require(len(session) == 2, "session: not two numbers")
        outcome = Outcome(
            _bytes(content["client"], "client", PUBLIC_KEY_SIZE),
            (_number(session[0], "session", _U64_MAX), _number(session[1], "session", _U32_MAX)),
            _number(content["number"], "number", _U64_MAX),
            _bytes(content["operation"], "operation"),
            _number(content["slot"], "slot", _U64_MAX),
            _number(content["status"], "status", 255),
            _bytes(content["result"], "result"),
        )
        return cls(
            _bytes(content["cluster"], "cluster", HASH_SIZE),
            outcome,
            _number(content["place"], "place", _U32_MAX),
            _number(content["size"], "size", _U32_MAX),
            tuple(_bytes(one, "path", HASH_SIZE) for one in _list(content["path"], "path", PATH_MAX)),
            tuple(map(_entry, _list(content["entries"], "entries", _U32_MAX))),
        )


def result_payload(slot: int, size: int, root: bytes) -> bytes:
    """Return the entry RESULT(slot, size, root); its size is 45 bytes."""
    return _RESULT.pack(RESULT, slot, size, root)


def read_result(payload: bytes) -> tuple[int, int, bytes] | None:
    """Return slot, size and root of a RESULT, or None if these bytes are laid out otherwise."""
    if len(payload) != _RESULT.size or payload[0] != RESULT:
        return None
    _, slot, size, root = _RESULT.unpack(payload)
    return slot, size, root


def verify_entry(members: Members, entry: Entry, payload: bytes) -> None:
    """Verify that the log of ``entry.member``, as the verifier knows it, holds ``payload`` where the entry says.

    VerificationError otherwise.
    """
    if not 0 <= entry.member < len(members.identities):
        raise VerificationError("wrong-log", f"the cluster has no replica {entry.member}")
    if not (entry.place < len(entry.digests) and entry.digests[entry.place] == entry_digest(payload)):
        raise VerificationError("wrong-payload", f"replica {entry.member}: its entry is not the RESULT of this receipt")
    identity = members.identities[entry.member]
    try:
        verify_append(identity, entry.attestation, entry.digests, context=members.contexts[entry.member])
    except VerificationError as error:
        raise VerificationError(error.reason, f"replica {entry.member}: {error}") from error


def verify_receipt(receipt: Receipt, members: Members) -> None:
    """Verify that f+1 members of the verifier's own cluster attest what the receipt says; else VerificationError."""
    if receipt.cluster_id != members.cluster_id:
        raise VerificationError(
            "wrong-cluster", f"it is of cluster {receipt.cluster_id.hex()}, not of {members.cluster_id.hex()}"
        )
    named = [entry.member for entry in receipt.entries]
    if named != sorted(set(named)):
        raise VerificationError("malformed", "its entries are not of distinct members in ascending order")
    if not len(named) >= members.quorum:
        raise VerificationError(
            "too-few", f"it shows entries of {len(named)} distinct members, f+1 = {members.quorum} are needed"
        )
    said = receipt.outcome
    payload = result_payload(
        said.slot, receipt.size, root_of_path(said.leaf, receipt.place, receipt.size, receipt.path)
    )
    for entry in receipt.entries:
        verify_entry(members, entry, payload)


_FIELDS = frozenset(
    ["receipt", "cluster", "client", "session", "number", "operation", "slot", "status", "result", "place", "size"]
) | {"path", "entries"}
_ENTRY_FIELDS = frozenset({"member", "statement", "signature", "digests", "place"})


def _entry_fields(entry: Entry) -> dict[str, object]:
    return {
        "member": entry.member,
        "statement": entry.attestation.statement.hex(),
        "signature": entry.attestation.signature.hex(),
        "digests": [digest.hex() for digest in entry.digests],
        "place": entry.place,
    }


def _entry(content: Any) -> Entry:  # noqa: ANN401 - JSON
    _only(content, _ENTRY_FIELDS)
    attestation = Attestation(_bytes(content["statement"], "statement"), _bytes(content["signature"], "signature"))
    digests = tuple(
        _bytes(one, "digests", HASH_SIZE) for one in _list(content["digests"], "digests", GROUP_ENTRIES_MAX)
    )
    return Entry(
        _number(content["member"], "member", _U32_MAX),
        attestation,
        digests,
        _number(content["place"], "place", _U32_MAX),
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise VerificationError("malformed", f"malformed: {what}")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a field stands twice")
    return content


def _only(content: object, fields: frozenset[str]) -> None:
    alike = isinstance(content, dict) and content.keys() == fields
    _require(alike, f"not an object with exactly the fields {', '.join(sorted(fields))}")


def _number(value: object, name: str, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise VerificationError("malformed", f"malformed: {name}: not a number from 0 to {largest}")
    return value


def _list(value: object, name: str, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        raise VerificationError("malformed", f"malformed: {name}: not a list of at most {longest}")
    return value


def _bytes(value: object, name: str, size: int | None = None) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or data.hex() != value or (size is not None and len(data) != size):
        raise VerificationError(
            "malformed", f"malformed: {name}: not {'' if size is None else f'{size} bytes in '}hex digits"
        )
    return data
