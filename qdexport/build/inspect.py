"""Facts about a kernel plan for people: counts, and the kernels of each torch module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdexport.build.plan import kernel_counts
from qdexport.build.plan_advice import plan_advice

if TYPE_CHECKING:
    from qdexport.build.plan_cost import PlanCost
    from qdexport.core.results import Plan

__all__ = ["cost_facts", "plan_facts"]

_MICRO, _MEGA, _GIGA = 1e6, 1e6, 1e9


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Counts by type, and every kernel with its kind, types and modules."""
    counts = kernel_counts(plan)
    return {
        "kind": "kernel plan",
        "target": plan.target,
        "kernels_in_all": counts.kernels,
        "by_type": counts.by_type,
        "by_profile": _by_profile(plan),
        "int8_compute": counts.int8_compute,
        "fp8_compute": counts.fp8_compute,
        "nvfp4_compute": counts.nvfp4_compute,
        "fp_compute": counts.fp_compute,
        "attention_kernels": counts.attention_kernels,
        "quantize_only": counts.quantize_only,
        "kernels": [
            {"kernel": item.name, "type": item.kind, "outputs": item.outputs, "modules": item.modules}
            for item in plan.kernels
            if item.kind not in {"signal", "wait"}
        ],
    }


def _by_profile(plan: Plan) -> dict[str, int]:
    """Kernels of every optimization profile, by its number."""
    numbers = sorted({kernel.profile for kernel in plan.kernels})
    parts = {
        number: plan.model_copy(update={"kernels": [item for item in plan.kernels if item.profile == number]})
        for number in numbers
    }
    return {str(number): kernel_counts(part).kernels for number, part in parts.items()}


def cost_facts(cost: PlanCost) -> dict[str, Any]:
    """What a plan must cost on a GPU: sums, advice, and every kernel, the slowest first."""
    return {
        "kind": "predicted cost",
        "gpu": cost.gpu.name,
        "meaning": "a bound from peak rates, not a measurement; launches and caches are left out",
        "kernels_in_all": len(cost.kernels),
        "microseconds": cost.seconds * _MICRO,
        "microseconds_by_role": {role: round(value * _MICRO, 1) for role, value in cost.seconds_by_role().items()},
        "microseconds_if_all_were_int8_and_fused": cost.ideal_seconds * _MICRO,
        "share_of_quantize_and_widen_kernels": cost.share(["quantize", "widen"]),
        "weight_megabytes": cost.weight_bytes / _MEGA,
        "activation_megabytes": cost.activation_bytes / _MEGA,
        "giga_operations": sum(kernel.operations for kernel in cost.kernels) / _GIGA,
        "advice": plan_advice(cost),
        "kernels": [
            {
                "kernel": kernel.name,
                "role": kernel.role,
                "type": kernel.dtype,
                "microseconds": kernel.seconds * _MICRO,
                "bound": "compute" if kernel.compute_seconds > kernel.memory_seconds else "memory",
                "should": kernel.ideal_seconds * _MICRO,
                "kilobytes": kernel.bytes / 1e3,
                "mega_operations": kernel.operations / 1e6,
                "modules": list(kernel.modules),
            }
            for kernel in sorted(cost.kernels, key=lambda kernel: -kernel.seconds)
        ],
    }
