"""Receipts: what verifies, and that nothing that was forged, cut off, altered or aimed at something else does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import pytest

from tests.trustlog.support import CONTEXT, OTHER_CONTEXT
from trustlog import AttestedLog, BackendKind, LogIdentity, VerificationError, VerifyingKey, entry_digest, in_memory
from trustlog.merkle import MerkleTree
from trustlog.receipts import (
    PATH_MAX,
    RECEIPT_BYTES_MAX,
    Entry,
    Members,
    Outcome,
    Receipt,
    read_result,
    result_payload,
    verify_receipt,
)
from trustlog.verification import GROUP_ENTRIES_MAX

CLIENT = b"\x04" + bytes(range(64))
CLUSTER_ID = b"\x11" * 32


def outcome(number: int = 3, **other: object) -> Outcome:
    said = Outcome(CLIENT, (4, 1), number, b"put k %d" % number, 12, 0, b"\x01")
    return replace(said, **other)


class World:
    """Three logs of one cluster, a slot with some operations, and its RESULT in each log."""

    def __init__(self, operations: int = 5) -> None:
        self.logs: list[AttestedLog] = [in_memory(), in_memory(), in_memory()]
        keys = [VerifyingKey.from_bytes(log.public_key) for log in self.logs]
        identities = tuple(LogIdentity(key, BackendKind.SOFTWARE) for key in keys)
        self.members = Members(identities, 2, CLUSTER_ID, (CONTEXT,) * len(identities))
        self.outcomes = [outcome(number) for number in range(1, operations + 1)]
        self.tree = MerkleTree([one.leaf for one in self.outcomes])

    def say(self, member: int, payload: bytes, *, context: bytes = CONTEXT, before: int = 1) -> Entry:
        """Append `payload` in a group in which others stand before and after it."""
        digests = [entry_digest(b"before %d" % at) for at in range(before)] + [entry_digest(payload)]
        digests.append(entry_digest(b"after"))
        attestation = self.logs[member].append(digests, context=context)
        return Entry(member, attestation, tuple(digests), before)

    def result(self, slot: int = 12) -> bytes:
        return result_payload(slot, self.tree.size, self.tree.root)

    def receipt(self, place: int = 2, members: tuple[int, ...] = (0, 2)) -> Receipt:
        entries = tuple(self.say(member, self.result()) for member in members)
        path = tuple(self.tree.path(place))
        return Receipt(CLUSTER_ID, self.outcomes[place], place, self.tree.size, path, entries)

    def refuses(self, receipt: Receipt) -> VerificationError:
        with pytest.raises(VerificationError) as caught:
            verify_receipt(receipt, self.members)
        return caught.value


@pytest.mark.parametrize("operations", [1, 2, 3, 8, 20])
def test_a_receipt_verifies_after_it_was_written_and_read(operations):
    world = World(operations)
    for place in range(operations):
        receipt = world.receipt(place)
        assert Receipt.decode(receipt.encode()) == receipt
        verify_receipt(receipt, world.members)
    verify_receipt(world.receipt(0, (0, 1, 2)), world.members)


def test_results_have_one_layout():
    payload = result_payload(7, 3, bytes(range(32)))
    assert payload == b"\x0a" + (7).to_bytes(8, "big") + (3).to_bytes(4, "big") + bytes(range(32))
    assert read_result(payload) == (7, 3, bytes(range(32)))
    assert read_result(payload + b"\0") is read_result(payload[:-1]) is read_result(b"\x0b" + payload[1:]) is None


def test_no_byte_can_be_altered():
    """Whatever still reads as the same JSON (a space for a newline) says the same; all else is refused."""
    world = World(3)
    raw = world.receipt(1).encode()
    content = json.loads(raw)
    altered = 0
    for at in range(len(raw)):
        for changed in {raw[at] ^ 1, raw[at] ^ 0x20, ord("0"), ord(" ")} - {raw[at]}:
            data = raw[:at] + bytes([changed]) + raw[at + 1 :]
            try:
                if json.loads(data) == content:
                    continue
            except ValueError:
                pass
            altered += 1
            with pytest.raises(VerificationError):
                verify_receipt(Receipt.decode(data), world.members)
    assert altered > len(raw)


def test_no_part_can_be_cut_off():
    world = World(3)
    raw = world.receipt(1).encode()
    for end in range(len(raw) - 2):
        with pytest.raises(VerificationError, match="not JSON"):
            Receipt.decode(raw[:end])


def test_no_field_stands_twice():
    raw = World(3).receipt(1).encode()
    for name in (b'"slot": 12,', b'"slot": 13,'):
        with pytest.raises(VerificationError, match="twice"):
            Receipt.decode(raw.replace(b"{", b"{" + name, 1))


def test_another_version_is_named_whatever_its_fields_are():
    with pytest.raises(VerificationError, match="a receipt of version 2"):
        Receipt.decode(b'{"receipt": 2, "proof": "00"}')


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_another_encoding_is_none(encoding):
    raw = World(3).receipt(1).encode()
    with pytest.raises(VerificationError, match="not JSON"):
        Receipt.decode(raw.decode().encode(encoding))


def test_every_field_is_needed_and_no_other():
    content = json.loads(World(3).receipt(1).encode())
    for holder in (content, content["entries"][0]):
        for name in list(holder):
            kept = holder.pop(name)
            with pytest.raises(VerificationError, match="exactly the fields"):
                Receipt.decode(json.dumps(content).encode())
            holder[name] = kept
        holder["note"] = 1
        with pytest.raises(VerificationError, match="exactly the fields"):
            Receipt.decode(json.dumps(content).encode())
        del holder["note"]
    Receipt.decode(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("receipt", 2),
        ("receipt", True),
        ("slot", -1),
        ("slot", 1.0),
        ("slot", 2**64),
        ("status", 256),
        ("session", [1]),
        ("session", [1, 2**32]),
        ("session", [1, 2, 3]),
        ("client", "04"),
        ("client", "00" * 64 + " 0"),
        ("operation", "0G"),
        ("operation", "AB"),
        ("operation", None),
        ("path", ["00" * 31]),
        ("path", ["00" * 32] * 33),
        ("path", {}),
        ("entries", [7]),
        ("entries", "x"),
    ],
)
def test_a_field_of_another_form_is_refused(name, value):
    content = json.loads(World(3).receipt(1).encode())
    content[name] = value
    with pytest.raises(VerificationError) as caught:
        Receipt.decode(json.dumps(content).encode())
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"null", b"[" * 100_000, b'{"receipt": 1, "receipt": 1}', b"\xff"])
def test_other_files_are_no_receipts(data):
    with pytest.raises(VerificationError) as caught:
        Receipt.decode(data)
    assert caught.value.reason == "malformed"


def test_a_file_above_the_limit_is_not_looked_at():
    with pytest.raises(VerificationError, match="more than"):
        Receipt.decode(b" " * (RECEIPT_BYTES_MAX + 1))


@pytest.mark.parametrize("value", [b"{}", b"1", b"[]", b'{"a":1}'])
def test_a_file_of_many_values_is_refused_before_memory_is_spent(value):
    many = b"[" + b",".join([value] * 4_000_000) + b"]"
    tracemalloc.start()
    with pytest.raises(VerificationError, match="more values than a receipt of this size can have"):
        Receipt.decode(many[:RECEIPT_BYTES_MAX])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_receipt_with_the_most_values_is_read():
    digests = tuple(bytes([at % 256]) * 32 for at in range(GROUP_ENTRIES_MAX))
    shown = World().receipt()
    entries = tuple(replace(shown.entries[0], member=member, digests=digests) for member in range(11))
    most = replace(shown, path=(bytes(32),) * PATH_MAX, entries=entries)
    assert Receipt.decode(most.encode()) == most


@pytest.mark.parametrize(
    "other",
    [
        {"number": 4},
        {"operation": b"put k 4"},
        {"result": b"\x00"},
        {"status": 1},
        {"client": b"\x04" + bytes(64)},
        {"session": (4, 2)},
        {"slot": 13},
    ],
)
def test_a_receipt_is_for_one_operation_and_one_result(other):
    world = World()
    receipt = world.receipt(2)
    assert world.refuses(replace(receipt, outcome=replace(receipt.outcome, **other))).reason == "wrong-payload"


def test_a_path_from_elsewhere_does_not_do():
    world = World()
    receipt = world.receipt(2)
    for path in ((), receipt.path[:-1], (*receipt.path, bytes(32)), tuple(world.tree.path(1))):
        assert world.refuses(replace(receipt, path=path)).reason in {"wrong-path", "wrong-payload"}
    for place, size in ((3, 5), (2, 6), (2, 4), (5, 5), (0, 0)):
        assert world.refuses(replace(receipt, place=place, size=size)).reason in {"wrong-path", "wrong-payload"}


def test_fewer_than_a_quorum_of_distinct_members_do_not_do():
    world = World()
    receipt = world.receipt(2, (0, 1))
    first, second = receipt.entries
    assert world.refuses(replace(receipt, entries=(first,))).reason == "too-few"
    assert world.refuses(replace(receipt, entries=())).reason == "too-few"
    assert world.refuses(replace(receipt, entries=(first, first))).reason == "malformed"
    assert world.refuses(replace(receipt, entries=(second, first))).reason == "malformed"
    # One log's two entries, one of them under another's name.
    again = replace(world.say(0, world.result()), member=1)
    assert world.refuses(replace(receipt, entries=(first, again))).reason == "wrong-log"
    assert world.refuses(replace(receipt, entries=(first, replace(second, member=3)))).reason == "wrong-log"


def test_a_lie_of_f_members_convinces_nobody():
    """The faulty member attests another result; the others' entries do not match it."""
    world = World()
    honest = world.receipt(2, (0, 1))
    lie = replace(honest.outcome, result=b"a lie")
    tree = MerkleTree([lie.leaf])
    said = result_payload(12, 1, tree.root)
    forged = Receipt(CLUSTER_ID, lie, 0, 1, (), (world.say(0, said),))
    assert world.refuses(forged).reason == "too-few"
    assert world.refuses(replace(forged, entries=(forged.entries[0], honest.entries[1]))).reason == "wrong-payload"
    # f + 1 liars are one more than a cluster withstands: this shows that only their number is missing above.
    verify_receipt(replace(forged, entries=(forged.entries[0], world.say(1, said))), world.members)


def test_whose_keys_count_comes_from_the_verifier():
    world, other = World(), World()
    theirs = other.receipt(2)
    verify_receipt(theirs, other.members)
    assert world.refuses(theirs).reason == "wrong-log"
    assert world.refuses(replace(world.receipt(2), cluster_id=bytes(32))).reason == "wrong-cluster"


def test_statements_of_another_context_kind_or_entry_do_not_do():
    world = World()
    receipt = world.receipt(2)
    elsewhere = world.say(2, world.result(), context=OTHER_CONTEXT)
    assert world.refuses(replace(receipt, entries=(receipt.entries[0], elsewhere))).reason == "wrong-context"
    identity = world.members.identities[2]
    tpm = replace(identity, kind=BackendKind.PROCESS)
    members = replace(world.members, identities=(*world.members.identities[:2], tpm))
    with pytest.raises(VerificationError) as caught:
        verify_receipt(receipt, members)
    assert caught.value.reason == "wrong-kind"
    for place in (0, 2, 3, 1000):
        entries = (receipt.entries[0], replace(receipt.entries[1], place=place))
        assert world.refuses(replace(receipt, entries=entries)).reason == "wrong-payload"
    signature = replace(receipt.entries[1].attestation, signature=bytes(64))
    entries = (receipt.entries[0], replace(receipt.entries[1], attestation=signature))
    assert world.refuses(replace(receipt, entries=entries)).reason == "bad-signature"
    assert "replica 2" in str(world.refuses(replace(receipt, entries=entries)))


PLAIN = """
import sys
allowed = set(sys.stdlib_module_names) | {"trustlog", "cryptography", "_cffi_backend"}

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Nothing())
from trustlog import BackendKind, LogIdentity, VerifyingKey
from trustlog.receipts import Members, Receipt, verify_receipt

raw, context, cluster, *keys = sys.argv[1:]
identities = tuple(LogIdentity(VerifyingKey.from_bytes(bytes.fromhex(key)), BackendKind.SOFTWARE) for key in keys)
members = Members(identities, 2, bytes.fromhex(cluster), (bytes.fromhex(context),) * len(keys))
verify_receipt(Receipt.decode(raw.encode()), members)
try:
    import msgpack
except ImportError:
    print("verified", any(name.split(".")[0] in {"asyncio", "socket", "replica"} for name in sys.modules))
"""


def test_verifying_needs_the_standard_library_and_cryptography_only():
    world = World()
    arguments = [world.receipt(2).encode().decode(), CONTEXT.hex(), CLUSTER_ID.hex()]
    arguments += [log.public_key.hex() for log in world.logs]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "verified False\n"), done.stderr


def test_a_leaf_by_hand():
    """Whoever writes another verifier needs its layout."""
    said = Outcome(CLIENT, (1, 2), 3, b"operation", 4, 7, b"result")
    numbers = bytes(7) + b"\1" + bytes(3) + b"\2" + bytes(7) + b"\3"
    digest = hashlib.sha256(b"trustlog/operate" + CLIENT + numbers + b"operation").digest()
    assert said.leaf == hashlib.sha256(b"\0" + digest + b"\7" + b"result").digest()
