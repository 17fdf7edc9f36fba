"""The JSON documents that ``trustlog`` writes and verifies: readable facts next to the attested bytes.

The bytes count. Facts beside them are for people; verifying refuses a document whose facts differ from its
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trustlog.errors import VerificationError
from trustlog.hashing import entry_digest
from trustlog.statements import (
    AppendStatement,
    BackendKind,
    EndStatement,
    LookupStatement,
    Outcome,
    TruncateStatement,
)
from trustlog.verification import (
    GROUP_ENTRIES_MAX,
    Attestation,
    LogIdentity,
    find_contradiction,
    heads_of,
    initial_head,
    verify_append,
    verify_end,
    verify_lookup,
    verify_truncate,
)

DOCUMENT_SIZE_MAX = 16 * 2**20

Statement = AppendStatement | LookupStatement | EndStatement | TruncateStatement
_TYPES: dict[bytes, type[Statement]] = {
    statement_type.TAG: statement_type
    for statement_type in (AppendStatement, LookupStatement, EndStatement, TruncateStatement)
}


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the verifier knows by itself; None or empty: not compared."""

    context: bytes
    nonce: bytes | None = None
    index: int | None = None
    payloads: Sequence[bytes] = ()


def decode_statement(data: bytes) -> Statement:
    """Decode whichever statement ``data`` is; VerificationError otherwise."""
    statement_type = _TYPES.get(data[:16])
    if statement_type is None:
        raise VerificationError("wrong-statement", "this is no statement of an attested log")
    return statement_type.decode(data)


def facts(statement: Statement) -> dict[str, object]:
    """Return what a statement says, as JSON values: bytes as hex, names in small letters."""
    said: dict[str, object] = {"kind": statement.kind.name.lower(), "log_id": statement.log_id.hex()}
    said["epoch"] = statement.epoch
    match statement:
        case AppendStatement():
            said |= {"statement": "append", "first": statement.first, "last": statement.last}
            said["head"] = statement.head_after.hex()
        case LookupStatement():
            digest = statement.digest.hex() if statement.outcome is Outcome.ASSIGNED else None
            said |= {
                "statement": "lookup",
                "index": statement.index,
                "outcome": statement.outcome.name.lower(),
            }
            said |= {"digest": digest, "low": statement.low, "last": statement.last}
            said["nonce"] = statement.nonce.hex()
        case EndStatement():
            said |= {"statement": "end", "low": statement.low, "last": statement.last}
            said |= {"head": statement.head.hex(), "nonce": statement.nonce.hex()}
        case TruncateStatement():
            said |= {"statement": "truncate", "low": statement.low, "last": statement.last}
            said["head"] = statement.head.hex()
    return said


def document(
    attestation: Attestation, *, digests: Sequence[bytes] = (), payload: bytes | None = None
) -> dict[str, object]:
    """Build the document of one attestation; ``digests`` of an append, ``payload`` of a lookup."""
    content = facts(decode_statement(attestation.statement))
    if digests:
        content["digests"] = [digest.hex() for digest in digests]
    if payload is not None:
        content["payload"] = payload.hex()
    statement, signature = attestation.statement.hex(), attestation.signature.hex()
    return content | {"attestation": {"statement": statement, "signature": signature}}


def contradiction_document(
    a: Attestation, digests_a: Sequence[bytes], b: Attestation, digests_b: Sequence[bytes]
) -> dict[str, object]:
    """Build the document of two groups of one log that contradict each other."""
    return {"contradiction": [document(a, digests=digests_a), document(b, digests=digests_b)]}


def verify_document(data: bytes, identity: LogIdentity, expected: Expectation) -> dict[str, object]:
    """Verify a document with nothing but the log's identity: of its log.pub (``published``), or of a cluster file.

    Returns the facts, else VerificationError.
    """
    content = _parse(data)
    if "contradiction" in content:
        return _verify_contradiction(content, identity, expected)
    attestation = _attestation(content)
    statement = decode_statement(attestation.statement)
    _check_answerable(statement, expected)
    _check_pinned(statement.kind, identity)
    context = expected.context
    digests: list[bytes] = []
    match statement:
        case AppendStatement():
            listed = _field(content, "digests", list)[: GROUP_ENTRIES_MAX + 1]
            digests = [_bytes_of(digest) for digest in listed]
            verify_append(identity, attestation, digests, context=context)
            _check_beginning(identity, statement, digests)
        case LookupStatement():
            nonce = statement.nonce if expected.nonce is None else expected.nonce
            index = statement.index if expected.index is None else expected.index
            verify_lookup(identity, attestation, context=context, nonce=nonce, index=index)
            digests = [statement.digest] if statement.outcome is Outcome.ASSIGNED else []
        case EndStatement():
            nonce = statement.nonce if expected.nonce is None else expected.nonce
            verify_end(identity, attestation, context=context, nonce=nonce)
        case TruncateStatement():
            verify_truncate(identity, attestation, context=context)
    said = facts(statement)
    _check_facts(content, said)
    if statement.kind is BackendKind.TPM:
        said["not_proven"] = _not_proven(statement)
    if "payload" in content:
        _check_payloads([_bytes_of(content["payload"])], digests)
        said["payload"] = content["payload"]
    if expected.payloads:
        _check_payloads(expected.payloads, digests)
    return said


def _verify_contradiction(content: dict[str, Any], identity: LogIdentity, expected: Expectation) -> dict[str, object]:
    """Verify that two statements prove the log's trusted part broken; they count in whatever context they were made."""
    if expected.nonce is not None or expected.index is not None or expected.payloads:
        raise VerificationError("wrong-document", "two statements that contradict answer no nonce, index or payload")
    shown = _field(content, "contradiction", list)
    if len(shown) != 2 or not all(isinstance(one, dict) for one in shown):
        raise VerificationError("malformed", "a contradiction is one of two statements")
    groups = [(_attestation(one), [_bytes_of(digest) for digest in _field(one, "digests", list)]) for one in shown]
    for attestation, _ in groups:
        _check_pinned(decode_statement(attestation.statement).kind, identity)
    why = find_contradiction(identity, *groups[0], *groups[1])
    if why is None:
        raise VerificationError("no-contradiction", "the two statements agree with each other")
    for one, (attestation, _) in zip(shown, groups, strict=True):
        _check_facts(one, facts(decode_statement(attestation.statement)))
    return {"statement": "contradiction", "log_id": identity.key.log_id.hex(), "contradiction": why}


def _check_beginning(identity: LogIdentity, statement: AppendStatement, digests: Sequence[bytes]) -> None:
    """Refuse a TPM log's entry 1 that does not stand on the pinned base: replaying could never reach it."""
    if statement.kind is not BackendKind.TPM or statement.first != 1:
        return
    if heads_of(identity, statement, digests)[0] != initial_head(identity):
        raise VerificationError(
            "wrong-head", "this says to be the log's beginning, and does not begin at the base that was pinned"
        )


def _not_proven(statement: Statement) -> str:
    """Say what a TPM's word leaves open: it counts no indexes, its host does (``trustlog.tpm.chain``)."""
    if isinstance(statement, AppendStatement):
        entries = str(statement.first)
        if statement.last > statement.first:
            entries = f"{statement.first} to {statement.last}"
        return f"that this is the log's entry {entries} (only replaying the log from its pinned base shows that)"
    return f"that the log ends at entry {statement.last} and keeps what is from {statement.low} on: its host's word"


def _check_pinned(kind: BackendKind, identity: LogIdentity) -> None:
    if kind is BackendKind.TPM and identity.tpm is None:
        raise VerificationError(
            "not-pinned", "a TPM's statement counts only with what was pinned: give the log.pub of its enrolment"
        )


def _attestation(content: dict[str, Any]) -> Attestation:
    attested = _field(content, "attestation", dict)
    return Attestation(_bytes_of(_field(attested, "statement", str)), _bytes_of(_field(attested, "signature", str)))


def _check_facts(content: dict[str, Any], said: dict[str, object]) -> None:
    for name, value in said.items():
        if name in content and content[name] != value:
            raise VerificationError("wrong-document", f"the document's {name} is not what was attested")


def _check_answerable(statement: Statement, expected: Expectation) -> None:
    """Refuse an expectation that this kind of statement cannot meet: ignoring it would look like proof."""
    name = str(facts(statement)["statement"])
    name = f"an {name}" if name in {"append", "end"} else f"a {name}"
    if expected.nonce is not None and not isinstance(statement, (LookupStatement, EndStatement)):
        raise VerificationError("no-nonce", f"{name} statement has no nonce: it proves no freshness")
    if expected.index is not None and not isinstance(statement, LookupStatement):
        raise VerificationError("no-index", f"{name} statement answers no question about an index")
    if expected.payloads and not isinstance(statement, (AppendStatement, LookupStatement)):
        raise VerificationError("no-payload", f"{name} statement attests no payload")


def _check_payloads(payloads: Sequence[bytes], digests: Sequence[bytes]) -> None:
    if [entry_digest(payload) for payload in payloads] != list(digests):
        raise VerificationError("wrong-payload", "the payload is not what was attested")


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > DOCUMENT_SIZE_MAX:
        raise VerificationError("malformed", f"the document has more than {DOCUMENT_SIZE_MAX} bytes")
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise VerificationError("malformed", "the document is not JSON, or names a field twice") from error
    if not isinstance(content, dict):
        raise VerificationError("malformed", "the document is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a field stands twice")
    return content


def _field(content: dict[str, Any], name: str, expected: type) -> Any:  # noqa: ANN401
    if not isinstance(content.get(name), expected):
        raise VerificationError("malformed", f"the document has no proper {name!r}")
    return content[name]


def _bytes_of(value: object) -> bytes:
    try:
        if isinstance(value, str):
            return bytes.fromhex(value)
    except ValueError:
        pass
    raise VerificationError("malformed", "the document holds something else where hex digits belong")
