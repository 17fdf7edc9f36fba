"""Passphrases of private keys at rest: where one comes from, and how it is set, changed and taken away.

A passphrase is looked for only when a key turns out to be encrypted, in this order: the file that an option names, the
file that TRUSTLOG_PASSPHRASE_FILE names, a person at a terminal. It is never taken from an argument or a variable
itself: other users see the one, and children inherit the other. A passphrase file is as secret as a key and is refused
like one when others can read it; it holds the passphrase on one line.

`change_passphrases` puts each key's new file, complete and on disk, in the place of the old one by renaming. A crash
leaves the old file or the new one; some keys may then have the one passphrase and some the other, and the same command
again finishes what was begun.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from replica.cluster.keys import (
    CLIENT_KEY_NAME,
    PASSPHRASE_BYTES_MAX,
    ClientKey,
    LockedKeyError,
    is_encrypted,
    load_client_key,
    load_private_key,
    public_bytes,
    write_private_key,
)
from replica.cluster.strict_toml import ConfigError, read_bounded
from replica.cluster.writing import give, sync_directory

PASSPHRASE_VARIABLE: Final = "TRUSTLOG_PASSPHRASE_FILE"  # noqa: S105 - a name
OPTION: Final = "--passphrase-file"


class KeysBusyError(ConfigError):
    """Another program is changing a folder's keys."""


@dataclass(frozen=True, slots=True)
class Passphrase:
    """A passphrase (1 to 1023 bytes), and where it came from, for texts."""

    secret: bytes = field(repr=False)
    source: str


class PassphraseSource:
    """Finds the passphrase when it is needed, and once.

    file: what an option named. ask: asks a person, given what to say; None where there is nobody. environ: instead of
    the process' own.
    """

    def __init__(
        self,
        file: Path | None = None,
        ask: Callable[[str], str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._file, self._ask = file, ask
        self._environ = os.environ if environ is None else environ
        self._found: Passphrase | None = None

    def given(self) -> Passphrase | None:
        """Return what the named file holds, None if none is named; ConfigError if it cannot be used."""
        if self._found is None and self._file is not None:
            self._found = Passphrase(read_passphrase_file(self._file), f"in {self._file}")
        elif self._found is None and (name := self._environ.get(PASSPHRASE_VARIABLE)):
            self._found = Passphrase(read_passphrase_file(Path(name)), f"in {name} ({PASSPHRASE_VARIABLE})")
        return self._found

    def given_now(self) -> Passphrase | None:
        """Return what the named file holds by now, as `given` does; it, or its content, may have been exchanged."""
        return PassphraseSource(self._file, None, self._environ).given()

    def get(self, prompt: str, why: str) -> Passphrase:
        """Return what the named file holds, or what a person answers; ConfigError says `why` if there is neither."""
        found = self.given()
        if found is None:
            if self._ask is None:
                raise LockedKeyError(
                    f"{why}, and no passphrase was given: name a file that holds it with {OPTION} or "
                    f"{PASSPHRASE_VARIABLE}; it is asked for on a terminal only"
                )
            found = Passphrase(check_passphrase(self._ask(prompt).encode(), "what was typed"), "that was typed")
            self._found = found
        return found

    def for_key(self, path: Path) -> Passphrase:
        """Return the passphrase for an encrypted key; ConfigError if it cannot be had."""
        return self.get(f"Passphrase of {path}", f"{path}: this private key is encrypted")


def read_passphrase_file(path: Path) -> bytes:
    """Return the one line in a passphrase file; ConfigError if others can read it, or it holds anything else."""
    content = read_bounded(path, PASSPHRASE_BYTES_MAX + 2, private="passphrase")
    return check_passphrase(content.removesuffix(b"\n").removesuffix(b"\r"), str(path))


def new_passphrase(file: Path | None, ask: Callable[[str], str]) -> bytes:
    """Return a new passphrase from a file that is named, else from a person; ConfigError if it cannot be one."""
    if file is not None:
        return read_passphrase_file(file)
    return check_passphrase(ask("New passphrase").encode(), "what was typed")


def for_new_keys(source: PassphraseSource, *, asks: bool, ask: Callable[[str], str]) -> bytes | None:
    """Return the passphrase for keys that are being made, None if they get none.

    asks: have a person asked if no file is named.
    """
    given = source.given()
    if given is not None:
        return given.secret
    return new_passphrase(None, ask) if asks else None


def unlocked_client_key(folder: Path, source: PassphraseSource | None = None) -> ClientKey:
    """Read a client's or an operator's key. source: if it is encrypted; without one, the variable says where."""
    path = folder / CLIENT_KEY_NAME
    if not is_encrypted(path):
        return load_client_key(folder)
    found = (source or PassphraseSource()).for_key(path)
    return load_client_key(folder, found.secret, found.source)


def check_passphrase(secret: bytes, source: str) -> bytes:
    """Return a passphrase; ConfigError if it cannot be one."""
    if not secret:
        raise ConfigError(f"{source}: empty; a passphrase has at least one character, on one line")
    if len(secret) > PASSPHRASE_BYTES_MAX:
        raise ConfigError(f"{source}: longer than {PASSPHRASE_BYTES_MAX} bytes; take a shorter passphrase")
    if any(byte in secret for byte in b"\r\n\0"):
        raise ConfigError(f"{source}: holds more than one line; a passphrase is one line")
    return secret


def change_passphrases(paths: Sequence[Path], old: PassphraseSource, new: bytes | None) -> int:
    """Encrypt these keys with `new`, or decrypt them if it is None; return how many files were not so before.

    Every key is opened before the first file is changed: with `old`, or with `new` where an interrupted change came
    so far. ConfigError if one cannot be opened, or another change is going on; then nothing was changed.
    """
    with ExitStack() as stack:
        for folder in dict.fromkeys(path.parent.resolve() for path in paths):
            stack.enter_context(only_one(folder))
        opened = [(path, *_open(path, old, new)) for path in paths]
        todo = [(path, key) for path, key, is_done in opened if not is_done]
        for path, key in todo:
            _exchange(path, key, new)
    return len(todo)


def _open(path: Path, old: PassphraseSource, new: bytes | None) -> tuple[ec.EllipticCurvePrivateKey, bool]:
    """Return a key, and whether its file is already as it should be."""
    if not is_encrypted(path):
        return load_private_key(path), new is None
    if new is not None:
        try:
            return load_private_key(path, new), True
        except LockedKeyError:
            pass  # the usual case: it still has the old one
    passphrase = old.for_key(path)
    return load_private_key(path, passphrase.secret, passphrase.source), False


def _exchange(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> None:
    """Put a new file in the place of a key's; whatever happens, one whole file is there."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.unlink(missing_ok=True)  # a crash left it; the lock says that nobody is writing it
        write_private_key(beside, key, passphrase)
        written = load_private_key(beside, passphrase)
        if public_bytes(written.public_key()) != public_bytes(key.public_key()):
            raise ConfigError(f"{beside}: what was written is another key; {path} was left as it is: check the disk")
        give(beside, path)
        beside.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise ConfigError(
            f"{path}: its passphrase could not be changed: {error.strerror or error}; the key is there, under the old "
            "passphrase or the new one: make room or see to the folder's permissions, and run the same command again"
        ) from error


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder's keys; KeysBusyError if another program has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be opened: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise KeysBusyError(f"{folder}: another program is changing these keys; wait until it has ended") from None
    finally:
        os.close(descriptor)
