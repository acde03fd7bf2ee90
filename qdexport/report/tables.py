"""Rows of the report's tables, put together from the parts of a report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdexport.check.outcome import agrees
from qdexport.core.results import Margin
from qdexport.report.facts import IDENTICAL_DB, decibel, duration, microseconds, number, rate, size

if TYPE_CHECKING:
    from qdexport.core.results import (
        Cost,
        Coverage,
        KernelFact,
        LayerErrors,
        LayerParity,
        Plan,
        Quality,
        QualityScores,
        Report,
        StageFacts,
    )

__all__ = [
    "Bar",
    "ErrorRow",
    "LayerRow",
    "QualityRow",
    "cost_bars",
    "error_rows",
    "kernel_bars",
    "layer_rows",
    "quality_rows",
    "stage_bars",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer of the coverage table; ``*_key`` are what the browser sorts by, None when not measured."""

    name: str
    bits: str
    planned: str
    onnx: str
    engine: str
    agrees: bool
    sqnr: str
    sqnr_key: float | None
    flips: str
    flips_key: float | None
    kernels: tuple[KernelFact, ...]
    kernel_summary: str
    why: str


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One score of the FP model, the quantized model, the ONNX file, and the FP model with another seed."""

    label: str
    note: str
    fp: str
    quantized: str
    onnx: str
    other: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar; ``share`` is its length in percent of the longest."""

    label: str
    value: str
    share: float
    note: str = ""
    faded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow:
    """One layer of the ranking; ``width`` is the length of its bar in percent, ``weight`` its weight's part of it."""

    name: str
    alone: str
    alone_key: float
    share: str
    share_key: float
    width: float
    weight: float
    change: str
    advice: str


_SCORES = (
    ("alignment", "Alignment", "share of images that show what the prompt says; higher is better"),
    ("psnr_db", "PSNR", "dB against the FP model's images; higher is better"),
    ("mse", "MSE", "against the FP model's images, values in [-1, 1]; lower is better"),
    ("ssim", "SSIM", "against the FP model's images; 1 is identical"),
    ("share", "Share of another seed's error", "squared error over what another seed makes; lower is better"),
    ("texture", "Texture", "how much neighbouring pixels differ, over the FP model's; above 1 is noise"),
    ("contrast", "Contrast", "deviation of an image over the FP model's; 1 is the same"),
    ("frechet_fp", "Fréchet distance to FP", "feature distributions against the FP model's; lower is better"),
    ("frechet", "Fréchet distance to real", "feature distributions against real images; lower is better"),
)


def quality_rows(quality: Quality) -> list[QualityRow]:
    """The scores that were measured."""
    rows, columns = [], (quality.fp, quality.quantized, quality.onnx, quality.other_seed)
    for key, label, note in _SCORES:
        values = [_value(part, key) for part in columns]
        if any(value is not None for value in values):
            # such a distance depends on the number of images
            counted = f"{label}, {quality.images} images" if key.startswith("frechet") else label
            rows.append(QualityRow(counted, note, *(_score(key, value) for value in values)))
    return rows


def error_rows(errors: LayerErrors) -> list[ErrorRow]:
    """The layers by the error that each makes, the largest first."""
    most = max((item.share or 0.0 for item in errors.layers), default=0.0) or 1.0
    return [
        ErrorRow(
            name=item.name,
            alone=decibel(item.alone_db),
            alone_key=item.alone_db,
            share="" if item.share is None else f"{100 * item.share:.1f} %",
            share_key=item.share or 0.0,
            width=100 * max(item.share or 0.0, 0.0) / most,
            weight=100 * item.weight_share,
            change=item.change,
            advice=item.advice,
        )
        for item in errors.layers
    ]


def cost_bars(cost: Cost) -> list[tuple[str, list[Bar]]]:
    """Bytes and time, FP16 beside what was compiled, each with bars of its own."""
    sides = [("FP16, from shapes", cost.fp16), ("quantized, from shapes", cost.quantized)]
    sides += [("all kernels of the plan", cost.plan)] if cost.plan else []
    return [
        ("Bytes of weights", _bars([(name, side.weight_bytes, size(side.weight_bytes)) for name, side in sides])),
        ("Bytes read and written", _bars([(name, side.moved_bytes, size(side.moved_bytes)) for name, side in sides])),
        (f"Least time on {cost.gpu}", _bars([(name, side.microseconds, microseconds(side)) for name, side in sides])),
    ]


def _bars(items: list[tuple[str, float, str]]) -> list[Bar]:
    longest = max(value for _, value, _ in items) or 1.0
    return [Bar(name, told, 100 * value / longest) for name, value, told in items]


def layer_rows(report: Report, plan: Plan | None) -> list[LayerRow]:
    """One row per layer of the coverage; empty when coverage is unknown."""
    coverage = report.coverage
    if coverage is None:
        return []
    parity = {layer.name: layer for layer in report.parity.layers} if report.parity else {}
    kernels = _kernels_by_layer(plan)
    rows = []
    for name, planned in coverage.planned.items():
        base = name.partition("#")[0]
        onnx, engine = coverage.onnx.get(name, "-"), coverage.engine.get(name, "-")
        measured = parity.get(name) or parity.get(base)
        bits = coverage.bits.get(name) or coverage.bits.get(base) or []
        ran = kernels.get(name) or kernels.get(base) or []
        rows.append(
            LayerRow(
                name=name,
                bits=" / ".join(map(str, bits)),
                planned=planned,
                onnx=onnx,
                engine=engine,
                agrees=agrees(planned, onnx) and (not coverage.engine or agrees(planned, engine)),
                sqnr=decibel(measured.sqnr_db) if measured else "",
                sqnr_key=min(measured.sqnr_db, IDENTICAL_DB) if measured else None,
                flips=_flips(measured),
                flips_key=max(measured.code_flip_rate, measured.weight_flip_rate) if measured else None,
                kernels=tuple(ran),
                kernel_summary=_summary(ran),
                why=_story(coverage, name),
            )
        )
    return rows + [_quantizer_row(coverage, parity, name) for name in coverage.notes if name not in coverage.planned]


def _flips(measured: LayerParity | None) -> str:
    """The share of activation codes that differ, and that of weight codes where there are any: a failure of its own."""
    if measured is None:
        return ""
    weights = f"; weight {rate(measured.weight_flip_rate)}" if measured.weight_flip_rate else ""
    return rate(measured.code_flip_rate) + weights


def _story(coverage: Coverage, name: str) -> str:
    """Why a layer is as it is, and what became of its mechanisms."""
    base = name.partition("#")[0]
    told = (coverage.why.get(name) or coverage.why.get(base, ""), coverage.notes.get(name) or coverage.notes.get(base))
    return "; ".join(part for part in told if part)


def _quantizer_row(coverage: Coverage, parity: dict[str, LayerParity], name: str) -> LayerRow:
    """What is no layer but has a quantizer of its own: attention probabilities."""
    measured = parity.get(name)
    return LayerRow(
        name=name,
        bits="",
        planned="-",
        onnx="-",
        engine="-",
        agrees=True,
        sqnr=decibel(measured.sqnr_db) if measured else "",
        sqnr_key=min(measured.sqnr_db, IDENTICAL_DB) if measured else None,
        flips=_flips(measured),
        flips_key=measured.code_flip_rate if measured else None,
        kernels=(),
        kernel_summary="",
        why=coverage.notes[name],
    )


def kernel_bars(kinds: dict[str, int]) -> list[Bar]:
    """Kernels by type, most frequent first."""
    longest = max(kinds.values(), default=1)
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return [Bar(kind, str(count), 100 * count / longest) for kind, count in ordered]


def stage_bars(stages: dict[str, StageFacts]) -> list[Bar]:
    """Seconds and memory of each stage, in the order in which they ran."""
    longest = max((facts.seconds for facts in stages.values()), default=0.0) or 1.0
    return [
        Bar(
            name,
            duration(facts.seconds),
            100 * facts.seconds / longest,
            "found again, not run" if facts.cached else f"peak {facts.peak_rss_mb:.0f} MB",
            facts.cached,
        )
        for name, facts in stages.items()
    ]


def _value(scores: QualityScores | None, key: str) -> float | None:
    found = getattr(scores, key, None)
    return found.value if isinstance(found, Margin) else found


def _score(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "psnr_db":
        return decibel(value).removesuffix(" dB")
    return f"{value:.3f}" if key in {"alignment", "ssim", "texture", "contrast"} else number(value)


def _kernels_by_layer(plan: Plan | None) -> dict[str, list[KernelFact]]:
    found: dict[str, list[KernelFact]] = {}
    for kernel in plan.kernels if plan else ():
        for name in dict.fromkeys((*kernel.modules, *(item.partition("#")[0] for item in kernel.modules))):
            found.setdefault(name, []).append(kernel)
    return found


def _summary(kernels: list[KernelFact]) -> str:
    """Names what computes first; ``kgen`` are the generated pointwise kernels around it."""
    counts = sorted(Counter(kernel.kind for kernel in kernels).items(), key=lambda item: item[0] == "kgen")
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in counts)
