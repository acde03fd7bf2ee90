"""The networks beside the denoiser on the page, on the terminal, and in the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from qdexport.check.outcome import compiled_problems, verdict_of
from qdexport.core.results import CompanionParity, CompanionResult, Report, WholePipeline
from qdexport.report.html import ReportInputs, write_html
from qdexport.report.terminal import summary

if TYPE_CHECKING:
    from pathlib import Path

PARITY = CompanionParity(
    reference="ONNX Runtime", calls=4, sqnr_db=72.5, noise_floor_db=64.25, largest_activation=33.0, verdict="pass"
)
RESULT = CompanionResult(
    class_name="AutoencoderKL", body="fp16", why_body="because <it> is", usage="latents: divided", nodes=289,
    onnx_bytes=383_352, layers={"planned": {"fp16": 22}}, parity=PARITY,
)  # fmt: skip
WHOLE = WholePipeline(
    networks=["denoiser", "vae_decoder"], images=4, steps=25, psnr_db=45.3, noise_floor_db=43.5, verdict="pass"
)


@pytest.fixture
def with_decoder(report: Report) -> Report:
    return report.model_copy(update={"companions": {"vae_decoder": RESULT}, "whole_pipeline": WHOLE})


def told(report: Report) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        summary(report, console)
    return capture.get()


def test_on_the_terminal_and_on_the_page(with_decoder: Report, inputs: ReportInputs, tmp_path: Path) -> None:
    assert compiled_problems(with_decoder) == []
    text = told(with_decoder)
    assert "AutoencoderKL in fp16: 289 nodes, 383 kB; 72.5 dB (rounding alone 64.2 dB)" in text
    assert "4 images with denoiser, vae_decoder in ONNX: 45.3 dB (rounding alone 43.5 dB)" in text
    write_html(tmp_path / "report.html", replace(inputs, report=with_decoder))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="#companions"' in page
    assert "because &lt;it&gt; is" in page
    write_html(tmp_path / "report.html", replace(inputs, report=with_decoder.model_copy(update={"companions": None})))
    assert 'id="companions"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_falls_short_fails_the_report(with_decoder: Report) -> None:
    wrong = PARITY.model_copy(update={"verdict": "fail", "reasons": ["vae_decoder: too far"]})
    result = RESULT.model_copy(update={"mismatches": ["conv_in: planned fp16, fp32 in the engine"], "parity": wrong})
    images = WHOLE.model_copy(update={"verdict": "fail", "reasons": ["images differ"]})
    report = with_decoder.model_copy(update={"companions": {"vae_decoder": result}, "whole_pipeline": images})
    assert compiled_problems(report) == [
        "vae_decoder: conv_in: planned fp16, fp32 in the engine", "vae_decoder: too far", "images differ",
    ]  # fmt: skip
    assert verdict_of(report).compiled == "fail"
    again = Report.model_validate_json(report.model_dump_json(exclude_none=True))
    assert (again.companions, again.whole_pipeline) == (report.companions, report.whole_pipeline)
