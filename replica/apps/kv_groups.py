"""The key-value store's operations on several keys, and operations that hold others. Each is atomic.

operation = u8 code, u16 key length, key, then; `keys` is u16 count, count x (u16 length, key)
    7  SET          u8 flags (1: only if absent, 2: only if present, 4: return the old value), value (the rest)
    8  APPEND       bytes (the rest)
    9  LENGTH       nothing
    10 TAKE         nothing: returns the value and removes it
    11 GET_MANY     keys
    12 PUT_MANY     u8 1: only if none of the keys has a value, else 0; u16 count,
                    count x (u16 length, key, u32 length, value)
    13 DELETE_MANY  keys
    14 COUNT        keys
    15 SIZE         nothing
    16 KEYS         u32 limit, u16 length, after (the key is the prefix)
    17 VERSIONS     keys
    18 GROUP        u8 1: all or nothing, else 0; u16 count, count x (u16 length, key, u64 version);
                    u16 count, count x (u32 length, operation)
The key is empty in 11 to 15, 17 and 18.

result =
    SET          u8 1 if it was set, else 0; if it was asked for, the old value as GET returns it
    APPEND       u64 the new length
    LENGTH       u64 the length, 0 if there is no value
    TAKE         as GET
    GET_MANY     u16 count, count x (u8 0, or u8 1, u32 length, value)
    PUT_MANY     u8 1 if they were set, else 0
    DELETE_MANY  u64 how many had a value
    COUNT        u64 how many have a value; one that is named twice counts twice
    SIZE         u64 how many keys there are
    KEYS         u8 1 if more follow, else 0; u32 count, count x (u16 length, key)
    VERSIONS     u16 count, count x u64 (see `kv_versions`)
    GROUP        u8 0 if a key no longer has its version: nothing was done; else u8 1, u16 count,
                 count x (u8 0 done or 1 refused, u32 length, result or reason)

GROUP carries its operations out in order with nothing between them, in the agreed order only: not as a stale read. An
operation that is refused changes nothing; with "all or nothing" the whole group is refused then. SCAN and KEYS look at
LOOKED_AT_MAX keys at the most, those of one group together; what goes beyond is refused. No operation writes before
it has checked all that it can refuse; PUT_MANY takes back what it wrote if the state has no room for the rest.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from replica.application import Context, OperationError
from replica.apps import kv_versions
from replica.apps.kv_layout import (
    ERROR_BYTES_MAX,
    GROUP_OPERATIONS_MAX,
    GROUP_RESULT_BYTES_MAX,
    HEAD,
    KEY_BYTES_MAX,
    KEYS_MAX,
    RESERVED,
    SCAN_BYTES_MAX,
    SCAN_LIMIT_MAX,
    U16,
    Budget,
    Code,
    check_key,
    check_record,
    found,
    head,
    take_keys,
    with_length,
)
from replica.core.layout import U32, U64, Reader

IF_ABSENT, IF_PRESENT, RETURN_OLD = 1, 2, 4

Handler = Callable[[bytes, Reader, Context], bytes]
Apply = Callable[[bytes], bytes]


def _set(key: bytes, body: Reader, context: Context) -> bytes:
    flags, value = body.u8(), body.take(body.left())
    if flags > 7 or (flags & IF_ABSENT and flags & IF_PRESENT):
        raise OperationError("set takes at most one condition")
    check_record(key, value)
    old = context.state.get(key)
    wanted = old is None if flags & IF_ABSENT else old is not None if flags & IF_PRESENT else True
    if wanted:
        kv_versions.put(context.state, key, value)
    return bytes([wanted]) + (found(old) if flags & RETURN_OLD else b"")


def _append(key: bytes, body: Reader, context: Context) -> bytes:
    value = (context.state.get(key) or b"") + body.take(body.left())
    check_record(key, value)
    kv_versions.put(context.state, key, value)
    return U64.pack(len(value))


def _length(key: bytes, body: Reader, context: Context) -> bytes:
    body.finish()
    return U64.pack(len(context.state.get(key) or b""))


def _take(key: bytes, body: Reader, context: Context) -> bytes:
    body.finish()
    value = context.state.get(key)
    kv_versions.delete(context.state, key)
    return found(value)


def _get_many(_: bytes, body: Reader, context: Context) -> bytes:
    keys = take_keys(body)
    body.finish()
    parts = [U16.pack(len(keys))]
    size = 0
    for key in keys:
        value = context.state.get(key)
        size += 5 + len(value or b"")
        if size > GROUP_RESULT_BYTES_MAX:
            raise OperationError(f"the values have more than {GROUP_RESULT_BYTES_MAX} bytes; ask for fewer at once")
        parts += (b"\x00",) if value is None else (b"\x01", U32.pack(len(value)), value)
    return b"".join(parts)


def _put_many(key: bytes, body: Reader, context: Context) -> bytes:  # noqa: ARG001 - as all handlers
    if_absent, count = body.u8(), body.u16()
    if if_absent > 1 or not 1 <= count <= KEYS_MAX:
        raise OperationError(f"an operation names from 1 to {KEYS_MAX} keys")
    records = []
    for _ in range(count):
        name = check_key(body.take(body.u16()))
        value = body.block(body.left())
        check_record(name, value)
        records.append((name, value))
    body.finish()
    if if_absent and any(name in context.state for name, _ in records):
        return b"\x00"
    kv_versions.put_all(context.state, records)
    return b"\x01"


def _delete_many(_: bytes, body: Reader, context: Context) -> bytes:
    keys = take_keys(body)
    body.finish()
    return U64.pack(sum([kv_versions.delete(context.state, key) for key in keys]))


def _count(_: bytes, body: Reader, context: Context) -> bytes:
    keys = take_keys(body)
    body.finish()
    return U64.pack(sum([key in context.state for key in keys]))


def _size(_: bytes, body: Reader, context: Context) -> bytes:
    body.finish()
    return U64.pack(len(context.state) - kv_versions.own_records(context.state))


def list_keys(prefix: bytes, body: Reader, context: Context, budget: Budget) -> bytes:
    """Carry out KEYS."""
    limit, after = body.u32(), body.take(body.u16())
    body.finish()
    if not 1 <= limit <= SCAN_LIMIT_MAX:
        raise OperationError(f"keys returns from 1 to {SCAN_LIMIT_MAX} keys")
    parts: list[bytes] = []
    size = more = 0
    for key, _ in context.state.scan(prefix, after or None, RESERVED):
        budget.spend()
        size += len(key) + 2
        if len(parts) == limit or (parts and size > SCAN_BYTES_MAX):
            more = 1
            break
        parts.append(U16.pack(len(key)) + key)
    return bytes([more]) + U32.pack(len(parts)) + b"".join(parts)


def _versions(_: bytes, body: Reader, context: Context) -> bytes:
    keys = take_keys(body)
    body.finish()
    if len(set(keys)) > kv_versions.VERSIONS_MAX // 2:
        # One that asked for more than there are would end its own.
        raise OperationError(f"at most {kv_versions.VERSIONS_MAX // 2} keys can be asked for their versions at once")
    return U16.pack(len(keys)) + b"".join([U64.pack(kv_versions.issue(context.state, key)) for key in keys])


HANDLERS: dict[int, Handler] = {
    Code.SET: _set,
    Code.APPEND: _append,
    Code.LENGTH: _length,
    Code.TAKE: _take,
    Code.GET_MANY: _get_many,
    Code.PUT_MANY: _put_many,
    Code.DELETE_MANY: _delete_many,
    Code.COUNT: _count,
    Code.SIZE: _size,
    Code.VERSIONS: _versions,
}


def apply_group(body: Reader, context: Context, apply: Apply) -> bytes:
    """Carry out GROUP, its operations by `apply`."""
    if not context.ordered:
        # It costs as much as all that it holds, and its sense is that nothing comes in between.
        raise OperationError("a group is carried out in the agreed order only, not as a stale read")
    all_or_nothing, guards = body.u8(), body.u16()
    if all_or_nothing > 1 or guards > KEYS_MAX:
        raise OperationError(f"a group has at most {KEYS_MAX} conditions")
    guarded = [(check_key(body.take(body.u16())), body.u64()) for _ in range(guards)]
    count = body.u16()
    if count > GROUP_OPERATIONS_MAX:
        raise OperationError(f"a group has at most {GROUP_OPERATIONS_MAX} operations")
    operations = [body.block(body.left()) for _ in range(count)]
    body.finish()
    if any(operation[:1] == bytes([Code.GROUP]) for operation in operations):
        raise OperationError("a group holds no other group")
    if not all(kv_versions.holds(context.state, key, version) for key, version in guarded):
        return b"\x00"
    parts = [b"\x01", U16.pack(count)]
    size = 0
    for number, operation in enumerate(operations):
        status, result = 0, b""
        try:
            result = apply(operation)
        except OperationError as error:
            if all_or_nothing:
                raise OperationError(f"operation {number}: {error}") from error
            status, result = 1, str(error).encode()[:ERROR_BYTES_MAX]
        size += 5 + len(result)
        if size > GROUP_RESULT_BYTES_MAX:
            # Whoever asked can ask for less, because nothing was changed.
            raise OperationError(f"the results have more than {GROUP_RESULT_BYTES_MAX} bytes; ask for less at once")
        parts += (bytes([status]), U32.pack(len(result)), result)
    return b"".join(parts)


# The client's side: operations out, results in.


@dataclass(frozen=True, slots=True)
class SetResult:
    """Whether SET was done; `old` is the value before, or None, if it was asked for."""

    done: bool
    old: bytes | None


@dataclass(frozen=True, slots=True)
class KeysResult:
    """A page of keys, and whether more follow."""

    keys: tuple[bytes, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one operation of a group came to: its result, or why it was refused."""

    refused: bool
    value: bytes


def set_key(key: bytes, value: bytes, flags: int = 0) -> bytes:
    """Return the operation that sets `key` under the conditions of `flags`."""
    return head(Code.SET, key) + bytes([flags]) + value


def append(key: bytes, value: bytes) -> bytes:
    """Return the operation that adds `value` at the end of what is at `key`."""
    return head(Code.APPEND, key) + value


def length(key: bytes) -> bytes:
    """Return the operation that asks for the length of a value."""
    return head(Code.LENGTH, key)


def take(key: bytes) -> bytes:
    """Return the operation that returns and removes a value."""
    return head(Code.TAKE, key)


def get_many(keys: Sequence[bytes]) -> bytes:
    """Return the operation that reads several keys at one time."""
    return _of_keys(Code.GET_MANY, keys)


def put_many(records: Sequence[tuple[bytes, bytes]], *, if_absent: bool = False) -> bytes:
    """Return the operation that sets several keys at one time; `if_absent`: only if none of them has a value."""
    _check_count(len(records))
    parts = [with_length(key) + U32.pack(len(value)) + value for key, value in records]
    return head(Code.PUT_MANY) + bytes([if_absent]) + U16.pack(len(records)) + b"".join(parts)


def delete_many(keys: Sequence[bytes]) -> bytes:
    """Return the operation that removes several keys at one time."""
    return _of_keys(Code.DELETE_MANY, keys)


def count(keys: Sequence[bytes]) -> bytes:
    """Return the operation that counts which of these keys have a value."""
    return _of_keys(Code.COUNT, keys)


def size() -> bytes:
    """Return the operation that asks how many keys there are."""
    return head(Code.SIZE)


def keys(prefix: bytes = b"", limit: int = 100, after: bytes = b"") -> bytes:
    """Return the operation that lists keys as `kv.scan` does, without their values."""
    if not 1 <= limit <= SCAN_LIMIT_MAX or len(after) > KEY_BYTES_MAX:
        raise ValueError(f"keys returns from 1 to {SCAN_LIMIT_MAX} keys")
    return head(Code.KEYS, prefix) + struct.pack(">IH", limit, len(after)) + after


def versions(wanted: Sequence[bytes]) -> bytes:
    """Return the operation that asks for the versions of keys."""
    return _of_keys(Code.VERSIONS, wanted)


def group(
    operations: Sequence[bytes], guards: Iterable[tuple[bytes, int]] = (), *, all_or_nothing: bool = False
) -> bytes:
    """Return the operation that carries out others if every key of `guards` still has its version."""
    if len(operations) > GROUP_OPERATIONS_MAX:
        raise ValueError(f"a group has at most {GROUP_OPERATIONS_MAX} operations, not {len(operations)}")
    conditions = [with_length(key) + U64.pack(version) for key, version in guards]
    if len(conditions) > KEYS_MAX:
        raise ValueError(f"a group has at most {KEYS_MAX} conditions, not {len(conditions)}")
    parts = [head(Code.GROUP), bytes([all_or_nothing]), U16.pack(len(conditions)), *conditions]
    parts.append(U16.pack(len(operations)))
    for operation in operations:
        parts += (U32.pack(len(operation)), operation)
    return b"".join(parts)


def read_set(result: bytes) -> SetResult:
    """Return the result of SET."""
    body = Reader(result)
    done = body.u8() == 1
    if not body.left() or not body.u8():
        return SetResult(done, None)
    return SetResult(done, body.take(body.left()))


def read_size(result: bytes) -> int:
    """Return the result of APPEND, LENGTH, DELETE_MANY, COUNT or SIZE."""
    body = Reader(result)
    number = body.u64()
    body.finish()
    return number


def read_values(result: bytes) -> tuple[bytes | None, ...]:
    """Return the result of GET_MANY."""
    body = Reader(result)
    values = tuple([body.block(body.left()) if body.u8() else None for _ in range(body.u16())])
    body.finish()
    return values


def read_keys(result: bytes) -> KeysResult:
    """Return the result of KEYS."""
    body = Reader(result)
    more = body.u8() == 1
    listed = tuple([body.take(body.u16()) for _ in range(body.u32())])
    body.finish()
    return KeysResult(listed, more)


def read_versions(result: bytes) -> tuple[int, ...]:
    """Return the result of VERSIONS."""
    body = Reader(result)
    numbers = tuple([body.u64() for _ in range(body.u16())])
    body.finish()
    return numbers


def read_group(result: bytes) -> tuple[Outcome, ...] | None:
    """Return the result of GROUP; None if a key no longer had its version."""
    body = Reader(result)
    if not body.u8():
        body.finish()
        return None
    outcomes = tuple([Outcome(body.u8() == 1, body.block(body.left())) for _ in range(body.u16())])
    body.finish()
    return outcomes


def _of_keys(code: Code, wanted: Sequence[bytes]) -> bytes:
    _check_count(len(wanted))
    return HEAD.pack(code, 0) + U16.pack(len(wanted)) + b"".join([with_length(key) for key in wanted])


def _check_count(number: int) -> None:
    if not 1 <= number <= KEYS_MAX:
        raise ValueError(f"an operation names from 1 to {KEYS_MAX} keys, not {number}")
