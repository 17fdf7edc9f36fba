"""A key-value store, and the byte layout of its operations, which clients use too.

operation = u8 code, u16 key length, key, then
    1 PUT     value (the rest)
    2 GET     nothing
    3 DELETE  nothing
    4 CAS     u8 expects (0: absent, 1: a value), u32 length, expected value, new value (the rest)
    5 INCR    i64 amount
    6 SCAN    u32 limit, u16 length, after (the key is the prefix)

result =
    PUT       u8 1 if a value was replaced, else 0
    GET       u8 0, or u8 1 and the value
    DELETE    u8 1 if there was a value, else 0
    CAS       u8 1 swapped; u8 0 and the present value as GET returns it
    INCR      i64 the new value (stored as decimal text)
    SCAN      u8 1 if more follow, else 0; u32 count, count x (u16 length, key, u32 length, value)
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from replica.application import Context, OperationError
from replica.core.layout import U32, LayoutError, Reader

KEY_BYTES_MAX = 4096
SCAN_LIMIT_MAX = 1000
# Key and value together: a page of SCAN with one record must fit a result of 1 MiB.
RECORD_BYTES_MAX = 1024 * 1024 - 64
SCAN_BYTES_MAX = 512 * 1024
I64_MIN, I64_MAX = -(2**63), 2**63 - 1

_HEAD = struct.Struct(">BH")
_I64 = struct.Struct(">q")


class Code(IntEnum):
    """The operations."""

    PUT = 1
    GET = 2
    DELETE = 3
    CAS = 4
    INCR = 5
    SCAN = 6


class KeyValue:
    """The key-value store as an application."""

    def apply(self, operation: bytes, context: Context) -> bytes:
        """Carry out one operation; OperationError for one that is malformed or cannot be done."""
        if len(operation) < _HEAD.size:
            raise OperationError("not an operation of the key-value store")
        code, size = _HEAD.unpack_from(operation)
        body_at = _HEAD.size + size
        key = operation[_HEAD.size : body_at]
        if len(key) != size or size > KEY_BYTES_MAX or (size == 0 and code != Code.SCAN):
            raise OperationError(f"a key must have 1 to {KEY_BYTES_MAX} bytes")
        state = context.state
        if code == Code.PUT:
            replaced = key in state
            _store(context, key, operation[body_at:])
            return b"\x01" if replaced else b"\x00"
        if code in {Code.GET, Code.DELETE} and len(operation) != body_at:
            raise OperationError("not an operation of the key-value store")
        if code == Code.GET:
            return _found(state.get(key))
        if code == Code.DELETE:
            return b"\x01" if state.delete(key) else b"\x00"
        try:
            return _OTHERS[code](key, Reader(operation, body_at), context)
        except (KeyError, LayoutError):
            raise OperationError("not an operation of the key-value store") from None


def _store(context: Context, key: bytes, value: bytes) -> None:
    if len(key) + len(value) > RECORD_BYTES_MAX:
        raise OperationError(f"key and value must have at most {RECORD_BYTES_MAX} bytes together")
    context.state.put(key, value)


def _found(value: bytes | None) -> bytes:
    return b"\x00" if value is None else b"\x01" + value


def _cas(key: bytes, body: Reader, context: Context) -> bytes:
    expects, expected = body.u8(), body.block(body.left())
    new = body.take(body.left())
    present = context.state.get(key)
    if expects not in {0, 1}:
        raise OperationError("cas expects either no value or a value")
    if present != (expected if expects else None):
        return b"\x00" + _found(present)
    _store(context, key, new)
    return b"\x01"


def _incr(key: bytes, body: Reader, context: Context) -> bytes:
    amount: int = _I64.unpack(body.take(_I64.size))[0]
    body.finish()
    present = context.state.get(key) or b"0"
    try:
        # int() takes underscores and blanks; a stored number is plain decimal text or not a number.
        number = int(present) if len(present) <= 20 and present.removeprefix(b"-").isdigit() else None
    except ValueError:
        number = None
    if number is None:
        raise OperationError("the present value is not a whole number")
    number += amount
    if not I64_MIN <= number <= I64_MAX:
        raise OperationError("the sum does not fit 64 bits")
    context.state.put(key, b"%d" % number)
    return _I64.pack(number)


def _scan(prefix: bytes, body: Reader, context: Context) -> bytes:
    limit, after = body.u32(), body.take(body.u16())
    body.finish()
    if not 1 <= limit <= SCAN_LIMIT_MAX:
        raise OperationError(f"scan returns from 1 to {SCAN_LIMIT_MAX} keys")
    parts: list[bytes] = []
    count = size = 0
    more = 0
    for key, value in context.state.scan(prefix, after or None):
        size += len(key) + len(value) + 6
        if count == limit or (count and size > SCAN_BYTES_MAX):
            more = 1
            break
        count += 1
        parts += (struct.pack(">H", len(key)), key, U32.pack(len(value)), value)
    return bytes([more]) + U32.pack(count) + b"".join(parts)


_OTHERS = {Code.CAS: _cas, Code.INCR: _incr, Code.SCAN: _scan}

# The client's side: operations out, results in.


def _head(code: Code, key: bytes) -> bytes:
    if len(key) > KEY_BYTES_MAX or (not key and code is not Code.SCAN):
        raise ValueError(f"a key must have 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
    return _HEAD.pack(code, len(key)) + key


def put(key: bytes, value: bytes) -> bytes:
    """Return the operation that sets `key`."""
    return _head(Code.PUT, key) + value


def get(key: bytes) -> bytes:
    """Return the operation that reads `key`."""
    return _head(Code.GET, key)


def delete(key: bytes) -> bytes:
    """Return the operation that removes `key`."""
    return _head(Code.DELETE, key)


def cas(key: bytes, expected: bytes | None, new: bytes) -> bytes:
    """Return the operation that sets `key` to `new` if its value is `expected` (None: if it has none)."""
    wanted = expected or b""
    return _head(Code.CAS, key) + struct.pack(">BI", expected is not None, len(wanted)) + wanted + new


def incr(key: bytes, amount: int = 1) -> bytes:
    """Return the operation that adds `amount`, a signed 64-bit number, to the decimal number at `key`."""
    if not I64_MIN <= amount <= I64_MAX:
        raise ValueError("the amount does not fit 64 bits")
    return _head(Code.INCR, key) + _I64.pack(amount)


def scan(prefix: bytes = b"", limit: int = 100, after: bytes = b"") -> bytes:
    """Return the operation that lists keys with `prefix` in byte order, those above `after` if given."""
    if not 1 <= limit <= SCAN_LIMIT_MAX or len(after) > KEY_BYTES_MAX:
        raise ValueError(f"scan returns from 1 to {SCAN_LIMIT_MAX} keys")
    return _head(Code.SCAN, prefix) + struct.pack(">IH", limit, len(after)) + after


@dataclass(frozen=True, slots=True)
class CasResult:
    """Whether the value was swapped; if not, `present` is the value found, or None."""

    swapped: bool
    present: bytes | None


@dataclass(frozen=True, slots=True)
class ScanResult:
    """A page of keys and values, and whether more follow."""

    items: tuple[tuple[bytes, bytes], ...]
    more: bool


def read_flag(result: bytes) -> bool:
    """Return the result of PUT or DELETE: whether there was a value before."""
    return Reader(result).u8() == 1


def read_value(result: bytes) -> bytes | None:
    """Return the result of GET."""
    return result[1:] if Reader(result).u8() else None


def read_cas(result: bytes) -> CasResult:
    """Return the result of CAS."""
    return CasResult(True, None) if Reader(result).u8() else CasResult(False, read_value(result[1:]))


def read_number(result: bytes) -> int:
    """Return the result of INCR."""
    number: int = _I64.unpack(result)[0]
    return number


def read_scan(result: bytes) -> ScanResult:
    """Return the result of SCAN."""
    body = Reader(result)
    more, count = body.u8() == 1, body.u32()
    items = tuple((body.take(body.u16()), body.block(body.left())) for _ in range(count))
    body.finish()
    return ScanResult(items, more)
