from __future__ import annotations

from typing import TYPE_CHECKING

from qdexport.core.results import KernelFact, Margin, Plan, Quality, QualityScores, Report, StageFacts
from qdexport.report import facts, tables

if TYPE_CHECKING:
    from qdexport.core.results import Coverage


def coverage_of(report: Report) -> Coverage:
    assert report.coverage is not None
    return report.coverage


def test_rows_join_coverage_parity_and_kernels(report: Report, plan: Plan) -> None:
    rows = {row.name: row for row in tables.layer_rows(report, plan)}
    row = rows["conv_in"]
    assert (row.bits, row.planned, row.onnx, row.engine) == ("8 / 8", "int8", "int8", "int8")
    assert row.agrees
    assert row.kernel_summary == "correlation, kgen"
    assert row.sqnr.endswith(" dB")
    folded = rows["mid_block.resnets.0.time_emb_proj"]
    assert (folded.bits, folded.sqnr, folded.sqnr_key, folded.flips_key) == ("", "", None, None)
    assert folded.agrees
    assert list(rows) == list(coverage_of(report).planned)


def test_differing_weight_codes_are_told_beside_those_of_activations(report: Report) -> None:
    assert report.parity is not None
    layer = report.parity.layers[0]
    layer.code_flip_rate, layer.weight_flip_rate = 1e-3, 0.25
    row = next(row for row in tables.layer_rows(report, None) if row.name == layer.name)
    assert (row.flips, row.flips_key) == (f"{facts.rate(1e-3)}; weight {facts.rate(0.25)}", 0.25)
    assert facts.differing(layer) == ("weight codes", 0.25)
    layer.weight_flip_rate = 0.0
    assert facts.differing(layer) == ("activation codes", 1e-3)


def test_a_merged_kernel_belongs_to_each_of_its_layers(report: Report) -> None:
    names = list(coverage_of(report).planned)[:3]
    plan = Plan(target="t", kernels=[KernelFact(index=0, name="k", kind="gemm", modules=names)])
    rows = tables.layer_rows(report, plan)
    assert [row.kernel_summary for row in rows[:4]] == ["gemm", "gemm", "gemm", ""]


def test_parts_of_a_split_layer_share_parity_and_kernels(report: Report) -> None:
    coverage = coverage_of(report)
    for column in (coverage.planned, coverage.onnx, coverage.engine):
        column |= {"conv_in#0": "int8", "conv_in#1": "int8"}
    plan = Plan(
        target="t",
        kernels=[
            KernelFact(index=0, name="shared", kind="kgen", modules=["conv_in"]),
            KernelFact(index=1, name="first", kind="correlation", modules=["conv_in#0"]),
        ],
    )
    rows = {row.name: row for row in tables.layer_rows(report, plan)}
    assert [kernel.name for kernel in rows["conv_in#0"].kernels] == ["first"]
    assert rows["conv_in#1"].kernel_summary == "correlation, kgen"
    assert rows["conv_in#1"].sqnr == rows["conv_in"].sqnr
    assert rows["conv_in#1"].bits == "8 / 8"


def test_without_an_engine_only_the_onnx_file_must_agree(report: Report) -> None:
    coverage = coverage_of(report)
    coverage.engine = {}
    assert all(row.agrees for row in tables.layer_rows(report, None))
    coverage.onnx["conv_in"] = "fp32"
    assert [row.name for row in tables.layer_rows(report, None) if not row.agrees] == ["conv_in"]


def test_quality_rows_hold_only_what_was_measured() -> None:
    quality = Quality(
        images=4,
        steps=25,
        seed=0,
        fp=QualityScores(alignment=1.0),
        quantized=QualityScores(
            alignment=0.75, psnr_db=999.0, texture=Margin(value=1.25, low=1.2, high=1.3, limit=1.5)
        ),
    )
    rows = {row.label: (row.fp, row.quantized, row.onnx) for row in tables.quality_rows(quality)}
    texture = {"Texture": ("-", "1.250", "-")}
    assert rows == {"Alignment": ("1.000", "0.750", "-"), "PSNR": ("-", "identical", "-"), **texture}


def test_bars_are_shares_of_the_longest() -> None:
    bars = tables.kernel_bars({"gemm": 5, "kgen": 20})
    assert [(bar.label, bar.value, bar.share) for bar in bars] == [("kgen", "20", 100.0), ("gemm", "5", 25.0)]
    stages = tables.stage_bars({
        "a": StageFacts(seconds=0.0, peak_rss_mb=10.0, cached=True),
        "b": StageFacts(seconds=2.0, peak_rss_mb=1234.5, cached=False),
    })  # fmt: skip
    assert [(bar.share, bar.faded) for bar in stages] == [(0.0, True), (100.0, False)]
    assert tables.kernel_bars({}) == tables.stage_bars({}) == []
