"""Thresholds of compiler parity, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qdexport.core.results import EndToEnd, LayerParity, Parity

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FLIP_LIMIT", "FLOOR_MARGIN_DB", "LAYER_SQNR_DB", "judge"]

# FP32: sums of products in another order cost some 1e-7 relative (130 dB); 100 dB leaves room for cancellation.
# FP16: every output is rounded to 11 bits (about 74 dB), operands of a per-step layer once more.
LAYER_SQNR_DB: Final = {"fp32": 100.0, "fp16": 60.0}
FLIP_LIMIT: Final = 1e-4
FLOOR_MARGIN_DB: Final = 1.0
_NAMED = 3


def judge(layers: Sequence[LayerParity], whole: EndToEnd, body: str, reference: str) -> Parity:
    """Holds measurements against the thresholds.

    Args:
        layers: one entry per quantized layer.
        whole: one denoiser call beside its noise floor.
        body: ``fp32`` or ``fp16``.
        reference: who computed the other side.

    Returns:
        The parity record; a failure's reasons name the worst layers.
    """
    least = LAYER_SQNR_DB[body]
    reasons = [
        *_worst([item for item in layers if item.weight_flip_rate > 0], "weight codes differ", "weight_flip_rate"),
        *_worst([item for item in layers if item.code_flip_rate > FLIP_LIMIT],
                f"more than {FLIP_LIMIT:g} of the integer codes differ", "code_flip_rate"),
        *_worst([item for item in layers if not item.sqnr_db >= least], f"output below {least:g} dB", "sqnr_db"),
    ]
    if not whole.sqnr_db >= whole.noise_floor_db - FLOOR_MARGIN_DB:
        reasons.append(
            f"end to end {whole.sqnr_db:.1f} dB, more than {FLOOR_MARGIN_DB:g} dB below the noise floor of "
            f"{whole.noise_floor_db:.1f} dB"
        )
    return Parity(
        reference=reference, layers=list(layers), end_to_end=whole, verdict="fail" if reasons else "pass", reasons=reasons
    )


def _worst(layers: Sequence[LayerParity], what: str, key: str) -> list[str]:
    if not layers:
        return []
    ordered = sorted(layers, key=lambda item: getattr(item, key), reverse=key != "sqnr_db")
    named = ", ".join(f"{item.name} ({getattr(item, key):.3g})" for item in ordered[:_NAMED])
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return [f"{len(ordered)} layers: {what}: {named}{more}"]
