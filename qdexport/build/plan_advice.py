"""What a plan's costs say about the recipe: sentences, each with the time that it is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from qdexport.build.plan_cost import KernelCost, PlanCost

__all__ = ["plan_advice"]

_NARROW = frozenset({"int8", "int4", "fp8", "nvfp4"})
_WEIGHTED = frozenset({"convolution", "product"})
_SHOWN = 3
_WORTH_SAYING = 0.01  # of the plan's seconds


_FLOATING = (
    "{count} convolutions and products with weights compute in floating point; quantize them (report.json, "
    "`coverage.why`, says why a layer was left out)"
)
_QUANTIZE = (
    "{count} kernels do nothing but quantize: what comes before them does not write codes itself; `qdexport compile "
    "--dump-passes DIR` shows the graph around them"
)
_WIDEN = (
    "{count} kernels widen stored weights in every call: fewer bytes on disk, not less time; 4-bit weights of INT8 "
    "products do without in INT8 (`int4_storage: never`), weight-only layers with quantized inputs"
)
_UNFUSED = (
    "{count} products of attention are kernels of their own; without softmax quantizers, and with an FP16 body, the "
    "builder fuses attention into one kernel"
)
_WIDE = "{count} pointwise kernels write FP32; `body: fp16` halves what they and their readers move"

_NORMS = (
    "{count} kernels are GroupNorms kept as an operator, each with a kernel that fills its sums with zeros; `qdexport "
    "search MODEL` builds the written-out forms and keeps what is cheaper (`qdexport compile --explain LAYER` says "
    "what each form of a norm costs)"
)
_MOVES = (
    "{count} kernels only copy or transpose; `qdexport search MODEL` compares the layouts of tokens (the copy behind "
    "fused attention of several images stays in all of them)"
)
# names of kernels: a GroupNorm operator, and one that computes nothing
_NORM_OPERATOR = re.compile(r"_*myl_\w*Gnor")
_MOVES_ONLY = re.compile(r"_*myl_(?:Move|Repl|Resh|Slic|Tran)+(?:Etc)?_")

_RULES: tuple[tuple[Callable[[KernelCost], bool], str], ...] = (
    (lambda kernel: kernel.role in _WEIGHTED and kernel.dtype not in _NARROW, _FLOATING),
    (lambda kernel: kernel.role == "quantize", _QUANTIZE),
    (lambda kernel: kernel.role == "widen", _WIDEN),
    (lambda kernel: kernel.role == "attention" and not kernel.fused, _UNFUSED),
    (lambda kernel: kernel.role == "pointwise" and kernel.dtype == "fp32", _WIDE),
    (lambda kernel: _NORM_OPERATOR.match(kernel.name) is not None, _NORMS),
    (lambda kernel: kernel.role != "widen" and _MOVES_ONLY.match(kernel.name) is not None, _MOVES),
)


def plan_advice(cost: PlanCost) -> list[str]:
    """What to change, most seconds first; nothing below a hundredth of the plan's time.

    Args:
        cost: of a plan on one GPU.
    """
    found = [(*_group(cost.kernels, rule), text) for rule, text in _RULES]
    found = [item for item in found if item[0] > _WORTH_SAYING * cost.seconds]
    found.sort(key=lambda item: -item[0])
    return [_sentence(seconds, cost.seconds, kernels, text) for seconds, kernels, text in found]


def _group(kernels: Sequence[KernelCost], rule: Callable[[KernelCost], bool]) -> tuple[float, list[KernelCost]]:
    chosen = sorted((kernel for kernel in kernels if rule(kernel)), key=lambda kernel: -kernel.seconds)
    return sum(kernel.seconds for kernel in chosen), chosen


def _sentence(seconds: float, whole: float, kernels: Sequence[KernelCost], text: str) -> str:
    names = [kernel.module for kernel in kernels if kernel.module]
    shown = list(dict.fromkeys(names))[:_SHOWN]
    where = f" (first: {', '.join(shown)})" if shown else ""
    return f"{seconds * 1e6:.3g} us, {100 * seconds / whole:.0f} %: {text.format(count=len(kernels))}{where}"
