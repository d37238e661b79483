"""Charts: scales that hold their values, ticks that can be told apart, lines that keep their extremes."""

import math
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxlm.training import charts, scales, units
from jaxlm.training.charts import Axis, Series

finite = st.floats(-1e12, 1e12, allow_subnormal=False)
positive = st.floats(1e-9, 1e12)


def coordinates(html: str) -> list[float]:
    drawn = "".join(re.findall(r' d="([^"]*)"', html.partition('class="plot"')[2]))
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?|nan|inf", drawn)]


@given(st.lists(finite, min_size=1, max_size=20), st.booleans(), st.floats(0, 0.2))
def test_an_axis_holds_all_its_values(values, log, margin):
    shown = [v for v in values if scales.Scale(1, 2, log).shows(v)]
    assert len(shown) == len(values) or log
    assume(not shown or max(shown) == min(shown) or max(shown) - min(shown) > 1e-6 * max(map(abs, shown)))
    scale = scales.fit(values, log=log, margin=margin)
    assert scale.low < scale.high
    for value in shown:
        assert -1e-6 <= scale.place(value) <= scales.SPAN + 1e-6


@given(finite, st.floats(1e-6, 1e12), st.integers(3, 7))
def test_ticks_of_a_linear_axis_are_few_ascending_inside_and_distinct(low, length, count):
    assume(length > 1e-3 * abs(low))
    scale = scales.Scale(low, low + length)
    found = scales.ticks(scale, count)
    assert 2 <= len(found) <= count + 3
    assert found == sorted(set(found))
    slack = 1e-6 * length
    assert all(scale.low - slack <= v <= scale.high + slack for v in found)
    assert len(set(scales.labels(found))) == len(found), scales.labels(found)


@given(positive, st.floats(1.01, 1e15))
def test_ticks_of_a_logarithmic_axis_are_few_ascending_inside_and_distinct(low, ratio):
    scale = scales.Scale(low, low * ratio, log=True)
    found = scales.ticks(scale)
    assert 2 <= len(found) <= 9
    assert found == sorted(set(found))
    assert all(scale.low * 0.998 <= v <= scale.high * 1.002 for v in found)
    assert len(set(scales.labels(found))) == len(found), scales.labels(found)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.0, 0.001, 0.002, 0.003), ["0", "1e-3", "2e-3", "3e-3"]),
        ((0.0, 0.5, 1.0), ["0.0", "0.5", "1.0"]),
        ((3.0, 4.0, 5.0), ["3", "4", "5"]),
        ((0.0, 5000.0, 10000.0), ["0", "5k", "10k"]),
        ((0.1, 1.0, 10.0), ["0.1", "1", "10"]),
        ((0.0, 250.0, 500.0, 1000.0), ["0", "250", "500", "1000"]),
    ],
)
def test_labels_are_written_as_people_write_them(values, labels):
    assert scales.labels(values) == labels


@settings(max_examples=50)
@given(st.integers(1, 5000), st.integers(0, 2**31), st.booleans(), st.integers(4, 600))
def test_a_thinned_line_keeps_its_ends_and_extremes(count, seed, log, limit):
    values = [((seed + 7919 * i * i) % 10007) / 100 for i in range(count)]
    points = [(float(i + 1), v) for i, v in enumerate(values)]
    scale = scales.fit([x for x, _ in points], log=log)
    kept = scales.thin(points, scale, limit)
    assert len(kept) <= max(limit, 2)
    assert kept == sorted(kept) and set(kept) <= set(points)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert {max(y for _, y in kept), min(y for _, y in kept)} == {max(values), min(values)}


def test_thinning_keeps_a_lone_peak_among_values_that_are_not_finite():
    points = [(float(i), math.nan if 1000 < i < 2000 else 1.0) for i in range(10_000)]
    points[5000] = (5000.0, 99.0)
    kept = scales.thin(points, scales.Scale(0, 10_000), 100)
    assert (5000.0, 99.0) in kept and len(kept) <= 100
    assert any(math.isnan(y) for _, y in kept)


def test_smoothing_ends_with_the_mean_of_the_last_window_and_passes_over_nan():
    values = [float(i % 7) for i in range(100)]
    smooth = scales.smooth(values, 20)
    assert len(smooth) == 100
    assert smooth[-1] == pytest.approx(sum(values[-20:]) / 20)
    assert smooth[0] == values[0]
    assert smooth[50] == pytest.approx(sum(values[40:61]) / 21)
    values[50] = math.nan
    assert scales.smooth(values, 20)[50] == pytest.approx(sum(v for v in values[40:61] if v == v) / 20)
    assert all(math.isnan(v) for v in scales.smooth([math.nan] * 5, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_subnormal=False), max_size=30),
    st.sampled_from(["line", "faint", "points", "dashed", "dotted", "mixed"]),
    st.booleans(),
    st.booleans(),
)
def test_whatever_the_values_every_coordinate_is_a_number_near_the_drawing(values, style, log_x, log_y):
    values = [v if abs(v) < 1e100 else math.inf for v in values]
    one = Series("a", range(len(values)), values, style)
    html = charts.line_chart("Title", [one], Axis(log=log_x), Axis(log=log_y))
    numbers = coordinates(html)
    assert all(math.isfinite(n) and -1000 <= n <= 2000 for n in numbers)
    bad = sum(not math.isfinite(v) for v in values[1 if log_x else 0 :])
    assert (f"{bad:,} value{'s' if bad > 1 else ''} not finite" in html) == (bad > 0)


def test_a_chart_scales_with_its_place_and_its_text_does_not():
    html = charts.line_chart("Loss", [Series("training", [1, 2, 3], [3.0, 2.0, 1.5])], y=Axis("nats"))
    assert 'viewBox="0 0 1000 1000"' in html and 'preserveAspectRatio="none"' in html and 'width="100%"' in html
    assert "max-width:100%" in charts.STYLE and "non-scaling-stroke" in charts.STYLE
    assert re.search(r"\.chart text\{[^}]*font-size:12px", charts.STYLE)
    assert 'aria-label="Loss: training from 3 to 1.500"' in html
    assert "Loss <span>nats</span>" in html and "training <b>1.500</b>" in html


def test_a_point_between_gaps_is_drawn():
    html = charts.line_chart("x", [Series("a", [1, 2, 3], [math.nan, 2.0, math.nan])])
    assert 'class="c0 single" d="M500.0 500.0h0"' in html


def test_evaluations_tell_their_values():
    html = charts.line_chart("x", [Series("validation", [0, 100], [3.0, 2.123456], "points")])
    assert "<title>100: validation 2.1235</title>" in html


def test_a_heat_map_has_a_cell_for_each_row_and_stretch_and_none_where_nothing_is_known():
    rows = [[1.0, 2.0, 3.0], [math.nan, 5.0, 6.0]]
    html = charts.heat_map("load", ["0", "<1>"], [1, 2, 3], rows)
    assert html.count("<rect") == 5 and "&lt;1&gt;" in html
    wide = charts.heat_map("load", ["0"], range(1000), [[float(i) for i in range(1000)]])
    assert wide.count("<rect") == 120


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (units.significant(1.64234), "1.642"),
        (units.significant(12345), "12,345"),
        (units.significant(0.0001234), "1.23e-04"),
        (units.significant(math.nan), "nan"),
        (units.significant(0.0), "0"),
        (units.compact(950), "950"),
        (units.compact(12_345), "12.3k"),
        (units.compact(999_999), "1.0M"),
        (units.size(1.2e9), "1.2 GB"),
        (units.size(17), "17 B"),
        (units.clock(83), "1:23"),
        (units.clock(3723), "1:02:03"),
        (units.clock(200_000), "2d 07:33"),
        (units.clock(math.inf), "?"),
        (units.duration(8.44), "8.4 s"),
        (units.duration(171), "2 min 51 s"),
        (units.duration(11_530), "3 h 12 min"),
        (units.duration(190_800), "2 d 5 h"),
    ],
)
def test_numbers_are_written_for_people(made, text):
    assert made == text
