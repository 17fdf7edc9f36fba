"""Strict reading of TOML: every key is known and of the right type; a mistake is named where it stands."""

import difflib
import hashlib
import os
import shlex
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_BYTES_MAX = 1024 * 1024
INTEGER_MAX = 2**53 - 1  # what every TOML and JSON reader represents exactly


class ConfigError(Exception):
    """A configuration file cannot be used; the text names the file, the key, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class TomlFile:
    """A parsed file. `digest` is the 32-byte SHA-256 of its bytes, `name` what error texts call it."""

    name: str
    data: dict[str, Any]
    digest: bytes


def read_bounded(path: Path, size_max: int = FILE_BYTES_MAX, *, private: str = "") -> bytes:
    """Return a regular file's content, at most `size_max` bytes; ConfigError if that cannot be.

    private: what the file holds that is nobody else's; one that other users can read is refused then, too.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(descriptor).st_mode
            content = b""
            while stat.S_ISREG(mode) and len(content) <= size_max:
                more = os.read(descriptor, size_max + 1 - len(content))
                content += more
                if not more:
                    break
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path}: not a regular file")
    if private and mode & 0o077:
        raise ConfigError(
            f"{path}: this {private} is open to other users (mode {stat.S_IMODE(mode):04o}); "
            f"if nobody can have copied it, run: chmod 600 {shlex.quote(str(path))}"
        )
    if len(content) > size_max:
        raise ConfigError(f"{path}: larger than {size_max} bytes; this is not a file that trustlog-replica wrote")
    return content


def parse_toml(raw: bytes, name: str, size_max: int = FILE_BYTES_MAX) -> TomlFile:
    """Parse a file's bytes, at most `size_max`; ConfigError with line and column if they are not TOML."""
    if len(raw) > size_max:
        raise ConfigError(f"{name}: {len(raw)} bytes, the limit is {size_max}")
    try:
        data = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8; restore the file from a copy") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}; restore the file or mend that line") from None
    except (RecursionError, ValueError) as error:
        # Deep nesting ends in RecursionError; a number of thousands of digits in ValueError.
        text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{name}: not valid TOML: {text}; restore the file from a copy") from None
    return TomlFile(name, data, hashlib.sha256(raw).digest())


class Table:
    """One table of a file, read key by key. `finish` refuses keys that nobody asked for.

    Every method raises ConfigError that names file and key; `default` makes a key optional.
    """

    def __init__(self, file_name: str, data: dict[str, Any], path: str = "") -> None:
        self.file_name = file_name
        self._data = data
        self._path = path
        self._asked: list[str] = []

    def error(self, key: str, text: str) -> ConfigError:
        """Return the error that says `text` about `key` of this table."""
        return ConfigError(f"{self.file_name}: {self._path}{key}: {text}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._take(key, str, "a text in quotes", default)
        return str(value)

    def choice(self, key: str, choices: list[str], default: str | None = None) -> str:
        """Return one of the given strings."""
        value = self.text(key, default)
        if value not in choices:
            raise self.error(key, f'"{printable(value)}" is none of {_listed(choices)}{_nearest(value, choices)}')
        return value

    def integer(self, key: str, low: int, high: int = INTEGER_MAX, default: int | None = None) -> int:
        """Return an integer from `low` to `high`."""
        value = self._take(key, int, "a whole number", default)
        if not low <= value <= high:
            raise self.error(key, f"must be from {low} to {high}, not {value if abs(value) < 1 << 64 else 'that'}")
        return int(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        return bool(self._take(key, bool, "true or false", default))

    def hexadecimal(self, key: str, size: int) -> bytes:
        """Return exactly `size` bytes written as hexadecimal digits."""
        text = self.text(key)
        try:
            value = bytes.fromhex(text) if text.isalnum() else b""
        except ValueError:
            value = b""
        if len(value) != size:
            raise self.error(key, f"must be {2 * size} hexadecimal digits ({size} bytes)")
        return value

    def hexadecimals(self, key: str, count_max: int, size_max: int) -> tuple[bytes, ...]:
        """Return the byte strings of a list of hexadecimal texts, each at most `size_max` bytes; () if missing."""
        value = self._take(key, list, "a list of hexadecimal texts", [])
        if len(value) > count_max:
            raise self.error(key, f"{len(value)} texts, at most {count_max} are possible")
        found = []
        for text in value:
            if type(text) is not str or len(text) > 2 * size_max:
                raise self.error(key, f"must hold texts of at most {2 * size_max} hexadecimal digits")
            try:
                found.append(bytes.fromhex(text))
            except ValueError:
                raise self.error(key, "must hold hexadecimal digits only") from None
        return tuple(found)

    def table(self, key: str) -> "Table":
        """Return the table [key]."""
        return Table(self.file_name, self._take(key, dict, "a table", None), f"{self._path}{key}.")

    def optional_table(self, key: str) -> "Table | None":
        """Return the table [key], None if there is none."""
        self._asked.append(key)
        return self.table(key) if key in self._data else None

    def raw_table(self, key: str) -> dict[str, Any]:
        """Return the optional table [key] as it was parsed, for a reader that is as strict itself."""
        self._asked.append(key)
        return dict(self._take(key, dict, "a table", {}))

    def tables(self, key: str, count_max: int) -> list["Table"]:
        """Return the tables [[key]], at most `count_max`."""
        value = self._take(key, list, f"a list of tables, each headed [[{self._path}{key}]]", None)
        if len(value) > count_max:
            raise self.error(key, f"{len(value)} tables, at most {count_max} are possible")
        if not all(type(item) is dict for item in value):
            raise self.error(key, "must hold tables only")
        return [Table(self.file_name, item, f"{self._path}{key}[{i}].") for i, item in enumerate(value)]

    def finish(self) -> None:
        """Refuse keys that were never asked for, and name the known key that comes nearest."""
        for key in self._data:
            if key not in self._asked:
                hint = _nearest(key, self._asked) or f"; known here: {_listed(self._asked)}"
                raise self.error(printable(key), f"is not a key that this program knows{hint}")

    def _take(self, key: str, kind: type, wanted: str, default: Any) -> Any:  # noqa: ANN401 - what TOML holds
        self._asked.append(key)
        value = self._data.get(key, default)
        if value is None:
            misspelt = [other for other in self._data if other not in self._asked]
            near = difflib.get_close_matches(key, misspelt, 1)
            hint = f'; is "{printable(near[0])}" a misspelling of it?' if near else ""
            raise self.error(key, f"is missing{hint}")
        # `type`, not isinstance: a bool is an int in Python, but not in a configuration.
        if type(value) is not kind:
            raise self.error(key, f"must be {wanted}, not {type(value).__name__}")
        return value


def printable(text: str, length_max: int = 80) -> str:
    """Return a text from outside as it may stand in a message: no control characters, of bounded length."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:length_max])
    return shown + ("…" if len(text) > length_max else "")


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _listed(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
