"""The load generator, a process of its own: `python -m tests.bench.generator SYSTEM WHERE` (tests.bench.sinks).

It reads one JSON line per run from its standard input, and answers with one line:

    {"concurrency": 50, "connections": 1, "value_bytes": 100, "seconds": 2.0, "pids": {"etcd 0": 4711}}
    {"operations": …, "p50_ms": …, "cpu_us": {"etcd 0": …, "client": …}, …}           client.measure.Run

Connections stay open from run to run. Its end is the end of its input. An error ends it, with words on standard error.
"""

import asyncio
import json
import os
import secrets
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict

import uvloop

from client.measure import GENERATOR, KEY_BYTES, Load, run_load
from client.workload import Content
from tests.bench.sinks import open_sinks

KEYS = 10_000


def contents(value_bytes: int) -> Content:
    """Return the same keys for every system and size; values that do not compress."""
    keys = [f"{number:0{KEY_BYTES}d}".encode() for number in range(KEYS)]
    return Content(keys, secrets.token_bytes(value_bytes))


async def serve(system: str, where: str) -> None:
    """Answer requests until there are no more."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        opened: dict[int, list] = {}
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            asked = json.loads(line)
            count = asked["connections"]
            if count not in opened:
                opened[count] = await stack.enter_async_context(open_sinks(system, where, count))
            load = Load(asked["concurrency"], None, asked["value_bytes"])
            pids = {**asked["pids"], GENERATOR: os.getpid()}
            run = await run_load(opened[count], load, asked["seconds"], contents(load.value_bytes), pids)
            print(json.dumps(asdict(run)), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:]))
