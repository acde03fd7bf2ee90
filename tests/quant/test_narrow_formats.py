"""FP8, NVFP4 and weight-only layers in PyTorch: parameters, plans, gradients, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qdexport.core.bit_plan import BitPlan, LayerBits, apply_bit_plan
from qdexport.core.recipe import Recipe
from qdexport.core.spec import Granularity, ObserverSpec, QuantSpec
from qdexport.errors import RecipeError
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.quant.affine import parameters_from_range, weight_scale_like
from qdexport.quant.attach import quantize_model, weight_scale
from qdexport.quant.calibrate import calibrate
from qdexport.quant.checkpoint import QUANTIZATION_FILE, load_quantized, save_quantized
from qdexport.quant.inspect import checkpoint_facts
from qdexport.quant.modules import WeightQuantizer
from qdexport.quant.ops import fake_quantize
from qdexport.quant.packing import weight_codes
from qdexport.quant.plan import average_weight_bits, macs_share, plan_layers
from qdexport.quant.ranges import given_ranges

FP8 = QuantSpec(format="fp8", bits=8)
MSE = ObserverSpec(kind="mse", exponent=2.0)


def four_bits(**changes):
    return QuantSpec(bits=4, granularity="per_block", block_size=32, **changes)


def test_scales_of_formats():
    low, high = torch.tensor([-3.0]), torch.tensor([7.0])
    assert parameters_from_range(low, high, FP8)[0] == torch.tensor(7 / 448)
    assert parameters_from_range(low, high, QuantSpec(format="nvfp4", bits=4))[0] == torch.tensor(7 / (6 * 448))


@pytest.mark.parametrize("observer", [ObserverSpec(), MSE], ids=["minmax", "mse"])
def test_scales_of_blocks(observer):
    """FP16 numbers, one per 32 inputs; those of min-max are the nearest to it."""
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    spec = four_bits(observer=observer)
    scale = weight_scale(weight, spec)
    assert scale.shape == (1, 6, 3)
    assert torch.equal(scale, scale.half().float())
    if observer.kind == "minmax":
        blocks = weight.reshape(6, 3, 32).abs().amax(dim=2) / 7
        assert torch.equal(scale[0], blocks.half().float())


def error(weight, spec):
    quantizer = WeightQuantizer(spec, weight_scale(weight, spec))
    return float((quantizer(weight) - weight).square().sum())


def test_blocks_err_less_than_channels_and_least_squares_less_than_extremes():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 256)
    channels = error(weight, QuantSpec(bits=4, granularity="per_channel"))
    extremes, squares = error(weight, four_bits()), error(weight, four_bits(observer=MSE))
    assert squares < extremes < channels / 2


def test_codes_of_blocks_are_those_of_their_scales():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).half()
    quantizer = WeightQuantizer(four_bits(), weight_scale(weight, four_bits()))
    codes = weight_codes(weight, quantizer)
    assert codes.min() == -7
    assert codes.max() == 7
    wide = weight_scale_like(quantizer.scale, weight)
    assert torch.equal(quantizer(weight), (torch.from_numpy(codes).float() * wide).half())


@pytest.mark.parametrize("form", ["fp8", "int"])
def test_gradients_are_straight_through(form):
    """Of x where it is not clipped; of the scale by finite differences of the quantizer with fixed codes (LSQ)."""
    x = torch.tensor([[0.3, -2.2, 900.0, 5.1], [1.4, 0.0, -700.0, -3.3]], requires_grad=True)
    scale = torch.tensor([[[0.5, 1.5], [0.25, 1.0]]] if form == "int" else [1.0], requires_grad=True)
    bounds = (-448, 448) if form == "fp8" else (-8, 7)
    y = fake_quantize(x, scale, torch.zeros_like(scale), None, *bounds, 1 if form == "int" else -1, None, form)
    y.sum().backward()
    expected = (y.detach() - x.detach()).abs() < 1 if form == "int" else x.detach().abs() <= 448
    assert torch.equal(x.grad, expected.float())
    wide = weight_scale_like(scale, x).detach() if form == "int" else scale.detach()
    code, ratio = y.detach() / wide, x.detach() / wide
    local = torch.where(expected, code - ratio, code)
    summed = local.reshape(1, 2, 2, 2).sum(dim=3) if form == "int" else local.sum()[None]
    assert torch.allclose(scale.grad, summed, atol=1e-6)


RULES = [
    {"match": "*", "kinds": ["conv"], "weight": {"bits": 8, "granularity": "per_channel"}},
    {"match": "*", "kinds": ["linear"], "weight": {"bits": 4, "granularity": "per_block", "block_size": 64}},
]


@pytest.fixture(scope="module")
def tiny():
    return loaded_from_denoiser(random_unet("tiny_sd", seed=0), name="tiny")


def recipe_of(rules, **changes):
    return Recipe.model_validate({"name": "r", "rules": rules, "time_embedding": "all", **changes})


def test_blocks_that_do_not_divide_a_width_shrink_and_say_so(tiny):
    plans = {plan.name: plan for plan in plan_layers(tiny.denoiser, recipe_of(RULES))}
    narrow = plans["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]  # 16 inputs
    wide = plans["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"]  # 64 inputs
    assert narrow.weight.block_size == 16
    assert narrow.why == "rule 2 (match: *); blocks of 16, since 64 does not divide 16"
    assert (wide.weight.block_size, wide.why) == (64, "rule 2 (match: *)")
    assert wide.weight_only
    assert not wide.quantized
    assert macs_share(plans.values()) == 0
    assert 4 < average_weight_bits(tiny.denoiser, list(plans.values())) < 8


def test_a_width_without_any_block_has_one_scale_per_channel():
    denoiser = random_unet("tiny_sd", seed=0, cross_attention_dim=24)
    plans = {plan.name: plan for plan in plan_layers(denoiser, recipe_of(RULES))}
    text = plans["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert text.weight.granularity is Granularity.PER_CHANNEL
    assert text.weight.block_size is None
    assert text.why.endswith("one scale per output channel, since 64 does not divide 24")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"weight": RULES[1]["weight"]}, "layer conv_in is a convolution, and no target takes its weight in blocks"),
        (
            {"weight": {"format": "nvfp4"}, "activation": {"format": "nvfp4"}},
            "layer conv_in is a convolution, and NVFP4 is a format of linear layers",
        ),
    ],
)
def test_convolutions_have_no_blocks(tiny, rule, message):
    with pytest.raises(RecipeError, match=message):
        plan_layers(tiny.denoiser, recipe_of([{"match": "*", **rule}]))


def test_nvfp4_needs_widths_of_whole_blocks():
    denoiser = random_unet("tiny_sd", seed=0, cross_attention_dim=24)
    rule = {"match": "*.to_k", "weight": {"format": "nvfp4"}, "activation": {"format": "nvfp4"}}
    with pytest.raises(RecipeError, match=r"attn2\.to_k is 24 inputs wide, no multiple of 16"):
        plan_layers(denoiser, recipe_of([rule]))


def test_mechanisms_of_activations_leave_weight_only_layers_out(tiny):
    changes = {"channel_scale": {"match": "*"}, "split_shortcuts": True, "bos": "constant"}
    with pytest.raises(RecipeError, match=r"channel_scale\.match '\*' matches no quantized layer"):
        plan_layers(tiny.denoiser, recipe_of(RULES, **changes))
    int8 = {"match": "conv_out", "weight": {"bits": 8}, "activation": {"bits": 8}}
    plans = plan_layers(tiny.denoiser, recipe_of([*RULES, int8], **changes))
    assert [plan.name for plan in plans if plan.channel_scale or plan.quantized] == ["conv_out"]
    assert not any(plan.bos or plan.splits for plan in plans)


def test_a_bit_plan_leaves_weight_only_layers_out(tiny):
    plans = plan_layers(tiny.denoiser, recipe_of(RULES))
    bits = {"conv_in": LayerBits(weight=4, activation=8)}
    plan = BitPlan(model="m", recipe="r", average_weight_bits=4, average_activation_bits=8, layers=bits)
    with pytest.raises(RecipeError, match="bit plan: the rule of conv_in quantizes its weight alone"):
        apply_bit_plan(plans, plan)
    both = {"weight": {"bits": 8}, "activation": {"bits": 8}}
    plans = plan_layers(tiny.denoiser, recipe_of([*RULES, {"match": "conv_in", **both}]))
    changed = apply_bit_plan(plans, plan)
    assert [new.name for old, new in zip(plans, changed, strict=True) if new != old] == ["conv_in"]


def test_weights_alone_need_no_calibration(tiny):
    """Nothing is sampled: a denoiser without a pipeline cannot be."""
    recipe = recipe_of(RULES, activation_rows={"method": "clustered"})
    plans = plan_layers(tiny.denoiser, recipe)
    assert not given_ranges(plans, -1, 1).low
    if tiny.scheduler is not None:
        assert not calibrate(tiny, plans, recipe).low


def test_a_checkpoint_holds_four_bits_and_half_scales(tiny, tmp_path):
    recipe = recipe_of(RULES, body="fp16")
    plans = plan_layers(tiny.denoiser, recipe)
    model = quantize_model(tiny, plans, recipe, given_ranges(plans, -1, 1))
    save_quantized(model, tmp_path / "out")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    with safe_open(tmp_path / "out" / QUANTIZATION_FILE, framework="np") as file:
        assert f"{name}.input_scale" not in file.keys()  # noqa: SIM118  no mapping
        assert file.get_tensor(f"{name}.weight_codes").shape == (16 * 64 // 2,)
        scale = file.get_tensor(f"{name}.weight_scale")
    assert scale.dtype == np.float16
    again = load_quantized(tmp_path / "out", loaded=tiny)
    layer, other = model.denoiser.get_submodule(name), again.denoiser.get_submodule(name)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(layer(x), other(x))
    facts = {row["name"]: row for row in checkpoint_facts(tmp_path / "out")["layers"]}
    assert facts[name]["weight"] == "4 bits per_block of 64, weight-only"
    assert facts[name]["activation"] == "fp16"
