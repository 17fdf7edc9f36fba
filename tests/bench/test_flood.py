"""What one client's flood does to another is measured on a real cluster, and told with what it was measured under."""

import asyncio

import pytest

from client.bench import initialise, started
from tests.bench import flood
from tests.bench.flood import NONE, Figures, measure, page_of, percentile


@pytest.mark.parametrize(("share", "found"), [(0.5, 50), (0.99, 99), (1, 100), (0.001, 1)])
def test_a_percentile_is_a_value_that_occurred(share, found):
    assert percentile(list(range(100, 0, -1)), share) == found
    assert percentile([7.0], share) == 7.0


def test_the_page_has_a_line_per_load():
    found = {
        NONE: Figures([0.001, 0.002, 0.003]),
        "one key": Figures([0.1] * 99 + [0.9], [1000.0, 3000.0], 2),
    }
    lines = page_of(found, 1, 5, "here").splitlines()
    assert "| none | 3 | 2.0 | 3.0 | 3.0 | 0 | 0 |" in lines
    assert "| one key | 100 | 100.0 | 100.0 | 900.0 | 2,000 | 2 |" in lines
    assert lines[-1] == "here"


def test_a_real_cluster_is_flooded_and_the_quiet_client_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(flood, "FLOODS", {NONE: (0, 0), "two keys": (2, 20)})
    directory = tmp_path / "cluster"
    initialise(directory, 1, "three-phase", "software")
    with started(directory, "memory"):
        found = asyncio.run(measure(directory, 1, 0.3))
    assert found[NONE].latencies
    assert found["two keys"].latencies
    assert not found[NONE].flood_rates
    assert found["two keys"].flood_rates[0] > 0
