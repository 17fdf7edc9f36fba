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
    INCR      i64 the new value (stored as decimal text); no value counts as 0, and text that INCR would not write
              is refused: "", "007", "-0", "+1"
    SCAN      u8 1 if more follow, else 0; u32 count, count x (u16 length, key, u32 length, value)

Operations on several keys, conditions and groups are in `kv_groups`, codes and limits in `kv_layout`.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replica.application import Context, OperationError, Right
from replica.apps import kv_access, kv_groups, kv_versions
from replica.apps.kv_layout import (
    I64,
    I64_MAX,
    I64_MIN,
    KEY_BYTES_MAX,
    MALFORMED,
    RECORD_BYTES_MAX,
    RESERVED,
    SCAN_BYTES_MAX,
    SCAN_LIMIT_MAX,
    WITH_PREFIX,
    Budget,
    Code,
    check_record,
    found,
    head,
    read_number_at,
    split,
)
from replica.core.layout import U32, LayoutError, Reader

Listing = Callable[[bytes, Reader, Context, Budget], bytes]

# As numbers: every operation is compared with them, and looking up a member of an enumeration costs more than that.
_PUT, _GET, _DELETE = int(Code.PUT), int(Code.GET), int(Code.DELETE)

# How a cluster file names this application.
APPLICATION = "replica.apps.kv:KeyValue"


class KeyValue:
    """The key-value store as an application."""

    # Keys of the state that are not its users'.
    internal_prefix = RESERVED

    def apply(self, operation: bytes, context: Context) -> bytes:
        """Carry out one operation; OperationError for one that is malformed or cannot be done."""
        return self._carry_out(operation, context, Budget())

    def accesses(self, operation: bytes) -> Iterator[tuple[Right, bytes]]:
        """Return what an operation reads and writes (`kv_access`); OperationError for one that is malformed."""
        return kv_access.accesses(operation)

    def _carry_out(self, operation: bytes, context: Context, budget: Budget) -> bytes:
        code, key, body_at = split(operation)
        state = context.state
        if code == _PUT:
            replaced = key in state
            _store(context, key, operation[body_at:])
            return b"\x01" if replaced else b"\x00"
        if code in {_GET, _DELETE} and len(operation) != body_at:
            raise OperationError(MALFORMED)
        if code == _GET:
            return found(state.get(key))
        if code == _DELETE:
            return b"\x01" if kv_versions.delete(state, key) else b"\x00"
        body = Reader(operation, body_at)
        try:
            if code == Code.GROUP:
                return kv_groups.apply_group(body, context, lambda held: self._carry_out(held, context, budget))
            if code in WITH_PREFIX:
                return _LISTINGS[code](key, body, context, budget)
            return _OTHERS[code](key, body, context)
        except (KeyError, LayoutError):
            raise OperationError(MALFORMED) from None


def _store(context: Context, key: bytes, value: bytes) -> None:
    check_record(key, value)
    kv_versions.put(context.state, key, value)


def _cas(key: bytes, body: Reader, context: Context) -> bytes:
    expects, expected = body.u8(), body.block(body.left())
    new = body.take(body.left())
    present = context.state.get(key)
    if expects not in {0, 1}:
        raise OperationError("cas expects either no value or a value")
    if present != (expected if expects else None):
        return b"\x00" + found(present)
    _store(context, key, new)
    return b"\x01"


def _incr(key: bytes, body: Reader, context: Context) -> bytes:
    amount: int = I64.unpack(body.take(I64.size))[0]
    body.finish()
    number = read_number_at(context.state, key) + amount
    if not I64_MIN <= number <= I64_MAX:
        raise OperationError("the sum does not fit 64 bits")
    kv_versions.put(context.state, key, b"%d" % number)
    return I64.pack(number)


def _scan(prefix: bytes, body: Reader, context: Context, budget: Budget) -> bytes:
    limit, after = body.u32(), body.take(body.u16())
    body.finish()
    if not 1 <= limit <= SCAN_LIMIT_MAX:
        raise OperationError(f"scan returns from 1 to {SCAN_LIMIT_MAX} keys")
    parts: list[bytes] = []
    count = size = 0
    more = 0
    for key, value in context.state.scan(prefix, after or None, RESERVED):
        budget.spend()
        size += len(key) + len(value) + 6
        if count == limit or (count and size > SCAN_BYTES_MAX):
            more = 1
            break
        count += 1
        parts += (struct.pack(">H", len(key)), key, U32.pack(len(value)), value)
    return bytes([more]) + U32.pack(count) + b"".join(parts)


_OTHERS = {Code.CAS: _cas, Code.INCR: _incr, **kv_groups.HANDLERS}
_LISTINGS: dict[int, Listing] = {Code.SCAN: _scan, Code.KEYS: kv_groups.list_keys}

# The client's side: operations out, results in.


def put(key: bytes, value: bytes) -> bytes:
    """Return the operation that sets `key`."""
    return head(Code.PUT, key) + value


def get(key: bytes) -> bytes:
    """Return the operation that reads `key`."""
    return head(Code.GET, key)


def delete(key: bytes) -> bytes:
    """Return the operation that removes `key`."""
    return head(Code.DELETE, key)


def cas(key: bytes, expected: bytes | None, new: bytes) -> bytes:
    """Return the operation that sets `key` to `new` if its value is `expected` (None: if it has none)."""
    wanted = expected or b""
    return head(Code.CAS, key) + struct.pack(">BI", expected is not None, len(wanted)) + wanted + new


def incr(key: bytes, amount: int = 1) -> bytes:
    """Return the operation that adds `amount`, a signed 64-bit number, to the decimal number at `key`."""
    if not I64_MIN <= amount <= I64_MAX:
        raise ValueError("the amount does not fit 64 bits")
    return head(Code.INCR, key) + I64.pack(amount)


def scan(prefix: bytes = b"", limit: int = 100, after: bytes = b"") -> bytes:
    """Return the operation that lists keys with `prefix` in byte order, those above `after` if given."""
    if not 1 <= limit <= SCAN_LIMIT_MAX or len(after) > KEY_BYTES_MAX:
        raise ValueError(f"scan returns from 1 to {SCAN_LIMIT_MAX} keys")
    return head(Code.SCAN, prefix) + struct.pack(">IH", limit, len(after)) + after


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
    number: int = I64.unpack(result)[0]
    return number


def read_scan(result: bytes) -> ScanResult:
    """Return the result of SCAN."""
    body = Reader(result)
    more, count = body.u8() == 1, body.u32()
    items = tuple((body.take(body.u16()), body.block(body.left())) for _ in range(count))
    body.finish()
    return ScanResult(items, more)


__all__ = [
    "APPLICATION",
    "I64_MAX",
    "I64_MIN",
    "KEY_BYTES_MAX",
    "RECORD_BYTES_MAX",
    "SCAN_BYTES_MAX",
    "SCAN_LIMIT_MAX",
    "CasResult",
    "Code",
    "KeyValue",
    "ScanResult",
    "cas",
    "delete",
    "get",
    "incr",
    "put",
    "read_cas",
    "read_flag",
    "read_number",
    "read_scan",
    "read_value",
    "scan",
]
