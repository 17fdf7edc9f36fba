"""A connection as a sequence of messages: an asyncio protocol with bounded buffers in both directions."""

import asyncio
from collections import Counter
from typing import cast

from replica.core.layout import U32, LayoutError
from replica.wire.messages import HANDSHAKE_FRAME_BYTES_MAX, Message, decode_message, encode_frame

# What may wait in a connection's write buffer before its owner is told to hold back.
WRITE_BUFFER_HIGH = 1024 * 1024
# A peer that lets this much wait does not read; it is disconnected.
WRITE_BUFFER_MAX = 32 * 1024 * 1024
# What is handed to the transport at once. Under TLS it says how much waits only of what comes after the piece that the
# socket did not take: a larger one would wait there uncounted.
PIECE_BYTES = 64 * 1024
# A connection that holds back or takes turns handles so many messages before others have their turn of the loop.
TURN_MESSAGES_MAX = 64


class MessageProtocol(asyncio.Protocol):
    """Cuts the byte stream into frames and hands each message on; collects what is sent in one loop turn.

    A subclass implements `message_received` and may extend `opened` and `closed`. Bytes that are not a message close
    the connection and are counted under `refusals`. Before the handshake is over, frames are limited to 4 KiB; the
    subclass raises `frame_bytes_max` afterwards.

    With `holds_back`, reading pauses while answers wait to be sent: small questions with large answers would cost
    memory without bound. One end of a connection only may do so, or two ends could wait for each other for ever. With
    `takes_turns`, it pauses for a turn of the loop only.
    """

    holds_back = False
    takes_turns = False

    def __init__(self, refusals: Counter[str] | None = None) -> None:
        self.transport: asyncio.Transport | None = None
        self.frame_bytes_max = HANDSHAKE_FRAME_BYTES_MAX
        self.refusals = Counter[str]() if refusals is None else refusals
        self.writable = True
        self.last_heard = 0.0
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._to_send: list[bytes] = []
        self._to_send_bytes = 0
        self._paused = False
        self._held = False
        self._in_line = False

    # To be implemented by subclasses.

    def message_received(self, message: Message) -> None:
        """Handle one message. A LayoutError raised here closes the connection and is counted."""
        raise NotImplementedError

    def has_turn(self) -> bool:
        """Say whether to handle the next message now; if not, nothing is read until `take_turn` is called."""
        return True

    def opened(self) -> None:
        """Act on the connection being established."""

    def closed(self, reason: str) -> None:
        """Act on the connection being gone; `reason` is in words."""

    def drained(self) -> None:
        """Act on the write buffer being low again after `writable` was False."""

    # For users of the connection.

    def send(self, message: Message) -> None:
        """Send a message with everything else that is sent in this turn of the loop."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded frame; for one message to many connections."""
        if not self._to_send:
            self._loop.call_soon(self._flush)
        self._to_send.append(frame)
        self._to_send_bytes += len(frame)
        if self._to_send_bytes > WRITE_BUFFER_MAX:
            self.refuse("does-not-read")

    def hold(self, *, pause: bool) -> None:
        """Read no further for now, or go on."""
        self._held = pause
        if pause:
            self._pause()
        else:
            self._go_on()

    def take_turn(self) -> None:
        """Read on after `has_turn` denied it."""
        self._in_line = False
        self._go_on()

    @property
    def waiting_bytes(self) -> int:
        """How much waits to be sent, what the socket and a piece hold not counted."""
        return self._to_send_bytes + (0 if self.transport is None else self.transport.get_write_buffer_size())

    @property
    def is_open(self) -> bool:
        """Say whether the connection stands and is not being closed."""
        return self.transport is not None and not self.transport.is_closing()

    def close(self) -> None:
        """Send what waits, then close."""
        self._flush()
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once; what waits to be sent is dropped."""
        self._drop_to_send()
        if self.transport is not None:
            self.transport.abort()

    def refuse(self, reason: str) -> None:
        """Count what came from outside as refused for `reason`, and drop the connection."""
        self.refusals[reason] += 1
        self.abort()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH)
        self.last_heard = self._loop.time()
        self.opened()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.transport = None
        self._received.clear()
        self._drop_to_send()
        self.closed(str(exc) if exc else "closed by the other side")

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self.writable = False

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self.writable = True
        self.drained()
        self._go_on()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self.last_heard = self._loop.time()
        self._received += data
        if not self._paused:
            self._read_frames()

    def _read_frames(self) -> None:
        received = self._received
        position = handled = 0
        while len(received) - position >= U32.size and self.is_open:
            in_turn = (self.holds_back or self.takes_turns) and handled == TURN_MESSAGES_MAX
            if in_turn or self._held or self._answers_wait():
                self._pause()
                break
            (size,) = U32.unpack_from(received, position)
            if size > self.frame_bytes_max:
                self.refuse("oversized-frame")
                return
            end = position + U32.size + size
            if len(received) < end:
                break
            if not self.has_turn():
                self._in_line = True
                self._pause()
                break
            body = bytes(memoryview(received)[position + U32.size : end])
            position = end
            handled += 1
            try:
                self.message_received(decode_message(body))
            except LayoutError:
                self.refuse("malformed-message")
                return
        del received[:position]

    def _answers_wait(self) -> bool:
        return self.holds_back and (not self.writable or self._to_send_bytes > WRITE_BUFFER_HIGH)

    def _pause(self) -> None:
        if self.transport is not None and not self._paused:
            self._paused = True
            self.transport.pause_reading()
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Read on after a pause, unless answers wait still: then what is sent calls again."""
        if not self._paused or self._held or self._in_line or self.transport is None:
            return
        if not self.is_open or self._answers_wait():
            return
        self._paused = False
        self.transport.resume_reading()
        self._read_frames()

    def _drop_to_send(self) -> None:
        self._to_send.clear()
        self._to_send_bytes = 0

    def _flush(self) -> None:
        if not self._to_send or self.transport is None:
            self._drop_to_send()
            return
        if self._to_send_bytes <= PIECE_BYTES:
            self.transport.writelines(self._to_send)
        else:
            data = memoryview(b"".join(self._to_send))
            for start in range(0, len(data), PIECE_BYTES):
                self.transport.write(data[start : start + PIECE_BYTES])
        self._drop_to_send()
        if self.transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
            self.refuse("does-not-read")
        elif self._paused:
            self._loop.call_soon(self._go_on)
