"""The commands as a table: what Redis' COMMAND shows, and how each is carried out.

A command's handler looks at its arguments and says what to do; it does nothing itself:

    Now      the answer is known
    Ordered  one operation of the key-value store is to be ordered, and its result read so
    Later    something that takes several steps; what came before must be answered first

It raises `Refusal` for arguments that it does not take.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client.gateway.resp import ErrorReply, Reply

if TYPE_CHECKING:
    from client.gateway.session import Session


@dataclass(frozen=True, slots=True)
class Now:
    """The answer."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Ordered:
    """An operation, and how its result becomes the answer."""

    operation: bytes
    read: Callable[[bytes], Reply]


@dataclass(frozen=True, slots=True)
class Later:
    """Something to be awaited when all that came before is answered."""

    work: Callable[[], Awaitable[Reply]]


Step = Now | Ordered | Later
Handler = Callable[["Session", Sequence[bytes]], Step]


class Refusal(Exception):  # noqa: N818 - it becomes an error reply
    """A command is not carried out; the text is the error reply."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `arity` counts the name: exactly so many words, or with a minus at least so many.

    keys: the places of the first and the last key and the step between keys, as in Redis; zeros if it has none.
    while_queued: it is carried out at once even between MULTI and EXEC. open: it needs no AUTH.
    """

    name: str
    arity: int
    handler: Handler
    summary: str
    group: str
    flags: tuple[str, ...] = ()
    keys: tuple[int, int, int] = (0, 0, 0)
    arguments: str = ""
    while_queued: bool = False
    open: bool = False

    def takes(self, words: int) -> bool:
        """Say whether the command takes so many words, its name included."""
        return words == self.arity if self.arity >= 0 else words >= -self.arity

    def as_reply(self) -> Reply:
        """Return its entry in COMMAND."""
        flags: list[Reply] = [flag.encode() for flag in self.flags]
        first, last, step = self.keys
        categories: list[Reply] = [b"@" + self.group.encode()]
        return [self.name.encode(), self.arity, flags, first, last, step, categories, [], [], []]

    def documentation(self) -> Reply:
        """Return its entry in COMMAND DOCS."""
        return {
            b"summary": self.summary.encode(),
            b"since": b"0.1.0",
            b"group": self.group.encode(),
            b"complexity": b"one ordered operation" if self.keys != (0, 0, 0) else b"answered by the gateway",
        }


TABLE: dict[str, Command] = {}


def command(
    name: str,
    arity: int,
    summary: str,
    group: str,
    *,
    flags: str = "",
    keys: tuple[int, int, int] = (0, 0, 0),
    arguments: str = "",
    while_queued: bool = False,
    open: bool = False,  # noqa: A002 - the field's name
) -> Callable[[Handler], Handler]:
    """Put a handler into the table."""

    def add(handler: Handler) -> Handler:
        TABLE[name] = Command(
            name, arity, handler, summary, group, tuple(flags.split()), keys, arguments, while_queued, open
        )
        return handler

    return add


def find(words: Sequence[bytes]) -> Command:
    """Return the command that these words call; Refusal, with Redis' text, if there is none or they are too few."""
    name = words[0].decode("ascii", "replace").lower()
    found = TABLE.get(name)
    if found is None:
        shown = words[0][:128].decode("utf-8", "replace")
        rest = "".join(f"'{word[:128].decode('utf-8', 'replace')}' " for word in words[1:20])
        raise Refusal(f"ERR unknown command '{shown}', with args beginning with: {rest}")
    if not found.takes(len(words)):
        raise Refusal(f"ERR wrong number of arguments for '{name}' command")
    return found


def error(text: str) -> Now:
    """Return an error as a step."""
    return Now(ErrorReply(text))


def integer(word: bytes) -> int:
    """Return a signed 64-bit number; Refusal, with Redis' text, for anything else."""
    digits = word.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 20 or not -(2**63) <= int(word) < 2**63:
        raise Refusal("ERR value is not an integer or out of range")
    return int(word)
