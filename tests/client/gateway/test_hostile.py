"""The Redis gateway and hostile bytes: malformed, endless, unread, too many; it lives and its memory is bounded."""

import asyncio

import hiredis
import pytest

from client.gateway.connection import RespConnection
from client.gateway.glob import compile_pattern
from client.gateway.keys import TURN_BYTES, matching
from tests.client.fake_cluster import until
from tests.client.gateway.talk import gateway, text

pytestmark = pytest.mark.asyncio


MALFORMED = [
    b"*1000000000\r\n",
    b"*1\r\n$536870912\r\n" + b"x" * 1000,
    b"*1\r\n*1\r\n" * 1000,
    b"*1\r\n:1\r\n",
    b"x" * 70_000,
    b'SET "a\r\n',
    b"\x16\x03\x01\x02\x00\x01\x00\r\n" + b"\x00" * 70_000,
]


@pytest.mark.parametrize("raw", MALFORMED, ids=lambda raw: repr(raw[:16]))
async def test_malformed_bytes_get_an_error_and_end_their_connection_only(fleet, raw):
    async with fleet, gateway(fleet) as (served, connect):
        good, bad = await connect(), await connect()
        assert await good("SET", "a", "1") == b"OK"
        bad.writer.write(raw)
        assert (await bad.ended()).startswith(b"-ERR ")
        assert await good("GET", "a") == b"1"
        await until(lambda: served.connected == 1)
        assert served.buffered == 0


async def test_blank_lines_are_nothing(fleet):
    async with fleet, gateway(fleet) as (served, connect):
        talk = await connect()
        talk.writer.write(b"\r\n" * 5000 + b" \n" * 5000 + b"*0\r\n" * 5000 + b"PING\r\n")
        assert await talk.reply() == b"PONG"
        assert not served.refusals


@pytest.mark.parametrize("rest", [b"", b"\r\n", b"*2\r\n$3\r\nGET\r\n"])
async def test_who_has_said_all_is_answered(fleet, rest):
    """As `printf 'SET a 1' | nc` does: the sending side is closed before the answers come."""
    async with fleet, gateway(fleet) as (served, connect):
        talk = await connect()
        for number in range(1200):
            talk.send("SET", "a", str(number))
        talk.send("GET", "a")
        talk.writer.write(rest)
        talk.writer.write_eof()
        assert await talk.replies(1202) == [b"OK"] * 1200 + [b"1199", None]
        await until(lambda: served.connected == 0)
        assert not served.refusals


async def test_who_has_said_all_and_does_not_read_is_ended(fleet):
    async with fleet, gateway(fleet, unread_s=0.2) as (served, connect):
        talk = await connect()
        await talk("SET", "k", "x" * 900_000)
        talk.reader._transport.pause_reading()
        talk.writer.write(hiredis.pack_command(("GET", "k")) * 8)
        talk.writer.write_eof()
        await until(lambda: served.connected == 0)


@pytest.mark.parametrize("words", [("KEYS",), ("SCAN", "0", "MATCH"), ("CONFIG", "GET")])
async def test_patterns_are_bounded(talk, words):
    assert text(await talk(*words, "[^x]" * 25_000)).startswith("ERR")
    if words[0] == "CONFIG":
        assert text(await talk(*words, *["[^x]"] * 300)).startswith("ERR the patterns have at most 1024 bytes")


async def test_others_have_their_turn_while_keys_are_matched():
    keys = [b"a" * 1000] * 1000
    searching = asyncio.ensure_future(matching(compile_pattern(b"*" + b"a" * 500 + b"b"), keys))
    turns = 0
    while not searching.done():
        await asyncio.sleep(0)
        turns += 1
    assert searching.result() == []
    assert turns >= 1_000_000 // TURN_BYTES


async def test_a_page_in_a_browser_is_not_talked_to(fleet):
    async with fleet, gateway(fleet) as (served, connect):
        talk = await connect()
        talk.writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\nSET a 1\r\n")
        assert b"OK" not in await talk.ended()
        assert served.refusals["http"] == 1
        assert await (await connect())("EXISTS", "a") == 0


async def test_what_was_said_before_a_malformed_command_is_answered(talk):
    talk.writer.write(hiredis.pack_command(("SET", "a", "1")) + b"*x\r\n")
    assert await talk.reply() == b"OK"
    assert text(await talk.reply()).startswith("ERR Protocol error")
    assert await talk.reply() is None


async def test_an_unfinished_command_has_a_deadline(fleet):
    async with fleet, gateway(fleet, command_s=0.2) as (served, connect):
        slow, idle = await connect(), await connect()
        slow.writer.write(b"*2\r\n$3\r\nGET\r\n$1")
        assert b"did not come to its end" in await slow.ended()
        assert await idle("PING") == b"PONG"
        assert served.refusals["incomplete-command"] == 1


async def test_buffers_are_bounded_over_all_connections(fleet):
    async with fleet, gateway(fleet, buffered_bytes_max=1_000_000) as (served, connect):
        talks = [await connect() for _ in range(8)]
        for talk in talks:
            talk.writer.write(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$3000000\r\n" + b"x" * 400_000)
        await until(lambda: served.refusals["buffers-full"] >= 6)
        assert served.buffered <= 1_000_000
        for talk in talks:
            talk.close()
        await until(lambda: served.connected == 0)
        assert served.buffered == 0
        assert await (await connect())("PING") == b"PONG"


async def test_a_connection_that_does_not_read_is_held_back_and_then_ended(fleet):
    async with fleet, gateway(fleet, unread_s=0.2) as (served, connect):
        talk = await connect()
        await talk("SET", "k", "x" * 500_000)
        talk.reader._transport.pause_reading()
        talk.writer.write(hiredis.pack_command(("GET", "k")) * 200)
        await until(lambda: served.refusals["answers-not-read"] == 1)
        # Far from all were carried out: 200 answers are 100 MB.
        assert fleet.executor.operations < 100
        assert await (await connect())("PING") == b"PONG"


class Stuck(asyncio.Transport):
    """A transport whose other side takes nothing, so that it never closes."""

    aborted = False

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def is_closing(self):
        return False

    def write(self, data):
        pass

    def close(self):
        pass

    def abort(self):
        self.aborted = True


async def test_a_connection_that_cannot_close_is_given_up(fleet):
    async with fleet, gateway(fleet, unread_s=0.1) as (served, _):
        stuck, connection = Stuck(), RespConnection(served)
        connection.connection_made(stuck)
        connection.end("ERR enough")
        assert not stuck.aborted
        await until(lambda: stuck.aborted)
        connection.connection_lost(None)
        await asyncio.wait_for(connection.worker, 10)


async def test_connections_are_bounded(fleet):
    async with fleet, gateway(fleet, connections_max=2) as (served, connect):
        first, second, third = [await connect() for _ in range(3)]
        assert await first("PING") == await second("PING") == b"PONG"
        assert b"max number of clients reached" in await third.ended()
        first.close()
        await until(lambda: served.connected == 1)
        assert await (await connect())("PING") == b"PONG"
