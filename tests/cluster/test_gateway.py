"""The gateway with the real tools: redis-cli, redis-benchmark, redis-py and curl against three real replicas."""

import contextlib
import csv
import json
import random
import socket
import subprocess
import threading
import time

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.cluster import Processes
from tests.support.gateway import GatewayProcess
from tests.support.tools import tool
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

MEMORY_GROWTH_MAX = 48 * 1024 * 1024


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("gateway") / "a cluster") as cluster:
        cluster.start_and_wait()
        with GatewayProcess(cluster.directory) as gateway:
            yield gateway


def connect(gateway, **options) -> redis.Redis:
    # What a library sends again by itself would hide what the gateway says.
    options.setdefault("retry", Retry(NoBackoff(), 0))
    return redis.Redis(port=gateway.resp, socket_timeout=30, **options)


def run(*command, stdin=None) -> subprocess.CompletedProcess:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def cli(gateway, *words, stdin=None) -> str:
    done = run(tool("redis-cli"), "-p", str(gateway.resp), *words, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_redis_cli(served):
    assert cli(served, "ping") == "PONG"
    assert cli(served, "set", "cli:a", "hello world") == "OK"
    assert cli(served, "get", "cli:a") == "hello world"
    assert cli(served, "-3", "get", "cli:none") == ""
    assert cli(served, "incrby", "cli:n", "41") == "41"
    assert cli(served, "incr", "cli:n") == "42"
    assert cli(served, "--scan", "--pattern", "cli:*").split() == ["cli:a", "cli:n"]
    assert "ERR unknown command 'lpush'" in cli(served, "lpush", "a", "b")
    assert "not supported" in cli(served, "set", "a", "b", "ex", "5")
    script = "multi\nset cli:a 1\nincr cli:a\nexec\n"
    assert cli(served, stdin=script).split() == ["OK", "QUEUED", "QUEUED", "OK", "2"]
    assert "redis_version:7.0.0" in cli(served, "info")
    assert "matching_replies_needed:2" in cli(served, "info", "trustlog")
    assert cli(served, "command", "count").isdigit()
    assert "summary" in cli(served, "command", "docs", "get")
    assert cli(served, "-n", "0", "dbsize").isdigit()


def test_redis_cli_mass_insertion(served):
    """`redis-cli --pipe` sends everything before it reads an answer."""
    lines = "".join(f"SET pipe:{i} {i}\r\n" for i in range(3000))
    done = run(tool("redis-cli"), "-p", str(served.resp), "--pipe", stdin=lines)
    assert "errors: 0, replies: 3000" in done.stdout, done.stdout + done.stderr
    assert connect(served).get("pipe:2999") == b"2999"


def test_redis_benchmark(served):
    options = ["-p", str(served.resp), "-t", "ping,set,get,incr,mset", "-n", "300", "-c", "20", "-P", "4", "--csv"]
    done = run(tool("redis-benchmark"), *options)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    tests = {row["test"] for row in rows}
    assert {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"} <= tests
    assert all(float(row["rps"]) > 0 for row in rows)


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py(served, protocol):
    with connect(served, protocol=protocol) as client:
        assert client.ping()
        assert client.set("py:a", b"\x00\xff") is True
        assert client.get("py:a") == b"\x00\xff"
        assert client.set("py:a", "2", nx=True) is None
        assert client.set("py:a", "2", xx=True, get=True) == b"\x00\xff"
        client.mset({"py:b": "1", "py:c": "2"})
        assert client.mget("py:b", "py:none", "py:c") == [b"1", None, b"2"]
        assert client.exists("py:a", "py:none") == 1
        assert client.append("py:b", "x") == 2
        assert client.strlen("py:b") == 2
        assert client.getdel("py:b") == b"1x"
        assert client.delete("py:c", "py:none") == 1
        assert sorted(client.scan_iter("py:*")) == [b"py:a"]
        assert client.keys("py:*") == [b"py:a"]
        assert client.info("trustlog")["replicas"] == 3
        assert client.config_get("maxclients")["maxclients"] == "1024"
        assert client.client_setname("tester")
        assert client.command_count() > 40
        with pytest.raises(redis.ResponseError, match="EX is not supported"):
            client.set("py:a", "1", ex=5)
        client.set("py:text", "abc")
        with pytest.raises(redis.ResponseError, match="not an integer"):
            client.incr("py:text")
        client.delete("py:a", "py:text")


def test_redis_py_pipelines_and_transactions(served):
    with connect(served) as client, connect(served) as other:
        with client.pipeline(transaction=False) as pipe:
            for i in range(1200):
                pipe.set(f"pl:{i}", i)
            for i in range(1200):
                pipe.get(f"pl:{i}")
            found = pipe.execute()
        assert found == [True] * 1200 + [b"%d" % i for i in range(1200)]
        with client.pipeline() as pipe:
            assert pipe.set("tx:a", 1).incr("tx:a").get("tx:a").execute() == [True, 2, b"2"]
            pipe.watch("tx:a")
            seen = int(pipe.get("tx:a"))
            other.set("tx:a", "2")
            pipe.multi()
            pipe.set("tx:a", seen + 1)
            with pytest.raises(redis.WatchError):
                pipe.execute()
        assert client.transaction(lambda pipe: pipe.multi() or pipe.incr("tx:a"), "tx:a") == [3]


def test_curl(served):
    curl, base = tool("curl"), f"http://127.0.0.1:{served.http}"

    def call(*options, path):
        done = run(curl, "-sS", "-w", "\n%{http_code}", *options, base + path)
        assert done.returncode == 0, done.stderr
        body, _, status = done.stdout.rpartition("\n")
        return int(status), body

    status, body = call("-X", "PUT", "--data-binary", "hello", path="/v1/keys/curl")
    assert (status, json.loads(body)) == (201, {"key": "curl", "replaced": False})
    status, body = call(path="/v1/keys/curl")
    assert (status, json.loads(body)["value"]) == (200, "hello")
    assert call("-H", "Accept: application/octet-stream", path="/v1/keys/curl") == (200, "hello")
    assert call(path="/readyz")[0] == 200
    assert len(json.loads(call(path="/status")[1])["replicas"]) == 3
    assert "trustlog_gateway_ready 1.0" in call(path="/metrics")[1]
    status, body = call(path="/v1/keys/none")
    assert (status, json.loads(body)["error"]["code"]) == (404, "absent")
    # Both doors show one store.
    assert connect(served).get("curl") == b"hello"


def test_malformed_bytes_neither_kill_it_nor_grow_its_memory(served):
    with connect(served) as client:
        client.set("before", "1")
        before = served.rss_bytes()
        chance = random.Random(20261127)
        pieces = [b"*", b"$", b"\r\n", b"1", b"3", b"-1", b"999999999", b"SET", b"GET", b"\x00", b"*3\r\n", b"$3\r\n"]
        streams = [b"".join(chance.choices(pieces, k=chance.randint(1, 60))) for _ in range(300)]
        streams += [
            b"\r\n" * 5000,
            b" \n" * 5000,
            b"*1\r\n" * 20_000,
            b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$4194304\r\n" + bytes(1_000_000),
        ]
        streams += [b"*1000000000\r\n", b"*2\r\n$4\r\nPING\r\n$536870912\r\n", b"P" * 100_000] * 20
        slow = [socket.create_connection(("127.0.0.1", served.resp)) for _ in range(20)]
        for number, stream in enumerate(streams):
            with socket.create_connection(("127.0.0.1", served.resp), timeout=20) as one:
                try:
                    one.sendall(stream)
                    one.shutdown(socket.SHUT_WR)
                    while one.recv(65536):
                        pass
                except ConnectionError:
                    pass
            # A byte now and then, as of somebody with a lot of time.
            slow[number % len(slow)].sendall(b"*2\r\n$3\r\nGET\r\n$9\r\nxxxxxxxxx\r\n"[number // 20 : number // 20 + 1])
        assert client.get("before") == b"1"
        for one in slow:
            one.close()
        assert served.process.poll() is None
        metrics = run(tool("curl"), "-sS", f"http://127.0.0.1:{served.http}/metrics").stdout
        assert 'trustlog_gateway_refusals_total{reason="protocol"}' in metrics
        assert "internal-error" not in metrics, served.log.read_text()
        assert served.rss_bytes() - before < MEMORY_GROWTH_MAX


def test_the_primary_is_killed_in_the_middle(tmp_path):
    """No acknowledged write is lost, none is done twice, no answer is wrong, and errors are errors of the protocol."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        with GatewayProcess(cluster.directory, 30.0) as gateway:
            acknowledged: list[dict[str, int]] = [{} for _ in range(6)]
            unknown = [0] * 6
            wrong: list[str] = []
            stop = threading.Event()

            def work(worker: int) -> None:
                with connect(gateway) as client:
                    number = 0
                    while not stop.is_set():
                        number += 1
                        try:
                            with client.pipeline(transaction=number % 2 == 0) as pipe:
                                pipe.set(f"w{worker}:{number}", number).incr(f"count{worker}").get(
                                    f"w{worker}:{number}"
                                )
                                done = pipe.execute()
                        except redis.ResponseError as error:
                            if not str(error).startswith(("UNDECIDED", "NOTEXECUTED")) and "UNDECIDED" not in str(
                                error
                            ):
                                wrong.append(str(error))
                            unknown[worker] += 1
                            continue
                        if done[0] is not True or done[2] != b"%d" % number:
                            wrong.append(f"{number}: {done}")
                        acknowledged[worker][f"w{worker}:{number}"] = done[1]

            workers = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
            for thread in workers:
                thread.start()
            try:
                wait_for(lambda: all(len(done) >= 20 for done in acknowledged), "work is under way")
                cluster.kill(0)
                counts = [len(done) for done in acknowledged]
                wait_for(
                    lambda: all(len(done) >= n + 20 for done, n in zip(acknowledged, counts, strict=True)),
                    "work goes on after the primary was killed",
                    60,
                )
            finally:
                stop.set()
                for thread in workers:
                    thread.join(60)
            assert not wrong
            with connect(gateway) as client:
                for worker, done in enumerate(acknowledged):
                    sums = list(done.values())
                    assert sums == sorted(set(sums)), "an INCR was done twice, or answered wrongly"
                    total = int(client.get(f"count{worker}"))
                    assert len(done) <= total <= len(done) + unknown[worker]
                    values = client.mget(list(done))
                    assert values == [key.rpartition(":")[2].encode() for key in done]
                assert client.info("trustlog")["replicas_connected"] == 2


class Repeating(threading.Thread):
    """Runs a tool again and again, each time with the next number; `done` is what step returned for each."""

    def __init__(self, step) -> None:
        super().__init__()
        self.step, self.done, self.failure = step, [], None
        self._stopped = threading.Event()

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                self.done.append(self.step(len(self.done)))
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self._stopped.set()
        self.join(60)


def test_every_tool_goes_on_over_the_kill(tmp_path):
    """curl's PUTs are kept, counters are exact, and a watch tells each change once."""
    curl = tool("curl")
    with Processes(tmp_path / "c") as cluster, contextlib.ExitStack() as stack:
        cluster.start_and_wait()
        gateway = stack.enter_context(GatewayProcess(cluster.directory, 30.0))
        base = f"http://127.0.0.1:{gateway.http}"

        def put(number: int) -> str:
            done = run(
                curl, "-sS", "-w", "\n%{http_code}", "-X", "PUT", "-d", f"{number}", f"{base}/v1/keys/kk{number}"
            )
            body, _, status = done.stdout.rpartition("\n")
            assert (status, json.loads(body)) == ("201", {"key": f"kk{number}", "replaced": False}), done
            return f"kk{number}"

        def incr(_: int) -> int:
            return int(cli(gateway, "incr", "cli:n"))

        told = tmp_path / "told"
        with told.open("wb") as out:
            watch = subprocess.Popen([curl, "-sSN", f"{base}/v1/watch?prefix=kk"], stdout=out)
        stack.callback(watch.wait)
        stack.callback(watch.kill)
        wait_for(lambda: b"event: begin" in told.read_bytes(), "the watch has begun")
        puts, incrs = Repeating(put), Repeating(incr)
        for thread in (puts, incrs):
            thread.start()
            stack.callback(thread.stop)
        wanted = 1200
        options = ["-p", str(gateway.resp), "-n", str(wanted), "-c", "10", "--csv", "incr", "bench:n"]
        bench = subprocess.Popen(
            [tool("redis-benchmark"), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        stack.callback(bench.communicate)
        stack.callback(bench.kill)
        client = stack.enter_context(connect(gateway))

        def under_way(*wanted: int) -> bool:
            if puts.failure or incrs.failure:
                return True
            return len(puts.done) >= wanted[0] and len(incrs.done) >= wanted[1]

        wait_for(lambda: under_way(5, 5) and int(client.get("bench:n") or 0) >= 50, "all tools are under way")
        assert bench.poll() is None, "the benchmark was over before the primary was killed"
        cluster.kill(0)
        before = len(puts.done), len(incrs.done)
        wait_for(lambda: under_way(before[0] + 5, before[1] + 5), "work goes on after the primary was killed", 60)
        said, _ = bench.communicate(timeout=60)
        puts.stop()
        incrs.stop()
        assert (puts.failure, incrs.failure) == (None, None)
        assert (bench.returncode, "rror" in said) == (0, False), said
        assert int(client.get("bench:n")) == wanted
        assert incrs.done == list(range(1, len(incrs.done) + 1))
        assert int(client.get("cli:n")) == len(incrs.done)
        assert client.mget(puts.done) == [key.removeprefix("kk").encode() for key in puts.done]
        wait_for(lambda: f'"{puts.done[-1]}"'.encode() in told.read_bytes(), "the watch has told all")
        events = [event.splitlines() for event in told.read_text().split("\n\n") if "event: put" in event]
        assert [json.loads(lines[2].removeprefix("data: "))["key"] for lines in events] == puts.done
        assert len({lines[0] for lines in events}) == len(events)


def test_a_dead_cluster_is_said_in_each_protocols_own_form(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        with GatewayProcess(cluster.directory, 1.0) as gateway:
            with connect(gateway) as client:
                client.set("a", "1")
                for number in range(3):
                    cluster.kill(number)
                began = time.monotonic()
                with pytest.raises(redis.ResponseError, match=r"^(UNDECIDED outcome unknown|NOTEXECUTED not sent)"):
                    client.set("a", "2")
                wait_for(lambda: client.info("trustlog")["ready"] == 0, "the gateway notices")
                with pytest.raises(redis.ResponseError, match=r"^NOTEXECUTED not sent, hence not executed"):
                    client.set("a", "3")
                assert client.ping()
                assert time.monotonic() - began < 30
            curl = run(tool("curl"), "-sS", "-w", "\n%{http_code}", f"http://127.0.0.1:{gateway.http}/readyz")
            body, _, status = curl.stdout.rpartition("\n")
            assert (status, json.loads(body)["ready"]) == ("503", False)
            assert "NOTEXECUTED" in cli(gateway, "get", "a")
            assert gateway.stop() == 0
