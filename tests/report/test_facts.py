from __future__ import annotations

import pytest

from qdexport.check.outcome import agrees, compiled_problems, in_short, verdict_of
from qdexport.core.results import Report, ScaleRow, WeightStorage
from qdexport.report import facts


def test_a_good_report_passes(report: Report) -> None:
    verdict = verdict_of(report)
    assert (verdict.compiled, verdict.pictures) == ("pass", "kept")
    assert verdict.why[0] == "All 56 layers planned in INT8 are INT8 in the ONNX file and in the compiled plan."
    assert [item.tone for item in facts.headlines(report)] == ["ok", "ok", "ok", "ok", "plain"]


def test_a_layer_that_is_not_as_planned_fails_even_when_unnamed(report: Report) -> None:
    assert report.coverage is not None
    report.coverage.engine["conv_in"] = "fp16"
    assert compiled_problems(report) == ["1 of 56 layers are not in the planned type in the compiled plan"]
    assert verdict_of(report).compiled == "fail"
    assert facts.headlines(report)[0].tone == "bad"


def test_a_layer_without_parity_fails(report: Report) -> None:
    assert report.parity is not None
    gone = report.parity.layers.pop()
    assert compiled_problems(report) == [f"parity was not measured on 1 quantized layers: {gone.name}"]


def test_a_split_layer_is_measured_under_its_own_name(report: Report) -> None:
    assert report.coverage is not None
    for column in (report.coverage.planned, report.coverage.onnx, report.coverage.engine):
        del column["conv_in"]
        column |= {"conv_in#0": "int8", "conv_in#1": "int8"}
    assert compiled_problems(report) == []


def test_parity_that_fails_gives_its_reasons(report: Report) -> None:
    assert report.parity is not None
    report.parity.verdict, report.parity.reasons = "fail", ["layer x flips 3e-2 of its codes", "another"]
    assert verdict_of(report).compiled == "fail"
    assert in_short(report)[0] == "layer x flips 3e-2 of its codes (and 1 more, below)"


def test_nothing_is_claimed_without_parity(report: Report) -> None:
    report.parity = None
    assert verdict_of(report).compiled == "not checked"


def test_numbers_that_fall_short_are_marked(report: Report) -> None:
    assert report.parity is not None
    report.parity.layers[0].weight_flip_rate = 1e-6  # weights may not differ at all
    report.parity.end_to_end.sqnr_db = report.parity.end_to_end.noise_floor_db - 1.5
    tones = {item.label: item.tone for item in facts.headlines(report)}
    assert tones["Differing weight codes, worst layer"] == "bad"
    assert tones["End to end, one call"] == "bad"


def test_timesteps_without_scales_of_their_own_are_told(report: Report) -> None:
    coverage = report.coverage
    assert coverage is not None
    assert facts.scale_rows(coverage) == ""
    coverage.scale_rows = [
        ScaleRow(timestep=step, first=first, last=last)
        for step, first, last in ((901, 750, 999), (601, 302, 749), (1, 0, 301))
    ]
    assert facts.scale_rows(coverage) == (
        "3 timesteps from 901 to 1 have scales of their own; any other reads those of the nearest of them "
        "(302 to 749 those of 601)"
    )
    coverage.scale_rows = [ScaleRow(timestep=step, first=step, last=step) for step in (1, 0)]
    assert facts.scale_rows(coverage) == "each of the 2 timesteps has scales of its own"


def test_int4_weights_may_compute_in_int8() -> None:
    assert agrees("int4", "int8")
    assert not agrees("int8", "int4")
    assert not agrees("int8", "-")
    assert agrees("fp32", "fp16")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (14_300_000, "14.3 MB"), (2_500_000_000, "2.5 GB"), (1_500, "1.5 kB")],
)
def test_size(value: int, text: str) -> None:
    assert facts.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.02, "20 ms"), (9.31, "9.3 s"), (124, "2 min 4 s"), (7260, "2 h 1 min")]
)
def test_duration(value: float, text: str) -> None:
    assert facts.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (3.1e-4, "3.1e-4"), (0.91, "0.91"), (240.7, "241"), (0.0, "0"), (2e7, "2e7")],
)
def test_number(value: float | None, text: str) -> None:
    assert facts.number(value) == text


def test_ratios() -> None:
    assert facts.decibel(999.0) == facts.decibel(float("inf")) == "identical"
    assert facts.decibel(71.44) == "71.4 dB"
    assert facts.rate(0.0) == "0"
    assert facts.rate(2.1e-5) == "2.1e-5"


def test_weights_alone_are_told_by_how_they_are_stored(report: Report) -> None:
    """No layer computes in a narrow type: what counts is that all weights are stored as planned."""
    coverage = report.coverage
    assert coverage is not None
    narrow = [name for name, kind in coverage.planned.items() if kind == "int8"]
    for column in (coverage.planned, coverage.onnx, coverage.engine):
        column.update(dict.fromkeys(narrow, "fp16"))
    coverage.storage = {name: WeightStorage(planned="int4", onnx="int4", engine="int4") for name in narrow}
    assert compiled_problems(report) == []
    assert in_short(report)[0].startswith("The weights of all 56 layers are stored as INT4; ")
    headline = facts.headlines(report)[0]
    assert (headline.label, headline.value, headline.tone) == ("Weights stored as INT4", "56 of 56", "ok")
    coverage.storage[narrow[0]].engine = "fp16"
    assert (facts.headlines(report)[0].value, facts.headlines(report)[0].tone) == ("55 of 56", "bad")
    assert report.parity is not None
    report.parity.layers = [layer for layer in report.parity.layers if layer.name != narrow[0]]
    assert compiled_problems(report) == [f"parity was not measured on 1 quantized layers: {narrow[0]}"]


def test_every_narrow_type_of_the_engine_is_counted(report: Report) -> None:
    assert report.engine is not None
    before = facts.compute_counts(report.engine)
    report.engine.fp8_compute, report.engine.nvfp4_compute = 3, 2
    assert facts.compute_counts(report.engine) == before.replace(" INT8", " INT8, 3 FP8, 2 NVFP4")
