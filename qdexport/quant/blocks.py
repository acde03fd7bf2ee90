"""Which blocks of the input dimension of a layer share a scale."""

from __future__ import annotations

from dataclasses import replace

from qdexport.core.spec import BLOCK_SIZES, NVFP4_BLOCK, Granularity, LayerPlan, QuantSpec
from qdexport.errors import RecipeError

__all__ = ["check_blocks", "weight_only_plan"]


def weight_only_plan(plan: LayerPlan, weight: QuantSpec | None, width: int) -> LayerPlan:
    """The plan of a layer whose weight alone is quantized.

    A linear layer whose input width is no multiple of the rule's block takes the next smaller block that divides it
    (of 128, 64, 32 and 16), or one scale per output channel when none does; ``why`` says so.

    Args:
        plan: without quantizers yet.
        weight: the rule's quantizer.
        width: input channels of the layer.

    Raises:
        RecipeError: the layer is a convolution and the rule has blocks.
    """
    if weight is None or weight.block_size is None:
        return replace(plan, weight=weight)
    if plan.kind == "conv":
        raise RecipeError(
            f"{plan.why}: layer {plan.name} is a convolution, and no target takes its weight in blocks; give "
            "convolutions a rule of their own (kinds: [conv]) with granularity: per_channel"
        )
    if width % weight.block_size == 0:
        return replace(plan, weight=weight)
    size = next((size for size in BLOCK_SIZES if size < weight.block_size and width % size == 0), None)
    changes = {"block_size": size} if size else {"block_size": None, "granularity": Granularity.PER_CHANNEL}
    instead = f"blocks of {size}" if size else "one scale per output channel"
    why = f"{plan.why}; {instead}, since {weight.block_size} does not divide {width}"
    return replace(plan, weight=weight.model_copy(update=changes), why=why)


def check_blocks(plan: LayerPlan, weight: QuantSpec | None, width: int) -> None:
    """Refuses NVFP4 for layers that have no blocks of 16 along the input dimension.

    Raises:
        RecipeError: the layer is a convolution, or its input width is no multiple of 16.
    """
    if weight is None or weight.format != "nvfp4":
        return
    if plan.kind == "conv":
        reason = "a convolution, and NVFP4 is a format of linear layers"
    elif width % NVFP4_BLOCK:
        reason = f"{width} inputs wide, no multiple of {NVFP4_BLOCK}, the block of NVFP4"
    else:
        return
    raise RecipeError(
        f"{plan.why}: layer {plan.name} is {reason}; give it a rule of its own with format: fp8, or int with 8 bits"
    )
