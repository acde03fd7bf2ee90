"""Thresholds of compiler and engine parity, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from qdexport.core.results import EndToEnd, Float64Parity, LayerParity, Parity, ShapeParity

__all__ = [
    "FLIP_LIMIT",
    "FLOOR_MARGIN_DB",
    "LAYER_SQNR_DB",
    "engine_problems",
    "float64_problems",
    "judge",
    "layer_problems",
    "shape_problems",
]

# FP32: sums of products in another order cost some 1e-7 relative (130 dB); 100 dB leaves room for cancellation.
# FP16: every output is rounded to 11 bits (about 74 dB), operands of a per-step layer once more.
LAYER_SQNR_DB: Final = {"fp32": 100.0, "fp16": 60.0}
FLIP_LIMIT: Final = 1e-4
FLOOR_MARGIN_DB: Final = 1.0
# ONNX Runtime's answers are rounded as the engine's are: two errors of equal size are 3 dB
_TWO_ERRORS_DB: Final = 3.0
_NAMED: Final = 3
_SHOWN: Final = 6


def judge(  # noqa: PLR0913  everything that was measured
    layers: Sequence[LayerParity],
    whole: EndToEnd,
    body: str,
    reference: str,
    shapes: Sequence[ShapeParity] = (),
    float64: Float64Parity | None = None,
    pictures: Sequence[str] = (),
) -> Parity:
    """Holds measurements against the thresholds.

    Args:
        layers: one entry per quantized layer.
        whole: the whole network beside its noise floor; information, which decides nothing.
        body: ``fp32`` or ``fp16``.
        reference: who computed the other side.
        shapes: the ends of the optimization profiles of a network with dynamic dimensions.
        float64: tables, constants and whole calls without any rounding.
        pictures: what is wrong with the file's pictures (:func:`qdexport.check.file_pictures.picture_problems`).

    Returns:
        The parity record; a failure's reasons name the worst layers.
    """
    reasons = layer_problems(layers, body)
    if float64 is not None:
        reasons += float64_problems(float64)
    for shape in shapes:
        reasons += shape_problems(shape)
    reasons += pictures
    return Parity(
        reference=reference,
        layers=list(layers),
        end_to_end=whole,
        float64=float64,
        shapes=list(shapes),
        verdict="fail" if reasons else "pass",
        reasons=reasons,
    )


def layer_problems(layers: Sequence[LayerParity], body: str) -> list[str]:
    """What is wrong with the layers, one sentence per kind of failure; nothing when each is within the thresholds."""
    if not layers:
        return ["no layer was compared"]
    least = LAYER_SQNR_DB[body]
    weights = [item for item in layers if item.weight_flip_rate > 0]
    flips = [item for item in layers if item.code_flip_rate > FLIP_LIMIT]
    # written so that a NaN fails
    noisy = [item for item in layers if not item.sqnr_db >= least]
    beyond = [item for item in layers if item.beyond_fp16 is not None]
    overflow = _worst(beyond, "numbers beyond 65504, the largest of FP16, overflow the FP16 body", "beyond_fp16")
    return [
        *(f"{sentence}; compile with --body fp32" for sentence in overflow),
        *_worst(weights, "integer weights differ", "weight_flip_rate"),
        *_worst(flips, f"more than {FLIP_LIMIT:g} of the activation codes differ", "code_flip_rate"),
        *_worst(noisy, f"the output is below {least:g} dB", "sqnr_db"),
    ]


def float64_problems(found: Float64Parity) -> list[str]:
    """What differs in float64, the first places in the order of execution; what follows from them is counted."""
    shown = found.problems[:_SHOWN]
    more = len(found.problems) - len(shown)
    return [*shown, *([f"and {more} more differences in float64"] if more else [])]


def shape_problems(shape: ShapeParity) -> list[str]:
    """What is wrong with the layers at one shape."""
    sizes = ", ".join(f"{name} {size}" for name, size in shape.sizes.items())
    where = f"at {sizes} (profile {shape.profile}, {shape.end})"
    return [f"{where}: {problem}" for problem in shape.problems]


def engine_problems(sqnr_db: Sequence[float], noise_floor_db: float) -> list[str]:
    """What is wrong with an engine's answers to the golden calls; nothing for a right engine.

    Args:
        sqnr_db: per golden call, engine against ONNX Runtime (:func:`qdexport.check.engine_parity.engine_parity`).
        noise_floor_db: the network's, from the report.
    """
    least = noise_floor_db - FLOOR_MARGIN_DB - _TWO_ERRORS_DB
    middle = statistics.median(sqnr_db)
    if middle >= least:
        return []
    reason = (
        f"the engine agrees with the golden outputs to {middle:.1f} dB only, less than {least:.1f} dB: the noise "
        f"floor of {noise_floor_db:.1f} dB, less {noise_floor_db - least:g} dB for two rounded sides"
    )
    return [reason]


def _worst(layers: Sequence[LayerParity], what: str, key: str) -> list[str]:
    if not layers:
        return []
    ordered = sorted(layers, key=lambda item: getattr(item, key), reverse=key != "sqnr_db")
    named = ", ".join(f"{item.name} ({getattr(item, key):.3g})" for item in ordered[:_NAMED])
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return [f"{what} in {len(ordered)} {'layer' if len(ordered) == 1 else 'layers'}: {named}{more}"]
