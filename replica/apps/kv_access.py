"""Which keys an operation of the key-value store reads and writes, for clients that may not use all of them.

    PUT, SET, DELETE, PUT_MANY, DELETE_MANY   write their keys; SET that returns the old value reads it too
    CAS, INCR, APPEND, TAKE                   read and write their key
    GET, LENGTH, GET_MANY, COUNT, VERSIONS    read their keys
    SCAN, KEYS                                read all keys with their prefix
    SIZE                                      reads the whole store
    GROUP                                     reads the keys of its conditions, and does what its operations do

So whoever may write a key is told whether it had a value, and no more of it. What cannot be read here is refused as a
whole, in a group too: nothing is carried out that was not understood.
"""

from collections.abc import Callable, Iterator

from replica.application import OperationError, Right
from replica.apps.kv_groups import RETURN_OLD
from replica.apps.kv_layout import MALFORMED, WITH_PREFIX, Code, split, take_keys
from replica.core.layout import LayoutError, Reader

Accesses = Iterator[tuple[Right, bytes]]

_READ = (Right.READ,)
_WRITE = (Right.WRITE,)
_BOTH = (Right.READ, Right.WRITE)

# Operations on the one key of their head.
_ONE_KEY = {
    Code.PUT: _WRITE,
    Code.GET: _READ,
    Code.DELETE: _WRITE,
    Code.CAS: _BOTH,
    Code.INCR: _BOTH,
    Code.APPEND: _BOTH,
    Code.LENGTH: _READ,
    Code.TAKE: _BOTH,
}
# Operations that begin with a list of keys.
_MANY_KEYS = {Code.GET_MANY: _READ, Code.DELETE_MANY: _WRITE, Code.COUNT: _READ, Code.VERSIONS: _READ}


def accesses(operation: bytes) -> Accesses:
    """Yield what an operation reads and writes; OperationError if it is malformed."""
    code, key, body_at = split(operation)
    body = Reader(operation, body_at)
    try:
        if code in _ONE_KEY:
            rights, keys = _ONE_KEY[Code(code)], [key]
        elif code in WITH_PREFIX:
            rights, keys = _READ, [key]
        elif code in _MANY_KEYS:
            rights, keys = _MANY_KEYS[Code(code)], take_keys(body)
        else:
            yield from _OTHERS[code](key, body)
            return
        yield from ((right, one) for one in keys for right in rights)
    except (KeyError, LayoutError):
        raise OperationError(MALFORMED) from None


def _set(key: bytes, body: Reader) -> Accesses:
    yield Right.WRITE, key
    if body.u8() & RETURN_OLD:
        yield Right.READ, key


def _put_many(_: bytes, body: Reader) -> Accesses:
    body.u8()
    for _number in range(body.u16()):
        yield Right.WRITE, body.take(body.u16())
        body.block(body.left())


def _size(_: bytes, __: Reader) -> Accesses:
    yield Right.READ, b""


def _group(_: bytes, body: Reader) -> Accesses:
    body.u8()
    for _number in range(body.u16()):
        yield Right.READ, body.take(body.u16())
        body.u64()
    for _number in range(body.u16()):
        held = body.block(body.left())
        if held[:1] == bytes([Code.GROUP]):
            raise OperationError("a group holds no other group")
        yield from accesses(held)


_OTHERS: dict[int, Callable[[bytes, Reader], Accesses]] = {
    Code.SET: _set,
    Code.PUT_MANY: _put_many,
    Code.SIZE: _size,
    Code.GROUP: _group,
}
