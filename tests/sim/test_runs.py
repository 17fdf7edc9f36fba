"""Whole runs: reproducible, clean, and the same in another process."""

import subprocess
import sys

import pytest

from replica.sim.run import run_seed


def trace_hash_in_another_process(seed: int, hash_seed: str) -> str:
    program = f"from replica.sim.run import run_seed; print(run_seed({seed}).trace_hash)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.long)])  # 0 has real signatures
def test_the_same_seed_gives_the_same_trace_in_every_process(seed):
    here = run_seed(seed).trace_hash
    assert here == run_seed(seed).trace_hash
    assert here == trace_hash_in_another_process(seed, "1")
    assert here == trace_hash_in_another_process(seed, "4242")


def test_different_seeds_give_different_traces():
    assert run_seed(1).trace_hash != run_seed(2).trace_hash
