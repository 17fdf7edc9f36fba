"""The Redis gateway before three fake replicas: commands, pipelines, transactions, unknown outcomes."""

import asyncio

import hiredis
import pytest

from client.gateway.session import GROUP_COMMANDS_MAX
from client.gateway.table import TABLE
from client.gateway.transactions import QUEUED_BYTES_MAX, QUEUED_MAX
from replica.application import Right
from replica.core.clients import Allow, Permission
from tests.client.fake_cluster import until
from tests.client.gateway.talk import gateway, text

pytestmark = pytest.mark.asyncio


SCRIPT = [
    (["PING"], b"PONG"),
    (["ping", "hi"], b"hi"),
    (["ECHO", "x"], b"x"),
    (["GET", "a"], None),
    (["SET", "a", "1"], b"OK"),
    (["SET", "a", "2", "NX"], None),
    (["SET", "b", "2", "XX"], None),
    (["SET", "a", "2", "XX", "GET"], b"1"),
    (["SET", "c", "9", "NX", "GET"], None),
    (["SET", "a", "7", "KEEPTTL"], b"OK"),
    (["GET", "a"], b"7"),
    (["GETSET", "a", "5"], b"7"),
    (["SETNX", "a", "1"], 0),
    (["SETNX", "d", "1"], 1),
    (["INCR", "a"], 6),
    (["INCRBY", "a", "10"], 16),
    (["DECR", "a"], 15),
    (["DECRBY", "a", "20"], -5),
    (["APPEND", "t", "ab"], 2),
    (["APPEND", "t", "cd"], 4),
    (["STRLEN", "t"], 4),
    (["STRLEN", "none"], 0),
    (["TYPE", "t"], b"string"),
    (["TYPE", "none"], b"none"),
    (["TTL", "t"], -1),
    (["PTTL", "none"], -2),
    (["GETDEL", "t"], b"abcd"),
    (["GETDEL", "t"], None),
    (["MSET", "x", "1", "y", "2"], b"OK"),
    (["MSETNX", "x", "1", "z", "2"], 0),
    (["MSETNX", "z", "3"], 1),
    (["MGET", "x", "none", "z", "x"], [b"1", None, b"3", b"1"]),
    (["EXISTS", "x", "x", "none"], 2),
    (["DBSIZE"], 6),
    (["DEL", "x", "y", "none"], 2),
    (["UNLINK", "z"], 1),
    (["KEYS", "*"], [b"a", b"c", b"d"]),
    (["KEYS", "[a-c]"], [b"a", b"c"]),
    (["SELECT", "0"], b"OK"),
    (["CONFIG", "GET", "save"], [b"save", b""]),
    (["CLIENT", "SETINFO", "LIB-NAME", "test"], b"OK"),
    (["CLIENT", "SETNAME", "me"], b"OK"),
    (["CLIENT", "GETNAME"], b"me"),
    (["CLIENT", "NO-EVICT", "on"], b"OK"),
    (["COMMAND", "COUNT"], len(TABLE)),
    (["COMMAND", "GETKEYS", "MSET", "a", "1", "b", "2"], [b"a", b"b"]),
    (["COMMAND", "INFO", "nothing"], [None]),
    (["SCAN", "0", "COUNT", "100"], [b"0", [b"a", b"c", b"d"]]),
    (["SCAN", "0", "TYPE", "list"], [b"0", []]),
]


async def test_commands(talk):
    for words, expected in SCRIPT:
        assert await talk(*words) == expected, words


async def test_a_pipeline_gets_the_same_answers_in_order(talk):
    for words, _ in SCRIPT:
        talk.send(*words)
    assert await talk.replies(len(SCRIPT)) == [expected for _, expected in SCRIPT]


REFUSED = [
    (["NOSUCH", "a b", "c"], "ERR unknown command 'NOSUCH', with args beginning with: 'a b' 'c' "),
    (["LPUSH", "a", "b"], "ERR unknown command 'LPUSH', with args beginning with: 'a' 'b' "),
    (["GET"], "ERR wrong number of arguments for 'get' command"),
    (["get", "a", "b"], "ERR wrong number of arguments for 'get' command"),
    (["SET", "a", "1", "EX", "5"], "ERR EX is not supported: "),
    (["SET", "a", "1", "PX", "5"], "ERR PX is not supported: "),
    (["SETEX", "a", "5", "1"], "ERR SETEX is not supported: "),
    (["EXPIRE", "a", "5"], "ERR EXPIRE is not supported: "),
    (["SET", "a", "1", "NX", "XX"], "ERR syntax error"),
    (["SET", "a", "1", "WHAT"], "ERR syntax error"),
    (["SET", "", "1"], "ERR a key must have 1 to 4096 bytes"),
    (["GET", "k" * 4097], "ERR a key must have 1 to 4096 bytes"),
    (["SET", "a", "v" * 1024 * 1024], "ERR "),
    (["INCRBY", "a", "1.5"], "ERR value is not an integer or out of range"),
    (["INCRBY", "a", "9223372036854775808"], "ERR value is not an integer or out of range"),
    (["DECRBY", "a", "-9223372036854775808"], "ERR decrement would overflow"),
    (["INCR", "text"], "ERR value is not an integer or out of range"),
    (["INCR", "highest"], "ERR increment or decrement would overflow"),
    (["MSET", "a", "1", "b"], "ERR wrong number of arguments for 'mset' command"),
    (["SELECT", "1"], "ERR DB index is out of range"),
    (["EXEC"], "ERR EXEC without MULTI"),
    (["DISCARD"], "ERR DISCARD without MULTI"),
    (["SCAN", "x"], "ERR invalid cursor"),
    (["SCAN", "77"], "ERR invalid cursor"),
    (["SCAN", "0", "MATCH"], "ERR syntax error"),
    (["SCAN", "0", "COUNT", "0"], "ERR syntax error"),
    (["AUTH", "x"], "ERR AUTH <password> called without any password configured"),
    (["HELLO", "4"], "NOPROTO unsupported protocol version"),
    (["CONFIG", "SET", "save", ""], "ERR CONFIG SET is not supported"),
    (["CLIENT", "KILL", "x"], "ERR unknown subcommand 'KILL'. Try CLIENT HELP."),
    (["COMMAND", "WHAT"], "ERR unknown subcommand 'WHAT'. Try COMMAND HELP."),
]


async def test_refusals_are_those_of_redis_and_change_nothing(talk):
    await talk("MSET", "text", "abc", "highest", "9223372036854775807")
    for words, expected in REFUSED:
        assert text(await talk(*words)).startswith(expected.strip()), words
    assert await talk("DBSIZE") == 2


async def test_resp3_and_what_hello_says(talk):
    hello = await talk("HELLO", "3")
    assert hello[b"proto"] == 3
    assert hello[b"server"] == b"trustlog"
    assert await talk("GET", "none") is None
    assert await talk("CONFIG", "GET", "databases") == {b"databases": b"1"}
    docs = await talk("COMMAND", "DOCS", "get", "nothing")
    assert set(docs) == {b"get"}
    assert await talk("RESET") == b"RESET"
    assert (await talk("HELLO"))[:2] == [b"server", b"trustlog"]


async def test_every_command_has_its_documentation_and_its_entry(talk):
    entries = await talk("COMMAND")
    assert sorted(entry[0].decode() for entry in entries) == sorted(TABLE)
    docs = await talk("COMMAND", "DOCS")
    assert len(docs) == 2 * len(TABLE)
    assert all(found.summary.endswith(".") for found in TABLE.values())


async def test_scan_finds_every_key_once(talk):
    wanted = {b"k%03d" % i for i in range(137)}
    await talk("MSET", *(word for key in sorted(wanted) for word in (key, b"v")))
    found, cursor = [], b"0"
    while True:
        cursor, keys = await talk("SCAN", cursor, "COUNT", "20", "MATCH", "k*")
        found += keys
        if cursor == b"0":
            break
    assert len(found) == len(wanted)
    assert set(found) == wanted


# Transactions


async def test_a_transaction_is_one_operation(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        talk = await connect()
        await talk("SET", "text", "abc")
        before = fleet.executor.operations
        for words in (["MULTI"], ["SET", "a", "1"], ["INCR", "a"], ["PING"], ["INCR", "text"], ["GET", "a"]):
            talk.send(*words)
        assert await talk.replies(6) == [b"OK", *[b"QUEUED"] * 5]
        assert fleet.executor.operations == before
        done = await talk("EXEC")
        assert done[:3] == [b"OK", 2, b"PONG"]
        assert text(done[3]) == "ERR value is not an integer or out of range"
        assert done[4] == b"2"
        assert fleet.executor.operations == before + 1


async def test_a_transaction_with_a_refused_command_is_discarded(talk):
    assert await talk("MULTI") == b"OK"
    assert await talk("SET", "a", "1") == b"QUEUED"
    assert text(await talk("MULTI")).startswith("ERR MULTI calls can not be nested")
    assert text(await talk("NOSUCH")).startswith("ERR unknown command")
    assert text(await talk("EXEC")).startswith("EXECABORT")
    assert await talk("GET", "a") is None
    await talk("MULTI")
    assert text(await talk("KEYS", "*")).startswith("ERR KEYS is not possible between MULTI and EXEC")
    assert text(await talk("EXEC")).startswith("EXECABORT")
    await talk("MULTI")
    await talk("SET", "a", "1")
    assert await talk("DISCARD") == b"OK"
    assert await talk("GET", "a") is None
    await talk("MULTI")
    assert await talk("EXEC") == []


async def test_watch(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        one, two = await connect(), await connect()
        await one("SET", "k", "1")

        async def transaction(*words):
            await one("MULTI")
            await one(*words)
            return await one("EXEC")

        await one("WATCH", "k")
        assert await transaction("SET", "k", "2") == [b"OK"]
        await one("WATCH", "k", "other")
        await two("SET", "k", "2")  # the same bytes: a version is not a value
        assert await transaction("SET", "k", "3") is None
        assert await one("GET", "k") == b"2"
        # What was watched is forgotten by EXEC, UNWATCH and DISCARD.
        assert await transaction("SET", "k", "4") == [b"OK"]
        await one("WATCH", "k")
        await two("SET", "k", "5")
        await one("UNWATCH")
        assert await transaction("SET", "k", "6") == [b"OK"]
        await one("WATCH", "new")
        await two("SET", "new", "5")
        await one("MULTI")
        assert text(await one("WATCH", "k")).startswith("ERR WATCH inside MULTI")
        assert await one("EXEC") is None


async def test_a_transaction_is_bounded(talk):
    await talk("MULTI")
    for _ in range(QUEUED_MAX):
        talk.send("SET", "a", "1")
    assert set(await talk.replies(QUEUED_MAX)) == {b"QUEUED"}
    assert text(await talk("SET", "a", "1")).startswith("ERR a transaction has at most")
    assert text(await talk("EXEC")).startswith("EXECABORT")


@pytest.mark.parametrize("words", [("ECHO", "x" * 200_000), ("SELECT",), ("COMMAND",), ("SET", "a", "x" * 200_000)])
async def test_every_command_of_a_transaction_takes_room(fleet, words):
    """Also one whose answer is known at once; and what waits counts for all connections together."""
    async with fleet, gateway(fleet) as (served, connect):
        words = (*words, "0") if words[0] == "SELECT" else words
        talk = await connect()
        await talk("MULTI")
        queued = 0
        while await talk(*words) == b"QUEUED":
            queued += 1
        await until(lambda: served.buffered > 0)
        session = next(served.sessions())
        assert session.transaction.size == served.buffered <= QUEUED_BYTES_MAX
        if len(words[-1]) > 1000:
            assert queued == 5
        assert text(await talk("EXEC")).startswith("EXECABORT")
        await until(lambda: served.buffered == 0)


async def test_transactions_count_as_buffered(fleet):
    async with fleet, gateway(fleet, buffered_bytes_max=1_000_000) as (_, connect):
        first, second = await connect(), await connect()
        for talk in (first, second):
            await talk("MULTI")
        for _ in range(4):
            assert await first("ECHO", "x" * 200_000) == b"QUEUED"
        second.send("ECHO", "x" * 250_000)
        assert text(await second.reply()).startswith("ERR this gateway's buffers are full")
        assert len(await first("EXEC")) == 4


# Pipelines


async def test_what_comes_together_goes_out_together_and_in_order(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        talk = await connect()
        await talk("PING")
        before = fleet.executor.operations
        count = GROUP_COMMANDS_MAX * 3
        talk.writer.write(b"".join(hiredis.pack_command(("APPEND", "k", b"%d," % i)) for i in range(count)))
        lengths = await talk.replies(count)
        assert lengths == sorted(set(lengths))
        assert await talk("GET", "k") == b"".join(b"%d," % i for i in range(count))
        assert fleet.executor.operations - before < count / 4


async def test_answers_too_large_for_one_operation_come_all_the_same(talk):
    for i in range(6):
        await talk("SET", f"k{i}", bytes([65 + i]) * 700_000)
    for i in range(6):
        talk.send("GET", f"k{i}")
    assert await talk.replies(6) == [bytes([65 + i]) * 700_000 for i in range(6)]


async def test_many_connections_share_envelopes(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        talks = [await connect() for _ in range(50)]
        await talks[0]("PING")
        envelopes = fleet.executed
        sums = await asyncio.gather(*(talk("INCR", "n") for talk in talks))
        assert sorted(sums) == list(range(1, 51))
        assert fleet.executed - envelopes < 25


# Outcomes


async def test_nobody_there_is_not_executed(fleet):
    async with gateway(fleet, deadline_s=0.3) as (_, connect):
        talk = await connect()
        assert text(await talk("SET", "a", "1")).startswith("NOTEXECUTED not sent, hence not executed")
        assert await talk("PING") == b"PONG"


async def test_an_unknown_outcome_is_said_and_what_follows_in_the_pipeline_is_not_carried_out(fleet):
    async with fleet, gateway(fleet, deadline_s=0.5) as (served, connect):
        talk = await connect()
        assert await talk("SET", "a", "1") == b"OK"
        for replica in fleet.replicas:
            replica.manners.add("silent")
        talk.writer.write(
            b"".join(
                hiredis.pack_command(words)
                for words in [("INCR", "a"), ("KEYS", "*"), ("MULTI",), ("SET", "b", "1"), ("EXEC",), ("SET", "c", "1")]
            )
        )
        replies = [text(reply).split()[0] for reply in await talk.replies(6)]
        assert replies == ["UNDECIDED", *["NOTEXECUTED"] * 5]
        for replica in fleet.replicas:
            replica.manners.clear()
        # The next pipeline is a new one; nothing of the one before comes later.
        await until(lambda: served.client.driver.core.in_flight == 0)
        assert await talk("EXISTS", "b", "c") == 0
        assert await talk("GET", "a") in {b"1", b"2"}
        assert served.outcomes["undecided"] == 1


async def test_what_is_unknown_is_not_sent_a_second_time(fleet):
    async with fleet, gateway(fleet, deadline_s=0.3) as (served, connect):
        talk = await connect()
        await talk("SET", "a", "1")
        for replica in fleet.replicas:
            replica.manners.add("silent")
        sent = []
        execute = served.client.execute

        async def counted(operation):
            sent.append(operation)
            return await execute(operation)

        served.client.execute = counted
        assert text(await talk("INCR", "a")).startswith("UNDECIDED")
        for words in (["INCR", "a"], ["INCR", "b"]):
            talk.send(*words)
        assert [text(reply).split()[0] for reply in await talk.replies(2)] == ["UNDECIDED"] * 2
        await talk("MULTI")
        await talk("INCR", "a")
        assert text(await talk("EXEC")).startswith("UNDECIDED")
        assert len(sent) == 3


async def test_a_transaction_cut_by_an_unknown_outcome_never_becomes_single_commands(fleet):
    async with fleet, gateway(fleet, deadline_s=0.3) as (_, connect):
        talk = await connect()
        await talk("SET", "a", "1")
        for replica in fleet.replicas:
            replica.manners.add("silent")
        talk.writer.write(hiredis.pack_command(("INCR", "a")) + hiredis.pack_command(("MULTI",)))
        assert text(await talk.reply()).startswith("UNDECIDED")
        assert text(await talk.reply()).startswith("NOTEXECUTED")
        for replica in fleet.replicas:
            replica.manners.clear()
        # A client that did not read the answers goes on.
        assert await talk("SET", "b", "1") == b"QUEUED"
        assert text(await talk("EXEC")).startswith("EXECABORT")
        assert await talk("EXISTS", "b") == 0


async def test_a_liar_is_outvoted(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        talk = await connect()
        fleet.replicas[0].manners.add("liar")
        assert await talk("SET", "a", "1") == b"OK"
        assert await talk("GET", "a") == b"1"


# Passwords


async def test_a_password(fleet):
    async with fleet, gateway(fleet, password=b"secret") as (served, connect):
        talk = await connect()
        assert await talk("PING") == b"PONG"
        assert text(await talk("GET", "a")) == "NOAUTH Authentication required."
        assert text(await talk("HELLO", "3")).startswith("NOAUTH HELLO must be called")
        assert text(await talk("AUTH", "wrong")).startswith("WRONGPASS")
        assert text(await talk("AUTH", "other", "secret")).startswith("WRONGPASS")
        assert text(await talk("GET", "a")).startswith("NOAUTH")
        assert await talk("AUTH", "secret") == b"OK"
        assert await talk("GET", "a") is None
        await talk("RESET")
        assert text(await talk("GET", "a")).startswith("NOAUTH")
        assert (await talk("HELLO", "3", "AUTH", "default", "secret"))[b"proto"] == 3
        assert await talk("GET", "a") is None
        assert served.refusals["wrong-password"] == 2


async def test_whoever_has_not_said_the_password_is_held_short(fleet):
    async with fleet, gateway(fleet, password=b"secret") as (_, connect):
        for words in (["MGET", *"abcdefghij"], ["AUTH", "x" * 16_385]):
            talk = await connect()
            talk.send(*words)
            assert text(await talk.reply()).startswith("ERR Protocol error: invalid")
            assert await talk.reply() is None
        talk = await connect()
        talk.send("AUTH", "secret")
        talk.send("SET", "a", "x" * 100_000)
        talk.send("MGET", *"abcdefghij")
        assert (await talk.replies(3))[:2] == [b"OK", b"OK"]


async def test_quit_answers_and_ends(talk):
    talk.send("SET", "a", "1")
    talk.send("QUIT")
    assert await talk.replies(3) == [b"OK", b"OK", None]


async def test_what_the_gateways_key_may_not_do_is_refused_command_by_command(fleet):
    async with fleet, gateway(fleet) as (_, connect):
        talk = await connect()
        fleet.order(Allow(1, fleet.client().public_key, "", (Permission(Right.READ | Right.WRITE, b"a"),)))
        for words in (("SET", "a", "1"), ("SET", "b", "1"), ("INCR", "a"), ("GET", "b")):
            talk.send(*words)
        replies = await talk.replies(4)
        assert replies[0] == b"OK"
        assert text(replies[1]) == 'NOPERM this key may not write "b"'
        assert replies[2] == 2
        assert text(replies[3]) == 'NOPERM this key may not read "b"'
