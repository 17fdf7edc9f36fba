"""Reading binary lists from outside: never beyond the end, never more than was announced."""

from __future__ import annotations

from typing import Literal

from trustlog.errors import VerificationError


class BytesReader:
    """Takes bytes off the front of ``data``; VerificationError(``reason``) instead of reading beyond the end."""

    def __init__(self, data: bytes, name: str, reason: str) -> None:
        self._data = data
        self._name = name
        self._reason = reason
        self.position = 0

    @property
    def is_at_end(self) -> bool:
        """Tell whether everything was read."""
        return self.position == len(self._data)

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count > len(self._data) - self.position:
            raise self.error(f"ends within an entry that begins before byte {self.position}")
        start, self.position = self.position, self.position + count
        return self._data[start : self.position]

    def number(self, size: int, order: Literal["little", "big"] = "little") -> int:
        """Return the next ``size`` bytes as a number."""
        return int.from_bytes(self.take(size), order)

    def bounded(self, size: int, high: int, what: str) -> int:
        """Return the next number, at most ``high``."""
        number = self.number(size)
        if number > high:
            raise self.error(f"{what} {number} at byte {self.position - size}, more than {high}")
        return number

    def error(self, text: str) -> VerificationError:
        """Return the error that says ``text`` of this list."""
        return VerificationError(self._reason, f"the {self._name} {text}")
