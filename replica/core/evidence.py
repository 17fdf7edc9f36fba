r"""Evidence against a log, as it is kept in a file and shown to anybody who has the cluster file.

What it claims (whose log, which entry, which rule) stands in front; `replica.core.proving` comes to the same claim from
the rest alone, with the public keys of the verifier's own cluster file, or refuses. Integers are big-endian; a block is
a u32 length and its bytes.

    16 tag "trustlog/fault\0\1"     u8 kind     32 cluster id
    u16 log     u64 index of the entry     u8 length and name of the rule, ASCII

    kind 1, entry       the entry alone shows it (no layout of an entry; an envelope that its client did not sign)
                        block group
    kind 2, replay      whoever reads the logs as every replica does comes to it: the accused log and what it waited for
                        basis, then for each log u32 count and count x block group, in order, from the basis on
    kind 3, checkpoint  a CHECKPOINT whose digest is not the one that q logs attested for that slot
                        block group, block certificate (layout in `replica.core.checkpoint`)
    kind 4, bare        not self-contained: what the first three kinds need was too large, or gone when collected.
                        It shows who said the entry, and proves no fault
                        block group

    basis               u8 0: the logs' beginnings
                        u8 1, block header, block certificate, then for each log block reduced state at the header's cut

Groups are in the layout of `replica.core.group`. Contradictory statements of one log are no such file but a JSON
document that `trustlog verify` checks by itself.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from replica.core.layout import LayoutError, Reader

EVIDENCE_TAG = b"trustlog/fault\0\1"
# A file of evidence: as much as a few milestones' worth of logs. What needs more is kept as kind 4.
EVIDENCE_BYTES_MAX = 64 * 1024 * 1024
RULE_SIZE_MAX = 40
# What a file's claim takes at the most.
CLAIM_BYTES_MAX = 256
_FIXED = struct.Struct(">16sB32sHQ")


class Kind(IntEnum):
    """How a file shows what it claims."""

    ENTRY = 1
    REPLAY = 2
    CHECKPOINT = 3
    BARE = 4


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed: replica `log` broke `rule` with its entry `index`."""

    log: int
    index: int
    rule: str


@dataclass(frozen=True, slots=True)
class Basis:
    """A certified checkpoint to read on from, all encoded. states: every log's reduced state at the header's cut."""

    header: bytes
    certificate: bytes
    states: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A file of evidence, taken apart; nothing is verified here.

    groups: kind 2: of every log; else one tuple with the one group. certificate: kind 3 only. basis: kind 2 only.
    """

    kind: Kind
    cluster_id: bytes
    claim: Claim
    groups: tuple[tuple[bytes, ...], ...]
    certificate: bytes = b""
    basis: Basis | None = None

    def encode(self) -> bytes:
        """Return the documented layout."""
        rule = self.claim.rule.encode("ascii")
        parts = [_FIXED.pack(EVIDENCE_TAG, self.kind, self.cluster_id, self.claim.log, self.claim.index)]
        parts += [bytes([len(rule)]), rule]
        if self.kind is not Kind.REPLAY:
            parts.append(_block(self.groups[0][0]))
            if self.kind is Kind.CHECKPOINT:
                parts.append(_block(self.certificate))
            return b"".join(parts)
        parts.append(bytes([self.basis is not None]))
        if self.basis is not None:
            parts += map(_block, (self.basis.header, self.basis.certificate, *self.basis.states))
        for groups in self.groups:
            parts.append(struct.pack(">I", len(groups)))
            parts += map(_block, groups)
        return b"".join(parts)


def decode_claim(raw: bytes) -> tuple[Kind, bytes, Claim]:
    """Return kind, cluster id and claim from the beginning of a file; LayoutError if it is none."""
    return _claim(Reader(raw))


def decode_evidence(raw: bytes, n: int) -> Evidence:
    """Decode a file of a cluster of n replicas; LayoutError if these bytes are not exactly one."""
    if len(raw) > EVIDENCE_BYTES_MAX:
        raise LayoutError(f"evidence of more than {EVIDENCE_BYTES_MAX} bytes")
    reader = Reader(raw)
    kind, cluster_id, claim = _claim(reader)
    if kind is not Kind.REPLAY:
        group = reader.block(len(raw))
        certificate = reader.block(len(raw)) if kind is Kind.CHECKPOINT else b""
        reader.finish()
        return Evidence(kind, cluster_id, claim, ((group,),), certificate)
    has_basis = reader.u8()
    if has_basis > 1:
        raise LayoutError(f"there is no basis {has_basis}")
    basis = None
    if has_basis:
        header, certificate = reader.block(len(raw)), reader.block(len(raw))
        basis = Basis(header, certificate, tuple(reader.block(len(raw)) for _ in range(n)))
    groups = tuple(tuple(reader.block(len(raw)) for _ in range(reader.u32())) for _ in range(n))
    reader.finish()
    return Evidence(kind, cluster_id, claim, groups, basis=basis)


def _claim(reader: Reader) -> tuple[Kind, bytes, Claim]:
    tag, kind, cluster_id, log, index = _FIXED.unpack(reader.take(_FIXED.size))
    if tag != EVIDENCE_TAG or not Kind.ENTRY <= kind <= Kind.BARE:
        raise LayoutError("not a file of evidence, or of a kind that this program does not know")
    size = reader.u8()
    if not 1 <= size <= RULE_SIZE_MAX:
        raise LayoutError(f"a rule's name of {size} bytes, the limit is {RULE_SIZE_MAX}")
    try:
        rule = reader.take(size).decode("ascii")
    except UnicodeDecodeError:
        raise LayoutError("a rule's name that is not ASCII") from None
    return Kind(kind), cluster_id, Claim(log, index, rule)


def _block(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content
