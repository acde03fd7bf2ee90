"""Facts read from a checkpoint without its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qdexport.core.recipe import Recipe
from qdexport.errors import ModelError
from qdexport.models.load import LoadedModel
from qdexport.quant.attach import quantize_model, scales_by_layer
from qdexport.quant.checkpoint import save_quantized
from qdexport.quant.inspect import checkpoint_facts
from qdexport.quant.plan import plan_layers
from qdexport.quant.ranges import given_ranges


def test_facts(tiny: LoadedModel, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rules = [*make_recipe({"bits": 6, "symmetric": False}).model_dump()["rules"], {"match": "conv_out"}]
    recipe = make_recipe(rules=rules)
    plans = plan_layers(tiny.denoiser, recipe)
    model = quantize_model(tiny, plans, recipe, given_ranges(plans, -4, 5))
    save_quantized(model, tmp_path / "checkpoint", with_weights=False)
    facts = checkpoint_facts(tmp_path / "checkpoint")
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert list(layers) == [plan.name for plan in plans]
    scale = scales_by_layer(model)["conv_in"][0]
    assert layers["conv_in"]["activation"] == "6 bits asymmetric"
    assert layers["conv_in"]["weight"] == "8 bits per_channel"
    assert layers["conv_in"]["scales"] == f"1 x {scale:.3g}..{scale:.3g}"
    assert layers["conv_out"]["weight"] == facts["body"] == "fp32"
    assert layers["time_embedding.linear_1"]["weight"] == "folded"
    assert facts["timesteps"] == len(model.timesteps)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no quantized checkpoint"):
        checkpoint_facts(tmp_path)
