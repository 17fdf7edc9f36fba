from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustlog import (
    APPEND_SIZE,
    END_SIZE,
    LOOKUP_SIZE,
    QUOTE_SIZE,
    TRUNCATE_SIZE,
    AppendStatement,
    BackendKind,
    EndStatement,
    LookupStatement,
    Outcome,
    QuoteStatement,
    TruncateStatement,
    VerificationError,
    VerifyingKey,
    chain,
    entry_digest,
    fold,
    genesis_head,
    log_id,
)
from trustlog.statements import (
    TAG_APPEND,
    TAG_END,
    TAG_LOOKUP,
    TAG_QUOTE,
    TAG_TRUNCATE,
    U64_MAX,
    _Statement,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "statements.json").read_text())
TYPES = {
    "append": AppendStatement,
    "lookup": LookupStatement,
    "end": EndStatement,
    "truncate": TruncateStatement,
    "quote": QuoteStatement,
}
QUOTED_KEY = bytes([4]) + b"k" * 64
HEADER = (BackendKind.SOFTWARE, b"c" * 32, b"i" * 32, 0)
EXAMPLES = [
    AppendStatement(*HEADER, 3, 5, b"b" * 32, b"a" * 32),
    LookupStatement(*HEADER, b"n" * 32, 4, Outcome.ASSIGNED, b"d" * 32, 2, 5),
    LookupStatement(*HEADER, b"n" * 32, 6, Outcome.UNASSIGNED, bytes(32), 2, 5),
    LookupStatement(*HEADER, b"n" * 32, 1, Outcome.FORGOTTEN, bytes(32), 2, 5),
    EndStatement(*HEADER, b"n" * 32, 2, 5, b"h" * 32),
    TruncateStatement(*HEADER, 2, 5, b"h" * 32),
    QuoteStatement(BackendKind.TPM, b"c" * 32, log_id(QUOTED_KEY), 9, b"n" * 32, b"m" * 32, QUOTED_KEY),
]


def by_hand(fields: dict) -> bytes:
    """Lay a statement out from the table in words, without the code under test."""
    u64 = struct.Struct(">Q").pack
    tag = {"append": "append", "lookup": "lookup", "end": "end", "truncate": "trunc", "quote": "quote"}[
        fields["statement"]
    ]
    data = f"trustlog/{tag}".encode().ljust(16, b"\0") + bytes([1, fields["kind"]])
    data += bytes.fromhex(fields["context"]) + bytes.fromhex(fields["log_id"]) + u64(fields["epoch"])
    order = {
        "append": ["first", "last", "head_before", "head_after"],
        "lookup": ["nonce", "index", "outcome", "digest", "low", "last"],
        "end": ["nonce", "low", "last", "head"],
        "truncate": ["low", "last", "head"],
        "quote": ["nonce", "measurement", "public_key"],
    }
    for name in order[fields["statement"]]:
        value = fields[name]
        if name == "outcome":
            data += bytes([value])
        else:
            data += bytes.fromhex(value) if isinstance(value, str) else u64(value)
    return data


@pytest.mark.parametrize("vector", VECTORS["statements"], ids=lambda vector: vector["name"])
def test_statement_vectors(vector):
    data = bytes.fromhex(vector["bytes"])
    assert by_hand(vector["fields"]) == data
    statement = TYPES[vector["fields"]["statement"]].decode(data)
    assert statement.encode() == data
    for name, value in vector["fields"].items():
        if name != "statement":
            assert getattr(statement, name) == (bytes.fromhex(value) if isinstance(value, str) else value)
    key = bytes.fromhex(vector["fields"].get("public_key", VECTORS["public_key"]))
    VerifyingKey.from_bytes(key).verify(bytes.fromhex(vector["signature"]), data)


def test_vectors_cover_every_statement_outcome_and_kind():
    fields = [vector["fields"] for vector in VECTORS["statements"]]
    assert {field["statement"] for field in fields} == set(TYPES)
    assert {field["outcome"] for field in fields if "outcome" in field} == set(Outcome)
    assert {field["kind"] for field in fields} == set(BackendKind)


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["name"])
def test_refused_vectors(vector):
    with pytest.raises(VerificationError) as caught:
        TYPES[vector["statement"]].decode(bytes.fromhex(vector["bytes"]))
    assert caught.value.reason == vector["reason"]


def test_hash_vectors():
    hashes = VECTORS["hashes"]
    own_id = log_id(bytes.fromhex(VECTORS["public_key"]))
    assert own_id.hex() == hashes["log_id"]
    assert genesis_head(own_id, 0).hex() == hashes["genesis_head_epoch_0"]
    assert genesis_head(own_id, 7).hex() == hashes["genesis_head_epoch_7"]
    digests = [entry_digest(payload.encode()) for payload in hashes["payloads"]]
    assert [digest.hex() for digest in digests] == hashes["digests"]
    head = genesis_head(own_id, 0)
    for index, (digest, expected) in enumerate(zip(digests, hashes["heads"], strict=True), 1):
        head = chain(head, index, digest)
        assert head.hex() == expected
    assert fold(genesis_head(own_id, 0), 1, digests) == head
    assert fold(bytes.fromhex(hashes["heads"][0]), 2, digests[1:]) == head


def test_domain_tags_are_distinct_and_full_size():
    tags = [TAG_APPEND, TAG_END, TAG_LOOKUP, TAG_QUOTE, TAG_TRUNCATE]
    assert len(set(tags)) == 5
    assert {len(tag) for tag in tags} == {16}


def test_sizes_are_those_of_the_table():
    assert (APPEND_SIZE, LOOKUP_SIZE, END_SIZE, TRUNCATE_SIZE, QUOTE_SIZE) == (170, 179, 170, 138, 219)


@pytest.mark.parametrize("statement", EXAMPLES, ids=repr)
def test_round_trip_and_strict_length(statement):
    data = statement.encode()
    assert type(statement).decode(data) == statement
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(VerificationError) as caught:
            type(statement).decode(wrong)
        assert caught.value.reason == "malformed"


@pytest.mark.parametrize("statement", EXAMPLES, ids=repr)
def test_no_statement_decodes_as_another(statement):
    for other in set(TYPES.values()) - {type(statement)}:
        with pytest.raises(VerificationError) as caught:
            other.decode(statement.encode())
        assert caught.value.reason == "wrong-statement"


@pytest.mark.parametrize("data", [b"", b"trustlog/append", TAG_APPEND])
def test_stubs_are_refused(data):
    with pytest.raises(VerificationError):
        AppendStatement.decode(data)


@pytest.mark.parametrize(("position", "value"), [(16, 0), (16, 2), (17, 0), (17, 4)])
def test_unknown_version_and_kind(position, value):
    for statement in EXAMPLES:
        data = bytearray(statement.encode())
        data[position] = value
        with pytest.raises(VerificationError) as caught:
            type(statement).decode(bytes(data))
        assert caught.value.reason == "malformed"


BAD = [
    lambda: AppendStatement(*HEADER, 0, 5, bytes(32), bytes(32)),
    lambda: AppendStatement(*HEADER, 6, 5, bytes(32), bytes(32)),
    lambda: AppendStatement(*HEADER, 1, U64_MAX + 1, bytes(32), bytes(32)),
    lambda: AppendStatement(*HEADER, 1, 1, bytes(31), bytes(32)),
    lambda: AppendStatement(*HEADER, 1, 1, bytes(32), bytes(33)),
    lambda: LookupStatement(*HEADER, bytes(31), 4, Outcome.ASSIGNED, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 0, Outcome.FORGOTTEN, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), U64_MAX + 1, Outcome.UNASSIGNED, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 4, Outcome.UNASSIGNED, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 6, Outcome.ASSIGNED, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 1, Outcome.ASSIGNED, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 1, 4, bytes(32), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 6, Outcome.UNASSIGNED, b"d" * 32, 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 1, Outcome.FORGOTTEN, b"d" * 32, 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 4, Outcome.ASSIGNED, bytes(31), 2, 5),
    lambda: LookupStatement(*HEADER, bytes(32), 4, Outcome.ASSIGNED, bytes(32), 0, 5),
    lambda: EndStatement(*HEADER, bytes(33), 1, 5, bytes(32)),
    lambda: EndStatement(*HEADER, bytes(32), 7, 5, bytes(32)),
    lambda: EndStatement(*HEADER, bytes(32), 0, 5, bytes(32)),
    lambda: EndStatement(*HEADER, bytes(32), 1, -1, bytes(32)),
    lambda: EndStatement(*HEADER, bytes(32), 1, 5, bytes(31)),
    lambda: EndStatement(*HEADER, bytes(32), U64_MAX + 1, U64_MAX, bytes(32)),
    lambda: QuoteStatement(*HEADER, bytes(32), bytes(32), QUOTED_KEY),
    lambda: QuoteStatement(*HEADER[:2], log_id(QUOTED_KEY), 0, bytes(31), bytes(32), QUOTED_KEY),
    lambda: QuoteStatement(*HEADER[:2], log_id(QUOTED_KEY), 0, bytes(32), bytes(31), QUOTED_KEY),
    lambda: QuoteStatement(*HEADER[:2], log_id(QUOTED_KEY[1:]), 0, bytes(32), bytes(32), QUOTED_KEY[1:]),
    lambda: TruncateStatement(*HEADER, 1, U64_MAX + 1, bytes(32)),
    lambda: TruncateStatement(*HEADER, 1, 1, bytes(31)),
    lambda: TruncateStatement(BackendKind.TPM, bytes(31), bytes(32), 0, 1, 1, bytes(32)),
    lambda: TruncateStatement(BackendKind.TPM, bytes(32), bytes(31), 0, 1, 1, bytes(32)),
    lambda: TruncateStatement(BackendKind.TPM, bytes(32), bytes(32), -1, 1, 1, bytes(32)),
    lambda: TruncateStatement(BackendKind.TPM, bytes(32), bytes(32), U64_MAX + 1, 1, 1, bytes(32)),
]


@pytest.mark.parametrize("build", BAD)
def test_invalid_statements_cannot_be_built(build):
    with pytest.raises(VerificationError) as caught:
        build()
    assert caught.value.reason == "malformed"


def test_the_common_base_is_no_statement():
    with pytest.raises(NotImplementedError):
        _Statement(*HEADER)
    with pytest.raises(NotImplementedError):
        _Statement._body(EXAMPLES[0])


@given(st.binary(max_size=250), st.sampled_from(list(TYPES.values())))
def test_arbitrary_bytes_never_escape_as_another_error(data, statement_type):
    for candidate in (data, statement_type.TAG + b"\x01\x01" + data):
        try:
            statement = statement_type.decode(candidate)
        except VerificationError:
            continue
        assert statement.encode() == candidate


u64 = st.integers(0, U64_MAX)
b32 = st.binary(min_size=32, max_size=32)


@given(st.sampled_from(BackendKind), st.tuples(b32, b32, b32, b32), u64, st.tuples(u64, u64))
def test_decode_inverts_encode(kind, values, epoch, bounds):
    context, own_id, nonce, head = values
    low, last = bounds
    low = min(max(low, 1), last + 1, U64_MAX)
    for statement in (
        EndStatement(kind, context, own_id, epoch, nonce, low, last, head),
        TruncateStatement(kind, context, own_id, epoch, low, last, head),
        AppendStatement(kind, context, own_id, epoch, low, max(low, last), head, nonce),
    ):
        assert type(statement).decode(statement.encode()) == statement
