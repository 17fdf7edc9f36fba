"""The recorder of latencies against exact percentiles."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.histogram import VALUE_MAX_NS, Recorder

SHARES = (0.001, 0.5, 0.9, 0.99, 0.999, 1.0)


def recorder_of(values):
    recorder = Recorder()
    for value in values:
        recorder.record(value)
    return recorder


def exact(values, share):
    return sorted(values)[math.ceil(share * len(values)) - 1]


@given(st.lists(st.floats(0, 3600), min_size=1, max_size=200))
def test_a_percentile_is_never_below_the_exact_one_and_hardly_above(values):
    recorder = recorder_of(values)
    for share in SHARES:
        want = exact(values, share)
        assert want <= recorder.percentile(share) <= want * 1.001 + 2e-9
    assert recorder.percentile(1.0) == recorder.maximum_s == max(values)
    assert recorder.count == len(values)


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_added_up_and_passed_on_as_json_it_counts_the_same(one, two):
    added = recorder_of(one)
    added.add(recorder_of(two))
    whole = recorder_of(one + two)
    assert (added.as_data(), added.count) == (whole.as_data(), whole.count)
    back = Recorder.from_data(json.loads(json.dumps(whole.as_data())))
    assert (back.count, back.maximum_s) == (whole.count, pytest.approx(whole.maximum_s, abs=1e-9))
    for share in SHARES:
        assert back.percentile(share) == pytest.approx(whole.percentile(share), abs=1e-9)


def test_buckets_are_bounded_and_what_is_too_long_is_counted():
    recorder = recorder_of(1.002**i / 1e9 for i in range(20_000) if 1.002**i < 2**50)
    assert len(recorder.as_data()) <= 33_793
    assert recorder.percentile(1.0) <= (VALUE_MAX_NS + 1) / 1e9
    assert recorder.maximum_s > VALUE_MAX_NS / 1e9


def test_what_is_no_latency_is_refused():
    recorder = Recorder()
    for value in (-1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="cannot be counted"):
            recorder.record(value)
    for share in (0.0, 1.1, 0.5):
        with pytest.raises(ValueError, match="a percentile needs latencies"):
            recorder.percentile(share)
    recorder.record(1.0)
    assert recorder.percentile(0.5) == 1.0
