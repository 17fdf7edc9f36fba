"""What an application is: a class with `apply(operation, context) -> result`, and hardly anything else.

Every replica runs every operation in the same order, so `apply` must be deterministic: it may use its arguments and
`context` only, never a clock, randomness, files, the network, or the order of a set. All that it remembers lies in
`context.state`; the platform digests, stores and transfers it. An exception is an error result and changes nothing.

Code that is to behave differently from what runs already has a number for that, the class attribute `version`: the
newest version of its behaviour that it knows, 0 if it has none. Replicas get new code one after the other, and go on
doing what the version in force does, `context.version`, until an operator puts the new one in force at one slot for all
(`replica.core.versions`):

    class Greeter:
        version = 1

        def apply(self, operation: bytes, context: Context) -> bytes:
            if context.version < 1:
                return b"hello " + operation
            return b"good day " + operation

What version 0 did, code must do as long as a cluster may still execute a slot of version 0, be it to catch up. State is
what it was: each version must make do with what earlier ones wrote.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntFlag
from importlib import import_module
from typing import Protocol, cast

from replica.core.state import BucketedMap

# The greatest version of an application's behaviour: a u16 in the command that puts one in force.
VERSION_MAX = 2**16 - 1


class OperationError(Exception):
    """Raise it from `apply` to refuse an operation; its text is the error that the client sees.

    Any other exception is an error result too, but the client sees only its type, because texts of foreign exceptions
    may differ between replicas.
    """


@dataclass(slots=True)
class Context:
    """What an operation may look at besides its own bytes.

    state: the application's ordered map of byte strings.
    slot: the position of the batch in the agreed order, from 1.
    time_ms: milliseconds since 1970 as the proposer claims, never going back; advisory: a faulty proposer can set it to
        anything later, for ever.
    client: the 65-byte public key that signed the request.
    ordered: False if nobody ordered the operation, which a client then wants to know the result of at one replica: what
        it writes is taken back. An application may refuse there what costs much.
    version: of the application's behaviour, in force in this slot: never more than the class attribute `version`.
    """

    state: BucketedMap
    slot: int = 0
    time_ms: int = 0
    client: bytes = b""
    ordered: bool = True
    version: int = 0


class Right(IntFlag):
    """What an operation does with keys of the state."""

    READ = 1
    WRITE = 2


class Application(Protocol):
    """The interface an application implements.

    One whose behaviour was changed has a class attribute `version`, an int from 0 to VERSION_MAX.

    An application whose clients are to be allowed some keys of the state only (`replica.core.clients`) has a method
    `accesses` too, as `KeysNamed` has it.
    """

    def apply(self, operation: bytes, context: Context) -> bytes:
        """Carry out one operation and return its result."""
        ...


class KeysNamed(Application, Protocol):
    """An application that says which keys of the state an operation reads and writes."""

    def accesses(self, operation: bytes) -> Iterable[tuple[Right, bytes]]:
        """Return what `apply` may read and write if it is given `operation`: one right and one key each.

        A key stands for all keys that begin with it too, b"" for the whole state. A result that tells more of a key
        than whether it had a value reads it. OperationError for what `apply` refuses whatever the state holds. `apply`
        must do no more than what is returned: nothing else is checked of a client that may not use all keys.

        An application that has a `version` is asked `accesses(operation, version)`, with the one in force: what is
        permitted is agreed, as results are. Having this method at all is: it comes or goes in another application only.
        """
        ...


class ApplicationLoadError(Exception):
    """The application named in the cluster file cannot be loaded; the text says why and what to do."""


def load_application(name: str) -> Application:
    """Return an instance of the class named "module:Class"."""
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ApplicationLoadError(f'"{name}" is not of the form module:Class')
    try:
        loaded = getattr(import_module(module_name), class_name)()
    except ImportError as error:
        raise ApplicationLoadError(f"{name}: {error}; install it on every replica or set PYTHONPATH") from error
    except AttributeError as error:
        raise ApplicationLoadError(f"{name}: the module has no class {class_name}") from error
    except Exception as error:
        raise ApplicationLoadError(f"{name}: making an instance failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(loaded, "apply", None)):
        raise ApplicationLoadError(f"{name}: the class has no method apply(operation, context)")
    version = getattr(loaded, "version", 0)
    if type(version) is not int or not 0 <= version <= VERSION_MAX:
        raise ApplicationLoadError(
            f"{name}: its attribute `version` is {version!r}; it must be a whole number from 0 to {VERSION_MAX}: the "
            "newest version of its behaviour that this code knows"
        )
    return cast("Application", loaded)


def known_version(application: Application) -> int:
    """Return the newest version of its behaviour that this application's code knows."""
    version: int = getattr(application, "version", 0)
    return version


def accesses_of(application: Application) -> Callable[[bytes, int], Iterable[tuple[Right, bytes]]] | None:
    """Return what says, of an operation and the version in force, which keys it uses; None if nothing does."""
    accesses = getattr(application, "accesses", None)
    if accesses is None or hasattr(application, "version"):
        return cast("Callable[[bytes, int], Iterable[tuple[Right, bytes]]] | None", accesses)
    return lambda operation, _version: accesses(operation)
