"""In which type the compiled plan stores the weights of layers whose weight alone is quantized."""

from __future__ import annotations

from collections.abc import Container, Mapping
from math import prod

from qdexport.build.plan import PlanTensor, frozen_tensors, plan_tensors
from qdexport.core.layer_names import node_names
from qdexport.core.results import KernelFact, Plan, WeightStorage

__all__ = ["engine_weight_types", "storage_mismatches"]

_NODES = ("Conv", "MatMul", "Gemm")
_NARROW = frozenset({"int8", "int4", "fp8", "nvfp4", "fp4"})


def engine_weight_types(plan: Plan, weights: Mapping[str, int]) -> dict[str, str]:
    """The type of the constant that holds each weight in the plan.

    A builder reads a narrow weight in the kernel that multiplies, or in one that widens it for every call. One that
    had widened it at build time would have a floating-point constant of the same size there: four times the bytes, and
    nothing won.

    Args:
        plan: the plan.
        weights: elements of the weight by layer.

    Returns:
        ``int4``, ``int8``, ``fp16`` and so on; ``missing`` where no kernel of the layer has a constant of its size.
    """
    by_node: dict[str, list[KernelFact]] = {}
    for kernel in plan.kernels:
        for name in (name for node in kernel.nodes for name in node_names(node)):
            by_node.setdefault(name, []).append(kernel)
    makers = _makers(plan)
    found = {}
    for layer, size in weights.items():
        kernels = [kernel for name in sorted(_names(layer)) for kernel in by_node.get(name, ())]
        tensors = [tensor for kernel in kernels for tensor in _constants(kernel, makers)]
        named = _named(kernels)
        needed = sum(other for name, other in weights.items() if other >= size and _holders(name, by_node) & named)
        found[layer] = "+".join(sorted(_types(tensors, size, needed))) or "missing"
    return found


def _names(layer: str) -> set[str]:
    return {f"{layer}.weight_quantizer/DequantizeLinear", *(f"{layer}/{op}" for op in _NODES)}


def _holders(layer: str, known: Container[str]) -> set[str]:
    """Names of the kernels that read a layer's codes: its DequantizeLinear, its product where that is in no kernel."""
    widened = f"{layer}.weight_quantizer/DequantizeLinear"
    return {widened} if widened in known else _names(layer)


def _named(kernels: list[KernelFact]) -> set[str]:
    return {name for kernel in kernels for node in kernel.nodes for name in node_names(node)}


def _types(constants: list[PlanTensor], size: int, needed: int) -> set[str]:
    """Types of the constants that have room for a weight: the narrow ones alone, where these have room for the weights
    of all layers of the kernels that are as large. Scales and tables (class embeddings) may be as large as a weight.
    """
    tensors = {tensor.name: tensor for tensor in constants if prod(tensor.dims) >= size}.values()
    narrow = [tensor for tensor in tensors if tensor.dtype in _NARROW]
    enough = narrow and sum(prod(tensor.dims) for tensor in narrow) >= needed
    return {tensor.dtype for tensor in (narrow if enough else tensors)}


def _makers(plan: Plan) -> dict[str, KernelFact]:
    """The kernels that make tensors of constants alone, by the tensor's name: they name no layer where the builder has
    merged several.
    """
    frozen = frozen_tensors(plan.kernels)
    return {
        tensor.name: kernel
        for kernel in plan.kernels
        for tensor in plan_tensors(kernel.outputs)
        if tensor.name in frozen
    }


def _constants(kernel: KernelFact, makers: Mapping[str, KernelFact]) -> list[PlanTensor]:
    """The constants that a kernel reads, itself or through kernels that read nothing else."""
    constants, waiting, seen = [], [kernel], set()
    while waiting:
        one = waiting.pop()
        for tensor in plan_tensors(one.inputs):
            if tensor.constant:
                constants.append(tensor)
            elif tensor.name in makers and tensor.name not in seen:
                seen.add(tensor.name)
                waiting.append(makers[tensor.name])
    return constants


def storage_mismatches(storage: Mapping[str, WeightStorage]) -> list[str]:
    """One sentence per layer whose weight is not stored as planned; empty when all are."""
    mismatches = []
    for layer, found in storage.items():
        if found.onnx == found.planned and found.engine in {None, found.planned}:
            continue
        sentence = f"{layer}: weight planned as {found.planned}, stored as {found.onnx} in the ONNX file"
        mismatches.append(sentence if found.engine is None else f"{sentence}, as {found.engine} in the engine")
    return mismatches
