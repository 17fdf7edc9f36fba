"""What an application is: a class with `apply(operation, context) -> result`, and nothing else.

Every replica runs every operation in the same order, so `apply` must be deterministic: it may use its arguments and
`context` only, never a clock, randomness, files, the network, or the order of a set. All that it remembers lies in
`context.state`; the platform digests, stores and transfers it. An exception is an error result and changes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from importlib import import_module
from typing import Protocol, cast

from replica.core.state import BucketedMap


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
    """

    state: BucketedMap
    slot: int = 0
    time_ms: int = 0
    client: bytes = b""
    ordered: bool = True


class Right(IntFlag):
    """What an operation does with keys of the state."""

    READ = 1
    WRITE = 2


class Application(Protocol):
    """The interface an application implements.

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
    return cast("Application", loaded)
