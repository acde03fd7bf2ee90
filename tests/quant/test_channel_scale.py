"""Channel scales: the joint ratio, its statistics, the identity they rest on, and where they are cut off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdexport.core.recipe import Recipe
from qdexport.core.spec import QuantSpec
from qdexport.models.load import LoadedModel, load_model
from qdexport.models.sampling import SampleRequest, sample
from qdexport.quant.affine import parameters_from_range
from qdexport.quant.attach import weight_scale
from qdexport.quant.calibrate import calibration_prompts, observe
from qdexport.quant.channel_scale import (
    ChannelObserver,
    cut_off,
    cut_offs,
    grouped_peaks,
    joint_ratio,
)
from qdexport.quant.modules import (
    ActivationQuantizer,
    ChannelScale,
    QuantConv2d,
    QuantLinear,
    QuantSplitConv2d,
    WeightQuantizer,
)
from qdexport.quant.observers import NonFiniteError
from qdexport.quant.plan import plan_layers
from qdexport.quant.reparameterize import choose_ratios

MakeRecipe = Callable[..., Recipe]
A4 = QuantSpec(bits=4)
W4 = QuantSpec(bits=4, granularity="per_channel")


def test_joint_ratio_is_the_formula() -> None:
    peaks = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 9 + 0.1
    expected = []
    for j in range(7):
        above = below = 0.0
        for t in range(5):
            p = float(peaks[t, j])
            above += p * (p / min(float(other) for other in peaks[t]))
            below += p
        expected.append(above / below)
    # float64 on both sides, rounded once to FP32: half a unit in the last place is 2^-24
    torch.testing.assert_close(joint_ratio(peaks).double(), torch.tensor(expected).double(), rtol=2.0**-23, atol=0)


def test_a_dead_channel_leaves_the_others_sane() -> None:
    alive = torch.tensor([[1.0, 2.0, 8.0], [2.0, 2.0, 4.0]])
    dead = torch.cat([alive, torch.zeros(2, 1)], dim=1)
    ratio = joint_ratio(dead)
    assert bool(torch.isfinite(ratio).all())
    assert ratio[3] == 1  # nothing is divided where nothing is
    # the floor of 1e-5 of the largest peak is the smallest of all channels then: ratios keep their proportions
    per_step = alive / (alive.amax(dim=1, keepdim=True) * 1e-5)
    expected = (alive * per_step).sum(dim=0) / alive.sum(dim=0)
    torch.testing.assert_close(ratio[:3], expected, rtol=1e-5, atol=0)  # some FP32 operations of 6e-8 each
    assert bool((cut_off(ratio, 10.0, power_of_two=False) <= 10).all())


def test_a_step_without_any_values_moves_nothing() -> None:
    peaks = torch.tensor([[1.0, 3.0], [2.0, 10.0]])
    silent = torch.cat([torch.zeros(1, 2), peaks])
    found = joint_ratio(silent)
    # the silent step counts like one whose channels all reach 1: r_t = 1
    expected = [(1 * 1 + 1 * 1 + 2 * 1) / (1 + 1 + 2), (1 * 1 + 3 * 3 + 10 * 5) / (1 + 3 + 10)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2.0**-23, atol=0)
    assert torch.equal(joint_ratio(torch.zeros(3, 4)), torch.ones(4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_peaks_must_be_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        joint_ratio(torch.tensor([[1.0, bad]]))


def test_cut_off() -> None:
    ratio = torch.tensor([0.5, 1.0, 1.4, 1.5, 6.0, 40.0])
    assert cut_off(ratio, 10.0, power_of_two=False).tolist() == [1, 1, torch.tensor(1.4).item(), 1.5, 6, 10]
    # to the nearest power in the logarithm: the bound between 1 and 2 is 1.414, between 4 and 8 it is 5.66
    assert cut_off(ratio, 10.0, power_of_two=True).tolist() == [1, 1, 1, 2, 8, 8]


def test_tried_cut_offs_run_from_no_change_to_the_limit() -> None:
    assert cut_offs(1.0)[0] == 1
    tried = cut_offs(10.0)
    assert tried[0] == 1
    assert tried[-1] == 10
    assert tried == sorted(tried)


def test_groups_of_peaks() -> None:
    peaks = torch.tensor([[1.0, 5.0], [4.0, 2.0], [3.0, 3.0]])
    assert grouped_peaks(peaks, (0, 0, 1)).tolist() == [[4, 5], [3, 3]]


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 3, 4, 4)), (-1, (2, 5, 3))])
def test_observer_has_the_ends_of_every_channel(axis: int, shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(shape) * (1 + row) for row in (0, 1, 1)]
    observer = ChannelObserver(2, axis)
    for row, x in zip((0, 1, 1), tensors, strict=True):
        observer.update(row, x)
    for row, seen in ((0, tensors[:1]), (1, tensors[1:])):
        for channel in range(3):
            values = torch.cat([x.select(axis, channel).flatten() for x in seen])
            assert observer.channel_low[row, channel] == values.min()
            assert observer.channel_high[row, channel] == values.max()
            assert observer.peaks[row, channel] == values.abs().max()
        assert observer.low[row] == min(float(x.min()) for x in seen)


def test_observer_goes_on_from_its_state() -> None:
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    whole, saved, resumed = (ChannelObserver(1, 1) for _ in range(3))
    for x in (first, second):
        whole.update(0, x)
    saved.update(0, first)
    resumed.load_state({name: tensor.clone() for name, tensor in saved.state().items()})
    resumed.update(0, second)
    for name, tensor in whole.state().items():
        assert torch.equal(resumed.state()[name], tensor), name
    with pytest.raises(ValueError, match=r"channel_low is \[1, 3\], expected 2 rows"):
        ChannelObserver(2, 1).load_state(saved.state())


def _transparent(spec: QuantSpec = A4) -> ActivationQuantizer:
    """A quantizer that a test replaces by the identity."""
    return ActivationQuantizer(spec, torch.ones(1), torch.zeros(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "split", "linear"])
def test_scaling_changes_nothing_in_floating_point(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``op(W r, x / r) = op(W, x)``: methods.md's first equivalence test."""
    monkeypatch.setattr(ActivationQuantizer, "forward", lambda _self, x: x)
    monkeypatch.setattr(WeightQuantizer, "forward", lambda _self, weight, dtype=None: weight.to(dtype))
    ratio = torch.rand(6) * 20 + 0.3
    weights = WeightQuantizer(W4, torch.ones(1, 5))
    layer: nn.Module
    if kind == "linear":
        plain, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
        layer = QuantLinear.wrap(plain, _transparent(), weights, ChannelScale(ratio, "linear"))
    else:
        plain, x = nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 4, 4)
        scale = ChannelScale(ratio, "conv")
        layer = QuantConv2d.wrap(plain, _transparent(), weights, scale)
        if kind == "split":
            layer = QuantSplitConv2d.wrap(plain, (4, 2), [_transparent()] * 2, [weights] * 2, scale)
    # up to 54 products of magnitude below 2, each side with at most 60 roundings of 2^-24 relative to their sum of
    # magnitudes (about 20): 1e-4 is far above, and far below what a scale in the wrong place does
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-4)
    assert not torch.equal(layer.operands(x)[0], (x if kind != "split" else x[:, :4]))


@torch.no_grad()
def test_powers_of_two_change_no_bit() -> None:
    ratio, x, weight = torch.tensor([1.0, 2.0, 8.0]), torch.randn(4, 3), torch.randn(5, 3)
    scale = ChannelScale(ratio, "linear")
    assert torch.equal(scale(x) * ratio, x)
    assert torch.equal(scale.weight(weight) / ratio, weight)


def test_quotient_keeps_the_type() -> None:
    scale = ChannelScale(torch.tensor([3.0, 7.0]), "linear")
    assert scale(torch.ones(1, 2, dtype=torch.float16)).dtype == torch.float16
    assert scale.weight(torch.ones(1, 2, dtype=torch.float16)).dtype == torch.float32


# the choice of a cut-off, on a pipeline one of whose layers reads a wild channel

LAYER = "down_blocks.0.resnets.0.conv1"
CALIBRATION = {"prompts": 2, "batch_size": 2, "steps": 2, "guidance_scale": 3.0, "seed": 7}


def _recipe(make_recipe: MakeRecipe, **settings: object) -> Recipe:
    rule = {"match": LAYER, "weight": {"bits": 4, "granularity": "per_channel"}, "activation": {"bits": 4}}
    return make_recipe(rules=[rule], calibration=CALIBRATION, channel_scale={"match": LAYER, "groups": 2, **settings})


def _ratio(model: LoadedModel, recipe: Recipe) -> Tensor:
    plans = plan_layers(model.denoiser, recipe)
    observations = observe(model, plans, recipe)
    (ratio,) = choose_ratios(model, plans, recipe, observations).values()
    return ratio


@torch.no_grad()
def _error(model: LoadedModel, recipe: Recipe, ratio: Tensor) -> float:
    """Of the layer's output over a run of the sampler, both operands quantized with one min-max range."""
    layer = model.denoiser.get_submodule(LAYER)
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
    prompts = tuple(calibration_prompts(model, recipe.calibration))
    sample(model, SampleRequest(prompts=prompts, seed=7, steps=2, guidance_scale=3.0, batch_size=2))
    handle.remove()
    scale = ChannelScale(ratio, "conv")
    x = torch.cat(inputs)
    low, high = torch.aminmax(scale(x))
    step, zero = parameters_from_range(low[None], high[None], A4)
    weights = WeightQuantizer(W4, weight_scale(scale.weight(layer.weight), W4))
    quantized = QuantConv2d.wrap(layer, ActivationQuantizer(A4, step, zero), weights, scale)
    return float((quantized(x) - layer(x)).square().sum())


@torch.no_grad()
def _make_wild(model: LoadedModel) -> None:
    norm = model.denoiser.get_submodule(LAYER.replace("conv1", "norm1"))
    norm.weight[3] *= 20
    model.denoiser.get_submodule(LAYER).weight[:, 3] /= 20


def test_a_wild_channel_is_scaled_and_the_error_falls(tiny_folder: Path, make_recipe: MakeRecipe) -> None:
    model, recipe = load_model(tiny_folder), _recipe(make_recipe)
    _make_wild(model)
    ratio = _ratio(model, recipe)
    assert ratio.argmax() == 3
    assert ratio[3] > 1.5
    assert not any(module._forward_hooks for module in model.denoiser.modules())
    assert _error(model, recipe, ratio) < 0.7 * _error(model, recipe, torch.ones_like(ratio))


def test_without_a_choice_the_limit_is_the_recipes(tiny_folder: Path, make_recipe: MakeRecipe) -> None:
    model = load_model(tiny_folder)
    _make_wild(model)
    assert _ratio(model, _recipe(make_recipe, choose_ratio=False, max_ratio=3.0, power_of_two=False)).max() == 3
    powers = _ratio(model, _recipe(make_recipe, power_of_two=True))
    assert torch.equal(torch.log2(powers), torch.log2(powers).round())


def test_an_even_input_never_gets_worse(tiny_folder: Path, make_recipe: MakeRecipe) -> None:
    model, recipe = load_model(tiny_folder), _recipe(make_recipe)
    ratio = _ratio(model, recipe)
    # compared on the same run; the choice sees ranges of single calls, this test one range over all of them
    assert _error(model, recipe, ratio) <= 1.05 * _error(model, recipe, torch.ones_like(ratio))
