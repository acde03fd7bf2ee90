"""qdexport's share of the comparison with ModelOpt: the same UNet, the same calibration calls.

``python -m benchmarks.qdexport_child SPEC.json``
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import answer
from benchmarks.costs import Cost, measured, resident_mb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from qdexport.core.spec import LayerPlan
    from qdexport.quant.observers import RangeObserver
    from qdexport.quant.ranges import ActivationRanges

__all__ = ["main"]

_STEPS = 25  # rows of the time table


def main(spec_path: str) -> None:
    """Quantizes one of the comparison's UNets and exports it.

    The specification holds ``model``, ``recipe``, ``body`` (fp32 or fp16), ``threads`` and ``folder``.
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    costs: dict[str, Cost] = {}
    with measured(costs, "import"):
        import torch

        import qdexport.pipeline.lower  # noqa: F401  timed here, used below
        from benchmarks import peer_model
    from qdexport.core.recipe import load_recipe
    from qdexport.core.target import target_named
    from qdexport.models.load import loaded_from_denoiser
    from qdexport.pipeline.lower import lower_to_onnx
    from qdexport.quant.attach import quantize_model
    from qdexport.quant.plan import plan_layers

    torch.set_num_threads(spec["threads"])
    recipe, target = load_recipe(spec["recipe"], {"body": spec["body"]}), target_named("tensorrt-rtx")
    base = resident_mb()
    with measured(costs, "load"):
        loaded = loaded_from_denoiser(peer_model.unet(spec["model"]), name=spec["model"])
    weight_bytes = sum(item.numel() * item.element_size() for item in loaded.denoiser.parameters())
    with measured(costs, "quantize"):
        plans = plan_layers(loaded.denoiser, recipe)
        model = quantize_model(loaded, plans, recipe, _observed(loaded.denoiser, plans, spec["model"]))
    with measured(costs, "export"):
        lowered = lower_to_onnx(model, Path(spec["folder"]), target)
    answer(
        spec,
        {
            "costs": {name: asdict(cost) for name, cost in costs.items()},
            "base_mb": base,
            "weight_bytes": weight_bytes,
            "layers_quantized": [plan.name for plan in plans if plan.quantizes_weight],
            "layers_excluded": [plan.name for plan in plans if not plan.quantizes_weight],
            "weights": {plan.name: loaded.denoiser.get_parameter(f"{plan.name}.weight").numel() for plan in plans},
            "io": lowered.facts.io.model_dump(mode="json"),
            "versions": {},
        },
    )


def _observed(denoiser: nn.Module, plans: Sequence[LayerPlan], name: str) -> ActivationRanges:
    """Static ranges from the calibration calls of the comparison."""
    import torch

    from benchmarks import peer_model
    from benchmarks.synthetic import ddim_timesteps
    from qdexport.quant.observers import make_observer
    from qdexport.quant.ranges import ActivationRanges

    first = {plan.group: plan for plan in reversed(plans) if plan.activation is not None and plan.quantized}
    specs = {key: plan.activation for key, plan in first.items() if plan.activation is not None}
    observers = {key: make_observer(spec.observer, 1) for key, spec in specs.items()}
    handles = [
        denoiser.get_submodule(plan.name).register_forward_pre_hook(partial(_observe, observers[key]))
        for key, plan in first.items()
    ]
    with torch.inference_mode():
        for step in peer_model.TIMESTEPS:
            denoiser(**peer_model.inputs(name, torch.float32), timestep=torch.tensor([step]), return_dict=False)
    for handle in handles:
        handle.remove()
    ends = {key: observers[key].ranges(spec) for key, spec in specs.items()}
    return ActivationRanges(
        low={key: low for key, (low, _) in ends.items()},
        high={key: high for key, (_, high) in ends.items()},
        timesteps=ddim_timesteps(_STEPS),
    )


def _observe(observer: RangeObserver, module: nn.Module, args: tuple[Any, ...]) -> None:
    del module
    observer.update(0, args[0])


if __name__ == "__main__":
    main(sys.argv[1])
