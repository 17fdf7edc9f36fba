"""The commands on keys. Each is one ordered operation; KEYS and SCAN are one for each page."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from client.gateway.glob import Pattern, compile_pattern
from client.gateway.resp import OK, Reply, Simple
from client.gateway.table import Later, Now, Ordered, Refusal, Step, command, integer
from replica.apps import kv, kv_groups

if TYPE_CHECKING:
    from client.gateway.session import Session

# What KEYS may find, in pieces and in bytes; more must be asked for with SCAN.
KEYS_FOUND_MAX: Final = 100_000
KEYS_BYTES_MAX: Final = 8 * 1024 * 1024
SCAN_COUNT: Final = 10
# After so many bytes of keys were looked at, others have their turn.
TURN_BYTES: Final = 64 * 1024
_NO_EXPIRY: Final = (
    "is not supported: the time that replicas agree on is advisory, so nothing that must be right may rest on it, and "
    "keys do not expire"
)
_EXPIRIES: Final = frozenset({b"EX", b"PX", b"EXAT", b"PXAT"})
_ONE: Final = (1, 1, 1)
_ALL: Final = (1, -1, 1)


@command("get", 2, "Returns the value of a key.", "string", flags="readonly fast", keys=_ONE)
def _get(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv.get(args[0]), kv.read_value)


@command(
    "set",
    -3,
    "Sets a key; NX: only if it is absent, XX: only if it is there; GET returns the old value.",
    "string",
    flags="write denyoom",
    keys=_ONE,
)
def _set(_: "Session", args: Sequence[bytes]) -> Step:
    flags = 0
    for word in args[2:]:
        option = word.upper()
        if option in _EXPIRIES:
            raise Refusal(f"ERR {option.decode()} {_NO_EXPIRY}")
        known = {b"NX": kv_groups.IF_ABSENT, b"XX": kv_groups.IF_PRESENT, b"GET": kv_groups.RETURN_OLD, b"KEEPTTL": 0}
        if option not in known:
            raise Refusal("ERR syntax error")
        flags |= known[option]
    if flags & kv_groups.IF_ABSENT and flags & kv_groups.IF_PRESENT:
        raise Refusal("ERR syntax error")
    wants_old = bool(flags & kv_groups.RETURN_OLD)

    def read(result: bytes) -> Reply:
        done = kv_groups.read_set(result)
        if wants_old:
            return done.old
        return OK if done.done else None

    return Ordered(kv_groups.set_key(args[0], args[1], flags), read)


@command("setnx", 3, "Sets a key only if it is absent.", "string", flags="write denyoom fast", keys=_ONE)
def _setnx(_: "Session", args: Sequence[bytes]) -> Step:
    operation = kv_groups.set_key(args[0], args[1], kv_groups.IF_ABSENT)
    return Ordered(operation, lambda result: int(kv_groups.read_set(result).done))


@command("getset", 3, "Sets a key and returns its old value.", "string", flags="write denyoom fast", keys=_ONE)
def _getset(_: "Session", args: Sequence[bytes]) -> Step:
    operation = kv_groups.set_key(args[0], args[1], kv_groups.RETURN_OLD)
    return Ordered(operation, lambda result: kv_groups.read_set(result).old)


@command("getdel", 2, "Returns the value of a key and removes it.", "string", flags="write fast", keys=_ONE)
def _getdel(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.take(args[0]), kv.read_value)


@command("append", 3, "Adds to the end of a value.", "string", flags="write denyoom fast", keys=_ONE)
def _append(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.append(args[0], args[1]), kv_groups.read_size)


@command("strlen", 2, "Returns the length of a value.", "string", flags="readonly fast", keys=_ONE)
def _strlen(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.length(args[0]), kv_groups.read_size)


@command("mget", -2, "Returns the values of several keys at one time.", "string", flags="readonly fast", keys=_ALL)
def _mget(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.get_many(args), lambda result: list(kv_groups.read_values(result)))


def _pairs(args: Sequence[bytes], name: str) -> list[tuple[bytes, bytes]]:
    if len(args) % 2:
        raise Refusal(f"ERR wrong number of arguments for '{name}' command")
    return list(zip(args[::2], args[1::2], strict=True))


@command("mset", -3, "Sets several keys at one time.", "string", flags="write denyoom", keys=(1, -1, 2))
def _mset(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.put_many(_pairs(args, "mset")), lambda _: OK)


@command(
    "msetnx",
    -3,
    "Sets several keys at one time, if none of them is there.",
    "string",
    flags="write denyoom",
    keys=(1, -1, 2),
)
def _msetnx(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.put_many(_pairs(args, "msetnx"), if_absent=True), lambda result: result[0])


@command("incr", 2, "Adds one to the whole number at a key.", "string", flags="write denyoom fast", keys=_ONE)
def _incr(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv.incr(args[0], 1), kv.read_number)


@command("decr", 2, "Takes one from the whole number at a key.", "string", flags="write denyoom fast", keys=_ONE)
def _decr(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv.incr(args[0], -1), kv.read_number)


@command("incrby", 3, "Adds to the whole number at a key.", "string", flags="write denyoom fast", keys=_ONE)
def _incrby(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv.incr(args[0], integer(args[1])), kv.read_number)


@command("decrby", 3, "Takes from the whole number at a key.", "string", flags="write denyoom fast", keys=_ONE)
def _decrby(_: "Session", args: Sequence[bytes]) -> Step:
    amount = -integer(args[1])
    if amount > kv.I64_MAX:
        raise Refusal("ERR decrement would overflow")
    return Ordered(kv.incr(args[0], amount), kv.read_number)


@command("del", -2, "Removes keys; says how many were there.", "generic", flags="write", keys=_ALL)
def _del(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.delete_many(args), kv_groups.read_size)


@command("unlink", -2, "Removes keys; the same as DEL.", "generic", flags="write fast", keys=_ALL)
def _unlink(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.delete_many(args), kv_groups.read_size)


@command("exists", -2, "Says how many of these keys are there.", "generic", flags="readonly fast", keys=_ALL)
def _exists(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.count(args), kv_groups.read_size)


@command("type", 2, "Returns string, or none.", "generic", flags="readonly fast", keys=_ONE)
def _type(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.count(args), lambda result: Simple("string" if kv_groups.read_size(result) else "none"))


def _expiry_of(_: "Session", args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.count(args), lambda result: -1 if kv_groups.read_size(result) else -2)


command(
    "ttl", 2, "Returns -1: keys do not expire; -2 if the key is absent.", "generic", flags="readonly fast", keys=_ONE
)(_expiry_of)
command(
    "pttl", 2, "Returns -1: keys do not expire; -2 if the key is absent.", "generic", flags="readonly fast", keys=_ONE
)(_expiry_of)


@command("dbsize", 1, "Returns how many keys there are.", "server", flags="readonly fast")
def _dbsize(_session: "Session", _args: Sequence[bytes]) -> Step:
    return Ordered(kv_groups.size(), kv_groups.read_size)


async def matching(pattern: Pattern, keys: Sequence[bytes]) -> list[bytes]:
    """Return the keys that match; other connections have their turn in between."""
    found = []
    looked = 0
    for key in keys:
        looked += len(key)
        if looked > TURN_BYTES:
            looked = 0
            await asyncio.sleep(0)
        if pattern.matches(key):
            found.append(key)
    return found


@command(
    "keys", 2, "Returns the keys that match a pattern; not at one time if they are many.", "generic", flags="readonly"
)
def _keys(session: "Session", args: Sequence[bytes]) -> Step:
    pattern = compile_pattern(args[0])

    async def work() -> Reply:
        found: list[Reply] = []
        size, after, more = 0, b"", True
        while more:
            page = kv_groups.read_keys(await session.execute(kv_groups.keys(pattern.prefix, kv.SCAN_LIMIT_MAX, after)))
            page_found = await matching(pattern, page.keys)
            found += page_found
            size += sum([len(key) for key in page_found])
            if len(found) > KEYS_FOUND_MAX or size > KEYS_BYTES_MAX:
                raise Refusal(f"ERR more than {KEYS_FOUND_MAX} keys or {KEYS_BYTES_MAX} bytes match; use SCAN")
            more = page.more and bool(page.keys)
            after = page.keys[-1] if page.keys else b""
        return found

    return Later(work)


@command("scan", -2, "Returns keys page by page; MATCH, COUNT and TYPE as in Redis.", "generic", flags="readonly")
def _scan(session: "Session", args: Sequence[bytes]) -> Step:
    cursor, pattern, count, wanted = args[0], b"*", SCAN_COUNT, b"string"
    if not cursor.isdigit() or len(cursor) > 20:
        raise Refusal("ERR invalid cursor")
    options = args[1:]
    if len(options) % 2:
        raise Refusal("ERR syntax error")
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name.upper() == b"MATCH":
            pattern = value
        elif name.upper() == b"COUNT":
            count = integer(value)
            if count < 1:
                raise Refusal("ERR syntax error")
        elif name.upper() == b"TYPE":
            wanted = value.lower()
        else:
            raise Refusal("ERR syntax error")
    cursors = session.gateway.cursors
    after = cursors.get(int(cursor))
    if after is None:
        raise Refusal("ERR invalid cursor: this gateway does not know it, or not any more; begin again with 0")
    if wanted != b"string":
        return Now([b"0", []])
    compiled = compile_pattern(pattern)
    operation = kv_groups.keys(compiled.prefix, min(count, kv.SCAN_LIMIT_MAX), after)

    async def work() -> Reply:
        page = kv_groups.read_keys(await session.execute(operation))
        following = cursors.add(page.keys[-1]) if page.more and page.keys else 0
        return [b"%d" % following, [*await matching(compiled, page.keys)]]

    return Later(work)


def _no_expiry(name: str) -> None:
    @command(name, -3, f"Refused: {name.upper()} {_NO_EXPIRY}.", "generic", flags="write", keys=_ONE)
    def refuse(_session: "Session", _args: Sequence[bytes]) -> Step:
        raise Refusal(f"ERR {name.upper()} {_NO_EXPIRY}")


for _name in ("expire", "pexpire", "expireat", "pexpireat", "setex", "psetex"):
    _no_expiry(_name)
