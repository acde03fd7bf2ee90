"""The two verdicts over a report: whether the network is compiled right, and whether its pictures are kept.

Both are read off the report alone, so that whoever holds one (the terminal, the page, an exit code) says the same. The
thresholds are those of :mod:`qdexport.check.verdict` for parity, and those that stand beside each number for pictures.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

from qdexport.core.results import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qdexport.core.results import Coverage, Margin, Quality, QualityScores, Report

__all__ = [
    "NARROW",
    "agrees",
    "beyond",
    "compiled_problems",
    "coverage_counts",
    "failed",
    "falls",
    "in_short",
    "narrow_name",
    "picture_problems",
    "storage_counts",
    "verdict_of",
]

NARROW: Final = frozenset({"int8", "int4", "fp8", "nvfp4"})
_IDENTICAL_DB: Final = 999.0
_NAMED: Final = 3
# fewer pictures have an interval so wide that its upper end says nothing; what lies above the limit whole still fails
_FEW: Final = 16


def verdict_of(report: Report) -> Verdict:
    """Both verdicts, each with what decided it in a sentence or more: first of the network, then of its pictures."""
    compiled, why_compiled = _compiled(report)
    pictures, why_pictures = _pictures(report)
    return Verdict(compiled=compiled, pictures=pictures, why=[*why_compiled, *why_pictures])


def in_short(report: Report) -> list[str]:
    """A sentence or two for each verdict: what decided it, and how much more is said elsewhere."""
    told = []
    for word, why in (_compiled(report), _pictures(report)):
        bad = word in {"fail", "not kept"} and len(why) > 1
        told.append(f"{why[0]} (and {len(why) - 1} more, below)" if bad else " ".join(why))
    return told


def failed(report: Report) -> bool:
    """Whether either verdict is a failure."""
    verdict = verdict_of(report)
    return verdict.compiled == "fail" or verdict.pictures == "not kept"


def compiled_problems(report: Report) -> list[str]:
    """Everything that says that the network is not compiled right.

    These are the reasons of the parity check, layers that are not as planned, quantized layers on which
    parity was not measured, and the same of the networks beside the denoiser.
    """
    found = []
    if report.parity is not None and report.parity.verdict == "fail":
        found.extend(report.parity.reasons or ["The parity check failed."])
    if report.coverage is not None:
        found.extend(report.coverage.mismatches or _unnamed_mismatches(report.coverage))
        found.extend(_unmeasured(report))
    return [*found, *_companion_problems(report)]


def picture_problems(report: Report) -> list[str]:
    """Everything that says that the pictures are not those of the floating-point model."""
    quality = report.quality
    if quality is None or quality.not_judged:
        return []
    few = _few(quality) > 0
    return [problem for name, scores in _columns(quality) for problem in _not_kept(name, scores, few=few)]


def agrees(planned: str, found: str) -> bool:
    """Whether a layer is as planned: INT4 weights may be computed in INT8, and FP layers may be anything."""
    return planned not in NARROW or found == planned or (planned, found) == ("int4", "int8")


def coverage_counts(coverage: Coverage) -> tuple[int, int, int | None]:
    """Layers planned in a narrow type, and how many of these are so in the ONNX file and in the engine."""
    narrow = [name for name, kind in coverage.planned.items() if kind in NARROW]
    onnx, engine = (
        sum(agrees(coverage.planned[name], column.get(name, "")) for name in narrow)
        for column in (coverage.onnx, coverage.engine)
    )
    return len(narrow), onnx, engine if coverage.engine else None


def storage_counts(coverage: Coverage) -> tuple[int, int, str]:
    """Layers whose weight alone is quantized, how many are stored as planned everywhere, and the types they have."""
    items = coverage.storage.values()
    good = sum(item.onnx == item.planned and item.engine in {None, item.planned} for item in items)
    return len(items), good, narrow_name(item.planned for item in items)


def narrow_name(kinds: Iterable[str]) -> str:
    """What to call a set of narrow types: ``INT8``, or ``INT8/INT4``."""
    return "/".join(sorted({kind.upper() for kind in kinds if kind in NARROW}, reverse=True)) or "INT8"


def _compiled(report: Report) -> tuple[Literal["pass", "fail", "not checked"], list[str]]:
    reasons = compiled_problems(report)
    if reasons:
        return "fail", reasons
    said = [_coverage_sentence(report.coverage)] if report.coverage else []
    if report.parity is None:
        return "not checked", [*said, "The integer codes were not compared: the check stage has not run."]
    layers = report.parity.layers
    worst = max((layer.code_flip_rate for layer in layers), default=0.0)
    least = min((layer.sqnr_db for layer in layers), default=_IDENTICAL_DB)
    codes = f"at most {worst:.1e} of a layer's activation codes differ" if worst else "every integer code agrees"
    reach = "" if least >= _IDENTICAL_DB else f"; the worst layer's output reaches {least:.1f} dB"
    return "pass", [*said, f"On identical inputs {codes}{reach}."]


def _pictures(report: Report) -> tuple[Literal["kept", "not kept", "not judged"], list[str]]:
    quality = report.quality
    if quality is None:
        why = "the check stage has not run" if report.parity is None else "the model came without a pipeline"
        return "not judged", [f"No pictures were compared: {why}."]
    if quality.not_judged:
        return "not judged", [quality.not_judged]
    if reasons := picture_problems(report):
        return "not kept", reasons
    share, few = quality.quantized.share, _few(quality)
    if share is None:
        return "not judged", ["This report holds no pictures of another seed to compare with; run `qdexport validate`."]
    told = (
        f"The pictures differ from those of the floating-point model by {_said(share)} of what another seed makes; "
        f"at most {share.limit:.3g} is asked."
    )
    if few and not share.high <= share.limit:
        return "not judged", [f"{told} {few} pictures are too few to tell."]
    fall, texture, contrast = (getattr(quality.quantized, key) for key in ("alignment_fall", "texture", "contrast"))
    if texture is not None:
        told += f" Neighbouring pixels differ {_said(texture)} times as much; below {texture.limit:.3g} is asked."
    if contrast is not None:
        told += f" Contrast is {_said(contrast)} times theirs; above {1 / contrast.limit:.3g} is asked."
    return "kept", [told if fall is None else f"{told} Alignment falls by {_said(fall)}."]


def _columns(quality: Quality) -> Iterator[tuple[str, QualityScores]]:
    yield "the quantized model", quality.quantized
    if quality.onnx is not None:
        yield "the ONNX file", quality.onnx


def _few(quality: Quality) -> int:
    """How many pictures there are of another seed, where these are too few to decide what is near a limit."""
    count = (quality.other_seed and quality.other_seed.images) or 0
    return count if count < _FEW else 0


def _not_kept(name: str, scores: QualityScores, *, few: bool) -> Iterator[str]:
    if scores.not_finite:
        yield f"{scores.not_finite} pictures of {name} hold values that are not finite."
    share = scores.share
    if share is not None and not (share.low if few else share.high) <= share.limit:  # written so that a NaN fails
        yield (
            f"The pictures of {name} are not those of the floating-point model: they differ from them by "
            f"{_said(share)} of what another seed makes; at most {share.limit:.3g} is asked."
        )
    texture, contrast = scores.texture, scores.contrast
    if texture is not None and beyond(texture, few=few):
        yield (
            f"The pictures of {name} are {'noisier' if texture.value > 1 else 'smoother'} than those of the "
            f"floating-point model: neighbouring pixels differ {_said(texture)} times as much; {_between(texture)}."
        )
    if contrast is not None and beyond(contrast, few=few):
        yield (
            f"The pictures of {name} have {'more' if contrast.value > 1 else 'less'} contrast than those of the "
            f"floating-point model, {_said(contrast)} times theirs; {_between(contrast)}."
        )
    fall = scores.alignment_fall
    if fall is not None and falls(fall):
        yield (
            f"The pictures of {name} show less of their prompts: alignment falls by {_said(fall)}, "
            f"less than {fall.limit:.3g} is asked."
        )


def falls(fall: Margin) -> bool:
    """Whether alignment falls by the limit or more, and not by chance: the interval lies above half of the limit."""
    return fall.low > fall.limit / 2 and not fall.value < fall.limit


def beyond(factor: Margin, *, few: bool = False) -> bool:
    """Whether texture or contrast changes by the limit or more, and not by chance.

    The near end of the interval lies beyond half of the limit; of few pictures, whose texture is far off by chance
    alone, beyond all of it.
    """
    value, near = abs(math.log(factor.value)), factor.low if factor.value > 1 else 1 / factor.high
    allowed = math.log(factor.limit)
    return not value < allowed and math.log(max(near, 1e-300)) > (allowed if few else allowed / 2)


def _between(factor: Margin) -> str:
    return f"between {1 / factor.limit:.3g} and {factor.limit:.3g} is asked"


def _said(margin: Margin) -> str:
    return f"{margin.value:.3g} ({margin.low:.3g} to {margin.high:.3g})"


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


def _unmeasured(report: Report) -> list[str]:
    coverage = report.coverage
    if coverage is None or report.parity is None:
        return []
    measured = {layer.name for layer in report.parity.layers}
    missed = [
        name
        for name, kind in coverage.planned.items()
        if (kind in NARROW or name in coverage.storage)
        and name not in measured and name.partition("#")[0] not in measured
    ]  # fmt: skip
    if not missed:
        return []
    return [f"parity was not measured on {len(missed)} quantized layers: {', '.join(missed[:_NAMED])}"]


def _unnamed_mismatches(coverage: Coverage) -> list[str]:
    """Counts layers not as planned when the report does not name them; an empty column is not made."""
    planned, onnx, engine = coverage_counts(coverage)
    found = []
    if coverage.onnx and onnx < planned:
        found.append(f"{planned - onnx} of {planned} layers are not in the planned type in the ONNX file")
    if engine is not None and engine < planned:
        found.append(f"{planned - engine} of {planned} layers are not in the planned type in the compiled plan")
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
