"""What a report says in a few words: margins, headline numbers, problems; for the page and the terminal."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qdexport.check.outcome import NARROW, coverage_counts, narrow_name, storage_counts, verdict_of
from qdexport.check.verdict import FLIP_LIMIT, FLOOR_MARGIN_DB, LAYER_SQNR_DB

if TYPE_CHECKING:
    from qdexport.core.results import (
        Cost,
        CostSide,
        Coverage,
        EngineFacts,
        LayerError,
        LayerParity,
        Margin,
        Parity,
        Quality,
        Report,
    )

__all__ = [
    "IDENTICAL_DB",
    "QUICK",
    "RTX_CAVEAT",
    "Headline",
    "Tone",
    "compiled_margin",
    "compute_counts",
    "cost_change",
    "decibel",
    "duration",
    "exact_layers",
    "headlines",
    "label_of",
    "layer_error",
    "margin",
    "microseconds",
    "number",
    "other_kinds",
    "pictures_margin",
    "rate",
    "size",
    "sqnr_limit",
    "weakest",
]

Tone = Literal["ok", "bad", "plain"]

IDENTICAL_DB = 999.0

RTX_CAVEAT = (
    "An INT8 kernel in a TensorRT-RTX plan is no proof of speed. NVIDIA's support matrices for TensorRT-RTX "
    "promise INT8 only as weight-only quantization; W8A8 builds, and the plan holds INT8 kernels, but what "
    "they become is decided on the device. Where W8A8 has to be fast, build with full TensorRT "
    "(--target tensorrt) and measure there."
)

QUICK = "Checked with --quick: fewer images and fewer calls. `qdexport validate OUT` checks everything."

_LABELS = {
    "fp": "FP", "quantized": "Quantized", "onnx": "ONNX Runtime", "engine": "Engine", "other_seed": "FP, other seed",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One of the numbers that matter, with a sentence under it."""

    label: str
    value: str
    note: str
    tone: Tone = "plain"


def compiled_margin(report: Report) -> str:
    """How far the compiled network is from the limits of parity."""
    if report.parity is None:
        return "codes not compared yet"
    flips, sqnr = weakest(report.parity)
    whole = report.parity.end_to_end
    told = []
    if flips is not None and sqnr is not None:
        which, worst = differing(flips)
        told.append(f"{rate(worst)} of a layer's {which} differ" if worst else "all codes equal")
        told.append(f"least SQNR {decibel(sqnr.sqnr_db)} of {sqnr_limit(report):.0f} asked")
    above = whole.sqnr_db - whole.noise_floor_db
    told.append(f"end to end {above:+.1f} dB to rounding alone, {-FLOOR_MARGIN_DB:g} allowed")
    return ", ".join(told)


def pictures_margin(report: Report) -> str:
    """How far the pictures are from the limits of what counts as kept."""
    quality = report.quality
    if quality is None or quality.quantized.share is None:
        return verdict_of(report).why[-1]
    share, fall = quality.quantized.share, quality.quantized.alignment_fall
    told = f"{margin(share)} of another seed's error, at most {number(share.limit)}"
    if (texture := quality.quantized.texture) is not None:
        told = f"{told}; neighbouring pixels differ {margin(texture)} times as much, below {number(texture.limit)}"
    if (contrast := quality.quantized.contrast) is not None:
        told = f"{told}; contrast {margin(contrast)} times theirs, above {number(1 / contrast.limit)}"
    return told if fall is None else f"{told}; alignment falls by {margin(fall)}, less than {number(fall.limit)}"


def margin(value: Margin) -> str:
    """A value with its interval."""
    return f"{number(value.value)} ({number(value.low)} to {number(value.high)})"


def layer_error(item: LayerError) -> str:
    """How much of the whole error a layer makes, or how large its own is where that is not known."""
    return f"{100 * item.share:.0f} %" if item.share is not None else decibel(item.own_db)


def cost_change(cost: Cost) -> str:
    """Bytes and time of the layers, before and after."""
    before, after = cost.fp16, cost.quantized
    return (
        f"weights {size(before.weight_bytes)} → {size(after.weight_bytes)}, moved {size(before.moved_bytes)} → "
        f"{size(after.moved_bytes)}, at least {microseconds(before)} → {microseconds(after)} on {cost.gpu}"
    )


def microseconds(side: CostSide) -> str:
    """A time that may be a millionth or a tenth of a second."""
    value = side.microseconds
    return f"{value:.3g} µs" if value < 1000 else f"{value / 1000:.3g} ms"


def headlines(report: Report) -> list[Headline]:
    """The numbers that matter, at most five, of the stages that ran."""
    made = []
    if report.coverage is not None:
        if any(kind in NARROW for kind in report.coverage.planned.values()) or not report.coverage.storage:
            made.append(_coverage_headline(report.coverage))
        else:
            made.append(_storage_headline(report.coverage))
    if report.quality is not None:
        made.append(_quality_headline(report.quality, verdict_of(report).pictures))
    if report.parity is not None:
        made.extend(_parity_headlines(report.parity, sqnr_limit(report)))
    if report.engine is not None:
        made.append(_engine_headline(report.engine))
    return made


def compute_counts(engine: EngineFacts) -> str:
    """How many convolutions and products compute in what: ``82 INT8 and 0 FP``, FP8 and NVFP4 where there are any."""
    narrow = [f"{engine.int8_compute} INT8"]
    narrow += [f"{engine.fp8_compute} FP8"] if engine.fp8_compute else []
    narrow += [f"{engine.nvfp4_compute} NVFP4"] if engine.nvfp4_compute else []
    return f"{', '.join(narrow)} and {engine.fp_compute} FP"


def weakest(parity: Parity) -> tuple[LayerParity | None, LayerParity | None]:
    """The layer with the worst flips, and the one with the smallest SQNR; weights that differ come first."""
    if not parity.layers:
        return None, None
    flips = max(parity.layers, key=lambda item: (item.weight_flip_rate, item.code_flip_rate))
    return flips, min(parity.layers, key=lambda layer: layer.sqnr_db)


def scale_rows(coverage: Coverage) -> str:
    """What is read at a timestep that was not calibrated; empty where scales are the same at every step."""
    rows = coverage.scale_rows
    if not rows:
        return ""
    own = [row.timestep for row in rows]
    nearest = [row for row in rows if row.first != row.last]
    if not nearest:
        return f"each of the {len(rows)} timesteps has scales of its own"
    example = max(nearest, key=lambda row: row.last - row.first)
    return (
        f"{len(rows)} timesteps from {own[0]:g} to {own[-1]:g} have scales of their own; any other reads those of the "
        f"nearest of them ({example.first:g} to {example.last:g} those of {example.timestep:g})"
    )


def differing(layer: LayerParity) -> tuple[str, float]:
    """Which codes of a layer differ, and how large a share: those of its weight first, of which none may."""
    if layer.weight_flip_rate:
        return "weight codes", layer.weight_flip_rate
    return "activation codes", layer.code_flip_rate


def exact_layers(parity: Parity) -> int:
    """How many layers have no differing code at all."""
    return sum(layer.code_flip_rate == layer.weight_flip_rate == 0 for layer in parity.layers)


def sqnr_limit(report: Report) -> float:
    """The smallest SQNR in dB that a layer's output should have with this body type."""
    return LAYER_SQNR_DB.get(report.body, LAYER_SQNR_DB["fp32"])


def label_of(column: str) -> str:
    """The heading of an image column."""
    return _LABELS.get(column, column)


def other_kinds(coverage: Coverage) -> str:
    """How many layers of each other type are planned: ``5 folded, 1 fp32``."""
    others = Counter(kind for kind in coverage.planned.values() if kind not in NARROW)
    return ", ".join(f"{count} {kind}" for kind, count in others.most_common())


def decibel(value: float) -> str:
    """A ratio in dB; identical tensors have no noise."""
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f} dB"


def rate(value: float) -> str:
    """A share of codes."""
    return "0" if value == 0 else _short(f"{value:.1e}")


def number(value: float | None) -> str:
    """Up to three significant digits; a dash when there is no value."""
    if value is None or math.isnan(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return _short(f"{value:.2e}")
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def size(count: int) -> str:
    """A number of bytes in decimal units."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time span in the unit that fits."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0.95:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _short(text: str) -> str:
    """Drops what pads a number: 2.10e-05 becomes 2.1e-5."""
    mantissa, _, exponent = text.partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _coverage_headline(coverage: Coverage) -> Headline:
    planned, onnx, engine = coverage_counts(coverage)
    kinds = narrow_name(coverage.planned.values())
    reached = onnx if engine is None else engine
    rest = other_kinds(coverage) or "no other layers"
    good = not coverage.mismatches and onnx == planned and engine in {None, planned}
    return Headline(
        label=f"Layers in {kinds}",
        value=f"{reached} of {planned}",
        note=f"planned {planned}, ONNX {onnx}"
        + ("" if engine is None else f", engine {engine}")
        + f"; {rest}",
        tone="ok" if good else "bad",
    )


def _storage_headline(coverage: Coverage) -> Headline:
    count, good, types = storage_counts(coverage)
    return Headline(
        label=f"Weights stored as {types}",
        value=f"{good} of {count}",
        note=f"{other_kinds(coverage)} in all; inputs are not quantized",
        tone="ok" if not coverage.mismatches and good == count else "bad",
    )


def _quality_headline(quality: Quality, word: str) -> Headline:
    scores, base = quality.quantized, quality.fp
    note = f"{quality.images} images, {quality.steps} steps"
    if base.alignment is not None and scores.alignment is not None:
        note = f"alignment {base.alignment:.3f} → {scores.alignment:.3f}; {note}"
    if scores.share is not None:
        note = f"{number(scores.share.value)} of another seed's error; {note}"
    tone: Tone = "ok" if word == "kept" else "bad" if word == "not kept" else "plain"
    value = f"{scores.psnr_db:.1f} dB" if scores.psnr_db is not None else number(scores.mse)
    label = "PSNR to the FP images" if scores.psnr_db is not None else "MSE to the FP images"
    return Headline(label=label, value=value, note=note, tone=tone)


def _parity_headlines(parity: Parity, limit: float) -> list[Headline]:
    flips, sqnr = weakest(parity)
    made = []
    if flips is not None and sqnr is not None:
        which, worst = differing(flips)
        good = flips.weight_flip_rate == 0 and worst <= FLIP_LIMIT and sqnr.sqnr_db >= limit
        made.append(
            Headline(
                label=f"Differing {which}, worst layer",
                value=rate(worst),
                note=f"smallest layer SQNR {decibel(sqnr.sqnr_db)}, at least {limit:.0f} asked",
                tone="ok" if good else "bad",
            )
        )
    whole = parity.end_to_end
    margin = whole.sqnr_db - whole.noise_floor_db
    beside = "" if whole.sqnr_db >= IDENTICAL_DB else f"; this is {_compared(margin)}"
    made.append(
        Headline(
            label="End to end, one call",
            value=decibel(whole.sqnr_db),
            note=f"rounding alone gives {decibel(whole.noise_floor_db)}{beside}",
            tone="ok" if margin >= -FLOOR_MARGIN_DB else "bad",
        )
    )
    return made


def _compared(margin: float) -> str:
    if abs(margin) < 0.05:
        return "the same"
    return f"{abs(margin):.1f} dB {'better' if margin > 0 else 'worse'}"


def _engine_headline(engine: EngineFacts) -> Headline:
    compute = f"{compute_counts(engine)} convs and gemms"
    baseline = engine.kernels_fp_baseline
    plain = "" if baseline is None else f"; without quantization {baseline} kernels"
    return Headline(
        label="Kernels in the engine",
        value=str(engine.kernels),
        note=f"{compute}, {engine.attention_kernels} attention; {size(engine.bytes)}{plain}",
    )
