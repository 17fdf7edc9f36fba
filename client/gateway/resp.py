r"""Redis' protocol (RESP2 and RESP3, https://redis.io/docs/latest/develop/reference/protocol-spec/).

A command is an array of bulk strings, or one line of words ("inline", for people with a terminal):

    *2\r\n$3\r\nGET\r\n$1\r\nk\r\n            GET k\r\n

`CommandReader` looks at every length before anything is stored or allocated for it; only then does hiredis see the
bytes of a whole command. A stream that breaks a rule cannot be read on: ProtocolError, and the connection ends.

Replies are built from these Python values: bytes (bulk string), int, None (null), `Simple`, `ErrorReply`, list, dict (a
map; in RESP2 an array of keys and values), `NULL_ARRAY`.
"""

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

import hiredis

# One argument, the arguments of a command, all its bytes, and a line without a length before it.
BULK_BYTES_MAX: Final = 4 * 1024 * 1024
ARGUMENTS_MAX: Final = 8200
COMMAND_BYTES_MAX: Final = 8 * 1024 * 1024
INLINE_BYTES_MAX: Final = 64 * 1024
# Of somebody who has not said the password yet, as in Redis.
STRANGER_ARGUMENTS_MAX: Final = 10
STRANGER_BULK_BYTES_MAX: Final = 16 * 1024
# A length is at most this many digits; more are wrong, whatever they say.
_LENGTH_DIGITS_MAX: Final = 20

RESP2, RESP3 = 2, 3


class ProtocolError(Exception):
    """What came is no command; the text is what Redis says then."""


@dataclass(frozen=True, slots=True)
class Simple:
    """A status such as OK."""

    text: str


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error: a word in capitals that programs look at, then a text for people."""

    text: str


class _NullArray:
    """The array that is not there: what EXEC returns if a watched key changed."""


NULL_ARRAY: Final = _NullArray()
OK: Final = Simple("OK")

Reply: TypeAlias = "bytes | int | Simple | ErrorReply | _NullArray | list[Reply] | dict[bytes, Reply] | None"


class CommandReader:
    """Cuts a stream into commands. Invariant: it never holds more than COMMAND_BYTES_MAX and what came last.

    stranger: whether it is somebody's who has not said the password; then commands are short.
    """

    def __init__(self) -> None:
        self.stranger = False
        self._buffer = bytearray()
        # Within the first command: up to where its lengths were looked at, and how many arguments are to come.
        self._seen = 0
        self._arguments_left = 0
        self._decoder = hiredis.Reader()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take what came from the network."""
        self._buffer += data

    def next(self) -> list[bytes] | None:
        """Return the next command's words, None if it has not come whole; ProtocolError if there can be none."""
        while self._buffer:
            if not self._arguments_left:
                if self._buffer[:1] != b"*":
                    line = self._inline()
                    if line is None or line:
                        return line
                    continue  # nor is an empty line
                if not self._begin():
                    return None
                if not self._arguments_left:
                    continue  # an empty array is no command
            if not self._complete():
                return None
            words = self._decode()
            if words:
                return words
        return None

    def _begin(self) -> bool:
        count = self._length_at(0, "multibulk")
        if count is None:
            return False
        number, end = count
        if number > (STRANGER_ARGUMENTS_MAX if self.stranger else ARGUMENTS_MAX):
            raise ProtocolError("Protocol error: invalid multibulk length")
        if number <= 0:
            del self._buffer[:end]
        else:
            self._seen, self._arguments_left = end, number
        return True

    def _complete(self) -> bool:
        """Look at the lengths that have come; say whether all of the command is there."""
        buffer = self._buffer
        while self._arguments_left:
            if self._seen >= len(buffer):
                return False
            if buffer[self._seen] != ord("$"):
                got = chr(buffer[self._seen]) if 32 <= buffer[self._seen] < 127 else "?"
                raise ProtocolError(f"Protocol error: expected '$', got '{got}'")
            found = self._length_at(self._seen, "bulk")
            if found is None:
                return False
            size, start = found
            end = start + size + 2
            size_max = STRANGER_BULK_BYTES_MAX if self.stranger else BULK_BYTES_MAX
            if not 0 <= size <= size_max or end > COMMAND_BYTES_MAX:
                raise ProtocolError("Protocol error: invalid bulk length")
            if len(buffer) < end:
                return False
            if buffer[end - 2 : end] != b"\r\n":
                raise ProtocolError("Protocol error: a bulk string does not end where its length says")
            self._seen = end
            self._arguments_left -= 1
        return True

    def _decode(self) -> list[bytes]:
        raw = bytes(memoryview(self._buffer)[: self._seen])
        del self._buffer[: self._seen]
        self._seen = 0
        self._decoder.feed(raw)
        words: list[bytes] = self._decoder.gets()
        return words

    def _length_at(self, at: int, what: str) -> tuple[int, int] | None:
        """Return the length in the line at `at`, and where the line ends; None if the line is not whole yet."""
        end = self._buffer.find(b"\r\n", at, at + _LENGTH_DIGITS_MAX + 3)
        if end < 0:
            if len(self._buffer) - at > _LENGTH_DIGITS_MAX + 2:
                raise ProtocolError(f"Protocol error: invalid {what} length")
            return None
        digits = bytes(self._buffer[at + 1 : end])
        if not digits.removeprefix(b"-").isdigit():
            raise ProtocolError(f"Protocol error: invalid {what} length")
        return int(digits), end + 2

    def _inline(self) -> list[bytes] | None:
        """Return the words of the line that comes first, none if it is empty; None if it is not whole yet."""
        if blank := _BLANK_LINES.match(self._buffer):
            del self._buffer[: blank.end()]
            return []
        end = self._buffer.find(b"\n", 0, INLINE_BYTES_MAX + 1)
        if end < 0:
            if len(self._buffer) > INLINE_BYTES_MAX:
                raise ProtocolError("Protocol error: too big inline request")
            return None
        line = bytes(self._buffer[:end]).rstrip(b"\r")
        del self._buffer[: end + 1]
        return split_line(line)


_BLANK_LINES = re.compile(rb"(?:\r?\n)+")
_WORD = re.compile(rb"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\')*)'|([^\s"'][^\s"']*))(?=\s|$)""", re.DOTALL)
_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})|\\(.)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}


def split_line(line: bytes) -> list[bytes]:
    """Return the words of an inline command; quotes and escapes are as in Redis. ProtocolError for open quotes."""
    words = []
    at = 0
    line = line.strip()
    while at < len(line):
        found = _WORD.match(line, at)
        if found is None:
            raise ProtocolError("Protocol error: unbalanced quotes in request")
        double, single, plain = found.groups()
        if double is not None:
            words.append(_ESCAPE.sub(_unescape, double))
        else:
            words.append(plain if single is None else single.replace(b"\\'", b"'"))
        at = found.end()
    if len(words) > ARGUMENTS_MAX:
        raise ProtocolError("Protocol error: too big inline request")
    return words


def _unescape(found: re.Match[bytes]) -> bytes:
    code, letter = found.groups()
    return bytes([int(code, 16)]) if code is not None else _ESCAPES.get(letter, letter)


def encode(reply: Reply, protocol: int) -> bytes:
    """Return the bytes of a reply in RESP2 or RESP3."""
    parts: list[bytes] = []
    _encode(reply, protocol, parts)
    return b"".join(parts)


def _encode(reply: Reply, protocol: int, parts: list[bytes]) -> None:
    if isinstance(reply, bytes):
        parts += (b"$%d\r\n" % len(reply), reply, b"\r\n")
    elif isinstance(reply, int):
        parts.append(b":%d\r\n" % reply)
    elif reply is None:
        parts.append(b"_\r\n" if protocol == RESP3 else b"$-1\r\n")
    elif isinstance(reply, Simple):
        parts.append(b"+%s\r\n" % reply.text.encode())
    elif isinstance(reply, ErrorReply):
        # An error is one line, whatever its text was made from.
        parts.append(b"-%s\r\n" % " ".join(reply.text.split()).encode(errors="replace"))
    elif isinstance(reply, list):
        parts.append(b"*%d\r\n" % len(reply))
        for element in reply:
            _encode(element, protocol, parts)
    elif isinstance(reply, dict):
        parts.append(b"%%%d\r\n" % len(reply) if protocol == RESP3 else b"*%d\r\n" % (2 * len(reply)))
        for key, value in reply.items():
            _encode(key, protocol, parts)
            _encode(value, protocol, parts)
    else:
        parts.append(b"_\r\n" if protocol == RESP3 else b"*-1\r\n")
