"""What the modules of the key-value store share: codes, limits, and how keys stand in operations."""

import re
import struct
from enum import IntEnum

from replica.application import OperationError
from replica.core.layout import Reader
from replica.core.state import BucketedMap

KEY_BYTES_MAX = 4096
SCAN_LIMIT_MAX = 1000
# Key and value together: a page of SCAN with one record must fit a result of 1 MiB.
RECORD_BYTES_MAX = 1024 * 1024 - 64
SCAN_BYTES_MAX = 512 * 1024
# What an operation on several keys, and one that holds others, may name, and what their results may weigh.
KEYS_MAX = 4096
GROUP_OPERATIONS_MAX = 1024
GROUP_RESULT_BYTES_MAX = 1024 * 1024 - 1024
# Keys that SCAN and KEYS may look at in one operation, all those of a group together.
LOOKED_AT_MAX = 16 * 1024
ERROR_BYTES_MAX = 1000
I64_MIN, I64_MAX = -(2**63), 2**63 - 1
MALFORMED = "not an operation of the key-value store"
# Keys that begin so are the store's own records (`kv_versions`): no text in UTF-8 does.
RESERVED = b"\xfftrustlog/"

HEAD = struct.Struct(">BH")
U16 = struct.Struct(">H")
I64 = struct.Struct(">q")
# At most 19 digits, so that no long text is ever made a number.
_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,18}")


class Code(IntEnum):
    """The operations."""

    PUT = 1
    GET = 2
    DELETE = 3
    CAS = 4
    INCR = 5
    SCAN = 6
    SET = 7
    APPEND = 8
    LENGTH = 9
    TAKE = 10
    GET_MANY = 11
    PUT_MANY = 12
    DELETE_MANY = 13
    COUNT = 14
    SIZE = 15
    KEYS = 16
    VERSIONS = 17
    GROUP = 18


# In these the field of the key is a prefix, which may be empty, or nothing.
WITH_PREFIX = frozenset({Code.SCAN, Code.KEYS})
WITHOUT_KEY = frozenset(
    {Code.GET_MANY, Code.PUT_MANY, Code.DELETE_MANY, Code.COUNT, Code.SIZE, Code.VERSIONS, Code.GROUP}
)


class Budget:
    """How many keys an operation may still look at while it lists, together with those that hold it or that it holds.

    The same at all replicas: it follows from the operation and the state alone.
    """

    def __init__(self) -> None:
        self.left = LOOKED_AT_MAX

    def spend(self) -> None:
        """Take in that a key is looked at; OperationError if it is one too many."""
        if self.left == 0:
            raise OperationError(f"an operation lists at most {LOOKED_AT_MAX} keys; ask for less at once")
        self.left -= 1


def split(operation: bytes) -> tuple[int, bytes, int]:
    """Return an operation's code, the key in its head, and where what follows begins; OperationError if it is none."""
    if len(operation) < HEAD.size:
        raise OperationError(MALFORMED)
    code, size = HEAD.unpack_from(operation)
    body_at = HEAD.size + size
    key = operation[HEAD.size : body_at]
    if len(key) != size or size > KEY_BYTES_MAX or (size and code in WITHOUT_KEY):
        raise OperationError(f"a key must have 1 to {KEY_BYTES_MAX} bytes")
    if code not in WITH_PREFIX and code not in WITHOUT_KEY:
        check_key(key)
    return code, key, body_at


def check_key(key: bytes) -> bytes:
    """Return the key; OperationError for one that nobody may use."""
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise OperationError(f"a key must have 1 to {KEY_BYTES_MAX} bytes")
    if key.startswith(RESERVED):
        raise OperationError("keys that begin with the byte ff and trustlog/ are the store's own")
    return key


def check_record(key: bytes, value: bytes) -> None:
    """Raise OperationError if key and value are too large together."""
    if len(key) + len(value) > RECORD_BYTES_MAX:
        raise OperationError(f"key and value must have at most {RECORD_BYTES_MAX} bytes together")


def found(value: bytes | None) -> bytes:
    """Return the result of GET."""
    return b"\x00" if value is None else b"\x01" + value


def take_keys(body: Reader) -> list[bytes]:
    """Read u16 count and that many keys, each preceded by its u16 length."""
    count = body.u16()
    if not 1 <= count <= KEYS_MAX:
        raise OperationError(f"an operation names from 1 to {KEYS_MAX} keys")
    return [check_key(body.take(body.u16())) for _ in range(count)]


def read_number_at(state: BucketedMap, key: bytes) -> int:
    """Return the whole number that is stored as decimal text, 0 if there is no value; OperationError for another value.

    A number stands in one way only, as Redis wants it too: no plus sign, blank, leading zero or minus zero; 64 bits.
    """
    present = state.get(key)
    if present is None:
        return 0
    number = int(present) if _NUMBER.fullmatch(present) else None
    if number is None or not I64_MIN <= number <= I64_MAX:
        raise OperationError("the present value is not a whole number")
    return number


def head(code: Code, key: bytes = b"") -> bytes:
    """Return an operation's beginning; ValueError for a key that no replica would take."""
    if len(key) > KEY_BYTES_MAX or not (key or code in WITH_PREFIX or code in WITHOUT_KEY):
        raise ValueError(f"a key must have 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
    if key.startswith(RESERVED) and code not in WITH_PREFIX:
        raise ValueError("keys that begin with the byte ff and trustlog/ are the store's own")
    return HEAD.pack(code, len(key)) + key


def with_length(key: bytes) -> bytes:
    """Return a key preceded by its length; ValueError as `head`."""
    return head(Code.GET, key)[1:]
