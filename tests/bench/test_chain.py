"""The bare chain of steps: the table, and a real chain for a moment, whose signatures count."""

import pytest

from tests.bench import chain
from tests.bench.chain import CHAIN, measure_chain, page_of


def test_the_table_compares_with_the_chain():
    found = {"etcd": [1.0, 1.2, 9.0], CHAIN: [2.4], "trustlog": []}
    lines = page_of(found, ["round 1: trustlog: it ended\nso"], 3, "here").splitlines()
    assert "| etcd | 1.20 | 0.50x |" in lines
    assert f"| {CHAIN} | 2.40 | 1.0x |" in lines
    assert "| trustlog | - | - |" in lines
    assert "- round 1: trustlog: it ended" in lines
    assert lines[-1] == "here"


def test_a_real_chain_answers(tmp_path):
    took = measure_chain(tmp_path, 0.2)
    assert took
    assert all(0 < one < 10 for one in took)
    assert list(tmp_path.iterdir()) == []


def test_a_chain_whose_signatures_are_not_good_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "START_S", 3.0)
    monkeypatch.setattr(chain.ClientKey, "sign", lambda *_: bytes(64))
    with pytest.raises(TimeoutError):
        measure_chain(tmp_path, 0.2)
