"""Redis' protocol: commands out of any bytes within limits, replies, patterns."""

import contextlib
import fnmatch
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.glob import PATTERN_BYTES_MAX, compile_pattern
from client.gateway.resp import (
    ARGUMENTS_MAX,
    BULK_BYTES_MAX,
    COMMAND_BYTES_MAX,
    INLINE_BYTES_MAX,
    NULL_ARRAY,
    OK,
    CommandReader,
    ErrorReply,
    ProtocolError,
    encode,
    split_line,
)
from tests.replica.core.support import examples


def packed(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def read_all(reader: CommandReader) -> list[list[bytes]]:
    found = []
    while (words := reader.next()) is not None:
        found.append(words)
    return found


@examples(200)
@given(
    st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=5), max_size=6),
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_commands_come_out_as_they_went_in_however_they_are_cut(commands, sizes):
    stream = b"".join(packed(*words) for words in commands)
    reader, found, turn = CommandReader(), [], 0
    while stream:
        size = sizes[turn % len(sizes)]
        turn += 1
        reader.feed(stream[:size])
        stream = stream[size:]
        found += read_all(reader)
    assert found == commands
    assert len(reader) == 0


def test_a_byte_at_a_time_costs_no_more_than_the_bytes():
    words = [b"MGET", *(b"k%d" % i for i in range(ARGUMENTS_MAX - 1))]
    reader, found = CommandReader(), []
    for byte in packed(*words):
        reader.feed(bytes([byte]))
        found += read_all(reader)
    assert found == [words]


def test_inline_and_arrays_mix_and_empty_ones_are_nothing():
    reader = CommandReader()
    reader.feed(b"PING\r\n" + packed(b"GET", b"a") + b"\r\n\n  SET k 'a b' \"c\\x41\\n\"\n*0\r\n*-1\r\nECHO x\n")
    assert read_all(reader) == [[b"PING"], [b"GET", b"a"], [b"SET", b"k", b"a b", b"cA\n"], [b"ECHO", b"x"]]


@pytest.mark.parametrize("line", [b"a 'b", b'a "b', b'"a"b', b"'a'b", b'a"b"', b"''x"], ids=lambda line: line.decode())
def test_open_quotes_are_refused(line):
    with pytest.raises(ProtocolError, match="unbalanced quotes"):
        split_line(line)


REFUSED = [
    b"*1000000000\r\n",
    b"*%d\r\n" % (ARGUMENTS_MAX + 1),
    b"*x\r\n",
    b"*1\r\n$x\r\n",
    b"*" + b"1" * 40,
    b"*1\r\n$" + b"9" * 40,
    b"*1\r\n$536870912\r\n",
    b"*1\r\n$%d\r\n" % (BULK_BYTES_MAX + 1),
    b"*1\r\n$-1\r\n",
    b"*1\r\n*1\r\n*1\r\n$1\r\na\r\n",
    b"*1\r\n:5\r\n",
    b"*1\r\n+OK\r\n",
    b"*1\r\n$3\r\nabcde",
    b"*1\r\n%1\r\n",
    b"x" * (INLINE_BYTES_MAX + 1),
]


@pytest.mark.parametrize("stream", REFUSED, ids=lambda stream: repr(stream[:24]))
def test_what_breaks_a_rule_is_refused_before_memory_is_spent(stream):
    reader = CommandReader()
    tracemalloc.start()
    with pytest.raises(ProtocolError):  # noqa: PT012 - whichever call finds it
        reader.feed(stream)
        read_all(reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1024 * 1024


def test_a_command_is_bounded_as_a_whole():
    reader = CommandReader()
    reader.feed(b"*5\r\n")
    for _ in range(COMMAND_BYTES_MAX // BULK_BYTES_MAX - 1):
        reader.feed(b"$%d\r\n%s\r\n" % (BULK_BYTES_MAX, bytes(BULK_BYTES_MAX)))
        assert reader.next() is None
    reader.feed(b"$%d\r\n" % BULK_BYTES_MAX)
    with pytest.raises(ProtocolError, match="invalid bulk length"):
        reader.next()


@examples(500)
@given(st.lists(st.sampled_from([b"*", b"$", b"1", b"2", b"-", b"\r\n", b"\n", b"a", b"'", b'"', b"\\", b":", b" "])))
def test_any_bytes_are_commands_or_refused(parts):
    reader = CommandReader()
    with contextlib.suppress(ProtocolError):  # the one other thing that may happen
        for part in parts:
            reader.feed(part)
            for words in read_all(reader):
                assert words
                assert all(type(word) is bytes for word in words)


@pytest.mark.parametrize(
    ("reply", "two", "three"),
    [
        (b"a\r\nb", b"$4\r\na\r\nb\r\n", b"$4\r\na\r\nb\r\n"),
        (-7, b":-7\r\n", b":-7\r\n"),
        (None, b"$-1\r\n", b"_\r\n"),
        (NULL_ARRAY, b"*-1\r\n", b"_\r\n"),
        (OK, b"+OK\r\n", b"+OK\r\n"),
        (ErrorReply("ERR a\r\nb"), b"-ERR a b\r\n", b"-ERR a b\r\n"),
        ([1, [b""]], b"*2\r\n:1\r\n*1\r\n$0\r\n\r\n", b"*2\r\n:1\r\n*1\r\n$0\r\n\r\n"),
        ({b"k": 1}, b"*2\r\n$1\r\nk\r\n:1\r\n", b"%1\r\n$1\r\nk\r\n:1\r\n"),
    ],
)
def test_replies(reply, two, three):
    assert (encode(reply, 2), encode(reply, 3)) == (two, three)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (b"*", [b"", b"a"], []),
        (b"h?llo", [b"hello", b"h\nllo"], [b"hllo", b"heello"]),
        (b"h[ae]llo", [b"hello", b"hallo"], [b"hillo"]),
        (b"h[^e]llo", [b"hallo"], [b"hello", b"hllo"]),
        (b"h[a-c]llo", [b"hbllo"], [b"hdllo"]),
        (b"h[c-a]llo", [b"hbllo"], [b"hdllo"]),
        (b"a\\*b", [b"a*b"], [b"axb"]),
        (b"a[\\]]b", [b"a]b"], [b"a\\b"]),
        (b"user:*:name", [b"user:1:name", b"user::name:name"], [b"user:1:nam", b"user:name"]),
        (b"**a**", [b"a", b"xax"], [b"x"]),
        (b"[", [], [b"[", b"a"]),
        (b"", [b""], [b"a"]),
    ],
)
def test_patterns(pattern, yes, no):
    compiled = compile_pattern(pattern)
    assert all(compiled.matches(text) for text in yes)
    assert not any(compiled.matches(text) for text in no)
    assert all(text.startswith(compiled.prefix) for text in yes)


@examples(500)
@given(st.text("ab*?", max_size=8), st.text("ab", max_size=8))
def test_stars_and_marks_match_as_a_regular_expression_does(pattern, text):
    expected = re.fullmatch(fnmatch.translate(pattern), text) is not None
    assert compile_pattern(pattern.encode()).matches(text.encode()) is expected


def test_a_pattern_made_to_take_for_ever_does_not():
    assert not compile_pattern(b"*a" * 200 + b"b").matches(b"a" * 4096)
    assert not compile_pattern(b"*" + b"a" * 1000 + b"b").matches(b"a" * 4096)


def test_patterns_are_bounded_and_take_little_memory():
    with pytest.raises(ValueError, match="at most 1024 bytes, this one has 1025"):
        compile_pattern(b"?" * (PATTERN_BYTES_MAX + 1))
    tracemalloc.start()
    for piece in (b"[^x]", b"?", b"*a", b"[a-z]"):
        compile_pattern(piece * (PATTERN_BYTES_MAX // len(piece)))
    assert tracemalloc.get_traced_memory()[1] < 512 * PATTERN_BYTES_MAX
    tracemalloc.stop()
