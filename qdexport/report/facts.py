"""What a report says in a few words: verdict, headline numbers, problems; for the page and the terminal."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qdexport.core.results import Coverage, EngineFacts, LayerParity, Parity, Quality, Report

__all__ = [
    "FLOOR_SLACK_DB",
    "IDENTICAL_DB",
    "MAX_CODE_FLIP_RATE",
    "MIN_LAYER_SQNR_DB",
    "NARROW",
    "RTX_CAVEAT",
    "Headline",
    "Tone",
    "Verdict",
    "agrees",
    "compute_counts",
    "coverage_counts",
    "decibel",
    "duration",
    "exact_layers",
    "headlines",
    "label_of",
    "narrow_name",
    "number",
    "other_kinds",
    "problems",
    "rate",
    "size",
    "sqnr_limit",
    "storage_counts",
    "verdict",
    "weakest",
]

Tone = Literal["ok", "bad", "plain"]

NARROW = frozenset({"int8", "int4", "fp8", "nvfp4"})
# a layer whose codes agree differs by rounding only: one to FP32 leaves about 150 dB, one to FP16 about 73 dB
MIN_LAYER_SQNR_DB = {"fp32": 100.0, "fp16": 60.0}
MAX_CODE_FLIP_RATE = 1e-4
FLOOR_SLACK_DB = 1.0
IDENTICAL_DB = 999.0

RTX_CAVEAT = (
    "An INT8 kernel in a TensorRT-RTX plan is no proof of speed. NVIDIA's support matrices for TensorRT-RTX "
    "promise INT8 only as weight-only quantization; W8A8 builds, and the plan holds INT8 kernels, but what "
    "they become is decided on the device. Where W8A8 has to be fast, build with full TensorRT "
    "(--target tensorrt) and measure there."
)

_LABELS = {"fp": "FP", "quantized": "Quantized", "onnx": "ONNX Runtime", "engine": "Engine"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One of the numbers that matter, with a sentence under it."""

    label: str
    value: str
    note: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome in one word, and why in a sentence or two."""

    word: Literal["pass", "fail", "not checked"]
    sentence: str


def verdict(report: Report) -> Verdict:
    """Judges a report: it fails when parity fails or a layer is not what was planned."""
    reasons = problems(report)
    if reasons:
        more = f" (and {len(reasons) - 1} more, below)" if len(reasons) > 1 else ""
        return Verdict(word="fail", sentence=reasons[0] + more)
    said = [_coverage_sentence(report.coverage)] if report.coverage else []
    if report.parity is None:
        said.append("The integer codes were not compared: the check stage has not run.")
        return Verdict(word="not checked", sentence=" ".join(said))
    flips, sqnr = weakest(report.parity)
    worst = flips.code_flip_rate if flips else 0.0
    codes = f"at most {rate(worst)} of a layer's activation codes differ" if worst else "every integer code agrees"
    reach = f"; the worst layer's output reaches {decibel(sqnr.sqnr_db)}" if sqnr else ""
    said.append(f"On identical inputs {codes}{reach}.")
    return Verdict(word="pass", sentence=" ".join(said))


def problems(report: Report) -> list[str]:
    """Everything that makes a report fail.

    These are the reasons of the parity check, layers that are not as planned, and quantized layers on which
    parity was not measured.
    """
    found = []
    if report.parity is not None and report.parity.verdict == "fail":
        found.extend(report.parity.reasons or ["The parity check failed."])
    if report.coverage is not None:
        found.extend(report.coverage.mismatches or _unnamed_mismatches(report.coverage))
    if report.coverage is not None and report.parity is not None:
        measured = {layer.name for layer in report.parity.layers}
        missed = [
            name
            for name, kind in report.coverage.planned.items()
            if (kind in NARROW or name in report.coverage.storage)
            and name not in measured and name.partition("#")[0] not in measured
        ]
        if missed:
            found.append(
                f"parity was not measured on {len(missed)} quantized layers: {', '.join(missed[:3])}"
            )
    return found + _companion_problems(report)


def agrees(planned: str, found: str) -> bool:
    """Whether a layer is as planned: INT4 weights may be computed in INT8, and FP layers may be anything."""
    return planned not in NARROW or found == planned or (planned, found) == ("int4", "int8")


def headlines(report: Report) -> list[Headline]:
    """The numbers that matter, at most five, of the stages that ran."""
    made = []
    if report.coverage is not None:
        if any(kind in NARROW for kind in report.coverage.planned.values()) or not report.coverage.storage:
            made.append(_coverage_headline(report.coverage))
        else:
            made.append(_storage_headline(report.coverage))
    if report.quality is not None:
        made.append(_quality_headline(report.quality))
    if report.parity is not None:
        made.extend(_parity_headlines(report.parity, sqnr_limit(report)))
    if report.engine is not None:
        made.append(_engine_headline(report.engine))
    return made


def coverage_counts(coverage: Coverage) -> tuple[int, int, int | None]:
    """Layers planned in a narrow type, and how many of these are so in the ONNX file and in the engine."""
    narrow = [name for name, kind in coverage.planned.items() if kind in NARROW]
    onnx, engine = (
        sum(agrees(coverage.planned[name], column.get(name, "")) for name in narrow)
        for column in (coverage.onnx, coverage.engine)
    )
    return len(narrow), onnx, engine if coverage.engine else None


def compute_counts(engine: EngineFacts) -> str:
    """How many convolutions and products compute in what: ``82 INT8 and 0 FP``, FP8 and NVFP4 where there are any."""
    narrow = [f"{engine.int8_compute} INT8"]
    narrow += [f"{engine.fp8_compute} FP8"] if engine.fp8_compute else []
    narrow += [f"{engine.nvfp4_compute} NVFP4"] if engine.nvfp4_compute else []
    return f"{', '.join(narrow)} and {engine.fp_compute} FP"


def storage_counts(coverage: Coverage) -> tuple[int, int, str]:
    """Layers whose weight alone is quantized, how many are stored as planned everywhere, and the types they have."""
    items = coverage.storage.values()
    good = sum(item.onnx == item.planned and item.engine in {None, item.planned} for item in items)
    return len(items), good, narrow_name(item.planned for item in items)


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
    return MIN_LAYER_SQNR_DB.get(report.body, MIN_LAYER_SQNR_DB["fp32"])


def label_of(column: str) -> str:
    """The heading of an image column."""
    return _LABELS.get(column, column)


def narrow_name(kinds: Iterable[str]) -> str:
    """What to call a set of narrow types: ``INT8``, or ``INT8/INT4``."""
    return "/".join(sorted({kind.upper() for kind in kinds if kind in NARROW}, reverse=True)) or "INT8"


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


def _unnamed_mismatches(coverage: Coverage) -> list[str]:
    """Counts layers not as planned when the report does not name them; an empty column is not made."""
    planned, onnx, engine = coverage_counts(coverage)
    found = []
    if coverage.onnx and onnx < planned:
        found.append(f"{planned - onnx} of {planned} layers are not in the planned type in the ONNX file")
    if engine is not None and engine < planned:
        found.append(
            f"{planned - engine} of {planned} layers are not in the planned type in the compiled plan"
        )
    return found


def _companion_problems(report: Report) -> list[str]:
    found: list[str] = []
    for name, result in (report.companions or {}).items():
        found.extend(f"{name}: {item}" for item in result.mismatches)
        if result.parity is not None and result.parity.verdict == "fail":
            found.extend(result.parity.reasons or [f"{name}: the parity check failed"])
    if report.whole_pipeline is not None and report.whole_pipeline.verdict == "fail":
        found.extend(report.whole_pipeline.reasons or ["the images of the whole pipeline differ"])
    return found


def _coverage_sentence(coverage: Coverage) -> str:
    planned, _, engine = coverage_counts(coverage)
    kinds = narrow_name(coverage.planned.values())
    if coverage.storage and not planned:
        count, _, types = storage_counts(coverage)
        body = next(coverage.planned[name] for name in coverage.storage)
        return f"The weights of all {count} layers are stored as {types}; their products are computed in {body}."
    if not coverage.onnx:
        return f"{planned} layers are planned in {kinds}; no ONNX file was made."
    where = "in the ONNX file" if engine is None else "in the ONNX file and in the compiled plan"
    return f"All {planned} layers planned in {kinds} are {kinds} {where}."


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


def _quality_headline(quality: Quality) -> Headline:
    scores, base = quality.quantized, quality.fp
    note = f"{quality.images} images, {quality.steps} steps"
    if base.alignment is not None and scores.alignment is not None:
        note = f"alignment {base.alignment:.3f} → {scores.alignment:.3f}; {note}"
    value = f"{scores.psnr_db:.1f} dB" if scores.psnr_db is not None else number(scores.mse)
    label = "PSNR to the FP images" if scores.psnr_db is not None else "MSE to the FP images"
    return Headline(label=label, value=value, note=note)


def _parity_headlines(parity: Parity, limit: float) -> list[Headline]:
    flips, sqnr = weakest(parity)
    made = []
    if flips is not None and sqnr is not None:
        which, worst = differing(flips)
        good = flips.weight_flip_rate == 0 and worst <= MAX_CODE_FLIP_RATE and sqnr.sqnr_db >= limit
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
            tone="ok" if margin >= -FLOOR_SLACK_DB else "bad",
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
