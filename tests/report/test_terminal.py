from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from qdexport.core.results import Report, ScaleRow
from qdexport.report.terminal import summary


def shown(
    report: Report, folder: Path | None = None, *, encoding: str = "utf-8", colour: bool = False
) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(
        file=stream,
        width=80,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
    )
    summary(report, console, folder)
    return raw.getvalue().decode(encoding)


def test_ten_seconds_are_enough(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    assert "report.html" not in shown(report, Path("out"))
    Path("out/report.html").touch()
    text = shown(report, Path("out"))
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) < 30
    assert max(map(len, lines)) <= 80
    words = " ".join(text.split())
    for fact in (
        "shapes-sd, w8a8-timestep, tensorrt-rtx, fp32 body",
        "PASS compiled right: 3.6e-5 of a layer's activation codes differ, least SQNR 119.2 dB of 100 asked, end to",
        "end +1.2 dB to rounding alone, -1 allowed",
        "KEPT pictures: 0.022 (0.017 to 0.029) of another seed's error, at most 0.5; alignment falls by 0 (-0.03",
        "INT8: 56 planned, 56 in ONNX, 56 in the engine; 6 others (5 folded, 1 fp32)",
        "least SQNR 119.2 dB down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "end to end 71.4 dB (rounding alone 70.2 dB)",
        "alignment 0.984 → 0.984, PSNR 42.8 dB, MSE 3.1e-4 (64 images, 25 steps)",
        "214 kernels: 56 INT8 and 1 FP convs and gemms, 12 attention; 14.3 MB, built in 38.4 s for 8.6, 8.9",
        "build 38.4 s); found again: check",
        "no proof of speed; for fast W8A8: --target tensorrt",
        "see out/report.html",
    ):
        assert fact in words


def test_the_nearest_step_is_told(report: Report) -> None:
    assert report.coverage is not None
    report.coverage.scale_rows = [ScaleRow(timestep=901, first=452, last=999), ScaleRow(timestep=1, first=0, last=451)]
    words = " ".join(shown(report).split())
    assert "2 timesteps from 901 to 1 have scales of their own; any other reads those of the nearest" in words


def test_mismatches_are_red(report: Report) -> None:
    assert report.coverage is not None
    report.coverage.engine["conv_in"] = "fp16"
    report.coverage.mismatches = ["conv_in: planned int8, engine fp16"]
    text = shown(report, colour=True)
    assert "\x1b[1;31m, 55 in the engine" in text
    assert "\x1b[1;31mconv_in: planned int8, engine fp16" in text
    assert "FAIL" in text


def test_many_problems_are_cut(report: Report) -> None:
    assert report.coverage is not None
    report.coverage.mismatches = [f"layer {index} is wrong" for index in range(50)]
    text = shown(report)
    assert "layer 5 is wrong" in text
    assert "layer 6 is wrong" not in text
    assert "and 44 more in report.json" in text


def test_only_stages_that_ran() -> None:
    text = shown(Report(tool_version="0", model="m", recipe="w8a8", target="onnxruntime"))
    assert text.split()[:3] == ["m,", "w8a8,", "onnxruntime"]
    assert "NOT CHECKED compiled right: codes not compared yet" in " ".join(text.split())
    assert "NOT JUDGED pictures: No pictures were compared: the check stage has not run." in " ".join(text.split())


def test_names_are_no_markup(report: Report) -> None:
    report.model = "[red]shapes[/red] :smile:"
    assert "[red]shapes[/red] :smile:" in shown(report)


def test_a_console_that_knows_only_ascii(report: Report) -> None:
    text = shown(report, encoding="ascii")
    assert "alignment 0.984 -> 0.984" in text
