"""The load that knows what it was told notices what is lost, counted twice, or not there; and it speaks Redis' protocol."""

import json
import subprocess
import sys

import pytest

from tests.support.cluster import Processes, environment
from tests.support.counting import PROGRAM, READ, Counting
from tests.support.gateway import GatewayProcess


def told(*lines: str) -> Counting:
    """One that was told these lines."""
    text = "\n".join(lines)
    with Counting([sys.executable, "-c", f"import sys; print('''{text}'''); sys.stdin.read()"]) as load:
        load.more(len([line for line in lines if not line.startswith("unknown")]))
    return load


LINES = ("put a 1", "incr c 1", "incr c 2", "put b 2", "unknown incr c timed out", "incr c 4")


@pytest.mark.parametrize("total", ["3", "4"])
def test_what_is_well(total):
    found = {"a": "1", "b": "2", "c": total}
    told(*LINES).check(lambda keys: [found[key] for key in keys])


@pytest.mark.parametrize("wrong", [{"a": ""}, {"b": "1"}, {"c": "2"}, {"c": "5"}])
def test_what_is_not(wrong):
    found = {"a": "1", "b": "2", "c": "4"} | wrong
    with pytest.raises(AssertionError):
        told(*LINES).check(lambda keys: [found[key] for key in keys])


def test_a_total_that_was_told_twice():
    with pytest.raises(AssertionError, match="told the same total twice"):
        told("incr c 1", "incr c 1").check(lambda keys: ["2" for _ in keys])


def test_a_load_that_ends_by_itself_is_noticed():
    with pytest.raises(AssertionError), Counting([sys.executable, "-c", "print('oh')"]) as load:
        load.more(1)


@pytest.mark.cluster
def test_against_a_gateway(tmp_path):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        with GatewayProcess(cluster.directory) as gateway:
            command = [sys.executable, str(PROGRAM), "127.0.0.1", str(gateway.resp), "-", "2", "x-"]
            with Counting(command) as load:
                load.more(50)
        assert load.unknown == []

        def read(keys):
            words = [sys.executable, "-c", READ, str(cluster.directory), *keys]
            done = subprocess.run(words, capture_output=True, env=environment(), timeout=60, check=True)
            return json.loads(done.stdout)

        load.check(read)
