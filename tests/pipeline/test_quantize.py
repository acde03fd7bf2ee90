"""From a model and a recipe to a fake-quant model: every mechanism alone, and all at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdexport.cli.compile import compile_
from qdexport.core.bit_plan import FLOAT_BITS, BitPlan, LayerBits
from qdexport.core.progress import SilentProgress
from qdexport.core.recipe import Recipe, load_recipe
from qdexport.core.target import TARGETS
from qdexport.errors import ModelError, RecipeError
from qdexport.models.configs import CONFIGS
from qdexport.models.denoiser import call_denoiser, example_inputs, io_spec
from qdexport.models.load import LoadedModel, load_model, loaded_from_denoiser
from qdexport.models.sampling import SampleRequest, record_calls
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.quantize import QuantizeSettings, make_quantized, observe_model, plan_model
from qdexport.quant import bos as bos_module
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.calibrate import calibration_prompts
from qdexport.quant.modules import ChannelScale, FirstToken, QuantSplitConv2d
from qdexport.quant.ranges import given_ranges
from qdexport.quant.softmax import SoftmaxQuantizer

MECHANISMS: dict[str, dict[str, Any]] = {
    "splits": {"split_shortcuts": True},
    "bos": {"bos": "constant"},
    "scales": {"channel_scale": {"kinds": ["conv", "linear"], "groups": 2}},
    "softmax": {"softmax": {"bits": 4}},
    "groups": {"activation_rows": {"method": "uniform", "count": 2}},
}
KINDS = {"splits": QuantSplitConv2d, "bos": FirstToken, "scales": ChannelScale, "softmax": SoftmaxQuantizer}


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder)


def _recipe(*chosen: str, **changes: Any) -> Recipe:
    rule = {
        "match": "*",
        "weight": {"bits": 8, "granularity": "per_channel"},
        "activation": {"bits": 8, "symmetric": False, "signed": False},
    }
    calibration = {"prompts": 1, "batch_size": 1, "steps": 3, "guidance_scale": 3.0, "seed": 7}
    data: dict[str, Any] = {"name": "test", "rules": [rule], "calibration": calibration}
    for name in chosen:
        data |= MECHANISMS[name]
    return Recipe.model_validate({**data, **changes})


def _make(model: LoadedModel, recipe: Recipe, **settings: Any) -> QuantizedModel:
    every = QuantizeSettings(target=TARGETS["tensorrt-rtx"], **settings)
    return make_quantized(model, recipe, every, SilentProgress())


@torch.no_grad()
def _predict(model: QuantizedModel) -> Tensor:
    inputs = example_inputs(io_spec(model.loaded, model.recipe.shapes, "fp32"), seed=0)
    timestep = model.timesteps[1] if model.timesteps else 500
    return call_denoiser(model.denoiser, {**inputs, "timestep": torch.tensor([timestep])})


def _kinds(model: QuantizedModel) -> set[str]:
    return {name for name, kind in KINDS.items() if any(isinstance(item, kind) for item in model.denoiser.modules())}


@torch.no_grad()
def _error(model: QuantizedModel) -> float:
    """Of the outputs over the calls of a sampler run: 8 bits fit what was calibrated, not any noise."""
    prompts = tuple(calibration_prompts(model.loaded, model.recipe.calibration))
    request = SampleRequest(prompts=prompts, seed=7, steps=3, guidance_scale=3.0, batch_size=1)
    error = energy = 0.0
    for call in record_calls(model.loaded, request):
        exact = call_denoiser(model.loaded.denoiser, call.inputs)
        error += float((call_denoiser(model.denoiser, call.inputs) - exact).square().sum())
        energy += float(exact.square().sum())
    return float((error / energy) ** 0.5)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_each_mechanism_alone(tiny: LoadedModel, name: str) -> None:
    model = _make(tiny, _recipe(name))
    assert _kinds(model) == {name} & set(KINDS)
    assert model.rows == (3 if name == "groups" else 1)
    assert (model.bos is not None) == (name == "bos")
    # measured: 0.04 (0.11 with 4 bits behind softmax); something put in the wrong place costs all of the output
    assert 0 < _error(model) < (0.2 if name == "softmax" else 0.08)
    if name == "groups":
        scale = model.denoiser.get_submodule("conv_out").input_quantizer.scale
        assert scale[0] == scale[1]
        assert scale[1] != scale[2]


def test_all_mechanisms_at_once(tiny: LoadedModel) -> None:
    model = _make(tiny, _recipe(*MECHANISMS))
    assert _kinds(model) == set(KINDS)
    assert model.rows == 3
    assert model.bos is not None
    assert 0 < _error(model) < 0.2
    # the floating-point model is as it was
    assert not any(isinstance(item, ChannelScale | SoftmaxQuantizer) for item in tiny.denoiser.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.denoiser.modules())


def test_bos_auto_is_constant_where_the_model_has_it(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe(bos="auto")
    model = _make(tiny, recipe)
    assert _kinds(model) == {"bos"}
    assert model.recipe.bos == "auto"
    named = _make(tiny, recipe, ranges=given_ranges(plan_model(tiny, recipe), -4, 5))
    assert model.bos is not None
    assert named.bos is not None
    assert torch.equal(named.bos.embedding, model.bos.embedding)
    monkeypatch.setattr(bos_module, "_text", lambda _loaded: torch.eye(4, 64).reshape(4, 1, 64))
    assert _kinds(_make(tiny, recipe)) == set()


@pytest.mark.parametrize("config", [name for name in CONFIGS if name.startswith("tiny_")])
def test_the_default_recipe_fits_every_denoiser(config: str) -> None:
    default = next(option.default for option in compile_.params if option.name == "recipe")
    bare = loaded_from_denoiser(random_unet(config), name=config)
    plans = plan_model(bare, load_recipe(str(default)))
    assert not any(plan.bos for plan in plans)
    assert all(plan.quantized or plan.folded for plan in plans)


def test_none_of_them(tiny: LoadedModel) -> None:
    model = _make(tiny, _recipe())
    assert _kinds(model) == set()
    assert model.rows == 1


def test_ranges_follow_the_channel_scales(tiny: LoadedModel) -> None:
    recipe = _recipe("scales", channel_scale={"match": "conv_in", "choose_ratio": False, "groups": 1})
    plans = plan_model(tiny, recipe)
    settings = QuantizeSettings(target=TARGETS["tensorrt-rtx"])
    observations, ratios = observe_model(tiny, plans, recipe, settings, SilentProgress())
    plain = _recipe()
    without, none = observe_model(tiny, plan_model(tiny, plain), plain, settings, SilentProgress())
    assert none == {}
    assert set(ratios) == {"conv_in"}
    after, before = (observer.inputs["conv_in"].high for observer in (observations, without))
    assert after < before  # of x / r, not of x
    assert after >= before / ratios["conv_in"].max() * (1 - 1e-6)  # two roundings of FP32
    # what is not scaled is not changed
    assert torch.equal(observations.inputs["conv_out"].high, without.inputs["conv_out"].high)


def test_clustered_groups_keep_their_budget(tiny: LoadedModel) -> None:
    every = _make(tiny, _recipe(activation_rows={"method": "clustered", "budget": 0.0}))
    one = _make(tiny, _recipe(activation_rows={"method": "clustered", "budget": 1e6}))
    assert every.rows == 3
    assert one.rows == 1  # equal rows are one static row
    static = _make(tiny, _recipe())
    assert torch.equal(_predict(one), _predict(static))
    assert torch.equal(_predict(every), _predict(_make(tiny, _recipe(activation_rows="per_step"))))


def test_an_interrupted_run_goes_on_to_the_same_bits(tiny: LoadedModel, tmp_path: Path) -> None:
    recipe = _recipe("scales", "softmax")
    whole = _predict(_make(tiny, recipe))
    first = _predict(_make(tiny, recipe, folder=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= {
        "calibration.safetensors",
        "calibration-scaled.safetensors",
    }
    assert torch.equal(first, whole)
    assert torch.equal(_predict(_make(tiny, recipe, folder=tmp_path)), whole)


def test_given_ranges_need_no_sampling(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe("splits")
    ranges = given_ranges(plan_model(tiny, recipe), -4, 5)
    monkeypatch.setattr("qdexport.pipeline.quantize.observe", lambda *_, **__: pytest.fail("sampled"))
    model = _make(tiny, recipe, ranges=ranges)
    assert torch.equal(model.denoiser.get_submodule("conv_in").input_quantizer.scale, torch.tensor([9 / 255]))
    bare = loaded_from_denoiser(random_unet("tiny_sd"), name="bare")
    assert _make(bare, recipe, ranges=given_ranges(plan_model(bare, recipe), -4, 5)).rows == 1


def test_given_ranges_without_what_a_mechanism_needs(tiny: LoadedModel) -> None:
    plain = given_ranges(plan_model(tiny, _recipe()), -4, 5)
    bare = loaded_from_denoiser(random_unet("tiny_sd"), name="bare")
    with pytest.raises(ModelError, match="bare came without a text encoder"):
        _make(bare, _recipe("bos"), ranges=given_ranges(plan_model(bare, _recipe("bos")), -4, 5))
    with pytest.raises(ModelError, match="no channel ratios for 'conv_in'"):
        _make(tiny, _recipe("scales"), ranges=plain)


def test_bos_needs_a_pipeline() -> None:
    bare = loaded_from_denoiser(random_unet("tiny_sd"), name="bare")
    with pytest.raises(ModelError, match="bare"):
        _make(bare, _recipe("bos"))


def _bit_plan(tiny: LoadedModel, path: Path, **widths: LayerBits) -> str:
    layers = {
        plan.name: LayerBits(weight=8, activation=8) for plan in plan_model(tiny, _recipe()) if plan.quantized
    } | widths
    BitPlan(model="tiny", recipe="test", average_weight_bits=8, average_activation_bits=8, layers=layers).save(path)
    return str(path)


def test_a_file_of_widths_is_followed(tiny: LoadedModel, tmp_path: Path) -> None:
    narrow = LayerBits(weight=3, activation=5, why="by hand")
    floating = LayerBits(weight=FLOAT_BITS, activation=FLOAT_BITS)
    path = _bit_plan(tiny, tmp_path / "bits.yaml", conv_in=narrow, conv_out=floating)
    model = _make(tiny, _recipe("scales", "splits", bit_plan=path))
    conv_in = model.denoiser.get_submodule("conv_in")
    assert (conv_in.weight_quantizer.spec.bits, conv_in.input_quantizer.spec.bits) == (3, 5)
    assert type(model.denoiser.get_submodule("conv_out")) is torch.nn.Conv2d
    other = model.denoiser.get_submodule("mid_block.resnets.0.conv1")
    assert (other.weight_quantizer.spec.bits, other.input_quantizer.spec.bits) == (8, 8)
    plan = next(plan for plan in model.plans if plan.name == "conv_in")
    assert plan.why == "by hand"
    assert plan.channel_scale
    with pytest.raises(RecipeError, match="the model has no layer 'conv_up'"):
        _make(tiny, _recipe(bit_plan=_bit_plan(tiny, tmp_path / "wrong.yaml", conv_up=narrow)))


def test_a_file_of_widths_goes_before_an_allocation(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdexport.pipeline.quantize._allocate", lambda *_, **__: pytest.fail("allocated"))
    path = _bit_plan(tiny, tmp_path / "bits.yaml")
    recipe = _recipe(bit_plan=path, bit_allocation={"weight_target": 4.0})
    assert all(plan.weight.bits == 8 for plan in _make(tiny, recipe).plans if plan.weight is not None)


def test_observations_serve_the_allocated_widths(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Allocation changes widths after calibration; ranges come from the same statistics."""
    wide = _make(tiny, _recipe())

    def allocate(_loaded: Any, plans: Any, *_: Any) -> Any:
        return [
            replace(plan, activation=plan.activation.model_copy(update={"bits": 4})) if plan.quantized else plan
            for plan in plans
        ]

    monkeypatch.setattr("qdexport.pipeline.quantize._allocate", allocate)
    narrow = _make(tiny, _recipe(bit_allocation={"weight_target": 8.0}))
    eight, four = (model.denoiser.get_submodule("conv_in").input_quantizer.scale.double() for model in (wide, narrow))
    # one range, 255 or 15 steps of it; each scale is rounded once to FP32
    torch.testing.assert_close(four * 15, eight * 255, rtol=2.0**-22, atol=0)
