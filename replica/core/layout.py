"""Reading fixed byte layouts strictly: no byte is skipped, none is read twice, none may be left over."""

import struct

U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
U64_MAX = 2**64 - 1
DIGEST_SIZE = 32


class LayoutError(ValueError):
    """Bytes from outside that are not what the documented layout allows. Nothing was changed."""


class Reader:
    """A cursor over `data` whose every read is checked against what is left."""

    __slots__ = ("_data", "_end", "position")

    def __init__(self, data: bytes, start: int = 0, end: int | None = None) -> None:
        self._data = data
        self._end = len(data) if end is None else end
        self.position = start

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes; LayoutError if fewer are left."""
        start = self.position
        stop = start + size
        if stop > self._end:
            raise LayoutError(f"{size} bytes wanted at offset {start}, {self._end - start} left")
        self.position = stop
        return self._data[start:stop]

    def _number(self, layout: struct.Struct) -> int:
        start = self.position
        stop = start + layout.size
        if stop > self._end:
            raise LayoutError(f"{layout.size} bytes wanted at offset {start}, {self._end - start} left")
        self.position = stop
        value: int = layout.unpack_from(self._data, start)[0]
        return value

    def u8(self) -> int:
        """Return the next byte as a number."""
        return self.take(1)[0]

    def u16(self) -> int:
        """Return the next two bytes, big-endian."""
        return self._number(U16)

    def u32(self) -> int:
        """Return the next four bytes, big-endian."""
        return self._number(U32)

    def u64(self) -> int:
        """Return the next eight bytes, big-endian."""
        return self._number(U64)

    def block(self, size_max: int) -> bytes:
        """Return a byte string preceded by its u32 length; LayoutError above `size_max`."""
        size = self.u32()
        if size > size_max:
            raise LayoutError(f"a length of {size} at offset {self.position - 4}, the limit is {size_max}")
        return self.take(size)

    def left(self) -> int:
        """Return how many bytes have not been read."""
        return self._end - self.position

    def finish(self) -> None:
        """Raise LayoutError unless every byte was read."""
        if self.position != self._end:
            raise LayoutError(f"{self._end - self.position} bytes too many at offset {self.position}")
