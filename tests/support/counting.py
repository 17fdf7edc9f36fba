"""Runs tests/deploy/counting.py somewhere, and checks afterwards that nothing acknowledged was lost or counted twice."""

import contextlib
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.waiting import wait_for

# Prints as JSON what some keys have now, "" for none: python -c READ CLUSTER-DIR KEY…
READ = """
import asyncio, json, sys
from client.api import Client

async def main():
    async with Client.from_dir(sys.argv[1], deadline_s=60) as client:
        print(json.dumps([(await client.get(key) or b"").decode() for key in sys.argv[2:]]))

asyncio.run(main())
"""
PROGRAM = Path(__file__).resolve().parents[1] / "deploy" / "counting.py"
SAMPLED = 100


class Counting(contextlib.AbstractContextManager):
    """`command` starts the program; ending it takes what it was told into account."""

    def __init__(self, command: Sequence[str], env=None) -> None:
        self._command, self._env = command, env
        self.puts: dict[str, str] = {}
        self.totals: dict[str, list[int]] = {}
        self.unknown: list[str] = []
        self._others: list[str] = []

    def __enter__(self):
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._env,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            match line.split():
                case ["put", key, value]:
                    self.puts[key] = value
                case ["incr", key, total]:
                    self.totals.setdefault(key, []).append(int(total))
                case ["unknown", *_]:
                    self.unknown.append(line.strip())
                case _:
                    self._others.append(line)

    @property
    def acknowledged(self) -> int:
        return len(self.puts) + sum(map(len, list(self.totals.values())))

    def more(self, count: int, seconds=60.0) -> None:
        """Wait until so many more are acknowledged."""
        wanted = self.acknowledged + count
        wait_for(
            lambda: self.acknowledged >= wanted or self._process.poll() is not None, f"{count} more are done", seconds
        )
        assert self._process.poll() is None, self._others

    def __exit__(self, kind, *_) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
            if kind is None:
                raise
        finally:
            self._reader.join(20)
            self._process.stdout.close()
        if kind is None:
            assert (self._process.returncode, self._others) == (0, [])

    def check(self, read: Callable[[list[str]], list[str]]) -> None:
        """Compare with what `read` finds now: every increment once, and a sample of the keys."""
        assert self.acknowledged > 0
        counters, keys = list(self.totals), list(self.puts)
        for counter, found in zip(counters, read(counters), strict=True):
            totals = self.totals[counter]
            assert totals == sorted(set(totals)), f"{counter} was told the same total twice"
            unknown = sum(line.split()[1:3] == ["incr", counter] for line in self.unknown)
            assert len(totals) <= int(found) <= len(totals) + unknown, counter
        sample = keys[:: max(1, len(keys) // SAMPLED)]
        for key, found in zip(sample, read(sample), strict=True):
            assert found == self.puts[key], key
