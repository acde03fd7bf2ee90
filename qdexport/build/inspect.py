"""Facts about a kernel plan for people: counts, and the kernels of each torch module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdexport.build.plan import kernel_counts

if TYPE_CHECKING:
    from qdexport.core.results import Plan

__all__ = ["plan_facts"]


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Counts by type, and every kernel with its kind, types and modules."""
    counts = kernel_counts(plan)
    return {
        "kind": "kernel plan",
        "target": plan.target,
        "kernels_in_all": counts.kernels,
        "by_type": counts.by_type,
        "int8_compute": counts.int8_compute,
        "fp_compute": counts.fp_compute,
        "attention_kernels": counts.attention_kernels,
        "quantize_only": counts.quantize_only,
        "kernels": [
            {"kernel": item.name, "type": item.kind, "outputs": item.outputs, "modules": item.modules}
            for item in plan.kernels
            if item.kind not in {"signal", "wait"}
        ],
    }
