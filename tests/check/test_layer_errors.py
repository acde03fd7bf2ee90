"""The ranking of layers: against what quantizing each alone does, and a layer that was made worse on purpose."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from qdexport.check import layer_errors as module
from qdexport.check.exact import exact_call
from qdexport.check.layer_advice import LayerRanges, advice, ranges_of
from qdexport.check.layer_errors import layer_errors
from qdexport.check.measure import decibels
from qdexport.core.results import LayerErrors
from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.models.denoiser import call_denoiser
from qdexport.quant.attach import shared_copy
from qdexport.quant.modules import ActivationQuantizer
from tests.check.conftest import Compiled

WORST = "mid_block.resnets.0.conv2"


@pytest.fixture(scope="module")
def found(static: Compiled) -> LayerErrors:
    errors = layer_errors(static.model, static.calls)
    assert errors is not None
    return errors


def alone(case: Compiled, name: str) -> float:
    """The measured ratio of signal to error with one layer quantized."""
    floating = case.model.loaded.denoiser
    changed = shared_copy(floating)
    parent, _, leaf = name.rpartition(".")
    setattr(changed.get_submodule(parent), leaf, case.model.denoiser.get_submodule(name))
    signal = noise = 0.0
    with torch.no_grad():
        for call in case.calls:
            exact_call(case.model.denoiser, call.inputs)  # selects the row of the step tables
            before, after = (call_denoiser(denoiser, call.inputs).double() for denoiser in (floating, changed))
            signal, noise = signal + float(before.square().sum()), noise + float((after - before).square().sum())
    return decibels(signal, noise)


def test_every_quantized_layer_is_ranked(static: Compiled, found: LayerErrors) -> None:
    assert {item.name for item in found.layers} == {plan.name for plan in static.model.plans if plan.quantizes_weight}
    assert found.method == "first order"
    assert found.calls == 3
    values = [item.alone_db for item in found.layers]
    assert values == sorted(values)
    assert all(0 <= item.weight_share <= 1 for item in found.layers)


def test_the_error_alone_is_that_of_the_network_with_one_layer_quantized(static: Compiled, found: LayerErrors) -> None:
    """24 random numbers are behind an estimate (1.3 dB), and the layers' first order: 6 dB for each, 1.5 on average."""
    apart = [item.alone_db - alone(static, item.name) for item in found.layers[::8]]
    assert max(map(abs, apart)) < 6
    assert abs(sum(apart) / len(apart)) < 1.5


def test_the_shares_add_up_to_the_whole(static: Compiled, found: LayerErrors) -> None:
    assert found.explained == pytest.approx(sum(item.share or 0 for item in found.layers))
    assert found.explained == pytest.approx(1, abs=0.25)
    signal = noise = 0.0
    for call in static.calls:
        quantized = exact_call(static.model.denoiser, call.inputs).double()
        exact = exact_call(static.model.loaded.denoiser, call.inputs).double()
        signal, noise = signal + float(exact.square().sum()), noise + float((quantized - exact).square().sum())
    assert found.whole_db == pytest.approx(decibels(signal, noise), abs=1e-3)


def test_a_layer_made_worse_is_first(static: Compiled) -> None:
    layer = static.model.denoiser.get_submodule(WORST)
    before = layer.input_quantizer.scale.clone()
    try:
        layer.input_quantizer.scale.mul_(30)  # its input keeps three codes or so
        errors = layer_errors(static.model, static.calls)
    finally:
        layer.input_quantizer.scale.copy_(before)
    assert errors is not None
    assert errors.layers[0].name == WORST
    assert errors.layers[0].weight_share < 0.1
    assert errors.layers[0].share == max(item.share or 0 for item in errors.layers)


def test_rows_by_step_and_an_fp16_body(stepped: Compiled) -> None:
    errors = layer_errors(stepped.model, stepped.calls)
    assert errors is not None
    assert errors.explained == pytest.approx(1, abs=0.35)
    assert not any("per_step" in item.change for item in errors.layers)
    parts = {plan.name for plan in stepped.model.plans if plan.splits}
    assert parts <= {item.name for item in errors.layers}


def test_without_the_memory_for_a_backward_pass(static: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENOUGH", 0.0)
    errors = layer_errors(static.model, static.calls[:1])
    assert errors is not None
    assert errors.method == "local"
    assert errors.explained is None
    assert all(item.share is None and item.alone_db == item.own_db for item in errors.layers)


def test_the_same_seed_gives_the_same_numbers(static: Compiled) -> None:
    first, second, other = (layer_errors(static.model, static.calls[:1], seed) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_nothing_quantized_nothing_ranked(static: Compiled) -> None:
    bare = [dataclasses.replace(plan, weight=None, activation=None) for plan in static.model.plans]
    assert layer_errors(dataclasses.replace(static.model, plans=tuple(bare)), static.calls) is None


def plan_of(weight: int, activation: int, **changes: object) -> LayerPlan:
    specs = {"weight": QuantSpec(bits=weight), "activation": QuantSpec(bits=activation)}
    return LayerPlan(**{"name": "a", "kind": "linear", **specs, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "ranges", "weight_share", "change"),
    [
        (plan_of(8, 8), LayerRanges(now=1, per_step=0.1, per_channel=0.1), 0.0, "activation_rows: per_step"),
        (plan_of(8, 8), LayerRanges(now=1, per_step=0.9, per_channel=0.1), 0.0, "channel_scale"),
        (plan_of(8, 8), LayerRanges(now=1, per_step=0.9, per_channel=0.9), 0.0, "floating point"),
        (plan_of(8, 4), LayerRanges(now=1, per_step=0.9, per_channel=0.9), 0.0, "activation.bits"),
        (plan_of(4, 8), LayerRanges(now=1, per_step=0.0, per_channel=0.0), 0.9, "weight.bits"),
        (plan_of(4, 8), LayerRanges(weight_now=1, weight_fitted=0.2), 0.9, "weight.observer.kind: mse"),
        (plan_of(4, 4), LayerRanges(now=1, per_step=1, per_channel=1), 0.5, "weight.bits"),
        (plan_of(8, 8, channel_scale=True), LayerRanges(now=1, per_step=0.9, per_channel=0.0), 0.0, "floating point"),
        (plan_of(8, 8), LayerRanges(now=1, per_step=0.1, per_half=0.1, splits=(2, 2)), 0.0, "split_shortcuts: true"),
    ],
)
def test_the_first_change_that_halves_the_error(
    plan: LayerPlan, ranges: LayerRanges, weight_share: float, change: str
) -> None:
    assert advice(plan, ranges, weight_share, rows=1)[0] == change


def test_a_table_of_rows_is_not_asked_for_twice() -> None:
    ranges = LayerRanges(now=1, per_step=0.0, per_channel=0.9)
    assert advice(plan_of(8, 8), ranges, 0.0, rows=25)[0] == "floating point"


def test_ranges_are_measured() -> None:
    """One channel ten times as large as the others, and a scale that was made for values ten times as large again."""
    x = torch.linspace(-1, 1, 64)[:, None] * torch.tensor([1.0, 1.0, 1.0, 10.0])
    quantizer = ActivationQuantizer(QuantSpec(bits=8), torch.tensor([100 / 127]), torch.zeros(1))
    ranges = LayerRanges(splits=(3, 1))
    ranges.add_input(x, quantizer, 1)
    assert ranges.channels == pytest.approx(10)
    assert ranges.lows == ranges.highs == 10
    # a scale ten times as fine: squared error down to a hundredth, less where values are few steps wide
    assert ranges.per_step < 0.03 * ranges.now
    assert ranges.per_channel < ranges.per_half * 1.01 < ranges.per_step
    assert math.isfinite(ranges.now)


def test_a_weight_is_known_before_any_call(static: Compiled) -> None:
    ranges = ranges_of(static.model.denoiser.get_submodule(WORST))
    assert 0 < ranges.weight_fitted <= ranges.weight_now
