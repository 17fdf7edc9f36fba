"""One node of a PySyncObj cluster: `python -m tests.bench.pysyncobj_node '{"own": "127.0.0.1:1", "others": […], …}'`.

PySyncObj is a library: a program that uses it *is* a node, so the load is generated inside the leader's process. It
speaks as tests.bench.generator does, and answers {"leader": true} to {"ask": "leader"}.
"""

import json
import os
import sys
import threading
from dataclasses import asdict
from functools import partial
from time import perf_counter

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

from client.measure import GENERATOR, run_of
from client.processes import cpu_seconds, machine_cpu_seconds
from client.workload import Recording
from tests.bench.generator import contents

RUN_EXTRA_S = 60.0


class Node(SyncObj):
    """A replicated dictionary."""

    def __init__(self, own, others, options):
        super().__init__(own, others, SyncObjConf(**options))
        self.held = {}

    @replicated
    def put(self, key, value):
        self.held[key] = value


class ClosedLoop:
    """Workers, each with one put under way. All of it runs in the node's own thread, by its callbacks."""

    def __init__(self, node, concurrency, seconds, content):
        self.recording = Recording()
        self.failure = None
        self._node, self._content, self._concurrency = node, content, concurrency
        self._ended, self._under_way = threading.Event(), concurrency
        self._began = perf_counter()
        self._ends = self._began + seconds

    def run(self):
        for number in range(self._concurrency):
            self._start(number * (len(self._content.keys) // self._concurrency))
        if not self._ended.wait(self._ends - self._began + RUN_EXTRA_S):
            raise TimeoutError("operations of PySyncObj did not end")
        if self.failure is not None:
            raise RuntimeError(f"PySyncObj failed an operation: reason {self.failure}")
        self.recording.seconds = perf_counter() - self._began
        self.recording.operations = self.recording.latencies.count
        return self.recording

    def _start(self, position):
        key = self._content.keys[position % len(self._content.keys)]
        self._node.put(key, self._content.value, callback=partial(self._done, position, perf_counter()))

    def _done(self, position, started, _, reason):
        now = perf_counter()
        if reason == FAIL_REASON.SUCCESS:
            self.recording.latencies.record(now - started)
        else:
            self.failure = reason
        if now < self._ends and self.failure is None:
            self._start(position + 1)
            return
        self._under_way -= 1
        if self._under_way == 0:
            self._ended.set()


def answer(node, asked):
    if asked.get("ask") == "leader":
        return {"leader": node._isLeader()}
    pids = {**asked["pids"], GENERATOR: os.getpid()}
    before, machine = {name: cpu_seconds(pid) for name, pid in pids.items()}, machine_cpu_seconds()
    loop = ClosedLoop(node, asked["concurrency"], asked["seconds"], contents(asked["value_bytes"]))
    recording = loop.run()
    used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    return asdict(run_of(recording, used, machine_cpu_seconds() - machine))


def main(settings):
    node = Node(settings["own"], settings["others"], settings["options"])
    try:
        for line in sys.stdin:
            print(json.dumps(answer(node, json.loads(line))), flush=True)
    finally:
        node.destroy()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
