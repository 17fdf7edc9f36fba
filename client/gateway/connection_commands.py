"""The commands that are about the connection or the gateway itself; none of them orders anything."""

import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from client.gateway.glob import PATTERN_BYTES_MAX, compile_pattern
from client.gateway.resp import ARGUMENTS_MAX, BULK_BYTES_MAX, OK, RESP2, RESP3, Reply, Simple
from client.gateway.table import TABLE, Now, Refusal, Step, command

if TYPE_CHECKING:
    from client.gateway.session import Session

# Libraries look at this to learn what a server can do; the commands are those of Redis 7.
REDIS_VERSION: Final = "7.0.0"
NAME_BYTES_MAX: Final = 256
CLIENTS_SHOWN_MAX: Final = 1000
_LIBRARY: Final = frozenset({b"LIB-NAME", b"LIB-VER"})


@command("ping", -1, "Answers PONG, or what it was given.", "connection", flags="fast", open=True)
def _ping(_: "Session", args: Sequence[bytes]) -> Step:
    if len(args) > 1:
        raise Refusal("ERR wrong number of arguments for 'ping' command")
    return Now(args[0] if args else Simple("PONG"))


@command("echo", 2, "Answers what it was given.", "connection", flags="fast")
def _echo(_: "Session", args: Sequence[bytes]) -> Step:
    return Now(args[0])


@command("quit", -1, "Ends the connection.", "connection", flags="fast", while_queued=True, open=True)
def _quit(session: "Session", _: Sequence[bytes]) -> Step:
    session.closing = True
    return Now(OK)


@command("select", 2, "There is one database, 0.", "connection", flags="fast")
def _select(_: "Session", args: Sequence[bytes]) -> Step:
    if args[0] != b"0":
        raise Refusal("ERR DB index is out of range")
    return Now(OK)


def _authenticate(session: "Session", user: bytes, password: bytes) -> None:
    expected = session.gateway.password
    if expected is None:
        raise Refusal(
            "ERR AUTH <password> called without any password configured for the default user. "
            "Are you sure your configuration is correct?"
        )
    # Both are compared, whatever the first comparison finds.
    right = hmac.compare_digest(password, expected)
    if not right or user != b"default":
        session.gateway.refusals["wrong-password"] += 1
        raise Refusal("WRONGPASS invalid username-password pair or user is disabled.")
    session.authenticated = True


@command("auth", -2, "Proves that one may use this gateway.", "connection", flags="fast", while_queued=True, open=True)
def _auth(session: "Session", args: Sequence[bytes]) -> Step:
    if len(args) > 2:
        raise Refusal("ERR syntax error")
    _authenticate(session, args[0] if len(args) == 2 else b"default", args[-1])
    return Now(OK)


@command("hello", -1, "Chooses RESP2 or RESP3; AUTH and SETNAME as in Redis.", "connection", flags="fast", open=True)
def _hello(session: "Session", args: Sequence[bytes]) -> Step:
    protocol = session.protocol
    if args:
        if args[0] not in {b"2", b"3"}:
            raise Refusal("NOPROTO unsupported protocol version")
        protocol = RESP3 if args[0] == b"3" else RESP2
    rest = list(args[1:])
    name = session.name
    while rest:
        option = rest.pop(0).upper()
        if option == b"AUTH" and len(rest) >= 2:
            _authenticate(session, rest.pop(0), rest.pop(0))
        elif option == b"SETNAME" and rest:
            name = _checked(rest.pop(0))
        else:
            raise Refusal(f"ERR Syntax error in HELLO option '{option.decode('ascii', 'replace')}'")
    if not session.authenticated:
        raise Refusal(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
            "<user> <pass> option can be used to authenticate the client and select the RESP protocol version at the "
            "same time"
        )
    session.protocol, session.name = protocol, name
    return Now(
        {
            b"server": b"trustlog",
            b"version": session.gateway.version.encode(),
            b"proto": protocol,
            b"id": session.number,
            b"mode": b"standalone",
            b"role": b"master",
            b"modules": [],
        }
    )


@command("reset", 1, "Forgets what this connection has said.", "connection", flags="fast", while_queued=True, open=True)
def _reset(session: "Session", _: Sequence[bytes]) -> Step:
    session.transaction = None
    session.watched.clear()
    session.protocol, session.name = RESP2, b""
    session.authenticated = session.gateway.password is None
    return Now(Simple("RESET"))


def _checked(name: bytes) -> bytes:
    if len(name) > NAME_BYTES_MAX or not all(33 <= byte <= 126 for byte in name):
        raise Refusal("ERR Client names cannot contain spaces, newlines or special characters.")
    return name


def _unknown(name: str, word: bytes) -> Refusal:
    shown = word[:128].decode("utf-8", "replace")
    return Refusal(f"ERR unknown subcommand '{shown}'. Try {name} HELP.")


def _line(session: "Session") -> bytes:
    library = b" ".join([name.lower() + b"=" + value for name, value in sorted(session.library.items())])
    watched = len(session.watched)
    return b"id=%d name=%s db=0 resp=%d watch=%d %s" % (
        session.number,
        session.name,
        session.protocol,
        watched,
        library,
    )


@command("client", -2, "ID, SETNAME, GETNAME, SETINFO, INFO, LIST, NO-EVICT, NO-TOUCH.", "connection", flags="admin")
def _client(session: "Session", args: Sequence[bytes]) -> Step:
    word, rest = args[0].upper(), args[1:]
    if word == b"ID" and not rest:
        return Now(session.number)
    if word == b"SETNAME" and len(rest) == 1:
        session.name = _checked(rest[0])
        return Now(OK)
    if word == b"GETNAME" and not rest:
        return Now(session.name or None)
    if word == b"SETINFO" and len(rest) == 2:
        if rest[0].upper() not in _LIBRARY:
            raise Refusal(f"ERR Unrecognized option '{rest[0][:64].decode('utf-8', 'replace')}'")
        session.library[rest[0].upper()] = _checked(rest[1])
        return Now(OK)
    if word == b"INFO" and not rest:
        return Now(_line(session) + b"\n")
    if word == b"LIST":
        sessions = list(session.gateway.sessions())[:CLIENTS_SHOWN_MAX]
        return Now(b"".join([_line(one) + b"\n" for one in sessions]))
    if word in {b"NO-EVICT", b"NO-TOUCH"} and len(rest) == 1:
        return Now(OK)
    if word == b"HELP":
        return Now([b"CLIENT ID|SETNAME name|GETNAME|SETINFO option value|INFO|LIST|NO-EVICT on|NO-TOUCH on"])
    raise _unknown("CLIENT", args[0])


@command("command", -1, "Describes the commands: COUNT, LIST, INFO, DOCS, GETKEYS.", "server", flags="loading stale")
def _command(_: "Session", args: Sequence[bytes]) -> Step:
    word, rest = args[0].upper() if args else b"", args[1:]
    names = [name.decode("ascii", "replace").lower() for name in rest]
    if not args:
        return Now([found.as_reply() for found in TABLE.values()])
    if word == b"COUNT" and not rest:
        return Now(len(TABLE))
    if word == b"LIST" and not rest:
        return Now([name.encode() for name in TABLE])
    if word == b"INFO":
        return Now([TABLE[name].as_reply() if name in TABLE else None for name in (names or TABLE)])
    if word == b"DOCS":
        return Now({name.encode(): TABLE[name].documentation() for name in (names or TABLE) if name in TABLE})
    if word == b"GETKEYS" and rest:
        found = TABLE.get(names[0])
        if found is None:
            raise Refusal("ERR Invalid command specified")
        if not found.takes(len(rest)):
            raise Refusal("ERR Invalid number of arguments specified for command")
        first, last, step = found.keys
        if not first:
            raise Refusal("ERR The command has no key arguments")
        return Now([rest[at] for at in range(first, len(rest) if last < 0 else last + 1, step)])
    if word == b"HELP":
        return Now([b"COMMAND [COUNT|LIST|INFO [name ...]|DOCS [name ...]|GETKEYS name [argument ...]]"])
    raise _unknown("COMMAND", args[0])


@command(
    "config", -2, "GET shows what some programs ask for; nothing can be set.", "server", flags="admin loading stale"
)
def _config(session: "Session", args: Sequence[bytes]) -> Step:
    word, rest = args[0].upper(), args[1:]
    if word == b"GET" and rest:
        if sum(map(len, rest)) > PATTERN_BYTES_MAX:
            raise Refusal(f"ERR the patterns have at most {PATTERN_BYTES_MAX} bytes")
        patterns = [compile_pattern(pattern.lower()) for pattern in rest]
        shown: dict[bytes, Reply] = {
            name: value
            for name, value in _settings(session).items()
            if any(pattern.matches(name) for pattern in patterns)
        }
        return Now(shown)
    if word == b"SET":
        raise Refusal("ERR CONFIG SET is not supported: a gateway is configured by its command line")
    if word == b"HELP":
        return Now([b"CONFIG GET pattern [pattern ...]"])
    raise _unknown("CONFIG", args[0])


def _settings(session: "Session") -> dict[bytes, bytes]:
    return {
        b"appendonly": b"yes",
        b"databases": b"1",
        b"maxclients": b"%d" % session.gateway.limits.connections_max,
        b"maxmemory": b"0",
        b"proto-max-bulk-len": b"%d" % BULK_BYTES_MAX,
        b"trustlog-arguments-max": b"%d" % ARGUMENTS_MAX,
        b"save": b"",
        b"timeout": b"0",
    }


@command("info", -1, "Describes the gateway: server, clients, stats, trustlog.", "server", flags="loading stale")
def _info(session: "Session", args: Sequence[bytes]) -> Step:
    wanted = {word.decode("ascii", "replace").lower() for word in args}
    everything = not wanted or bool(wanted & {"all", "default", "everything"})
    lines = []
    for section, content in session.gateway.info().items():
        if everything or section in wanted:
            lines += [f"# {section.capitalize()}", *(f"{name}:{value}" for name, value in content.items()), ""]
    return Now("\r\n".join(lines).encode())
