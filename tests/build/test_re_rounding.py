"""A permission never makes a worse plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.core.recipe import load_recipe
from qdexport.core.target import target_named
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.attach import quantize_model
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

pytestmark = [pytest.mark.slow, pytest.mark.rtx]

TARGET = target_named("tensorrt-rtx")


def kernels(name: str, changes: dict[str, Any], folder: Path, *, allowed: bool) -> int:
    sizes = {"shapes.height": 8, "shapes.width": 8, "shapes.batch": 2}
    recipe = load_recipe("w8a8", {"body": "fp16", "allow_re_rounding": allowed, **sizes})
    loaded = loaded_from_denoiser(random_unet(name, torch.float16, **changes), name=name)
    plans = plan_model(loaded, recipe)
    high = {key: torch.full((1,), 4.0) for plan in plans for key in activation_keys(plan)}
    ranges = ActivationRanges(low={key: -end for key, end in high.items()}, high=high, timesteps=(981, 501, 1))
    lowered = lower_to_onnx(quantize_model(loaded, plans, recipe, ranges), folder / "onnx", TARGET)
    options = BuildOptions(target=TARGET, io=lowered.facts.io, compute_capabilities=("8.9",))
    facts, _ = build_engine(lowered.file.path, folder / "engine", options)
    return facts.kernels


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # biases in queries, keys and values; an attention in front of an upsampling; layers that read time and class
        ("tiny_class", {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}),
        ("tiny_dit", {"num_layers": 1}),
    ],
)
def test_re_rounding_makes_no_kernel_more(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    exact = kernels(name, changes, tmp_path / "exact", allowed=False)
    assert kernels(name, changes, tmp_path / "shared", allowed=True) <= exact
