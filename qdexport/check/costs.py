"""What the weighted layers store, move and must take at least, against the same layers in FP16: from their shapes.

Nobody builds the FP16 network for this, so that both sides come from the same rule, one kernel for each layer: it reads
its input and its weight and writes its output, and takes the longer of two times, its operations at the peak rate of
their type and its bytes at the peak bandwidth. A bound, not a measurement. What the compiled plan says, which has all
other kernels, too, stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qdexport.build.plan_cost import plan_cost
from qdexport.core.gpus import GPUS, Gpu
from qdexport.core.precision import BYTES
from qdexport.core.results import Cost, CostSide
from qdexport.errors import BuildError, RecipeError
from qdexport.quant.layer_groups import layer_shapes

if TYPE_CHECKING:
    from qdexport.core.cost_model import LayerShape
    from qdexport.core.results import Coverage, Plan
    from qdexport.quant.attach import QuantizedModel

__all__ = ["cost_of"]

_NARROW: Final = frozenset({"int4", "nvfp4", "int8", "fp8"})
_SCALE_BYTES: Final = 4  # one FP32 number for each output channel
_USUAL: Final = "rtx-4090"


def cost_of(
    model: QuantizedModel, coverage: Coverage, plan: Plan | None, capabilities: Sequence[str] = ()
) -> Cost | None:
    """Costs of one denoiser call at the recipe's usual shapes.

    Args:
        model: the fake-quant model; its plans know the sizes of the layers.
        coverage: the type that every layer is planned in.
        plan: the kernels of the engine, where there is one.
        capabilities: compute capabilities of the engine; the first that a card is known of, which multiplies in the
            recipe's types, is taken.

    Returns:
        None where the sizes of the layers are not known.
    """
    if any(item.quantized and not item.macs for item in model.plans):
        return None
    shapes = layer_shapes(model.loaded.denoiser, model.plans)
    parts = {item.name: item.parts[0] for item in model.plans}
    types = {name: coverage.planned[parts[name]] for name in shapes}
    stored = {name: item.planned for name, item in coverage.storage.items()}
    gpu = _card(capabilities, set(types.values()))
    body = BYTES[model.body]
    return Cost(
        gpu=gpu.name,
        fp16=_side(shapes, dict.fromkeys(shapes, "fp16"), {}, gpu, BYTES["fp16"]),
        quantized=_side(shapes, types, stored, gpu, body),
        plan=_planned(plan, gpu),
    )


def _card(capabilities: Sequence[str], types: set[str]) -> Gpu:
    known = [gpu for capability in capabilities for gpu in GPUS.values() if gpu.capability == capability]
    for gpu in [*known, GPUS[_USUAL], *GPUS.values()]:
        if ("fp8" not in types or gpu.fp8) and ("nvfp4" not in types or gpu.nvfp4):
            return gpu
    return GPUS[_USUAL]


def _side(
    shapes: Mapping[str, LayerShape], types: Mapping[str, str], stored: Mapping[str, str], gpu: Gpu, body: float
) -> CostSide:
    weight_bytes = moved_bytes = seconds = 0.0
    for name, shape in shapes.items():
        kind = types[name]
        weight = shape.weights * BYTES[stored.get(name, kind)]
        if stored.get(name, kind) in _NARROW:
            weight += shape.channels * _SCALE_BYTES
        read = BYTES["int8" if kind == "int4" else kind]  # 4-bit weights meet 8-bit codes
        moved = shape.inputs * read + weight + shape.outputs * body
        weight_bytes, moved_bytes = weight_bytes + weight, moved_bytes + moved
        seconds += max(2.0 * shape.macs / gpu.rate(kind), moved / gpu.bandwidth)
    return CostSide(
        weight_bytes=round(weight_bytes), moved_bytes=round(moved_bytes), microseconds=round(1e6 * seconds, 2)
    )


def _planned(plan: Plan | None, gpu: Gpu) -> CostSide | None:
    """None without a plan, and for one whose sizes are known at run time alone."""
    if plan is None:
        return None
    try:
        cost = plan_cost(plan, gpu)
    except (BuildError, RecipeError):
        return None
    return CostSide(
        weight_bytes=round(cost.weight_bytes),
        moved_bytes=round(cost.weight_bytes + cost.activation_bytes),
        microseconds=round(1e6 * cost.seconds, 2),
    )
