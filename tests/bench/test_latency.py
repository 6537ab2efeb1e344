import pytest

from bench.latency import PERCENTILES, curves_of, draw_latencies
from common.figure import png


def test_each_nine_is_as_far_as_the_one_before():
    curves = {"ours": [(99.9, 9.0), (50, 1.0), (99, 4.0), (90, 2.0)], "theirs": [(50, 3.0), (99, 30.0)]}
    (axes,) = draw_latencies(curves, "requests of 28x28 PNG").axes
    ours, theirs = axes.lines
    assert ours.get_xdata()[1:] == pytest.approx([1, 2, 3])
    assert list(ours.get_ydata()) == [1.0, 2.0, 4.0, 9.0]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["ours", "theirs"]
    assert list(theirs.get_ydata()) == [3.0, 30.0]


def test_a_curve_is_the_median_of_rounds_of_each_row_that_did_not_fail():
    rounds = [{name: factor * percentile for name, percentile in PERCENTILES.items()} for factor in (1, 5, 2)]
    row = {"title": "ours", "failed": None, "loads": {"64": rounds}}
    failed = {"title": "theirs", "failed": "3 failures", "loads": {"64": []}}
    assert curves_of([row, failed], 64) == {"ours": [(value, 2 * value) for value in PERCENTILES.values()]}


def test_it_becomes_a_png():
    assert png(draw_latencies({"ours": [(50, 1.0), (99, 2.0)]}, "title")).startswith(b"\x89PNG")
