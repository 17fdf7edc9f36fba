"""Charts are well-formed SVG that shows every point in its place."""

import xml.etree.ElementTree as ET

import pytest

from client.chart import BOTTOM, HEIGHT, LEFT, MARKS, RIGHT, TOP, WIDTH, Axes, line_chart, linear_ticks, log_ticks
from client.cli.bench_report import chart_of
from client.measure import Load, Run, summarise

SVG = "{http://www.w3.org/2000/svg}"


def parsed(document):
    return ET.fromstring(document)  # noqa: S314 - drawn here


def texts(document):
    return [element.text for element in parsed(document).iter(f"{SVG}text")]


def test_ticks_are_round_and_hold_all_values():
    assert linear_ticks(0.0) == [0.0, 1.0]
    assert linear_ticks(8.0) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert linear_ticks(17_223)[-1] == 20_000
    assert log_ticks(2.0, 30.0) == [1.0, 10.0, 100.0]
    assert log_ticks(10.0, 10.0) == [10.0, 100.0]
    for greatest in (1e-6, 0.3, 1.0, 9.99, 12_345.6, 1e9):
        ticks = linear_ticks(greatest)
        assert ticks[-1] >= greatest
        assert 2 <= len(ticks) <= 12


def test_every_series_is_drawn_and_named_and_text_is_escaped():
    series = {"<p50>": [(0, 1.0), (1000, 10.0)], "p99 & more": [(500, 100.0)]}
    drawn = line_chart(Axes("ops/s", "ms", "a < b", log_y=True), series)
    lines = [element.get("points").split() for element in parsed(drawn).iter(f"{SVG}polyline")]
    # The axes end at 0 and 1,000, and at 1 and 100 of which 10 is the middle.
    bottom, right = float(HEIGHT - BOTTOM), float(WIDTH - RIGHT)
    assert lines[0] == [f"{float(LEFT)},{bottom}", f"{right},{(bottom + TOP) / 2}"]
    assert lines[1] == [f"{(LEFT + right) / 2},{float(TOP)}"]
    assert [len(line) for line in lines] == [2, 1]
    found = texts(drawn)
    assert {"a < b", "ops/s", "ms", f"{MARKS[0]} <p50>", f"{MARKS[1]} p99 & more", "1,000"} <= set(found)
    assert found.count(MARKS[0]) == 2


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="a point"):
        line_chart(Axes("x", "y"), {"none": []})
    with pytest.raises(ValueError, match="above 0"):
        line_chart(Axes("x", "y", log_y=True), {"zero": [(1, 0)]})


def test_a_measurement_is_drawn_by_size_of_value():
    runs = [Run(100, 1.0, 1.0, 2.0, {}, p999_ms=3.0)]
    levels = [summarise(Load(level, value_bytes=size), runs) for size in (100, 1024) for level in (1, 10)]
    found = texts(chart_of(levels))
    assert f"{MARKS[0]} p50, 100 B" in found
    assert f"{MARKS[5]} p99.9, 1024 B" in found
    assert "put, closed loop" in found
