"""What each kernel of a plan moves and computes, and what that must cost on a GPU: a roofline, without the GPU.

A kernel takes the longer of two times: its matrix operations at the peak rate of their type, and the bytes of its
operands at the peak bandwidth of the memory. A bound, not a measurement: real kernels reach less than either peak,
launching one takes some microseconds, and a cache that still holds an operand saves its bytes. So it ranks kernels and
plans; it does not predict a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import TYPE_CHECKING, Literal

from qdexport.build.plan import (
    COMPUTE_KINDS,
    PlanTensor,
    compute_precision,
    frozen_tensors,
    is_fused_attention,
    plan_tensors,
    quantizes_only,
    weight_order,
)
from qdexport.core.precision import BYTES
from qdexport.errors import BuildError

if TYPE_CHECKING:
    from qdexport.core.gpus import Gpu
    from qdexport.core.results import KernelFact, Plan

__all__ = ["KernelCost", "KernelRole", "PlanCost", "plan_cost"]

KernelRole = Literal["convolution", "product", "attention", "quantize", "widen", "pointwise", "copy"]

_CONVOLUTIONS = frozenset({"correlation", "deconv", "CaskConvolution", "CaskConvActPool", "CaskDeconvolution"})
_COPIES = frozenset({"copy", "memset"})
_NO_KERNELS = frozenset({"signal", "wait", "cjmp"})
_NARROW_WEIGHTS = frozenset({"int4", "nvfp4", "int8", "fp8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """One kernel on one GPU.

    Attributes:
        index: of the kernel in the plan.
        name: the builder's.
        role: what it does; ``quantize`` does nothing but quantize, ``widen`` turns stored weights into wider ones.
        dtype: type that a matrix kernel multiplies in, else that of its largest output.
        weight_bytes: of its constants.
        activation_bytes: of everything else that it reads and writes.
        operations: of matrix products and convolutions (a multiply-accumulate is two); 0 for other kernels.
        compute_seconds: operations at the peak rate of the type.
        memory_seconds: bytes at the peak bandwidth.
        ideal_seconds: what the same product must cost when it reads and writes codes of one byte and multiplies INT8
            (fused attention: two bytes, FP16); 0 for kernels that a better plan could do without.
        fused: whether it is attention in one kernel.
        modules: torch modules that it came from.
    """

    index: int
    name: str
    role: KernelRole
    dtype: str
    weight_bytes: float
    activation_bytes: float
    operations: float
    compute_seconds: float
    memory_seconds: float
    ideal_seconds: float
    fused: bool
    modules: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The roofline: the longer of the two times."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def module(self) -> str:
        """The torch module to name it by: a layer or block rather than a quantizer; empty when none is known."""
        layers = [module for module in self.modules if module and "_quantizer" not in module]
        return next(iter(layers or self.modules), "")

    @property
    def bytes(self) -> float:
        """All bytes moved."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """All kernels of a plan on one GPU."""

    gpu: Gpu
    kernels: tuple[KernelCost, ...]

    @property
    def seconds(self) -> float:
        """The sum over the kernels: one denoiser call, without launches."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def weight_bytes(self) -> float:
        """Bytes of constants that all kernels read."""
        return sum(kernel.weight_bytes for kernel in self.kernels)

    @property
    def activation_bytes(self) -> float:
        """Bytes of activations that all kernels read and write."""
        return sum(kernel.activation_bytes for kernel in self.kernels)

    @property
    def ideal_seconds(self) -> float:
        """The sum of what the matrix kernels must cost at INT8 with everything else fused into them."""
        return sum(kernel.ideal_seconds for kernel in self.kernels)

    def seconds_by_role(self) -> dict[KernelRole, float]:
        """Sums by role, the largest first."""
        sums: dict[KernelRole, float] = {}
        for kernel in self.kernels:
            sums[kernel.role] = sums.get(kernel.role, 0.0) + kernel.seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def share(self, roles: Sequence[KernelRole]) -> float:
        """Share of the seconds that kernels of some roles take, 0 to 1."""
        spent = sum(kernel.seconds for kernel in self.kernels if kernel.role in roles)
        return spent / self.seconds if self.seconds else 0.0


def plan_cost(plan: Plan, gpu: Gpu) -> PlanCost:
    """Costs of every kernel of a plan.

    Raises:
        BuildError: a tensor of the plan has a type of unknown size, or a dimension that is known only at run time.
        RecipeError: a kernel multiplies in a type that the GPU does not have.
    """
    kernels = [kernel for kernel in plan.kernels if kernel.kind not in _NO_KERNELS]
    frozen = frozen_tensors(kernels)
    return PlanCost(gpu=gpu, kernels=tuple(_kernel_cost(kernel, gpu, frozen) for kernel in kernels))


def _kernel_cost(kernel: KernelFact, gpu: Gpu, frozen: set[str]) -> KernelCost:
    try:
        return _cost_of(kernel, gpu, frozen)
    except (IndexError, ValueError, StopIteration, ArithmeticError) as error:
        raise BuildError(
            f"kernel {kernel.name!r} of the plan has tensors that a {kernel.kind} cannot have (inputs "
            f"{', '.join(kernel.inputs) or 'none'}); build the engine again"
        ) from error


def _cost_of(kernel: KernelFact, gpu: Gpu, frozen: set[str]) -> KernelCost:
    fused = is_fused_attention(kernel)
    inputs = _distinct(plan_tensors(kernel.inputs), frozen, fused=fused)
    outputs = _distinct(plan_tensors(kernel.outputs), frozen, fused=fused)
    role = _role(kernel, inputs, outputs)
    operations = _operations(kernel, role, inputs, outputs)
    matrix = role in {"convolution", "product", "attention"}
    dtype = compute_precision(kernel) if matrix else max(outputs, key=_bytes).dtype if outputs else ""
    weights = sum(_bytes(tensor) for tensor in (*inputs, *outputs) if tensor.constant)
    moved = sum(_bytes(tensor) for tensor in (*inputs, *outputs))
    return KernelCost(
        index=kernel.index,
        name=kernel.name,
        role=role,
        dtype=dtype,
        weight_bytes=weights,
        activation_bytes=moved - weights,
        operations=operations,
        compute_seconds=operations / gpu.rate(dtype) if operations else 0.0,
        memory_seconds=moved / gpu.bandwidth,
        ideal_seconds=_ideal_seconds(role, operations, (*inputs, *outputs), gpu) if matrix else 0.0,
        fused=fused,
        modules=tuple(kernel.modules),
    )


def _ideal_seconds(role: KernelRole, operations: float, tensors: Sequence[PlanTensor], gpu: Gpu) -> float:
    size, rate = (2.0, gpu.fp16) if role == "attention" else (1.0, gpu.int8)
    moved = sum(min(_bytes(tensor), size * prod(tensor.dims)) for tensor in tensors)
    return max(operations / rate, moved / gpu.bandwidth)


def _role(kernel: KernelFact, inputs: Sequence[PlanTensor], outputs: Sequence[PlanTensor]) -> KernelRole:
    if is_fused_attention(kernel):
        return "attention"
    if kernel.kind in _CONVOLUTIONS:
        return "convolution"
    if kernel.kind in COMPUTE_KINDS:
        weighted = any(tensor.constant and len(tensor.dims) > 1 and prod(tensor.dims) > 1 for tensor in inputs)
        return "product" if weighted else "attention"
    if kernel.kind in _COPIES:
        return "copy"
    if quantizes_only(kernel):
        return "quantize"
    if inputs and all(tensor.constant for tensor in inputs):
        codes = [BYTES[tensor.dtype] for tensor in inputs if tensor.dtype in _NARROW_WEIGHTS]
        if codes and all(BYTES.get(tensor.dtype, 0.0) > min(codes) for tensor in outputs):
            return "widen"
    return "pointwise"


def _operations(
    kernel: KernelFact, role: KernelRole, inputs: Sequence[PlanTensor], outputs: Sequence[PlanTensor]
) -> float:
    """Twice the multiply-accumulates of a matrix kernel."""
    if role not in {"convolution", "product", "attention"} or not outputs or not inputs:
        return 0.0
    out = max(outputs, key=lambda tensor: prod(tensor.dims))
    if role == "convolution":
        weight = _weight(inputs)
        return 2.0 * prod(out.dims) * prod(weight.dims) / weight.dims[0]
    if is_fused_attention(kernel):
        return _attention_operations(inputs)
    a = next(tensor for tensor in inputs if not tensor.constant)
    if role == "product":
        weight = _weight(inputs)
        return 2.0 * prod(a.dims) / weight.dims[-2] * prod(weight.dims)
    # queries and keys may be views of one tensor, which is listed once
    b = [tensor for tensor in inputs if len(tensor.dims) > 1 and prod(tensor.dims) > 1][:2][-1]
    # [B, M, K] x [B, K, N] -> [B, M, N]: the product of the three is (B M N K)^2 B
    batch = prod(out.dims[:-2])
    return 2.0 * sqrt(prod(a.dims) * prod(b.dims) * prod(out.dims) / batch)


def _weight(inputs: Sequence[PlanTensor]) -> PlanTensor:
    """The largest constant of two dimensions or more; scales and biases have as many but fewer elements."""
    constants = [tensor for tensor in inputs if tensor.constant and len(tensor.dims) > 1]
    return max(constants, key=weight_order)


def _attention_operations(inputs: Sequence[PlanTensor]) -> float:
    """Two products of ``[B, H, L, D]``: queries by keys, and probabilities by values."""
    query, key = [tensor for tensor in inputs if not tensor.constant][:2]
    return 4.0 * prod(query.dims) * prod(key.dims) / prod(query.dims[:-2]) / query.dims[-1]


def _distinct(tensors: Sequence[PlanTensor], frozen: set[str], *, fused: bool) -> tuple[PlanTensor, ...]:
    """Each tensor once; what a kernel has made of constants alone counts as one."""
    marked = [replace(tensor, constant=tensor.name in frozen) for tensor in tensors]
    # queries, keys and values may be parts of one tensor, and then have its name
    return tuple(marked) if fused else tuple({tensor.name: tensor for tensor in marked}.values())


def _bytes(tensor: PlanTensor) -> float:
    size = BYTES.get(tensor.dtype)
    if size is None:
        raise BuildError(f"the kernel plan has a tensor of an unknown type: {tensor}")
    if any(dim < 0 for dim in tensor.dims):
        raise BuildError(
            f"the kernel plan has a tensor whose size is known only at run time: {tensor}; "
            "build for one fixed shape to predict costs"
        )
    return prod(tensor.dims) * size
