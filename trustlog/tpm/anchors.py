r"""Anchors: a log's heads in an NV index that survives reboots and power cuts, for those who are not replicas.

    anchor   SHA-256("trustlog/anchor\0" ‖ log id ‖ u64 last ‖ head)                 extended into the index
    index    of type EXTEND: new value = SHA-256(old value ‖ anchor), 32 zero bytes at first; not orderly, so that no
             power cut takes anything back. Its public area, and so its name, is the one of ``index_public``.
    policy   PolicyOR(PolicyNvWritten(yes), PolicyNvWritten(no) and PolicySigned(verifier key, log id))

Whoever owns the TPM may undefine the index. But a new one is not written yet, and the first write of that needs a new
signature by the verifier, over a nonce of the TPM's own; so the value has one history. The first anchor is the empty
log's. From the list of anchors and one NV_Certify a verifier concludes: these heads were anchored, in this order,
and no others; so at the last of them the log had this head and never another, whatever happened to the machine since.

A crash between the list and the index is repaired: the list is written first, and its last line is extended again if
the index does not hold it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

from trustlog.errors import MisuseError, SealedStateError, TrustLogError, VerificationError
from trustlog.hashing import HASH_SIZE
from trustlog.keys import VerifyingKey
from trustlog.statements import U64_MAX
from trustlog.tpm.client import Signed, Tpm
from trustlog.tpm.exchange import no_password, session_auth
from trustlog.tpm.quote import NvCertification, verify_nv_certification
from trustlog.tpm.structures import (
    ALG_ECC,
    ALG_NULL,
    ALG_SHA256,
    CURVE_P256,
    NV_INDEXES,
    SIGN,
    USER_WITH_AUTH,
    name_of,
    sized,
)
from trustlog.tpm.wire import TpmError

ANCHORS_FILE = "anchors.jsonl"
PLACE_FILE = "anchor.json"
PLACE_SIZE_MAX = 1024
# A log that has an anchorage anchors itself with an append, so often at the most, and when it is closed. A chip's NV
# memory endures some hundred thousand writes: a year or more of these.
ANCHOR_PAUSE_S = 300.0
# The pause doubles with every so many anchors: then a list that is shown whole (2,048: `trustlog.appraisal.evidence`)
# lasts for 80 years, and after a year of appends the last anchor is two days old at most.
ANCHORS_PER_PAUSE = 128
ANCHORS_MAX = 1 << 20
INDEX_DEFAULT = 0x01817400  # an owner's index ("Registry of Reserved TPM 2.0 Handles": 0x01800000 … 0x01BFFFFF)

# TPMA_NV (part 2, section 13.4): type EXTEND, written by policy, read with the (empty) password, never locked out.
_EXTEND, _POLICY_WRITE, _AUTH_READ, _NO_DA, _WRITTEN = 4 << 4, 1 << 3, 1 << 18, 1 << 25, 1 << 29
INDEX_ATTRIBUTES = _EXTEND | _POLICY_WRITE | _AUTH_READ | _NO_DA
_CODE_POLICY_SIGNED, _CODE_POLICY_OR, _CODE_POLICY_NV_WRITTEN = 0x160, 0x171, 0x18F
_TAG = b"trustlog/anchor\0"

# Signs the message that it is given with the verifier's key: r‖s, 64 bytes.
Sign = Callable[[bytes], bytes]


class Anchor(NamedTuple):
    """A log's end at some time: index of the last entry, and the chain's head there (32 bytes)."""

    last: int
    head: bytes


@dataclass(frozen=True, slots=True)
class AnchorIndex:
    """An NV index for the anchors of the log ``log_id``, whose first write ``verifier`` must sign. ValueError: none."""

    index: int
    log_id: bytes
    verifier: VerifyingKey

    def __post_init__(self) -> None:
        """Check the index: part 2, section 7.4, handles of type TPM_HT_NV_INDEX."""
        if self.index not in NV_INDEXES:
            raise ValueError(f"{self.index:#x} is no NV index, which are {NV_INDEXES[0]:#x} to {NV_INDEXES[-1]:#x}")

    @property
    def branches(self) -> tuple[bytes, bytes]:
        """The policies of a written and of an unwritten index (32 bytes each; part 1, section 19.7)."""
        written = _policy(bytes(32), _CODE_POLICY_NV_WRITTEN, b"\x01")
        unwritten = _policy(bytes(32), _CODE_POLICY_NV_WRITTEN, b"\x00")
        signed = _policy(unwritten, _CODE_POLICY_SIGNED, name_of(verifier_public(self.verifier)))
        return written, hashlib.sha256(signed + self.log_id).digest()

    @property
    def public(self) -> bytes:
        """The TPMS_NV_PUBLIC to define the index with."""
        return self._public(INDEX_ATTRIBUTES)

    @property
    def name(self) -> bytes:
        """The name (34 bytes) of the index once it was written: no other index, policy or type has it."""
        return name_of(self._public(INDEX_ATTRIBUTES | _WRITTEN))

    def _public(self, attributes: int) -> bytes:
        policy = _policy(bytes(32), _CODE_POLICY_OR, b"".join(self.branches))
        return struct.pack(">IHI", self.index, ALG_SHA256, attributes) + sized(policy) + struct.pack(">H", HASH_SIZE)


def _policy(before: bytes, code: int, what: bytes) -> bytes:
    return hashlib.sha256(before + struct.pack(">I", code) + what).digest()


def verifier_public(key: VerifyingKey) -> bytes:
    """Return the TPMT_PUBLIC under which a TPM checks the verifier's signatures."""
    head = struct.pack(">HHIH", ALG_ECC, ALG_SHA256, USER_WITH_AUTH | SIGN, 0)
    detail = struct.pack(">HHHH", ALG_NULL, ALG_NULL, CURVE_P256, ALG_NULL)
    return head + detail + sized(key.raw[1:33]) + sized(key.raw[33:])


def message_to_sign(nonce: bytes, log_id: bytes) -> bytes:
    """Return what the verifier signs for a first write (part 3, section 23.3): it must be sure that nonce is new."""
    return nonce + struct.pack(">i", 0) + log_id


def anchor_digest(log_id: bytes, anchor: Anchor) -> bytes:
    """Return what an anchor extends the index with."""
    return hashlib.sha256(_TAG + log_id + struct.pack(">Q", anchor.last) + anchor.head).digest()


def value_of(log_id: bytes, anchors: Sequence[Anchor]) -> bytes:
    """Return the index's value after these anchors, from the first on."""
    value = bytes(HASH_SIZE)
    for anchor in anchors:
        value = hashlib.sha256(value + anchor_digest(log_id, anchor)).digest()
    return value


def verify_anchors(
    place: AnchorIndex, key: VerifyingKey, first_head: bytes, anchors: Sequence[Anchor], proof: Signed, nonce: bytes
) -> NvCertification:
    """Verify that the log's TPM holds exactly these anchors, asked with ``nonce`` (32 bytes).

    key: of the log. first_head: of the empty log. VerificationError "wrong-anchors" (not from the empty log on, not
    rising, or others than in the index), "wrong-nonce", and those of ``verify_nv_certification``.
    """
    if not anchors or anchors[0] != Anchor(0, first_head):
        raise VerificationError("wrong-anchors", "the anchors do not begin with the empty log")
    if any(later.last <= earlier.last for earlier, later in pairwise(anchors)):
        raise VerificationError("wrong-anchors", "the anchors are not in rising order")
    said = verify_nv_certification(key, proof.attest, proof.signature, name=place.name)
    if said.extra_data != nonce:
        raise VerificationError("wrong-nonce", "the certificate was made for another question")
    if said.content != value_of(place.log_id, anchors):
        raise VerificationError("wrong-anchors", "the NV index holds other anchors than these")
    return said


class Anchorage:
    """The anchors of one log: the NV index in its TPM, and the list in its folder."""

    def __init__(self, tpm: Tpm, place: AnchorIndex, folder: Path) -> None:
        self.place = place
        self._tpm = tpm
        self._place = place
        self._path = folder / ANCHORS_FILE
        self.anchors, self._end = _read(self._path)

    def begin(self, first_head: bytes, sign: Sign) -> None:
        """Define the index and anchor the empty log, with the verifier's signature; MisuseError if that was done.

        What a crash left half done is finished. The folder names the index before there is one.
        """
        place = self._path.parent / PLACE_FILE
        content = json.dumps({"index": f"{self._place.index:#010x}", "verifier": self._place.verifier.raw.hex()}) + "\n"
        start = Anchor(0, first_head)
        resumed = bool(self.anchors)
        if resumed and self._stands():
            if place.exists() and place.read_bytes() == content.encode():
                raise MisuseError(f"{self._path} exists: this log is anchored already")
            _replace(place, content.encode())
            return
        if self.anchors not in ([], [start]):
            raise MisuseError(f"{self._path} exists: this log is anchored already, elsewhere than in this index")
        if not resumed:
            self._note(start)
        _replace(place, content.encode())
        try:
            self._define(resumed=resumed)
        except (MisuseError, TpmError):
            if not resumed:
                place.unlink()
                self._path.unlink()
                self.anchors, self._end = [], 0
            raise
        self._extend(start, sign)

    def _stands(self) -> bool:
        """Tell whether the index is there, and holds what the list says."""
        try:
            name = self._tpm.nv_read_public(self._place.index).name
            value = self._tpm.nv_read(self._place.index, HASH_SIZE, no_password())
        except (TpmError, VerificationError):
            return False
        return name == self._place.name and value == value_of(self._place.log_id, self.anchors)

    def _define(self, *, resumed: bool) -> None:
        """Define the index, unless a beginning that was not finished has defined it."""
        try:
            self._tpm.nv_define(self._place.public)
        except TpmError as error:
            if error.code != 0x14C:
                raise
            if not (resumed and self._tpm.nv_read_public(self._place.index).name == name_of(self._place.public)):
                raise MisuseError(f"NV index {self._place.index:#010x} is taken; choose another") from error

    def anchor(self, last: int, head: bytes) -> None:
        """Anchor the log's end; nothing happens if it is anchored already. MisuseError if it would go back."""
        self._settle()
        anchor = Anchor(last, head)
        if anchor == self.anchors[-1]:
            return
        if not self.anchors[-1].last < last <= U64_MAX:
            raise MisuseError(f"entry {self.anchors[-1].last} is anchored; {last} is not after it")
        if len(self.anchors) >= ANCHORS_MAX:
            raise MisuseError(f"{ANCHORS_MAX} anchors are the most; anchor more seldom")
        self._note(anchor)
        self._extend(anchor, None)

    def certify(self, key: int, nonce: bytes) -> Signed:
        """Have the log's key (its handle) sign the index's content, with the asker's nonce."""
        return self._tpm.nv_certify(key, self._place.index, HASH_SIZE, nonce, no_password())

    def _note(self, anchor: Anchor) -> None:
        """Make the anchor the list's last line, durably."""
        line = json.dumps({"last": anchor.last, "head": anchor.head.hex()}).encode() + b"\n"
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644), "wb") as stream:
            stream.truncate(self._end)
            stream.seek(self._end)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._end += len(line)
        self.anchors.append(anchor)

    def _settle(self) -> None:
        """Compare the list with the index; extend by the list's last line if only that is missing."""
        if not self.anchors:
            raise MisuseError("this log is not anchored yet: begin with the verifier's signature")
        log_id = self._place.log_id
        try:
            value = self._tpm.nv_read(self._place.index, HASH_SIZE, no_password())
        except TpmError as error:
            raise MisuseError(
                f"NV index {self._place.index:#010x} cannot be read ({error}): it was removed, or never written. "
                "Without it nothing is anchored any more; a new one needs the verifier's signature"
            ) from error
        if value == value_of(log_id, self.anchors):
            return
        if value != value_of(log_id, self.anchors[:-1]):
            raise MisuseError(
                f"NV index {self._place.index:#010x} holds other anchors than {self._path}: the file is an older copy, "
                "or the index was extended by something else; put the newest file back"
            )
        self._extend(self.anchors[-1], None)

    def _extend(self, anchor: Anchor, sign: Sign | None) -> None:
        with self._authorized(sign) as auth:
            self._tpm.nv_extend(self._place.index, anchor_digest(self._place.log_id, anchor), auth)

    @contextmanager
    def _authorized(self, sign: Sign | None) -> Iterator[bytes]:
        """Yield the authorization of a write; the first one needs the verifier's signature."""
        place = self._place
        with self._tpm.fresh_session() as (session, nonce):
            self._tpm.policy_nv_written(session, written=sign is None)
            if sign is not None:
                key = self._tpm.load_external(verifier_public(place.verifier))
                with self._tpm.loaded(key):
                    signature = sign(message_to_sign(nonce, place.log_id))
                    self._tpm.policy_signed(session, key, nonce, place.log_id, signature)
            self._tpm.policy_or(session, place.branches)
            yield session_auth(session)


class AutomaticAnchors:
    """Anchors a log's head now and then, as it is appended to. A failure is remembered, and never stops the log."""

    def __init__(self, anchorage: Anchorage | None, trouble: str | None = None) -> None:
        """Take the log's anchorage, or none and the trouble with its files."""
        self._anchorage = anchorage
        self._due = time.monotonic()
        self.trouble = trouble

    @classmethod
    def load(cls, tpm: Tpm, folder: Path, log_id: bytes) -> Self | None:
        """Return those of the log in ``folder``; None if it was never anchored. Damage is a trouble of theirs."""
        path = folder / PLACE_FILE
        try:
            with path.open("rb") as stream:
                content = json.loads(stream.read(PLACE_SIZE_MAX))
            verifier = VerifyingKey.from_bytes(bytes.fromhex(content["verifier"]))
            return cls(Anchorage(tpm, AnchorIndex(int(content["index"], 16), log_id, verifier), folder))
        except FileNotFoundError:
            return None
        except SealedStateError as error:
            return cls(None, f"nothing is anchored: {error}")
        except (OSError, ValueError, KeyError, TypeError, VerificationError) as error:
            hint = "restore it from a copy, or run trustlog tpm anchor-begin again"
            return cls(None, f"nothing is anchored: {path} is damaged: {error}; {hint}")

    @property
    def index(self) -> int:
        """The NV index that holds them; the default one if the folder does not say."""
        return INDEX_DEFAULT if self._anchorage is None else self._anchorage.place.index

    @property
    def anchored_to(self) -> int | None:
        """The last entry that is anchored, as far as the list says; None if there is no telling."""
        if self._anchorage is None:
            return None
        return self._anchorage.anchors[-1].last if self._anchorage.anchors else 0

    def offer(self, last: int, head: bytes, *, final: bool = False) -> None:
        """Anchor the log's end if that is due, or if it is the final one."""
        if self._anchorage is None or (not final and time.monotonic() < self._due):
            return
        self._due = time.monotonic() + ANCHOR_PAUSE_S * 2 ** (len(self._anchorage.anchors) // ANCHORS_PER_PAUSE)
        try:
            self._anchorage.anchor(last, head)
        except (TrustLogError, OSError) as error:
            self.trouble = str(error)
        else:
            self.trouble = None


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of what may be there, durably."""
    new = path.with_suffix(".new")
    with new.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_anchors(path: Path) -> list[Anchor]:
    """Return the list in a log's folder, as the host keeps it; SealedStateError if it is damaged."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Anchor], int]:
    """Return the anchors, and where the file's whole lines end."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # torn by a crash: it was not extended yet
    anchors = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            anchors.append(_anchor(content["last"], bytes.fromhex(content["head"])))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SealedStateError(f"{path}: line {number} is damaged; restore the newest copy of this file") from error
    return anchors, sum(map(len, lines))


def _anchor(last: object, head: bytes) -> Anchor:
    """Return an anchor of proper sizes; ValueError otherwise."""
    if type(last) is not int or not 0 <= last < 2**64 or len(head) != HASH_SIZE:
        raise ValueError("no index, or no head")
    return Anchor(last, head)
