"""Compares three tables: compute types planned, found in the ONNX file, and found in the compiled plan."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["audit"]

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


def _fits(planned: str, found: str) -> bool:
    if planned in _NARROW:
        return found == planned or (planned == "int4" and found == "int8")
    if planned == "folded":
        return found in _FOLDED
    return found not in _NARROW
