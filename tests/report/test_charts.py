from __future__ import annotations

import math

import pytest

from qdexport.core.results import LayerParity, Report
from qdexport.report import charts


def test_sqnr_chart_orders_by_value_and_marks_what_is_low(report: Report) -> None:
    assert report.parity is not None
    layers = report.parity.layers
    layers[0].sqnr_db, layers[1].sqnr_db = 80.0, 120.0
    chart = charts.sqnr_chart(layers, 100.0)
    assert chart is not None
    assert chart.rule is not None
    low, high, same = chart.marks[0], chart.marks[1], chart.marks[3]
    assert low.tone == "bad"
    assert high.tone == "ok"
    assert same.y < high.y < chart.rule.at < low.y <= chart.bottom
    assert same.title.endswith("identical")
    assert "1 below 100 dB, 1 without difference" in chart.summary
    assert [band.label for band in chart.bands if band.label] == [
        "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
    ]  # fmt: skip
    assert sum(band.width for band in chart.bands) == pytest.approx(
        chart.right - chart.left, abs=0.1
    )  # rounded to 0.01


def test_flip_chart_is_left_out_when_all_codes_agree() -> None:
    layers = [LayerParity(name="a", sqnr_db=130, code_flip_rate=0.0)]
    assert charts.flip_chart(layers) is None
    layers[0].code_flip_rate = 5e-4
    chart = charts.flip_chart(layers)
    assert chart is not None
    assert chart.rule is not None
    assert chart.marks[0].tone == "bad"
    assert chart.marks[0].y < chart.rule.at


def test_no_layers_no_chart() -> None:
    assert charts.sqnr_chart([], 100.0) is None
    assert charts.flip_chart([]) is None


def test_error_charts_separate_decibels(report: Report) -> None:
    assert report.quality is not None
    errors, ratios = charts.error_charts(report.quality.error_per_step)
    assert [line.label for line in errors.lines] == ["latent MSE", "prediction MSE"]
    assert [line.label for line in ratios.lines] == ["prediction SQNR (dB)"]
    assert len(errors.lines[0].marks) == 25
    assert errors.x_ticks[0].label == "961"
    assert "timestep 961" in errors.lines[0].marks[0].title


def test_error_charts_skip_what_cannot_be_drawn() -> None:
    rows = [
        {"step": 0.0, "mse": 0.0},
        {"step": 1.0, "mse": 1e-4},
        {"step": 2.0, "mse": math.nan},
        {"step": 3.0},
    ]
    (chart,) = charts.error_charts(rows)
    assert [mark.title for mark in chart.lines[0].marks] == ["step 1: MSE 1e-4"]
    assert charts.error_charts([]) == []
    assert charts.error_charts([{"step": 0.0, "mse": 0.0}]) == []


def test_log_axis_is_linear_in_the_exponent() -> None:
    chart = charts.scale_chart({"a": 0.01, "b": 0.1, "c": 1.0})
    first, second, third = (mark.y for mark in chart.marks)
    assert first - second == pytest.approx(second - third, abs=0.02)  # positions are rounded to 0.01
    assert [tick.label for tick in chart.y_ticks] == ["0.001", "0.01", "0.1", "1"]


def test_equal_values_still_make_an_axis() -> None:
    chart = charts.scale_chart({"a": 1.0, "b": 1.0})
    assert len(chart.y_ticks) > 1
    assert all(chart.top <= mark.y <= chart.bottom for mark in chart.marks)
