"""Sums of integer products that a plan would store in FP16 before their scales are multiplied.

A product of codes is a whole number of up to ``K 127^2``; FP16 ends at 65,504. A kernel that multiplies one scale per
tensor inside stores a number of the layer's real size, but one scale per output channel is multiplied by a later
kernel, and what lies between holds the bare sum: with FP16 scales in the graph TensorRT-RTX makes that FP16, and it
overflows. qdexport writes FP32 scales, for which it is FP32; this looks whether it really is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdexport.build.plan import COMPUTE_KINDS, compute_precision, plan_tensors
from qdexport.core.layer_names import layers_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from qdexport.core.results import Plan

__all__ = ["half_precision_sums"]

_CODES = frozenset({"int8", "int4", "fp8"})
_HALVES = frozenset({"fp16", "bf16"})


def half_precision_sums(plan: Plan, per_channel: Collection[str]) -> list[str]:
    """One sentence per layer whose product of codes leaves its kernel in 16 bits although its scales come later.

    NVFP4 is not among them: its scales of blocks and of tensors are multiplied inside the product.

    Args:
        plan: the compiled plan.
        per_channel: layers, or parts of them, whose weight has a scale per output channel.
    """
    sentences = []
    for kernel in plan.kernels:
        if kernel.kind not in COMPUTE_KINDS or compute_precision(kernel) not in _CODES:
            continue
        if not {tensor.dtype for tensor in plan_tensors(kernel.outputs)} & _HALVES:
            continue
        products = [node.rpartition("/")[0] for node in kernel.nodes if node.endswith(("/MatMul", "/Gemm", "/Conv"))]
        layers = [layer for product in products for layer in layers_of(product)]
        sentences += [
            f"{layer}: its sums of products leave {kernel.name} in 16 bits before the scales per channel are "
            "multiplied, and overflow beyond 65,504"
            for layer in layers
            if layer in per_channel
        ]
    return sentences
