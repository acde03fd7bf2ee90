"""Quantizers put into a denoiser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qdexport.core.recipe import Recipe
from qdexport.core.spec import LayerPlan
from qdexport.errors import ModelError
from qdexport.models.denoiser import call_denoiser, example_inputs, io_spec, shortcut_splits
from qdexport.models.load import LoadedModel, loaded_from_denoiser
from qdexport.models.synthetic import empty_unet, random_unet
from qdexport.quant.affine import parameters_from_range
from qdexport.quant.attach import (
    QuantizedModel,
    attach,
    quantize_model,
    scales_by_layer,
    shared_copy,
    weight_scale,
)
from qdexport.quant.modules import QuantConv2d, QuantLinear, QuantSplitConv2d
from qdexport.quant.plan import activation_keys, merge_weight_scales, plan_layers
from qdexport.quant.ranges import ActivationRanges, given_ranges
from qdexport.quant.softmax import SoftmaxParameters

MakeRecipe = Callable[..., Recipe]


def _quantize(model: LoadedModel, recipe: Recipe, *, split: bool = False) -> QuantizedModel:
    splits = shortcut_splits(model.denoiser) if split else None
    plans = plan_layers(model.denoiser, recipe, splits=splits)
    return quantize_model(model, plans, recipe, given_ranges(plans, -4, 5))


def _inputs(model: LoadedModel, recipe: Recipe, body: str = "fp32") -> dict[str, Tensor]:
    return example_inputs(io_spec(model, recipe.shapes, body), seed=0)


@torch.no_grad()
def _predict(denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return call_denoiser(denoiser, inputs)


def test_quantized_model_leaves_the_original_alone_and_shares_its_weights(
    tiny: LoadedModel, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe()
    inputs = _inputs(tiny, recipe)
    before = _predict(tiny.denoiser, inputs)
    model = _quantize(tiny, recipe)
    assert torch.equal(_predict(tiny.denoiser, inputs), before)
    assert not torch.equal(_predict(model.denoiser, inputs), before)
    assert type(tiny.denoiser.get_submodule("conv_in")) is nn.Conv2d
    own = dict(model.denoiser.named_parameters())
    assert all(own[name] is parameter for name, parameter in tiny.denoiser.named_parameters())
    assert model.body == "fp32"
    assert model.rows == 1
    assert len(model.timesteps) == 3  # of the recipe's schedule: the given ranges name none
    assert list(model.denoiser.state_dict()) == list(tiny.denoiser.state_dict())


def test_planned_layers_are_replaced_and_no_others(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    model = _quantize(tiny, make_recipe(), split=True)
    for plan in model.plans:
        layer = model.denoiser.get_submodule(plan.name)
        quantized = isinstance(layer, QuantConv2d | QuantLinear | QuantSplitConv2d)
        assert quantized == plan.quantized
        assert isinstance(layer, QuantSplitConv2d) == bool(plan.splits)
    assert any(plan.splits for plan in model.plans)
    assert any(plan.folded for plan in model.plans)


def test_layers_of_one_group_share_one_quantizer(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    model = _quantize(tiny, make_recipe())
    by_group: dict[str, set[int]] = {}
    for plan in model.plans:
        if plan.quantized:
            quantizer = model.denoiser.get_submodule(plan.name).input_quantizer
            by_group.setdefault(plan.group, set()).add(id(quantizer))
    assert all(len(quantizers) == 1 for quantizers in by_group.values())
    assert len(set.union(*by_group.values())) == len(by_group)


def test_one_weight_scale_for_layers_that_read_one_tensor(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    model = _quantize(tiny, make_recipe(allow_re_rounding=True))
    exact = _quantize(tiny, make_recipe())
    scales: dict[tuple[str, str], list[Tensor]] = {}  # by block and input: text is read by several blocks
    for plan in model.plans:
        if not plan.quantized:
            continue
        own = exact.denoiser.get_submodule(plan.name).weight_quantizer.scale
        scale = model.denoiser.get_submodule(plan.name).weight_quantizer.scale
        if plan.kind == "conv":
            assert torch.equal(scale, own)  # only linear layers are products
        else:
            assert plan.weight is not None
            assert plan.weight.granularity == "per_group"
            assert scale.shape == (1,)
            assert scale >= own.max(), "no weight is clipped"
            scales.setdefault((plan.name.rpartition(".")[0], plan.group), []).append(scale)
    assert any(len(group) > 2 for group in scales.values())
    assert all(len({float(scale) for scale in group}) == 1 for group in scales.values())


def _shared(denoiser: nn.Module, recipe: Recipe) -> set[str]:
    """Layers that get a weight scale of their block."""
    plans = plan_layers(denoiser, recipe)
    merged = merge_weight_scales(denoiser, plans)
    return {plan.name for plan, old in zip(merged, plans, strict=True) if plan != old}


def test_products_with_a_bias_keep_their_scales(make_recipe: MakeRecipe) -> None:
    """Measured with TensorRT-RTX 1.7: else a class-conditional UNet2DModel has 117 kernels instead of 101."""
    found = _shared(empty_unet("tiny_class"), make_recipe())
    # what one layer alone reads shares nothing with others; in front of the upsampling it would cost a kernel
    attentions = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0")
    assert found == {f"{name}.to_out.0" for name in attentions}


@pytest.mark.parametrize("name", ["tiny_dit", "tiny_pixart", "tiny_sd3", "tiny_flux"])
def test_transformers_share_where_one_layer_reads(make_recipe: MakeRecipe, name: str) -> None:
    denoiser = empty_unet(name)
    readers = Counter(plan.group for plan in plan_layers(denoiser, make_recipe()) if plan.quantized)
    groups = {plan.name: plan.group for plan in plan_layers(denoiser, make_recipe())}
    found = _shared(denoiser, make_recipe())
    assert found
    assert {readers[groups[layer]] for layer in found} == {1}


def test_a_bias_keeps_the_scales_of_its_whole_product(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    projections = {f"{attention}.to_{part}" for part in "qkv"}
    assert projections <= _shared(tiny.denoiser, make_recipe())
    biased = shared_copy(tiny.denoiser)
    biased.get_submodule(f"{attention}.to_k").bias = nn.Parameter(torch.zeros(32))  # type: ignore[assignment]
    assert _shared(biased, make_recipe()) == _shared(tiny.denoiser, make_recipe()) - projections


def test_narrow_weights_keep_their_scales(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    plans = _quantize(tiny, make_recipe(weight={"bits": 4}, allow_re_rounding=True)).plans
    assert {plan.weight.granularity for plan in plans if plan.weight and plan.quantized} == {"per_channel"}


def _stepped(plans: list[LayerPlan], timesteps: tuple[int, ...]) -> ActivationRanges:
    """Rows that differ, but for one input."""
    grow = torch.arange(1, len(timesteps) + 1, dtype=torch.float64)
    keys = [key for plan in plans for key in activation_keys(plan)]
    high = {key: grow if key != "encoder_hidden_states" else torch.full_like(grow, 3.0) for key in keys}
    return ActivationRanges(low={key: -end for key, end in high.items()}, high=high, timesteps=timesteps)


def test_step_tables(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(activation_rows="per_step")
    plans = plan_layers(tiny.denoiser, recipe)
    model = quantize_model(tiny, plans, recipe, _stepped(plans, (901, 401)))
    assert model.rows == 2
    assert model.timesteps == (901, 401)
    scales = scales_by_layer(model)
    expected, _ = parameters_from_range(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), plans[0].activation)
    assert scales["conv_in"] == expected.tolist()
    text = next(plan.name for plan in plans if plan.group == "encoder_hidden_states")
    assert len(scales[text]) == 1  # equal rows are one static row
    inputs = _inputs(tiny, recipe)
    outputs = {}
    for timestep, row in ((901, 0), (700, 0), (600, 1), (401, 1)):
        outputs[timestep] = _predict(model.denoiser, {**inputs, "timestep": torch.tensor([timestep])})
        assert model.context.row is not None
        assert model.context.row.tolist() == [row]
    # the time embedding differs too, so compare with static models of either row
    for row, timestep in ((0, 700), (1, 600)):
        static = ActivationRanges(
            low={key: end[row : row + 1] for key, end in _stepped(plans, (901, 401)).low.items()},
            high={key: end[row : row + 1] for key, end in _stepped(plans, (901, 401)).high.items()},
        )
        alone = quantize_model(tiny, plans, recipe, static)
        expected = _predict(alone.denoiser, {**inputs, "timestep": torch.tensor([timestep])})
        assert torch.equal(outputs[timestep], expected)


def test_guidance_as_one_call_or_two(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(activation_rows="per_step")
    plans = plan_layers(tiny.denoiser, recipe)
    model = quantize_model(tiny, plans, recipe, _stepped(plans, (901, 401)))
    inputs = {**_inputs(tiny, recipe), "timestep": torch.tensor([401])}
    both = _predict(model.denoiser, inputs)
    for half in range(2):
        part = {name: x if name == "timestep" else x[half : half + 1] for name, x in inputs.items()}
        # kernels of another batch size may sum in another order, and a code at a tie may flip
        torch.testing.assert_close(_predict(model.denoiser, part), both[half : half + 1], atol=5e-2, rtol=0)


def test_scales_of_split_layers(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    model = _quantize(tiny, make_recipe(), split=True)
    split = next(plan for plan in model.plans if plan.splits)
    scales = scales_by_layer(model)
    assert split.name not in scales
    assert set(split.parts) <= set(scales)
    assert set(scales) == {part for plan in model.plans if plan.quantized for part in plan.parts}


@pytest.mark.parametrize(
    ("weights", "body", "expected"),
    [
        (torch.float32, "auto", "fp32"),
        (torch.float16, "auto", "fp16"),
        (torch.bfloat16, "auto", "fp16"),
        (torch.float32, "fp16", "fp16"),
        (torch.float16, "fp32", "fp32"),
    ],
)
def test_body(make_recipe: MakeRecipe, weights: torch.dtype, body: str, expected: str) -> None:
    loaded = loaded_from_denoiser(random_unet("tiny_sd", weights), name="tiny")
    model = _quantize(loaded, make_recipe(body=body))
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[expected]
    assert model.body == expected
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {dtype}
    assert {parameter.dtype for parameter in loaded.denoiser.parameters()} == {weights}
    assert model.denoiser.get_submodule("conv_in").weight_quantizer.scale.dtype == torch.float32
    assert model.timesteps == ()
    inputs = _inputs(loaded, model.recipe, expected)
    assert _predict(model.denoiser, inputs).dtype == dtype


def test_weight_that_does_not_fit_the_body(make_recipe: MakeRecipe) -> None:
    denoiser = random_unet("tiny_sd", torch.bfloat16)
    with torch.no_grad():
        denoiser.get_parameter("conv_out.bias")[1] = 1e5
    loaded = loaded_from_denoiser(denoiser, name="tiny")
    with pytest.raises(ModelError, match=r"conv_out\.bias holds 99840, beyond the largest float16 number 65504"):
        _quantize(loaded, make_recipe())


def test_weight_that_is_not_finite(make_recipe: MakeRecipe) -> None:
    denoiser = random_unet("tiny_sd")
    with torch.no_grad():
        denoiser.get_parameter("conv_out.weight")[1] = torch.nan
    with pytest.raises(ModelError, match="the weight of conv_out cannot be quantized"):
        _quantize(loaded_from_denoiser(denoiser, name="tiny"), make_recipe())


def test_missing_range(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    plans = plan_layers(tiny.denoiser, recipe)
    ranges = given_ranges(plans[:-1], -1, 1)
    with pytest.raises(ModelError, match="no range for 'conv_out', the input of layer conv_out"):
        quantize_model(tiny, plans, recipe, ranges)


def _one_layer(layer: nn.Module, name: str, make_recipe: MakeRecipe) -> None:
    rule = make_recipe().rules[0]
    root = nn.ModuleDict({"layer": layer})
    plan = LayerPlan(name=name, kind="linear", weight=rule.weight, activation=rule.activation, group="g")
    attach(root, [plan], given_ranges([plan], -1, 1), 1000)


def test_attach_changes_in_place(make_recipe: MakeRecipe) -> None:
    rule = make_recipe().rules[0]
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    plan = LayerPlan(name="0.0", kind="linear", weight=rule.weight, activation=rule.activation, group="g")
    attach(root, [plan], given_ranges([plan], -1, 1), 1000)
    assert isinstance(root[0][0], QuantLinear)
    with pytest.raises(ModelError, match=r"layer 0\.0 is quantized already"):
        attach(root, [plan], given_ranges([plan], -1, 1), 1000)


def test_layers_that_cannot_be_replaced(make_recipe: MakeRecipe) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    with pytest.raises(ModelError, match="layer layer is a Own with a forward of its own"):
        _one_layer(Own(2, 2), "layer", make_recipe)
    with pytest.raises(ModelError, match="layer layer is a ReLU, not a Conv2d or Linear"):
        _one_layer(nn.ReLU(), "layer", make_recipe)
    with pytest.raises(ModelError, match="has no layer other"):
        _one_layer(nn.Linear(2, 2), "other", make_recipe)


def test_a_linear_cannot_be_split(make_recipe: MakeRecipe) -> None:
    rule = make_recipe().rules[0]
    plan = LayerPlan(name="layer", kind="linear", weight=rule.weight, activation=rule.activation, group="g")
    plan = replace(plan, splits=(1, 1))
    with pytest.raises(ModelError, match="only a convolution can be split"):
        attach(nn.ModuleDict({"layer": nn.Linear(2, 2)}), [plan], given_ranges([plan], -1, 1), 1000)


def test_dead_weight_channel(make_recipe: MakeRecipe) -> None:
    """One near-zero channel must not set the scale of the others (methods.md 2.4)."""
    weight = torch.randn(4, 3, 3, 3)
    spec = make_recipe().rules[0].weight
    assert spec is not None
    alive = weight_scale(weight, spec)
    weight[1] = 0
    scale = weight_scale(weight, spec)
    assert torch.equal(scale[:, [0, 2, 3]], alive[:, [0, 2, 3]])
    assert scale[0, 1] > 0


def test_shared_copy_keeps_ties() -> None:
    root = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    root["b"].weight = root["a"].weight
    root["a"].register_buffer("steps", torch.tensor([1, 2]))
    same = shared_copy(root)
    assert same["a"].weight is root["a"].weight
    half = shared_copy(root, torch.float16)
    assert half["a"].weight is half["b"].weight
    assert half["a"].weight.dtype == torch.float16
    assert half["a"].steps.dtype == torch.int64


# channel scales, groups of steps, softmax


def _scaled(make_recipe: MakeRecipe, model: LoadedModel, ratio: Tensor) -> tuple[list[LayerPlan], ActivationRanges]:
    plans = plan_layers(model.denoiser, make_recipe(channel_scale={"match": "conv_in"}))
    plain = given_ranges([replace(plan, channel_scale=False) for plan in plans], -4, 5)
    return plans, replace(plain, channel_ratios={"conv_in": ratio})


def test_ratios_reach_layer_and_weight_scale(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    ratio = torch.tensor([1.0, 2.0, 4.0, 8.0])
    plans, ranges = _scaled(make_recipe, tiny, ratio)
    model = quantize_model(tiny, plans, make_recipe(), ranges)
    layer = model.denoiser.get_submodule("conv_in")
    assert isinstance(layer, QuantConv2d)
    assert layer.channel_scale is not None
    assert torch.equal(layer.channel_scale.ratio.flatten(), ratio)
    plain = tiny.denoiser.get_submodule("conv_in")
    assert layer.weight is plain.weight  # r is not folded into what is shared
    spec = layer.weight_quantizer.spec
    assert torch.equal(layer.weight_quantizer.scale, weight_scale(plain.weight * ratio.reshape(1, -1, 1, 1), spec))
    others = [item for item in model.denoiser.modules() if isinstance(item, QuantConv2d) and item is not layer]
    assert all(item.channel_scale is None for item in others)


def test_ratios_of_another_width_are_refused(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    plans, ranges = _scaled(make_recipe, tiny, torch.ones(3))
    with pytest.raises(ModelError, match=r"ratios of conv_in have shape \[3\], and layer conv_in has 4 input channels"):
        quantize_model(tiny, plans, make_recipe(), ranges)


def test_rows_of_grouped_steps_are_equal_in_the_tables(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(activation_rows={"method": "uniform", "count": 2})
    plans = plan_layers(tiny.denoiser, recipe)
    ranges = _stepped(plans, (901, 601, 1))
    high = {key: end[[0, 0, 2]] for key, end in ranges.high.items()}
    model = quantize_model(tiny, plans, recipe, replace(ranges, low={k: -e for k, e in high.items()}, high=high))
    scale = model.denoiser.get_submodule("conv_in").input_quantizer.scale
    assert scale.shape == (3,)
    assert scale[0] == scale[1] != scale[2]
    assert model.rows == 3


def test_softmax_tables_select_rows_too(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    """A model whose only table is behind a softmax looks its rows up as well."""
    recipe = make_recipe()
    plans = plan_layers(tiny.denoiser, recipe)
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    parameters = SoftmaxParameters(bits=2, scale=torch.tensor([0.3, 1.0]), mode=torch.tensor([0.0, 1.0]))
    ranges = replace(given_ranges(plans, -4, 5), softmax={block: parameters}, timesteps=(901, 1))
    model = quantize_model(tiny, plans, recipe, ranges)
    assert model.rows == 2
    inputs = _inputs(tiny, recipe)
    for timestep, row in ((999, 0), (2, 1)):
        _predict(model.denoiser, {**inputs, "timestep": torch.tensor([timestep])})
        assert model.context.row is not None
        assert model.context.row.tolist() == [row]
