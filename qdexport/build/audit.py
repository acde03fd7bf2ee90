"""Compares three tables: compute types planned, found in the ONNX file, and found in the compiled plan."""

from __future__ import annotations

from collections.abc import Mapping

from qdexport.build.plan import COMPUTE_KINDS, compute_precision, is_fused_attention
from qdexport.core.results import Plan

__all__ = ["audit", "floating_mismatches"]

_NARROW = frozenset({"int8", "int4", "fp8", "nvfp4"})
_FOLDED = frozenset({"folded", "missing"})


def audit(planned: Mapping[str, str], onnx: Mapping[str, str], engine: Mapping[str, str] | None) -> list[str]:
    """Finds the layers that are not what was planned.

    A layer planned in a narrow type must have it everywhere; INT4 weights may compute as INT8. A folded layer
    must be gone. A layer planned in floating point must not have become narrow; which floating-point type it
    has, and whether the builder merged it away, is not compared.

    Args:
        planned: compute type per layer or part of a layer (``name#0``).
        onnx: the same, read from the ONNX file.
        engine: the same, read from the kernel plan; None when no engine was built.

    Returns:
        One sentence per layer that differs, in the order of ``planned``; empty when all agree.
    """
    mismatches = []
    for layer, plan in planned.items():
        in_onnx = onnx.get(layer, "missing")
        in_engine = None if engine is None else engine.get(layer, "missing")
        if _fits(plan, in_onnx) and (in_engine is None or _fits(plan, in_engine)):
            continue
        sentence = f"{layer}: planned {plan}, {in_onnx} in the ONNX file"
        mismatches.append(sentence if in_engine is None else f"{sentence}, {in_engine} in the engine")
    return mismatches


def floating_mismatches(
    body: str,
    onnx: Mapping[str, str],
    engine: Mapping[str, str] | None,
    plan: Plan | None,
    planned: Mapping[str, str] | None = None,
) -> list[str]:
    """Finds what does not compute in the type of a floating-point network.

    Args:
        body: ``fp16`` or ``fp32``.
        onnx: type of the weight of each layer in the ONNX file.
        engine: compute type of each layer in the kernel plan; ``missing`` for one that became part of something else
            (a constant), which is no mismatch.
        plan: the kernel plan, for products without weights (attention); None when no engine was built.
        planned: type of each layer, where some have another one than the body.

    Returns:
        One sentence per layer or kernel that differs.
    """
    planned = dict.fromkeys(onnx, body) if planned is None else planned
    found = [
        f"{layer}: planned {planned[layer]}, {kind} in the ONNX file"
        for layer, kind in onnx.items()
        if kind != planned[layer]
    ]
    found += [
        f"{layer}: planned {planned[layer]}, {kind} in the engine"
        for layer, kind in (engine or {}).items()
        if kind not in {planned[layer], "missing"}
    ]
    if plan is not None:
        named = set(onnx)
        for kernel in plan.kernels:
            matrix = kernel.kind in COMPUTE_KINDS or is_fused_attention(kernel)
            if matrix and not named & set(kernel.modules) and (kind := compute_precision(kernel)) != body:
                found.append(f"kernel {kernel.index} {kernel.name}: planned {body}, {kind} in the engine")
    return found


def _fits(planned: str, found: str) -> bool:
    if planned in _NARROW:
        return found == planned or (planned == "int4" and found == "int8")
    if planned == "folded":
        return found in _FOLDED
    return found not in _NARROW
