"""Redis' load generator through the gateway: the table and its ratios, and a run of each kind for a moment."""

import re

import pytest
from click.testing import CliRunner

from tests.bench import gateway
from tests.bench.gateway import Figures, Gateway, RedisAlone, page_of, redis_benchmark
from tests.bench.programs import ProgramError
from tests.support.tools import tool


def figures(**by_pipeline) -> Figures:
    made = Figures()
    for name, rates in by_pipeline.items():
        for rate in rates:
            made.add(int(name.removeprefix("p")), rate, 1000 / rate)
    return made


def test_the_table_compares_with_etcd_at_one_put_on_each_connection():
    found = {"etcd": figures(p1=[900, 1000, 5000]), "gateway": figures(p1=[2000, 3000, 4000], p16=[7000])}
    lines = page_of(
        found, {"Redis": "apt-get install redis-server"}, ["round 2: gateway: it ended\nso"], 3, "here"
    ).splitlines()
    assert "| etcd | 1,000 (1.0x) | 1.0 | - | - |" in lines
    assert "| gateway | 3,000 (3.0x) | 0.3 | 7,000 (7.0x) | 0.1 |" in lines
    assert "| Redis | not installed | - | not installed | - |" in lines
    assert "- failed in round 2: gateway: it ended" in lines
    assert lines[-1] == "here"
    assert "| gateway | 3,000 | 0.3 | - | - |" in page_of({"gateway": figures(p1=[3000])}, {}, [], 1, "here")


def test_a_load_that_fails_is_an_error_with_its_words(monkeypatch, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho what went wrong >&2\nexit 3\n")
    failing.chmod(0o700)
    monkeypatch.setattr(gateway, "TOOL", str(failing))
    with pytest.raises(ProgramError, match="ended with code 3: what went wrong"):
        redis_benchmark(1, 10, 1)


def test_real_gateways_and_redis_are_loaded(monkeypatch, tmp_path):
    for name in ("redis-benchmark", "redis-server"):
        tool(name)
    monkeypatch.setattr(gateway, "SYSTEMS", (RedisAlone(), Gateway("gateway, two-phase", "two-phase")))
    done = CliRunner().invoke(gateway.main, ["--rounds", "1", "--requests", "100", "--dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in ("Redis", "gateway, two-phase"):
        assert re.search(rf"\| {name} \| [\d,]+ \| [\d.]+ \| [\d,]+ \| [\d.]+ \|", done.stdout), done.stdout
    assert "failed" not in done.output
    assert list(tmp_path.iterdir()) == []
